"""Built-in texts, in the public domain: what quality is measured on, and what GPTQ calibrates with.

``evaluation.txt`` is the beginning of Lewis Carroll's *Alice's Adventures in Wonderland* (1865). ``calibration.txt``
has beginnings of Jane Austen's *Pride and Prejudice* (1813), Herman Melville's *Moby-Dick* (1851), Charles Dickens' *A
Tale of Two Cities* (1859), Arthur Conan Doyle's *A Scandal in Bohemia* (1891), and Abraham Lincoln's address at
Gettysburg (1863); the passages, questions and functions of the built-in workloads are added to it.
"""

from __future__ import annotations

from importlib import resources

from inference_server.workloads.texts import FUNCTIONS, PASSAGES, QUESTIONS


def evaluation() -> str:
    """Text that quality is measured on."""
    return _read("evaluation.txt")


def calibration() -> str:
    """Text that GPTQ sees: prose, questions and code, and nothing of what quality is measured on."""
    return "\n\n".join((_read("calibration.txt"), *PASSAGES, *QUESTIONS, *FUNCTIONS))


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
