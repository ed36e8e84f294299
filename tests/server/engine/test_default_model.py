"""The real default model says, greedily in float32, exactly what transformers says; the KV cache changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from inference_server.engine.core import Engine
from inference_server.protocol import EngineConfig, SamplingParams, Submit

pytestmark = pytest.mark.model

QUESTIONS = [
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "Explain recursion to a child.",
    "List three uses for a paperclip.",
    "What is the capital of Peru, and what is it known for?",
    "Translate 'good morning' into French and Spanish.",
    "Write a Python function that reverses a list.",
    "Summarize the plot of Romeo and Juliet.",
    "How do vaccines work?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23?",
    "Tell me a story about a lonely robot.",
    "What causes the seasons?",
    "Name five rivers in Africa.",
    "How does a bicycle stay upright?",
    "Write an email asking for a day off.",
    "What is the difference between a virus and a bacterium?",
    "Describe the taste of an orange.",
    "Who was Ada Lovelace?",
    "Give one argument for and one against homework.",
]
TOKENS = 64
PROMPTS = int(os.environ.get("PARITY_PROMPTS", "4"))
"""Without a KV cache and in transformers every token is slow: all 20 take about 5 minutes on two quiet cores."""


@pytest.fixture(scope="module")
def engine(default_model: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(default_model), dtype="float32"), lambda *_: None)


@pytest.fixture(scope="module")
def prompts(default_model: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
        for question in QUESTIONS[:PROMPTS]
    ]


@pytest.fixture(scope="module")
def expected(default_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """``transformers.generate``, one prompt at a time, greedy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def serve(engine: Engine, prompts: list[list[int]], switches: dict[int, bool]) -> list[list[int]]:
    """Serve all prompts at once; ``switches`` sets the KV cache before the given steps."""
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    for handle, prompt in enumerate(prompts):
        engine.submit(Submit(requests=(handle,), prompt=tuple(prompt), sampling=sampling, arrival_ns=0))
    requests = dict(engine.requests)
    step = 0
    while engine.has_work():
        if step in switches:
            engine.set_features(0, {"kv_cache": switches[step]})
        report, _ = engine.step()
        assert report is not None
        step += 1
    engine.check_integrity()
    assert engine.cache.usage().used_blocks == 0
    return [request.tokens[request.prompt_len :] for _, request in sorted(requests.items())]


# generate() forbids the end token here by min_new_tokens; the engine only ignores it. No answer ends within TOKENS
# tokens unless it says so, and then both sides differ in what comes after the end: compare up to there.
def until_end(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("KV cache on", {0: True}),
        ("switched off and on in the middle", {0: True, 24: False, 27: True, 50: False, 52: True}),
        ("KV cache off", {0: False}),
    ],
)
def test_greedy_output_equals_transformers(
    engine: Engine,
    prompts: list[list[int]],
    expected: list[list[int]],
    name: str,
    switches: dict[int, bool],
) -> None:
    got = serve(engine, prompts, switches)
    eos = engine.loaded.eos_token_ids[0]
    for prompt, ours, theirs in zip(QUESTIONS, got, expected, strict=False):
        ours_until = until_end(ours, eos)
        assert ours_until == until_end(theirs, eos)[: len(ours_until)], f"{name}: {prompt}"
        assert len(ours_until) >= min(len(until_end(theirs, eos)), 8)


def test_the_head_in_the_package_proposes_what_the_model_says(engine: Engine, prompts: list[list[int]]) -> None:
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0)

    def answers() -> tuple[list[list[int]], list[int]]:
        for handle, prompt in enumerate(prompts):
            engine.submit(Submit(requests=(handle,), prompt=tuple(prompt), sampling=sampling, arrival_ns=0))
        requests, accepted = list(engine.requests.values()), []
        while engine.has_work():
            report, _ = engine.step()
            assert report is not None
            accepted += report.accepted
        return [request.tokens for request in requests], accepted

    engine.set_features(0, {"kv_cache": True})  # another test may have left it off
    plain, _ = answers()
    engine.set_features(0, {"speculation": "eagle", "num_speculative_tokens": 4, "adaptive_speculation": False})
    said, accepted = answers()
    engine.set_features(0, {"speculation": "off"})
    assert said == plain
    # 1.6 on these four; a head of another model, or one that is read wrongly, says 1.1.
    assert 1 + sum(accepted) / len(accepted) > 1.4
