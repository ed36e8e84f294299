"""Packed weights as a live switch: what a server says after a flip is what one started in that precision says."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from architectures import build
from serving import GREEDY, engine_for, run, submit

pytest.importorskip("numba")

from inference_server.engine.core import Engine
from inference_server.engine.quantization.packing import Scheme, quantize
from inference_server.engine.work import step_work
from inference_server.features import FeatureError
from inference_server.protocol import CommandFailed, FeaturesApplied, TaskProgress

PRECISIONS: list[dict[str, Any]] = [
    {"weight_precision": "master"},
    {"weight_precision": "int8"},
    {"weight_precision": "int4", "int4_group": "32", "int4_grid": "minimum"},
    {"weight_precision": "int4", "int4_group": "64", "int4_grid": "symmetric"},
]


def flip(engine: Engine, values: dict[str, Any]) -> list[Any]:
    """Switch, and wait until it is done."""
    answers: list[Any] = engine.set_features(1, values)
    engine.weights.wait()
    return answers or engine.take_news()


def prompts(count: int, seed: int = 3) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 256) for _ in range(draw.randrange(1, 40))] for _ in range(count)]


def answers_of(engine: Engine, first: int = 0, **switch: Any) -> dict[int, list[int]]:
    for index, prompt in enumerate(prompts(4)):
        submit(engine, first + index, prompt, max_tokens=8, **GREEDY)
    return {handle - first: tokens for handle, tokens in run(engine, **switch).items()}


def model() -> Any:
    torch.manual_seed(0)
    return build("llama").float()


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("values", PRECISIONS[1:], ids=lambda values: "-".join(values.values()))
def test_a_packed_model_gives_what_its_dequantized_weights_give(values: dict[str, Any], fast: bool) -> None:
    """The oracle is the same model in whole float32 weights that were rounded and expanded again."""
    engine = engine_for(model(), features={**values, "fast_path": fast})
    rounded = model()
    embedding = rounded.get_input_embeddings().weight.clone()
    body, head = Scheme(8), Scheme(8)
    if values["weight_precision"] == "int4":
        body, head = Scheme(4, int(values["int4_group"]), values["int4_grid"]), Scheme(8, 32)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear):
            scheme = head if name == "lm_head" else body
            module.weight.data = quantize(module.weight, scheme).dequantize()
    rounded.get_input_embeddings().weight = torch.nn.Parameter(embedding, requires_grad=False)
    reference = engine_for(rounded, features={"fast_path": fast})
    assert answers_of(engine) == answers_of(reference)
    assert answers_of(engine, 10) != answers_of(engine_for(model()))


def test_a_hundred_flips_under_load_lose_no_request_and_leave_nothing_behind() -> None:
    """After each flip the server answers as one started in that precision, with the prefix cache on and full."""
    expected = [answers_of(engine_for(model(), features=values)) for values in PRECISIONS]
    assert len({str(each) for each in expected}) > 2, "the precisions can be told apart"
    engine = engine_for(model())
    draw = random.Random(0)
    for values in PRECISIONS:
        flip(engine, values)
    flip(engine, PRECISIONS[0])
    held = engine.weights.nbytes
    outputs: dict[int, list[int]] = {}
    wanted: dict[int, int] = {}

    def step() -> None:
        report, _ = engine.step()
        assert report is not None
        for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
            outputs.setdefault(handle, []).append(token)

    for turn in range(100):
        # These run across one flip or several, so in several precisions; they have to end, with all of their tokens.
        for index, prompt in enumerate(prompts(2, seed=turn)):
            wanted[10 * turn + index] = 4 + index * 30
            submit(engine, 10 * turn + index, prompt, max_tokens=4 + index * 30, **GREEDY)
        for _ in range(draw.randrange(1, 4)):
            step()
        choice = draw.randrange(len(PRECISIONS))
        (applied, *_) = flip(engine, PRECISIONS[choice])
        assert isinstance(applied, FeaturesApplied)
        assert applied.epoch == engine.epoch
        if turn % 10 == 0:
            fresh = [10 * turn + 2 + index for index in range(4)]
            for handle, prompt in zip(fresh, prompts(4), strict=True):
                submit(engine, handle, prompt, max_tokens=8, **GREEDY)
            while not all(len(outputs.get(handle, [])) == 8 for handle in fresh):
                step()
            assert {index: outputs[handle] for index, handle in enumerate(fresh)} == expected[choice]
    while engine.has_work():
        step()
    engine.check_integrity()
    assert {handle: len(outputs[handle]) for handle in wanted} == wanted
    assert engine.weights.nbytes == held
    flip(engine, PRECISIONS[0])
    assert engine.weights.drop() == held
    assert engine.weights.nbytes == 0
    assert answers_of(engine, 2000) == expected[0]


def test_requests_that_run_across_a_flip_all_end() -> None:
    engine = engine_for(model(), kv_bytes=1 << 16)
    for values in PRECISIONS:
        flip(engine, values)
    outputs = answers_of(engine, switches={step: PRECISIONS[step % 4] for step in range(2, 30)})
    assert sorted(map(len, outputs.values())) == [8, 8, 8, 8]


def test_the_engine_serves_on_while_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from inference_server.engine.quantization import packing

    gate = threading.Event()
    original = packing.quantize

    def slow(*arguments: Any) -> Any:
        gate.wait(10)
        return original(*arguments)

    monkeypatch.setattr(packing, "quantize", slow)
    engine = engine_for(model())
    before = answers_of(engine)
    assert engine.set_features(7, {"weight_precision": "int8"}) == []
    assert engine.features.weight_precision == "master"
    assert answers_of(engine, 10) == before
    assert engine.waits_for_weights
    assert not any(isinstance(news, FeaturesApplied) for news in engine.take_news())
    gate.set()
    engine.weights.wait()
    news = engine.take_news()
    applied = [each for each in news if isinstance(each, FeaturesApplied)]
    assert [each.correlation for each in applied] == [7]
    assert engine.features.weight_precision == "int8"
    progress = [each for each in news if isinstance(each, TaskProgress)]
    assert progress[-1].fraction == 1.0


def test_a_later_switch_of_the_weights_takes_the_place_of_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from inference_server.engine.quantization import packing

    gate = threading.Event()
    original = packing.quantize
    monkeypatch.setattr(packing, "quantize", lambda *arguments: (gate.wait(10), original(*arguments))[1])
    engine = engine_for(model())
    assert engine.set_features(1, {"weight_precision": "int4"}) == []
    gate.set()
    (applied, *_) = engine.set_features(2, {"weight_precision": "master", "max_num_seqs": 8})
    assert isinstance(applied, FeaturesApplied)
    refused = [news for news in engine.take_news() if isinstance(news, CommandFailed)]
    assert [each.correlation for each in refused] == [1]
    assert engine.features.weight_precision == "master"
    assert not engine.weights.packing


def test_the_bytes_that_a_step_reads_follow_the_weights_in_use() -> None:
    engine = engine_for(model())
    whole = engine.work
    assert whole is not None
    (applied, *_) = flip(engine, {"weight_precision": "int8"})
    packed = applied.work
    variant = engine.weights.in_use
    assert variant is not None
    linears = [module for module in engine.loaded.model.modules() if isinstance(module, torch.nn.Linear)]
    saved = sum(module.weight.nbytes for module in linears) - variant.nbytes
    assert whole.body_bytes + whole.head_bytes - packed.body_bytes - packed.head_bytes == saved
    assert whole.head_bytes / packed.head_bytes == pytest.approx(4, rel=0.1)
    flip(engine, {"weight_precision": "master"})
    assert engine.work == whole == step_work(engine.loaded)


def test_what_does_not_fit_into_the_budget_is_refused_and_says_what_to_do() -> None:
    engine = engine_for(model(), packed_bytes=1000)
    with pytest.raises(FeatureError, match="--packed-memory"):
        engine.set_features(1, {"weight_precision": "int8"})
    assert engine.features.weight_precision == "master"


def test_variants_that_are_not_in_use_make_room_for_others() -> None:
    engine = engine_for(model())
    flip(engine, {"weight_precision": "int8"})
    one = engine.weights.nbytes
    engine.weights.budget = int(one * 1.7)
    flip(engine, {"weight_precision": "int4"})
    flip(engine, {"weight_precision": "int4", "int4_group": "64"})
    labels = [variant.label for variant in engine.weights.kept()]
    assert "int8" not in labels
    assert labels[-1] == "int4 g64 minimum"
    assert engine.weights.nbytes <= engine.weights.budget


def test_an_answer_from_other_weights_is_not_replayed() -> None:
    engine = engine_for(model(), features={"response_cache": True})
    first = answers_of(engine)
    flip(engine, {"weight_precision": "int4", "int4_group": "64", "int4_grid": "symmetric"})
    assert answers_of(engine, 10) != first


def test_torch_compile_and_packed_weights_exclude_each_other() -> None:
    engine = engine_for(model())
    if not {spec.name: spec for spec in engine.specs}["compiled"].available:
        pytest.skip("torch.compile is not to be had here")
    flip(engine, {"weight_precision": "int8"})
    with pytest.raises(FeatureError, match="exclude each other"):
        engine.set_features(1, {"compiled": True})
