"""Precisions from a notebook: measured, compared, dropped, saved, and cancelled, against the real server."""

import threading
import time

import pytest

import inference_workbench as iw
from inference_workbench.errors import RequestError


def test_measuring_compares_precisions_and_switches_nothing(wb):
    coarse = wb.quantization.measure(weight_precision="int4", int4_group="64", int4_grid="symmetric")
    fine = wb.quantization.measure(weight_precision="int8")
    assert coarse["divergence"] > fine["divergence"] > 0
    assert wb.features.weight_precision == "master"
    results = wb.quantization.results.set_index("label")
    assert results.loc["int8", "perplexity"] == fine["perplexity"]
    assert set(wb.quantization.worst("int8")["position"]) <= set(range(results.loc["int8", "tokens"] * 2))
    with pytest.raises(KeyError, match="results"):
        wb.quantization.worst("int5")


def test_a_text_of_ones_own_is_measured_apart(wb):
    own = wb.quantization.measure("The quick brown fox jumps over the lazy dog.", kv_cache_dtype="int8")
    assert own["text"].startswith("The quick brown fox")
    assert own["tokens"] < 100


def test_a_precision_can_be_used_compared_dropped_and_saved(wb, tmp_path):
    wb.generate("Once upon a time", max_tokens=12, ignore_eos=True)
    wb.features.weight_precision = "int8"
    assert wb.quantization.status["in_use"] == "int8"
    wb.generate("Once upon a time", max_tokens=12, ignore_eos=True)
    speeds = wb.quantization.speeds
    assert {"fast-cpu fp32", "fast-cpu fp32 int8"} <= set(speeds.index)
    assert (speeds[1].dropna() > 0).all()
    assert wb.quantization.save(str(tmp_path / "saved")) == (tmp_path / "saved" / "model.safetensors").stat().st_size
    with pytest.raises(RequestError, match="not empty"):
        wb.quantization.save(str(tmp_path / "saved"))
    packed = wb.quantization.memory["packed"]
    wb.features.weight_precision = "master"
    assert wb.quantization.drop() == packed
    assert wb.quantization.memory["packed"] == 0


def test_a_measurement_that_is_cancelled_says_so(wb):
    failed = []

    def measure():
        try:
            wb.quantization.measure("word " * 20_000, kv_cache_dtype="int8")
        except iw.errors.RequestError as error:
            failed.append(str(error))

    thread = threading.Thread(target=measure)
    thread.start()
    deadline = time.monotonic() + 20
    while not wb.quantization.cancel():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    thread.join(20)
    assert "cancelled" in failed[0]


def test_what_cannot_be_measured_is_refused(wb):
    with pytest.raises(RequestError, match="no price in quality"):
        wb.quantization.measure(kv_cache="off")
