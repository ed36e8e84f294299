"""What happens when the engine dies, goes silent or cannot load: everybody is told, and it comes back by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from running_front import RunningFront, gone, scripted_command

Start = Callable[..., RunningFront]
LONG = {"model": "scripted", "prompt": [70, 71, 72], "max_tokens": 5000}


def test_killing_the_engine_ends_streams_with_the_reason_and_the_next_request_works(front: RunningFront) -> None:
    before = front.engine()
    stream = front.client.completions.create(
        model="tiny-llama", prompt="Once", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = iter(stream)
    for _ in range(5):
        next(pieces)
    os.kill(before["pid"], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="SIGKILL"):
        list(pieces)
    # No waiting: a request that comes while the engine is loading waits for it.
    answer = front.client.completions.create(model="tiny-llama", prompt="Once", max_tokens=4)
    assert answer.usage.completion_tokens == 4
    after = front.engine()
    assert after["state"] == "ready"
    assert after["pid"] != before["pid"]
    assert after["restarts"] == before["restarts"] + 1


def test_switches_and_step_numbers_survive_a_restart(front: RunningFront) -> None:
    front.http.patch("/features", json={"max_num_seqs": 7})
    epoch = front.http.get("/features").json()["epoch"]
    os.kill(front.engine()["pid"], signal.SIGKILL)
    front.wait_for(lambda: front.engine()["state"] != "ready", "death")
    front.wait_for_engine("ready")
    features = front.http.get("/features").json()
    assert features["values"]["max_num_seqs"] == 7
    assert features["epoch"] > epoch
    front.http.patch("/features", json={"max_num_seqs": 32})


def test_a_whole_answer_that_is_lost_is_a_503_with_the_engines_last_words(scripted: Start) -> None:
    front = scripted("dies", after=3)
    front.wait_for_engine("ready")
    with pytest.raises(openai.InternalServerError, match="SIGKILL") as error:
        front.client.completions.create(**LONG)
    assert error.value.status_code == 503
    assert "the device fell off the bus" in str(error.value)
    assert "engine-" in str(error.value)  # where the rest of its output is


def test_an_engine_that_dies_again_and_again_is_given_up_until_somebody_restarts_it(scripted: Start) -> None:
    front = scripted("exits", after=0, step_s=0.001)
    front.wait_for_engine("ready")
    for _ in range(3):
        with pytest.raises(openai.APIError, match="exited with status 3"):
            front.client.completions.create(**LONG)
    failed = front.wait_for_engine("failed")
    assert "3 times within a minute" in failed["message"]
    with pytest.raises(openai.APIError, match="fell off the bus") as error:
        front.client.completions.create(**LONG)
    assert error.value.status_code == 503
    assert front.http.post("/engine/restart").status_code == 200
    front.wait_for_engine("ready")


def test_an_engine_that_goes_silent_is_killed_and_replaced(scripted: Start, tmp_path: Path) -> None:
    front = scripted("goes-silent", after=2, once=tmp_path / "was-here", engine_silence_s=1.5)
    pid = front.wait_for_engine("ready")["pid"]
    with pytest.raises(openai.APIError, match=r"no sign of life for 1\.5 s"):
        front.client.completions.create(**LONG)
    assert gone(pid)
    assert front.client.completions.create(**LONG | {"max_tokens": 3}).choices[0].text


def test_an_engine_of_another_version_is_not_believed(scripted: Start) -> None:
    front = scripted("babbles", after=1)
    front.wait_for_engine("ready")
    with pytest.raises(openai.APIError, match="cannot be understood"):
        front.client.completions.create(**LONG)


def test_a_model_that_cannot_be_loaded_is_explained_and_not_tried_again(scripted: Start) -> None:
    front = scripted("load-fails")
    event = front.wait_for_engine("failed")
    assert event["message"] == "The weights are not weights.\nChoose a model."
    assert event["restarts"] == 0
    with pytest.raises(openai.APIError, match="not weights"):
        front.client.completions.create(**LONG)
    assert front.http.get("/health").json()["engine"] == "failed"


def test_a_traceback_at_the_start_reaches_the_user(scripted: Start) -> None:
    event = scripted("traceback").wait_for_engine("failed")
    assert "libmissing.so: cannot open shared object file" in event["message"]
    assert event["restarts"] == 0


def test_an_engine_killed_while_loading_is_explained(scripted: Start) -> None:
    assert "SIGSEGV" in scripted("dies-loading").wait_for_engine("failed")["message"]


def test_a_command_that_does_not_exist_is_explained(scripted: Start) -> None:
    front = scripted(engine_command='["/nowhere/engine"]')
    assert "/nowhere/engine" in front.wait_for_engine("failed")["message"]


def test_a_request_waits_for_a_loading_engine_no_longer_than_it_was_told_to(scripted: Start) -> None:
    front = scripted(load_s=3, loading_wait_s=0.5)
    with pytest.raises(openai.APIError, match="not ready yet") as error:
        front.client.completions.create(**LONG)
    assert error.value.status_code == 503
    front.wait_for_engine("ready")
    assert front.client.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2


def test_a_client_that_leaves_while_the_engine_loads_leaves_nothing_behind(scripted: Start) -> None:
    front = scripted(load_s=2)
    with pytest.raises(openai.APITimeoutError):
        front.client.with_options(timeout=0.5).completions.create(**LONG)
    front.wait_until_idle()
    front.wait_for_engine("ready")
    assert front.http.get("/requests").json()["requests"][-1]["state"] == "cancelled"


def test_stopping_frees_the_engine_and_starting_brings_it_back(scripted: Start) -> None:
    front = scripted()
    pid = front.wait_for_engine("ready")["pid"]
    stream = iter(front.client.completions.create(**LONG, stream=True))
    next(stream)
    assert front.http.post("/engine/stop").json()["state"] == "stopped"
    assert gone(pid)
    with pytest.raises(openai.APIError, match="stopped"):
        list(stream)
    with pytest.raises(openai.APIError, match="stopped"):
        front.client.completions.create(**LONG)
    assert front.http.post("/engine/start").status_code == 200
    assert front.client.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2


def test_a_refusal_by_the_engine_is_a_400_for_a_stream_too(scripted: Start) -> None:
    front = scripted()
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="presence_penalty is not implemented"):
            front.client.completions.create(**LONG, presence_penalty=1.0, stream=stream)


def test_killing_the_front_leaves_no_engine(scripted: Start) -> None:
    front = scripted()
    pid = front.wait_for_engine("ready")["pid"]
    front.process.kill()
    front.wait_for(lambda: gone(pid), "end of the engine", 5)


def test_killing_whoever_started_the_front_leaves_neither(tmp_path: Path, tokenizer_folder: Path) -> None:
    """As a JupyterLab or a kernel would: the front ends with it, and the engine with the front."""
    import time

    command = scripted_command(tokenizer_folder, "good")
    starter = textwrap.dedent(
        """
        import subprocess, sys, time
        command = [sys.executable, "-m", "inference_server.cli", "serve", "--uds", sys.argv[1]]
        print(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).pid, flush=True)
        time.sleep(60)
        """
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "INFERENCE_WORKBENCH_ENGINE_COMMAND": command,
        "INFERENCE_WORKBENCH_ORIGIN": "kernel",
    }
    socket = tmp_path / "s"
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, str(socket)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    front = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    engine = None
    import httpx
    import msgspec

    from inference_server.discovery import ServerFile

    while engine is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        for path in (tmp_path / "runtime").glob("*.json"):
            file = msgspec.json.decode(path.read_bytes(), type=ServerFile)
            with httpx.Client(transport=httpx.HTTPTransport(uds=file.uds), base_url="http://localhost") as client:
                engine = client.get("/info", params={"token": file.token}).json()["engine"]["pid"]
    parent.kill()
    parent.wait()
    while not (gone(front) and gone(engine)):
        assert time.monotonic() < deadline, (gone(front), gone(engine))
        time.sleep(0.05)
    assert not socket.exists()
    assert not list((tmp_path / "runtime").glob("*.json"))
