"""The default model is quantized already: 4 bits on its own grid lose nothing; all else is measured against it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")

from inference_server.engine.core import Engine
from inference_server.protocol import EngineConfig, SamplingParams, Submit

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def engine(default_model: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(default_model), dtype="float32", kv_bytes=1 << 27), lambda *_: None)


def answer(engine: Engine, prompt: list[int], count: int = 24) -> list[int]:
    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    engine.submit(Submit(requests=(0,), prompt=tuple(prompt), sampling=sampling, arrival_ns=0))
    tokens: list[int] = []
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        tokens += report.tokens.token_id
    return tokens


def switch(engine: Engine, **values: str) -> None:
    engine.set_features(0, values)
    engine.weights.wait()
    engine.take_news()
    assert all(getattr(engine.features, name) == value for name, value in values.items())


def test_the_grid_of_the_file_is_found_again_in_every_matrix(engine: Engine) -> None:
    """Q4_1 in the layers, Q8_0 in the output layer; so nothing that is said changes."""
    prompt = [1, 4093, 198, 2683, 359, 260, 6376, 4461, 47, 2, 198]
    expected = answer(engine, prompt)
    switch(engine, weight_precision="int4", int4_group="32", int4_grid="minimum")
    variant = engine.weights.in_use
    assert variant is not None
    pairs = list(variant.pairs())
    assert len(pairs) == 4 * 30 + 1
    for matrix, packed in pairs:
        assert torch.equal(packed.dequantize(), matrix.weight)
    assert answer(engine, prompt) == expected
    assert variant.nbytes < 0.19 * engine.loaded.weight_bytes


def test_in_bfloat16_the_grid_is_taken_from_the_file(engine: Engine, default_model: Path) -> None:
    """The master was rounded to bfloat16; what is packed was not."""
    config = EngineConfig(model=str(default_model), dtype="bfloat16", kv_bytes=1 << 26)
    half = Engine.load(config, lambda *_: None)
    switch(half, weight_precision="int4", int4_group="32", int4_grid="minimum")
    variant = half.weights.in_use
    assert variant is not None
    whole = {part.name: matrix.weight for matrix in engine.weights.matrices for part in matrix.parts}
    for matrix, packed in variant.pairs():
        assert torch.equal(packed.dequantize(), whole[matrix.parts[0].name])
        assert torch.equal(packed.dequantize().bfloat16(), matrix.weight)
