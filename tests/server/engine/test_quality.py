"""The quality meter agrees with transformers, runs beside requests without changing them, and says what it measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import DEVICE, GREEDY, run, submit
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_model

pytest.importorskip("numba")

from inference_server.engine.core import Engine
from inference_server.engine.quantization import quality, texts
from inference_server.engine.quantization.packing import Scheme, quantize
from inference_server.features import FeatureError
from inference_server.protocol import EngineConfig, TaskProgress

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="told against the fast path of the CPU")

TEXT = " ".join(texts.evaluation().split()[:130])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("models") / "tiny-llama")


def engine_of(folder: Path, **features: Any) -> Engine:
    return Engine.load(EngineConfig(model=str(folder), kv_bytes=1 << 20, features=features), lambda *_: None)


def measure(engine: Engine, text: str | None = TEXT, **values: Any) -> dict[str, Any]:
    number = engine.precision.measure(text, values)["number"]
    engine.weights.wait()
    while engine.precision.has_work:
        engine.precision.advance()
    (result,) = [each for each in engine.precision.status()["results"] if each["number"] == number]
    return result


def reference(folder: Path, model: Any) -> torch.Tensor:
    """Log-probabilities of every window, from transformers."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    rows = []
    for begin in range(0, len(ids), quality.WINDOW):
        window = torch.tensor([ids[begin : begin + quality.WINDOW]])
        with torch.inference_mode():
            logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        rows.append(torch.cat([torch.log_softmax(logits, -1), window[0, 1:, None].float()], 1))
    return torch.cat(rows)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_what_is_measured_is_what_transformers_gives(folder: Path, fast: bool) -> None:
    engine = engine_of(folder)
    if not fast:
        engine.fast = None
    result = measure(engine, weight_precision="int8")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    master = reference(folder, model)
    embedding = model.get_input_embeddings().weight.clone()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = quantize(module.weight, Scheme(8)).dequantize()
    model.get_input_embeddings().weight = torch.nn.Parameter(embedding, requires_grad=False)
    packed = reference(folder, model)
    targets = master[:, -1:].long()
    log_master, log_packed = master[:, :-1], packed[:, :-1]
    assert result["tokens"] == len(targets) > quality.WINDOW, "more than one window"
    loss = -float(log_packed.gather(1, targets).mean())
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result["perplexity_master"] == pytest.approx(
        math.exp(-float(log_master.gather(1, targets).mean())), rel=1e-4
    )
    divergence = (log_master.exp() * (log_master - log_packed)).sum(-1)
    assert result["divergence"] == pytest.approx(float(divergence.mean()), rel=1e-2)
    assert result["divergence_max"] == pytest.approx(float(divergence.max()), rel=1e-2)
    same = (log_master.argmax(-1) == log_packed.argmax(-1)).float().mean()
    assert result["same_top1"] == pytest.approx(float(same), abs=2 / len(targets))
    worst = result["worst"]
    assert len(worst) == quality.WORST
    assert [each["divergence"] for each in worst] == sorted((each["divergence"] for each in worst), reverse=True)
    position = int(divergence.argmax())
    window, at = divmod(position, quality.WINDOW - 1)
    assert worst[0]["position"] == window * quality.WINDOW + at + 1
    assert engine.weights.in_use is None, "measuring switches nothing"


def test_the_master_does_not_differ_from_itself_and_8_bit_keys_hardly(folder: Path) -> None:
    engine = engine_of(folder)
    itself = measure(engine)
    assert itself["label"] == "master"
    assert itself["divergence"] == 0
    assert itself["same_top1"] == 1
    keys = measure(engine, kv_cache_dtype="int8")
    assert keys["label"] == "master, KV int8"
    assert 0 < keys["divergence"] < 0.1
    coarse = measure(engine, weight_precision="int3", int4_grid="symmetric", int4_group="64")
    assert coarse["divergence"] > 10 * keys["divergence"]
    assert [each["label"] for each in engine.precision.status()["results"]] == [
        "master",
        "master, KV int8",
        "int3 g64 symmetric",
    ]


def test_requests_beside_a_measurement_say_what_they_say_alone_and_most_time_is_theirs(folder: Path) -> None:
    def requests(engine: Engine) -> None:
        for handle in range(4):
            submit(engine, handle, [5 + handle, 7, 9], max_tokens=300, **GREEDY)

    alone = engine_of(folder)
    requests(alone)
    expected = run(alone)
    engine = engine_of(folder)
    requests(engine)
    engine.precision.measure(None, {"weight_precision": "int8"})
    engine.weights.wait()
    outputs: dict[int, list[int]] = {handle: [] for handle in range(4)}
    portions = 0
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
            outputs[handle].append(token)
        before = engine.precision._spent_ns
        engine.precision.advance_beside()
        portions += engine.precision._spent_ns > before
    assert outputs == expected
    assert 0 < portions < 150, "it went on, and left at least half of the steps alone"


def test_a_measurement_can_be_cancelled_and_tells_how_far_it_is(folder: Path) -> None:
    engine = engine_of(folder)
    engine.precision.measure(None, {"kv_cache_dtype": "int8"})
    for _ in range(20):
        engine.precision.advance()
    assert 0 < engine.precision.status()["measuring"] < 1
    assert engine.precision.cancel() == {"stopped": ["measuring quality"]}
    assert not engine.precision.has_work
    progress = [news for news in engine.take_news() if isinstance(news, TaskProgress)]
    assert progress[0].fraction == 0
    assert progress[-1].fraction == 1
    assert "cancelled" in progress[-1].detail
    assert engine.precision.status()["results"] == []


def test_what_cannot_be_measured_is_refused(folder: Path) -> None:
    engine = engine_of(folder)
    with pytest.raises(FeatureError, match="no price in quality"):
        engine.precision.measure(None, {"max_num_seqs": "4"})
    with pytest.raises(FeatureError, match="is one of"):
        engine.precision.measure(None, {"weight_precision": "int5"})
    with pytest.raises(FeatureError, match="characters"):
        engine.precision.measure("")
    engine.precision.measure("a", {})
    engine.precision.advance()
    assert "fewer than two tokens" in engine.precision.status()["last_failure"]


def test_gptq_is_a_switch_with_a_text_of_the_users_own(folder: Path) -> None:
    engine = engine_of(folder)
    values = {"weight_precision": "int4", "int4_group": "64", "int4_grid": "symmetric", "int4_rounding": "gptq"}
    assert engine.set_features(1, values) == []
    engine.weights.wait()
    engine.take_news()
    assert engine.features.int4_rounding == "gptq"
    (variant,) = engine.precision.status()["variants"]
    assert variant["label"] == "int4 g64 symmetric gptq"
    assert len(variant["layer_errors"]) == 8
    with pytest.raises(FeatureError, match="in use"):
        engine.precision.calibrate(TEXT)
    engine.set_features(2, {"weight_precision": "master"})
    assert engine.precision.calibrate(TEXT)["tokens"] > 256
    assert engine.precision.status()["variants"] == []
    assert engine.precision.status()["calibration"].startswith("Alice was beginning")
    with pytest.raises(FeatureError, match="256 at least"):
        engine.precision.calibrate("too short")


def test_an_engine_that_starts_in_a_precision_tells_how_far_packing_is(folder: Path) -> None:
    told: list[tuple[str, float | None]] = []
    features: dict[str, Any] = {"weight_precision": "int4", "int4_grid": "symmetric", "int4_rounding": "gptq"}
    config = EngineConfig(model=str(folder), kv_bytes=1 << 20, features=features)
    engine = Engine.load(config, lambda stage, fraction, _: told.append((stage, fraction)))
    assert engine.precision.status()["in_use"] == "int4 g32 symmetric gptq"
    fractions = [fraction for stage, fraction in told if stage == "packing weights" and fraction is not None]
    assert len(fractions) >= 8
    assert 0 <= min(fractions) < 0.5 < max(fractions) < 1


def test_the_memory_of_everything_is_told(folder: Path) -> None:
    engine = engine_of(folder)
    before = engine.precision.memory()
    assert before["weights"] == engine.loaded.weight_bytes
    assert before["packed"] == 0
    assert before["kv"] == engine.capacity.kv_bytes
    assert before["activations"] > 0
    engine.set_features(1, {"weight_precision": "int8"})
    engine.weights.wait()
    engine.take_news()
    submit(engine, 0, [5, 6, 7], max_tokens=20, **GREEDY)
    run(engine)
    (steps,) = engine.precision.status()["measured_steps"]
    assert (steps["path"], steps["batch"], steps["steps"]) == ("fast-cpu fp32 int8", 1, 19), "the prompt's is no decode"
    assert steps["median_ms"] > 0
    (variant,) = engine.precision.status()["variants"]
    assert engine.precision.memory()["packed"] == variant["bytes"] > 0
    assert variant["predicted_speedup"] > 2
    assert engine.precision.drop()["freed"] == 0, "what is in use stays"
    engine.set_features(2, {"weight_precision": "master"})
    assert engine.precision.drop()["freed"] == variant["bytes"]
