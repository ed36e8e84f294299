"""Runs an engine in this process: submit, switch, step until done."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inference_server.engine import loader
from inference_server.engine.core import Engine
from inference_server.models.locate import LocatedModel
from inference_server.protocol import CommandFailed, EngineConfig, FeaturesApplied, SamplingParams, Submit

DEVICE = loader.resolve_device(os.environ.get("INFERENCE_WORKBENCH_TEST_DEVICE", "cpu"))
"""Where the models of the engine's tests run."""
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def engine_for(model: Any, draft: Any = None, head: Any = None, **config: Any) -> Engine:
    """An engine around a model that is in memory, a draft model, and an EAGLE-style head."""
    loaded, drafting = (
        loader.inspect(each.to(DEVICE), LocatedModel("model", "memory", Path()), DEVICE, each.dtype, lambda *_: None)
        if each is not None
        else None
        for each in (model, draft)
    )
    assert loaded is not None
    return Engine(EngineConfig(**{"kv_bytes": 1 << 20, **config}), loaded, draft=drafting, head=head)


def switch(engine: Engine, values: dict[str, Any]) -> FeaturesApplied:
    """Throw switches, and wait where they do."""
    answers: Sequence[object] = engine.set_features(0, values)
    while not any(isinstance(each, FeaturesApplied | CommandFailed) for each in answers):
        time.sleep(0.01)
        answers = engine.take_news()
    (applied,) = [each for each in answers if isinstance(each, FeaturesApplied | CommandFailed)]
    assert isinstance(applied, FeaturesApplied), applied
    return applied


def submit(engine: Engine, handle: int, prompt: Sequence[int], samples: int = 1, **sampling: Any) -> None:
    handles = tuple(range(handle, handle + samples))
    overrides = sampling.pop("overrides", {})
    params = SamplingParams(**sampling)
    engine.submit(Submit(requests=handles, prompt=tuple(prompt), sampling=params, arrival_ns=0, overrides=overrides))


def run(
    engine: Engine, switches: Mapping[int, dict[str, Any]] | None = None, limit: int = 5000
) -> dict[int, list[int]]:
    """Step until every request has ended; return the output tokens by handle, as the reports gave them."""
    outputs: dict[int, list[int]] = {handle: [] for handle in engine.requests}
    for step in range(limit):
        if switches and step in switches:
            engine.set_features(0, switches[step])
        if not engine.has_work():
            engine.check_integrity()
            assert engine.cache.usage().used_blocks == 0
            return outputs
        report, _ = engine.step()
        assert report is not None, "there is work, but a step found none"
        for handle, index, token in zip(
            report.tokens.request, report.tokens.index, report.tokens.token_id, strict=True
        ):
            output = outputs.setdefault(handle, [])
            assert index == len(output), "tokens arrive in order, each once"
            output.append(token)
    raise AssertionError(f"not done after {limit} steps")


def generate(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy output of transformers itself, with its own attention and cache."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        ids = torch.tensor([list(prompt)], device=model.device)
        eos = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = None
        out = model.generate(ids, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(ids))
        model.generation_config.eos_token_id = eos
    finally:
        model.set_attn_implementation(implementation)
    return out[0, len(prompt) :].tolist()
