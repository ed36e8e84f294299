"""Recordings of a running server: started, stopped, listed, fetched; and whole whatever dies meanwhile."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import crashes
import pytest
from running_front import TOKEN, RunningFront
from watcher import Watcher

from inference_server.protocol import RecordingEvent
from inference_server.recording.convert import finish
from inference_server.recording.file import RecordingFile
from inference_server.recording.journal import JournalReader

Start = Callable[..., RunningFront]
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
FLUSH_S = 1.0
GRACE_S = 0.4
"""A flush may come late on a busy machine."""


def folder_of(front: RunningFront) -> Path:
    return front.folder / "data" / "inference-workbench" / "recordings"


def generate(front: RunningFront, tokens: int, **extra: object) -> None:
    body = {"prompt": [70, 71, 72], "max_tokens": tokens, "ignore_eos": True, "stream": True} | extra
    with front.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        for _ in answer.iter_lines():
            pass


def record(front: RunningFront, what: Callable[[], None], **body: object) -> Path:
    identifier = front.http.post("/recordings", json=body).json()["id"]
    what()
    answer = front.http.post(f"/recordings/{identifier}/stop?wait=true", json={}).json()
    assert answer["state"] == "finished", answer
    return folder_of(front) / answer["file"]


def test_a_recording_holds_what_was_asked_and_what_was_answered(front: RunningFront) -> None:
    def requests() -> None:
        generate(front, 20, temperature=0.7, seed=11, stop=["no such text"])
        generate(front, 5, temperature=0.9)

    path = record(front, requests, name="Two requests", note="of mine")
    with RecordingFile(path) as file:
        first, second = file.table("requests").to_pylist()
        tokens = file.table("tokens").to_pandas()
        steps = file.table("steps").to_pandas()
        manifest = file.manifest
    assert (manifest.name, manifest.note, manifest.recovered) == ("Two requests", "of mine", False)
    assert manifest.models[0].weights[0].sha256 is not None
    assert manifest.models[0].versions["torch"]
    assert manifest.features is not None
    assert first["prompt"] == [70, 71, 72]
    assert first["seed"] == 11
    assert '"temperature":0.7' in first["sampling"]
    assert first["stops"] == ["no such text"]
    assert second["seed"] is not None, "the server's own choice is known too"
    assert list(tokens["index"]) == [*range(20), *range(5)]
    assert first["last_token_ns"] == tokens[tokens.request == first["request"]].sent_ns.max()
    assert set(tokens.step) <= set(steps.step)
    assert (steps.read_bytes > 0).all()
    assert (steps.flops > 0).all()


def test_a_request_with_a_seed_that_the_server_chose_gives_the_same_tokens_again(front: RunningFront) -> None:
    path = record(front, lambda: generate(front, 30, temperature=1.5))
    with RecordingFile(path) as file:
        [request] = file.table("requests").to_pylist()
        said = file.table("tokens").to_pydict()["token_id"]
    again = record(front, lambda: generate(front, 30, temperature=1.5, seed=request["seed"]))
    with RecordingFile(again) as file:
        assert file.table("tokens").to_pydict()["token_id"] == said
    other = record(front, lambda: generate(front, 30, temperature=1.5, seed=request["seed"] ^ 1))
    with RecordingFile(other) as file:
        assert file.table("tokens").to_pydict()["token_id"] != said


def test_one_recording_runs_at_a_time_and_telemetry_tells_how_it_goes(front: RunningFront) -> None:
    with Watcher(front.url, TOKEN) as watcher:
        started = front.http.post("/recordings", json={"name": "first"}).json()
        refused = front.http.post("/recordings", json={})
        assert refused.status_code == 409
        assert "'first' is being recorded" in refused.json()["error"]["message"]
        assert front.http.get(f"/recordings/{started['id']}/download").status_code == 409
        generate(front, 5)
        front.wait_for(lambda: any(event.tokens == 5 for event in watcher.events(RecordingEvent)), "news", 5)
        front.http.post(f"/recordings/{started['id']}/stop?wait=true", json={})
        front.wait_for(lambda: watcher.events(RecordingEvent)[-1].state == "finished", "end", 5)
    states = [event.state for event in watcher.events(RecordingEvent)]
    assert states[0] == "recording"
    assert "finishing" in states
    assert front.http.get("/recordings").json()["active"] is None


def test_recordings_are_listed_fetched_and_removed_and_nothing_else_can_be(front: RunningFront) -> None:
    path = record(front, lambda: generate(front, 3), name="Über alles / ..")
    identifier = path.stem
    listed = front.http.get("/recordings").json()["recordings"]
    assert [event["tokens"] for event in listed if event["id"] == identifier] == [3]
    assert front.http.get(f"/recordings/{identifier}/download").content == path.read_bytes()
    assert front.http.request("DELETE", f"/recordings/{identifier}").json() == {"deleted": identifier}
    assert not path.exists()
    for wrong in (identifier, "..%2f..%2fsecret", "nothing"):
        assert front.http.get(f"/recordings/{wrong}/download").status_code == 404
        assert front.http.post(f"/recordings/{wrong}/stop", json={}).status_code == 404


def test_a_recording_ends_at_its_limit_and_the_server_serves_on(scripted: Start) -> None:
    front = scripted("good", step_s=0.001, recording_max_bytes=100_000, recording_flush_s=0.1)
    front.wait_for_engine("ready")
    with Watcher(front.url, TOKEN) as watcher:
        front.http.post("/recordings", json={})
        generate(front, 1500)
        front.wait_for(
            lambda: any(event.state == "finished" for event in watcher.events(RecordingEvent)), "finished recording"
        )
    last = watcher.events(RecordingEvent)[-1]
    assert "reached its limit" in last.message
    with RecordingFile(folder_of(front) / last.file) as file:
        assert 0 < file.manifest.tables["tokens"].rows < 1500
        assert not file.manifest.recovered


def test_a_request_that_was_running_when_the_recording_began_is_known_with_its_prompt(scripted: Start) -> None:
    front = scripted("good", step_s=0.01)
    front.wait_for_engine("ready")
    load = crashes.Load(front.url, HEADERS, 1)
    front.wait_for(lambda: [r for r in front.active() if r["first_token_ns"]], "running request")
    time.sleep(0.2)
    path = record(front, lambda: time.sleep(0.3))
    load.close()
    with RecordingFile(path) as file:
        [request] = file.table("requests").to_pylist()
        assert min(file.table("tokens").to_pydict()["index"]) > 5
    assert request["prompt"] == [70, 71, 72]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_older_than_the_flush_interval_is_lost_when_the_front_is_killed(scripted: Start, seed: int) -> None:
    front = scripted("good", step_s=0.004)
    front.wait_for_engine("ready")
    after_s = random.Random(seed).uniform(0.3, 3)
    found = crashes.kill_front(front.url, HEADERS, TOKEN, front.process.pid, folder_of(front), after_s)
    assert found.recovered
    assert found.heard > 0
    assert found.oldest_missing_s <= FLUSH_S + GRACE_S, found
    assert found.recorded >= found.heard - found.missing


def test_a_recording_goes_on_over_the_death_of_the_engine_and_tells_of_it(scripted: Start) -> None:
    front = scripted("good", step_s=0.004)
    front.wait_for_engine("ready")
    found = crashes.kill_engine(front.url, HEADERS, TOKEN, folder_of(front), 0.8)
    assert (found.missing, found.recovered) == (0, False)
    [path] = folder_of(front).glob("*.iwrec")
    with RecordingFile(path) as file:
        states = file.table("engine_events").to_pydict()["state"]
        assert {"failed"} == set(file.table("requests").to_pydict()["state"])
    assert "restarting" in states


def test_a_journal_that_was_left_behind_is_finished_by_the_next_server(scripted: Start) -> None:
    front = scripted("good", step_s=0.004)
    front.wait_for_engine("ready")
    front.http.post("/recordings", json={"name": "left"})
    load = crashes.Load(front.url, HEADERS, 2)
    time.sleep(1.5)
    front.process.kill()
    front.process.wait()
    load.close()
    for info in (front.folder / "runtime").glob("*.json"):
        info.unlink()
    second = scripted("good", step_s=0.004)
    path = second.wait_for(lambda: next(folder_of(second).glob("*.iwrec"), None), "recovered file", 15)
    second.wait_for(lambda: not list(folder_of(second).glob("*.iwjournal")), "end of the journal")
    [event] = second.wait_for(
        lambda: [r for r in second.http.get("/recordings").json()["recordings"] if r["state"] == "finished"], "news"
    )
    assert event["name"] == "left"
    with RecordingFile(path) as file:
        assert file.manifest.recovered
        assert file.table("tokens").num_rows > 50


def test_stopping_the_server_keeps_the_recording(scripted: Start) -> None:
    front = scripted("good", step_s=0.004)
    front.wait_for_engine("ready")
    front.http.post("/recordings", json={})
    generate(front, 40)
    folder = folder_of(front)
    front.close()
    front.wait_for(lambda: list(folder.glob("*.iwrec")), "file", 15)
    [path] = folder.glob("*.iwrec")
    with RecordingFile(path) as file:
        assert file.table("tokens").num_rows == 40
        assert file.manifest.end_reason == "The server was stopped."


def test_killing_the_process_that_makes_the_file_costs_nothing(scripted: Start, tmp_path: Path) -> None:
    front = scripted("good", step_s=0.002)
    front.wait_for_engine("ready")
    front.http.post("/recordings", json={})
    generate(front, 800)
    front.process.kill()
    front.process.wait()
    [journal] = folder_of(front).glob("*.iwjournal")
    expected = sum(1 for _ in JournalReader(journal))
    for number, after_s in enumerate((0.1, 0.5, 0.7, 0.9)):
        (tmp_path / str(number)).mkdir()
        copy = Path(shutil.copy(journal, tmp_path / str(number) / journal.name))
        with RecordingFile(crashes.kill_finisher(copy, after_s)) as file:
            assert file.manifest.tables["tokens"].rows > 0
            assert file.manifest.tables["steps"].rows <= expected
            assert not copy.exists()
    with RecordingFile(finish(journal)) as file:
        rows = file.manifest.tables["tokens"].rows
    assert rows >= 800 - int((FLUSH_S + GRACE_S) / 0.002)
