"""Questions, passages and functions that built-in workloads draw their prompts from: the contents of ``texts.toml``."""

from __future__ import annotations

import tomllib
from importlib import resources

_content = tomllib.loads(resources.files(__package__).joinpath("texts.toml").read_text(encoding="utf-8"))

QUESTIONS: tuple[str, ...] = tuple(_content["questions"])
PASSAGES: tuple[str, ...] = tuple(_content["passages"])
FUNCTIONS: tuple[str, ...] = tuple(_content["functions"])
CODE_TASKS: tuple[str, ...] = tuple(_content["code_tasks"])
INSTRUCTIONS: str = _content["instructions"]
"""What every request with a shared prefix begins with."""
