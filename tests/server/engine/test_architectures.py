"""Greedy tokens equal transformers' own in float32, for every architecture, under every combination of switches."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
from architectures import ARCHITECTURES, build
from serving import GREEDY, engine_for, generate, run, submit

from inference_server.models.errors import ModelError

REFUSED = {"bloom", "mpt", "falcon"}
SERVED = sorted(set(ARCHITECTURES) - REFUSED)
COMBINATIONS = [
    {
        "batching": batching,
        "kv_layout": layout,
        "prefix_cache_read": prefix,
        "prefix_cache_write": prefix,
        "chunked_prefill": chunked,
        "preemption": preemption,
        "max_num_batched_tokens": 16 if chunked else 64,
        "tight": tight,
    }
    for batching, layout, prefix, chunked, tight, preemption in product(
        ("continuous", "static", "single"), ("paged", "contiguous"), (True, False), (True, False), (True, False),
        ("recompute", "swap"),
    )
    if not (layout == "contiguous" and prefix)  # refused: a reservation in one piece shares nothing
    and not (preemption == "swap" and not tight)
]  # fmt: skip
BLOCK = 4


def prompts() -> list[list[int]]:
    random = Random(7)
    shared = [random.randrange(3, 256) for _ in range(13)]
    return [
        shared,
        shared[:9] + [random.randrange(3, 256) for _ in range(6)],
        [random.randrange(3, 256) for _ in range(27)],
        [random.randrange(3, 256)],
        [*shared, 5, 6, 7],
        [random.randrange(3, 256) for _ in range(8)],
    ]


@pytest.mark.parametrize("name", SERVED)
def test_tokens_equal_transformers_under_every_combination(name: str) -> None:
    model = build(name)
    count = 14
    expected = [generate(model, prompt, count) for prompt in prompts()]
    per_token = 4 * sum(heads * (k + v) for heads, k, v in engine_for(model).loaded.kv_shapes)
    # Tight: room for one and a half of the longest requests, so that somebody has to give way.
    roomy = engine_for(model, block_size=BLOCK, max_num_seqs=8)
    tight = engine_for(model, block_size=BLOCK, max_num_seqs=8, kv_bytes=per_token * BLOCK * 16)
    preempted = 0
    for combination in COMBINATIONS:
        features = dict(combination)
        engine = tight if features.pop("tight") else roomy
        engine.set_features(0, {"kv_layout": "paged", "prefix_cache_read": False})
        engine.set_features(0, features)
        for handle, prompt in enumerate(prompts()):
            submit(engine, handle, prompt, max_tokens=count, **GREEDY)
        requests = list(engine.requests.values())
        outputs = run(engine)
        assert [outputs[handle] for handle in range(len(expected))] == expected, f"{name} under {combination}"
        preempted += sum(request.num_preemptions for request in requests)
    assert preempted > 0, "the tight cache never forced anyone out: the test lost its point"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_model_that_bypasses_the_engine_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be|cannot:|differ"):
        engine_for(build(name))
