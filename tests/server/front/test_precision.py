"""The switches of precision through the whole server: a stream goes on across them, and their limits are told."""

from __future__ import annotations

from running_front import RunningFront


def test_a_stream_goes_on_while_weights_and_keys_change_their_precision(front: RunningFront) -> None:
    stream = front.client.completions.create(
        model="tiny-llama",
        prompt=[5, 6, 7],
        max_tokens=200,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    next(chunks)
    for values in (
        {"weight_precision": "int8"},
        {"kv_cache_dtype": "int8"},
        {"weight_precision": "int4", "int4_grid": "symmetric"},
        {"weight_precision": "master", "kv_cache_dtype": "master", "int4_grid": "minimum"},
    ):
        answer = front.http.patch("/features", json=values)
        assert answer.status_code == 200, answer.text
        assert answer.json()["values"].items() >= values.items()
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_the_longest_text_that_is_accepted_follows_the_precision_of_the_keys(front: RunningFront) -> None:
    def limit() -> int:
        return front.http.get("/info").json()["capacity"]["max_model_len"]

    before = limit()
    front.http.patch("/features", json={"kv_cache_dtype": "int8"}).raise_for_status()
    assert limit() >= before
    front.http.patch("/features", json={"kv_cache_dtype": "master"}).raise_for_status()
    assert limit() == before


def test_quality_is_measured_over_http_beside_requests(front: RunningFront) -> None:
    stream = front.client.completions.create(
        model="tiny-llama",
        prompt=[5, 6, 7],
        max_tokens=300,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    begun = front.http.post("/quantization/quality", json={"values": {"weight_precision": "int8"}})
    assert begun.status_code == 200, begun.text
    chunks = [chunk for chunk in stream if chunk.choices]
    assert chunks[-1].choices[0].finish_reason == "length"

    def result() -> dict | None:
        status = front.http.get("/quantization").json()
        assert not status["last_failure"]
        return next((each for each in status["results"] if each["number"] == begun.json()["number"]), None)

    found = front.wait_for(result, "a result")
    assert found["label"] == "int8"
    assert found["perplexity"] > 1
    status = front.http.get("/quantization").json()
    assert status["in_use"] == "master"
    assert status["memory"]["packed"] > 0
    assert front.http.post("/quantization/drop", json={}).json()["freed"] > 0
    refused = front.http.post("/quantization/quality", json={"values": {"weight_precision": "int5"}})
    assert refused.status_code == 422
    assert "is one of" in refused.json()["error"]["message"]
