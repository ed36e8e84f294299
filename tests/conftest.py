"""Fixtures shared by all tests: a tiny random model for speed, the default model for truth."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    # Before anything imports Triton, whose own functions are made for the interpreter or not when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before torch loads: spinning OpenMP threads of several processes would starve each other on a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

for folder in ("", "server/engine"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Browser tests go last: their driver keeps an event loop running, in which no asynchronous test could run."""
    items.sort(key=lambda item: "browser" in Path(str(item.path)).parts)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a tokenizer and a chat template."""
    from tiny_model import build

    return build(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Folder of the real default model, fetched into the user's cache if it is not there yet."""
    from inference_server.models import default_model as default

    return default.fetch(lambda *_: None)
