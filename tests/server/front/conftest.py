"""Fronts for tests: with the real engine and the tiny model, or with a scripted engine that misbehaves on demand."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running_front import SCRIPTED, RunningFront, running


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the tiny model without the model: byte-level BPE, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    import tiny_model

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_model.CORPUS, trainer)
    tokenizer.add_tokens(["<tool>", "naïve 東京"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "chat_template": tiny_model.CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def scripted(tmp_path: Path, tokenizer_folder: Path) -> Iterator[Callable[..., RunningFront]]:
    """Starts fronts with a scripted engine: ``scripted("dies", after=3, engine_silence_s=1)``."""
    with contextlib.ExitStack() as stack:

        def start(behaviour: str = "good", *, options: tuple[str, ...] = (), **settings: object) -> RunningFront:
            engine_options = ("after", "step_s", "load_s", "clock_ahead_s", "once")
            command = [sys.executable, str(SCRIPTED), "--tokenizer", str(tokenizer_folder), "--behaviour", behaviour]
            for name in engine_options:
                if name in settings:
                    command += [f"--{name.replace('_', '-')}", str(settings.pop(name))]
            environment = {"INFERENCE_WORKBENCH_ENGINE_COMMAND": json.dumps(command)}
            environment |= {f"INFERENCE_WORKBENCH_{name.upper()}": str(value) for name, value in settings.items()}
            return stack.enter_context(running(tmp_path, environment, *options))

        yield start


@pytest.fixture(scope="session")
def front(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningFront]:
    """A front whose engine is the real one, with the tiny model."""
    with running(tmp_path_factory.mktemp("front"), {}, "--model", str(tiny_model), "--kv-memory", "64M") as started:
        started.wait_for_engine("ready", 120)
        yield started
