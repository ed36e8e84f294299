"""``inference-workbench bench`` against our server and against one that speaks nothing but OpenAI's API."""

import json
import os
import subprocess
import sys

import pytest
from servers_under_test import python_path
from streaming_server import DONE, StreamingServer, event, text

from inference_workbench.endpoint import Endpoint
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.bench import bench, parse_length, parse_slo
from inference_workbench.experiments.target import Target


def command(*options, runtime, check=True):
    env = {**os.environ, "PYTHONPATH": python_path(), "JUPYTER_RUNTIME_DIR": str(runtime), "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-m", "inference_server.cli", "bench", *options],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture
def foreign():
    def script(number, body):
        assert body["stream_options"] == {"include_usage": True}
        yield 0.05, text("a")
        yield 0.02, text("b", finish_reason="length")
        yield 0.0, event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 2 + number % 2}) + DONE

    def chat(number, body):
        for wait, piece in script(number, body):
            yield (
                wait,
                piece.replace(b'"text": "a"', b'"delta": {"content": "a"}').replace(
                    b'"text": "b"', b'"delta": {"content": "b"}'
                ),
            )

    server = StreamingServer(chat)
    yield server
    server.close()


def test_our_own_server_is_found_and_measured(server, wb, tmp_path):
    out = tmp_path / "r.json"
    options = ["--requests", "5", "--concurrency", "2", "--output-tokens", "6:9", "--ignore-eos", "-o", str(out)]
    result = command(*options, "--slo", "ttft=60000,tpot=60000", "--details", runtime=server.runtime)
    assert "5 of 5 requests answered" in result.stdout
    written = json.loads(out.read_text())
    figures = written["figures"]
    assert figures["completed"] == figures["good"] == 5
    assert figures["failed"] == 0
    assert 30 <= figures["total_output_tokens"] <= 45
    assert figures["median_ttft_ms"] <= figures["p99_ttft_ms"] <= figures["p99_e2el_ms"]
    assert figures["output_throughput"] == pytest.approx(figures["total_output_tokens"] / figures["duration"])
    assert written["target"]["token_ids"] is True
    assert [len(each["token_ids"]) == each["output_tokens"] for each in written["details"]] == [True] * 5
    assert "messages" not in out.read_text()


def test_another_server_is_measured_by_its_pieces_and_says_so(foreign, tmp_path):
    result = command("--url", f"{foreign.url}/v1", "--requests", "4", "--json", runtime=tmp_path)
    written = json.loads(result.stdout)
    assert written["figures"]["completed"] == 4
    assert written["figures"]["mean_ttft_ms"] >= 50
    assert written["figures"]["median_itl_ms"] >= 20
    assert written["target"] == {"url": foreign.url, "model": "scripted", "token_ids": False}
    assert any("gaps are between pieces" in note for note in written["notes"])
    assert len(foreign.received) == 5, "one goes first and does not count"
    assert foreign.received[0][1] == "/v1/chat/completions"


def test_other_tools_options_are_taken(foreign, tmp_path):
    options = "--dataset-name random --random-input-len 9 --random-output-len 2 --num-prompts 3 --max-concurrency 3"
    command("--url", foreign.url, "--vllm", options, "--warm-up", "0", "--json", runtime=tmp_path, check=False)
    assert [len(body["prompt"]) for _, _, body in foreign.received] == [9, 9, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "localhost:80"], "is no address"),
        (["--url", "http://127.0.0.1:9"], "Nobody answers"),
        ([], "No server is running"),
        (["--workload", "chatter", "--url", "{url}"], "There is no workload 'chatter'"),
        (["--output-tokens", "many", "--url", "{url}"], "'many' is no length"),
        (["--find-capacity", "--url", "{url}"], "needs objectives"),
        (["--slo", "speed=3", "--url", "{url}"], "no objective 'speed_ms'"),
    ],
)
def test_a_mistake_is_named_without_a_traceback(foreign, tmp_path, options, message):
    result = command(*(each.format(url=foreign.url) for each in options), runtime=tmp_path, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_that_answers_nothing_useful_fails_before_the_load():
    server = StreamingServer(lambda *_: iter([(0.0, b'data: {"error": {"message": "no GPU"}}\n\n')]))
    with pytest.raises(WorkbenchError, match="does not answer as it should: no GPU"):
        bench(Target.probe(Endpoint(token="", url=server.url)), "chat", requests=2)
    server.close()


def test_lengths_and_objectives_are_read_as_written():
    assert (parse_length("128"), parse_length("16:64")) == (128, (16, 64))
    assert parse_slo("ttft=500, tpot_ms=50") == {"ttft_ms": 500.0, "tpot_ms": 50.0}
    with pytest.raises(WorkbenchError, match="'fast' is no objective"):
        parse_slo("fast")
