"""Recordings opened in Python: tables, SQL, summary, exports, and files that are none."""

import json
import subprocess
import sys
import zipfile
from itertools import pairwise

import msgspec
import numpy as np
import pandas as pd
import pytest
from servers_under_test import ROOT, python_path

import inference_workbench as iw
from inference_server.protocol import PARTS
from inference_workbench.errors import WorkbenchError

sys.path.insert(0, str(ROOT / "tests"))

from synthetic_recording import write_recording


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_recording(tmp_path_factory.mktemp("recording") / "small.iwrec", tokens=300, pause_s=2)


@pytest.fixture
def recording(path):
    with iw.open_recording(path) as opened:
        yield opened


def test_every_table_is_there_as_a_frame_as_arrow_and_as_an_attribute(recording):
    for name in recording.tables:
        assert recording.tables[name].shape == recording.arrow(name).shape
        assert getattr(recording, name) is recording.tables[name]
        assert len(recording.tables[name]) == recording.manifest.tables[name].rows
    with pytest.raises(AttributeError, match=r"no attribute 'cake'.*steps"):
        _ = recording.cake


def test_sql_sees_the_tables_and_nothing_else(recording, tmp_path):
    tokens = recording.tokens
    counted = recording.sql("select request, count(*) as n from tokens group by request order by request")
    assert counted["n"].tolist() == tokens.groupby("request").size().tolist()
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    local = pd.DataFrame({"a": [1]})
    assert len(local) == 1
    for forbidden in (f"select * from '{secret}'", "select * from local", f"copy tokens to '{secret}'"):
        with pytest.raises(Exception, match=r"(?i)disabled|not exist|permission"):
            recording.sql(forbidden)


def test_the_summary_is_what_the_tables_say(recording):
    summary = recording.summary()
    tokens, requests = recording.tokens, recording.requests
    assert summary.tokens == len(tokens)
    assert summary.requests == len(requests) == summary.finished
    assert summary.switches == 1
    first = tokens[tokens["index"] == 0]
    assert summary.ttft_p50_ms == pytest.approx(np.median(first["latency_ns"]) / 1e6)
    assert summary.itl_p95_ms == pytest.approx(np.percentile(tokens[tokens["index"] > 0]["latency_ns"], 95) / 1e6)
    assert sum(summary.parts.values()) == pytest.approx(1)
    assert "unexplained" in repr(summary)
    assert summary.to_series()["share_unexplained"] == summary.parts["unexplained"]


def test_seeds_stay_exact_where_some_are_missing(tmp_path):
    frame = iw.open_recording(write_recording(tmp_path / "seeds.iwrec", tokens=40)).request_events
    assert frame["seed"].isna().any()
    assert frame["seed"].dtype == pd.UInt64Dtype()


# -- exports ----------------------------------------------------------------------------------------------------------


def test_csv_files_hold_the_same_rows(recording, tmp_path):
    folder = recording.to_csv(tmp_path / "csv")
    for name in recording.tables:
        assert len(pd.read_csv(folder / f"{name}.csv")) == len(recording.tables[name])
    tokens = pd.read_csv(folder / "tokens.csv", keep_default_na=False)
    assert tokens["sent_ns"].tolist() == recording.tokens["sent_ns"].tolist()


def test_the_chrome_trace_keeps_to_the_format_in_every_event(recording, tmp_path):
    """The trace-event format as Perfetto reads it: fields and types per phase, slices of a track nest."""
    trace = json.loads(recording.to_chrome_trace(tmp_path / "trace.json").read_text())
    assert trace["displayTimeUnit"] == "ms"
    assert all(isinstance(value, str) for value in trace["otherData"].values())
    tracks = {}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["ts"], int | float)
        assert isinstance(event["args"], dict)
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                assert isinstance(event["cat"], str)
                tracks.setdefault((event["pid"], event["tid"]), []).append(event)
            case "C":
                assert event["args"]
                assert all(isinstance(value, int | float) for value in event["args"].values())
            case "i":
                assert event["s"] in {"g", "p", "t"}
            case "M":
                assert event["name"] in {"process_name", "thread_name"}
                assert isinstance(event["args"]["name"], str)
            case other:
                pytest.fail(f"unknown phase {other!r}")
    assert sum(event["ph"] == "i" for event in trace["traceEvents"]) == 1
    for track in tracks.values():
        open_until = []
        for event in sorted(track, key=lambda each: (each["ts"], -each["dur"])):
            while open_until and open_until[-1] <= event["ts"] + 1e-3:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + 1e-3, f"{event} sticks out of its parent"
            open_until.append(end)


def test_the_chrome_trace_has_each_step_request_and_token_where_it_was(recording, tmp_path):
    events = json.loads(recording.to_chrome_trace(tmp_path / "trace.json").read_text())["traceEvents"]
    begin = recording.manifest.started_ns

    def times(category):
        found = [event for event in events if event.get("cat") == category]
        return sorted((round(each["ts"] * 1e3), round((each["ts"] + each["dur"]) * 1e3)) for each in found)

    steps = recording.steps
    assert times("step") == list(zip(steps["begin_ns"] - begin, steps["end_ns"] - begin, strict=True))
    later = recording.tokens[recording.tokens["index"] > 0]
    expected = zip(later["sent_ns"] - later["latency_ns"] - begin, later["sent_ns"] - begin, strict=True)
    assert times("token") == sorted(expected)
    assert len(times("request")) == len(recording.requests)
    phases = [event for event in events if event.get("cat") == "phase" and event["pid"] == 2]
    for _, own in pd.DataFrame(phases).groupby("tid"):
        queue, prefill, decode = own.sort_values("ts", kind="stable").to_dict("records")
        assert [queue["name"], prefill["name"], decode["name"]] == ["queue", "prefill", "decode"]
        for before, after in pairwise((queue, prefill, decode)):
            assert before["ts"] + before["dur"] == pytest.approx(after["ts"], abs=1e-3)


def test_the_html_file_carries_the_recording_unchanged(recording, path, tmp_path):
    import base64
    import re

    page = recording.to_html(tmp_path / "replay.html").read_text()
    data = re.search(r'<script type="text/plain" id="inference-workbench-recording">(.*?)</script>', page, re.DOTALL)
    assert base64.b64decode(data[1]) == path.read_bytes()
    assert page.count("</script>") == 2, "nothing inside ends a script early"
    assert "default-src 'none'" in page


def test_the_command_line_exports(path, tmp_path):
    def export(*arguments):
        command = [sys.executable, "-m", "inference_server.cli", "export", str(path), *map(str, arguments)]
        env = {"PYTHONPATH": python_path(), "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    done = export("--html", "--chrome-trace", "--csv")
    assert done.returncode == 0, done.stderr
    for suffix in (".html", ".trace.json", ".csv"):
        assert str(path.with_suffix(suffix)) in done.stdout
        assert path.with_suffix(suffix).exists()
    assert export().returncode == 2
    broken = export("--html", "--output", tmp_path / "no" / "such" / "folder.html")
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr


# -- what is not a recording ------------------------------------------------------------------------------------------


def test_an_unfinished_journal_opens_up_to_its_last_whole_record(tmp_path):
    journal = write_recording(tmp_path / "running.iwrec", tokens=200, journal_only=True)
    torn = tmp_path / "torn.iwjournal"
    torn.write_bytes(journal.read_bytes()[:-7])
    with iw.open_recording(torn) as opened:
        assert opened.manifest.recovered
        assert opened.manifest.torn_bytes > 0
        assert opened.summary().tokens > 0
        html = opened.to_html(tmp_path / "torn.html")
    assert html.stat().st_size > 100_000
    assert torn.exists(), "reading leaves the journal alone"


def rewritten(path, target, change):
    """A copy of a recording with some entries replaced by ``change(name, content)``."""
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as after:
        for name in before.namelist():
            after.writestr(name, change(name, before.read(name)))
    return target


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path, target: target, "no recording at"),
        (lambda path, target: target.write_bytes(b"cake"), "no recording"),
        (lambda path, target: target.write_bytes(path.read_bytes()[:-2000]), "truncated"),
        (lambda path, target: target.write_bytes(path.read_bytes()[:2000]), "truncated"),
        (
            lambda path, target: rewritten(
                path, target, lambda name, data: data.replace(b'format_version": 1', b'format_version": 7')
            ),
            "version 7.*newer",
        ),
        (
            lambda path, target: rewritten(
                path, target, lambda name, data: data[:-4] if name == "tokens.parquet" else data
            ),
            "tokens.*(damaged|checksum)",
        ),
    ],
    ids=["missing", "foreign", "truncated", "cut short", "future version", "spoiled table"],
)
def test_what_is_no_recording_is_refused_with_a_reason(path, tmp_path, make, words):
    target = tmp_path / "broken.iwrec"
    make(path, target)
    with pytest.raises(iw.RecordingError, match=words):
        iw.open_recording(target).tables["tokens"]


# -- with a real server -----------------------------------------------------------------------------------------------


def test_a_run_has_the_rows_that_a_recording_of_it_has(wb, tmp_path):
    with wb.record(tmp_path / "run.iwrec", note="one request") as recorded:
        run = wb.generate("Once upon a time", max_tokens=12, ignore_eos=True, stream=False)
    with recorded.open() as recording:
        assert recording.manifest.note == "one request"
        for name, key in (("tokens", "index"), ("steps", "step"), ("step_requests", "step")):
            theirs = recording.tables[name]
            if "request" in theirs:
                theirs = theirs[theirs["request"] == run.request.request]
            ours = run.tables[name]
            pd.testing.assert_frame_equal(
                ours.sort_values(key).reset_index(drop=True),
                theirs.sort_values(key).reset_index(drop=True),
                check_dtype=False,
            )
        prompt = recording.requests["prompt"].iloc[0]
        assert len(prompt) == run.request.prompt_tokens
    sums = run.attribution[list(PARTS)].sum(axis=1)
    assert sums.to_numpy() == pytest.approx(run.attribution["latency_ms"].to_numpy())
    assert run.sql("select count(*) as n from tokens")["n"].iloc[0] == 12


def test_recordings_are_started_stopped_listed_fetched_and_removed(wb, tmp_path):
    started = wb.recordings.start("By hand")
    assert wb.recordings.active.id == started.id
    with pytest.raises(iw.RequestError, match="is being recorded"):
        wb.recordings.start()
    wb.generate("Hello", max_tokens=4, stream=False)
    done = wb.recordings.stop()
    assert done.state == "finished"
    assert done.tokens == 4
    assert done.id in [each.id for each in wb.recordings.list()]
    path = wb.recordings.download(done, tmp_path)
    with iw.open_recording(path) as recording:
        assert recording.manifest.name == "By hand"
    wb.recordings.delete(done)
    assert done.id not in [each.id for each in wb.recordings.list()]
    with pytest.raises(iw.RequestError, match="no recording"):
        wb.recordings.download(done, tmp_path)
    with pytest.raises(WorkbenchError, match="Nothing is being recorded"):
        wb.recordings.stop()


@pytest.fixture
def workload(wb, tmp_path):
    """Greedy, seeded and unseeded requests, one after another and at once."""
    with wb.record(tmp_path / "load.iwrec") as recorded:
        wb.generate_many(["One", "Two", "Three"], max_tokens=10, ignore_eos=True)
        wb.generate("Four", max_tokens=8, temperature=1.0, seed=11, ignore_eos=True, stream=False)
        wb.generate("Five", max_tokens=8, temperature=1.0, ignore_eos=True, stream=False)
        wb.generate("Six", max_tokens=8, stop=["e"], logprobs=2, stream=False)
    with recorded.open() as recording:
        yield recording


def test_a_recorded_workload_comes_again_with_the_same_tokens_at_the_same_times(wb, workload):
    seen = []
    again = wb.replay(workload, on_progress=lambda ended, total: seen.append((ended, total)))
    assert again.requests["verdict"].tolist() == ["identical"] * 6, again.requests
    assert again.identical
    assert seen[-1] == (6, 6)
    then, now = workload.requests, again.tables["requests"]
    gaps = np.diff(then.sort_values("arrival_ns")["arrival_ns"].to_numpy()) / 1e6
    assert np.diff(now.sort_values("arrival_ns")["arrival_ns"].to_numpy()) / 1e6 == pytest.approx(gaps, abs=60)
    assert again.summary()["late_ms_max"] < 60
    prompts = workload.requests["prompt"]
    assert sorted(map(len, prompts)) == sorted(again.tables["requests"]["prompt_tokens"])


def test_a_difference_is_named_by_request_position_and_tokens(wb, workload):
    handle = int(workload.requests["request"].iloc[0])
    tokens = workload.tables["tokens"]
    place = (tokens["request"] == handle) & (tokens["index"] == 3)
    right = int(tokens.loc[place, "token_id"].iloc[0])
    tokens.loc[place, "token_id"] = right + 1  # as if the recorded server had chosen another one
    again = iw.replay(workload, wb, speed=50)
    assert not again.identical
    (row,) = again.differences.to_dict("records")
    assert (row["recorded"], row["first_difference"]) == (handle, 3)
    assert (row["recorded_token"], row["token"]) == (right + 1, right)


def test_a_replay_that_is_cancelled_returns_what_there_is(wb, tmp_path):
    import threading

    with wb.record(tmp_path / "slow.iwrec") as recorded:
        for prompt in ("One", "Two", "Three"):
            wb.generate(prompt, max_tokens=6, ignore_eos=True, stream=False)
    cancel = threading.Event()
    with recorded.open() as recording:
        again = iw.replay(
            recording, wb, speed=0.001, cancel=cancel, on_progress=lambda ended, total: cancel.set() if ended else None
        )
    assert again.requests["verdict"].tolist() == ["identical", "not sent", "not sent"]


def test_a_recording_without_prompts_cannot_be_sent_again_and_says_so(wb, workload):
    workload.tables["requests"]["prompt"] = None
    with pytest.raises(WorkbenchError, match="none of them has its prompt"):
        iw.replay(workload, wb)
    assert msgspec.json.decode(workload.requests["sampling"].iloc[0])["max_tokens"]
