"""Fronts for tests: with the real engine and the tiny model, or with a scripted engine that misbehaves on demand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bpe_tokenizer import train_tokenizer
from running_front import RunningFront, running, scripted_command


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a byte-level BPE tokenizer and a chat template."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def scripted(tmp_path: Path, tokenizer_folder: Path) -> Iterator[Callable[..., RunningFront]]:
    """Starts fronts with a scripted engine: ``scripted("dies", after=3, engine_silence_s=1)``."""
    with contextlib.ExitStack() as stack:

        def start(behaviour: str = "good", *, options: tuple[str, ...] = (), **settings: object) -> RunningFront:
            engine_options = {
                name: settings.pop(name)
                for name in ("after", "step_s", "load_s", "clock_ahead_s", "once")
                if name in settings
            }
            command = scripted_command(tokenizer_folder, behaviour, **engine_options)
            environment = {"INFERENCE_WORKBENCH_ENGINE_COMMAND": command}
            environment |= {f"INFERENCE_WORKBENCH_{name.upper()}": str(value) for name, value in settings.items()}
            return stack.enter_context(running(tmp_path, environment, *options))

        yield start


@pytest.fixture(scope="session")
def front(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningFront]:
    """A front whose engine is the real one, with the tiny model."""
    with running(tmp_path_factory.mktemp("front"), {}, "--model", str(tiny_model), "--kv-memory", "64M") as started:
        started.wait_for_engine("ready", 120)
        yield started
