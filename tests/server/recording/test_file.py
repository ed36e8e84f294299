"""A recording holds what was logged, and whatever is wrong with a file is said clearly."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from recorded_events import BEGIN

from inference_server.recording.convert import finish
from inference_server.recording.file import RecordingFile
from inference_server.recording.format import TABLES, RecordingError


def test_every_table_has_the_rows_of_the_events_that_were_logged(recording: Path) -> None:
    with RecordingFile(recording) as file:
        rows = {name: file.table(name).num_rows for name in TABLES}
        tokens = file.table("tokens").to_pydict()
        requests = file.table("requests").to_pylist()
        manifest = file.manifest
    assert rows == {
        "steps": 5, "step_requests": 10, "tokens": 10, "requests": 2, "request_events": 4, "features": 1,
        "kv_events": 10, "engine_events": 1, "device": 1, "device_processes": 2, "telemetry_cost": 1,
    }  # fmt: skip
    assert {name: info.rows for name, info in manifest.tables.items()} == rows
    assert tokens["request"] == [1, 2] * 5
    assert tokens["forward_ns"] == [501, 502] * 5
    assert tokens["text"] == ["é"] * 10
    assert requests[0]["prompt"] == [5, 6, 7]
    assert json.loads(requests[1]["sampling"])["seed"] == 2
    assert requests[1]["seed"] == 2**64 - 2, "a seed keeps all its bits"
    assert requests[0]["forward_ns"] == 5 * 501
    assert requests[0]["tokens_recorded"] == 5
    assert not manifest.recovered
    assert manifest.end_reason == "stopped"
    assert manifest.models[0].model.name == "tiny"


def test_the_entries_are_stored_and_readable_by_any_parquet_reader(recording: Path, tmp_path: Path) -> None:
    import duckdb

    with zipfile.ZipFile(recording) as archive:
        assert archive.namelist()[0] == "manifest.json"
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        archive.extractall(tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "steps.parquet").num_rows == 5
    query = f"select sum(forward_ns) from '{tmp_path}/out/tokens.parquet'"
    assert duckdb.connect().execute(query).fetchone() == (5 * (501 + 502),)


def test_a_finished_journal_is_removed_and_its_file_stands_alone(journal: Path) -> None:
    file = finish(journal)
    assert sorted(path.name for path in journal.parent.iterdir()) == [file.name]


def _rewrite(recording: Path, **manifest: object) -> Path:
    """Copy of a recording whose manifest says something else."""
    other = recording.with_name("other.iwrec")
    with zipfile.ZipFile(recording) as before, zipfile.ZipFile(other, "w") as after:
        for name in before.namelist():
            data = before.read(name)
            if name == "manifest.json":
                data = json.dumps(json.loads(data) | manifest).encode()
            after.writestr(name, data)
    return other


def test_a_recording_of_a_later_version_is_refused_with_the_way_out(recording: Path) -> None:
    with pytest.raises(RecordingError, match=r"format version 2.*Install a newer"):
        RecordingFile(_rewrite(recording, format_version=2))


def test_a_zip_file_of_something_else_is_no_recording(tmp_path: Path, recording: Path) -> None:
    foreign = tmp_path / "foreign.iwrec"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("letter.txt", "Dear …")
    with pytest.raises(RecordingError, match=r"no recording: it has no manifest\.json"):
        RecordingFile(foreign)
    with pytest.raises(RecordingError, match="of format 'docx'"):
        RecordingFile(_rewrite(recording, format="docx"))


def test_a_file_that_is_no_zip_and_a_missing_one_are_told_apart(tmp_path: Path) -> None:
    text = tmp_path / "notes.iwrec"
    text.write_text("these are my notes")
    with pytest.raises(RecordingError, match="not a ZIP file"):
        RecordingFile(text)
    with pytest.raises(RecordingError, match="There is no recording at"):
        RecordingFile(tmp_path / "absent.iwrec")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_recording_says_that_its_end_is_missing(recording: Path, share: float) -> None:
    data = recording.read_bytes()
    recording.write_bytes(data[: int(share * len(data))])
    with pytest.raises(RecordingError, match="truncated"):
        RecordingFile(recording)


def test_a_flipped_bit_is_found_wherever_it_is(recording: Path) -> None:
    """Every 97th byte of the file is damaged once; it opens and reads as before, or says that it is damaged."""
    data = recording.read_bytes()
    silent = []
    with RecordingFile(recording) as file:
        good = {name: file.table_bytes(name) for name in TABLES}
    for place in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        recording.write_bytes(damaged)
        try:
            with RecordingFile(recording) as file:
                if any(file.table_bytes(name) != good[name] for name in TABLES):
                    silent.append(place)
                [file.table(name) for name in TABLES]
        except RecordingError:
            continue
    assert not silent


def test_a_journal_opens_like_a_recording_and_is_left_alone(journal: Path) -> None:
    with RecordingFile(journal) as file:
        assert file.table("tokens").num_rows == 10
    assert journal.exists()


def test_the_last_moment_of_a_recovered_recording_is_that_of_its_last_event(journal: Path) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    copy = shutil.copy(journal, journal.with_name("b.iwjournal"))
    with RecordingFile(copy) as file:
        assert file.manifest.recovered
        assert file.manifest.torn_bytes > 0
        assert file.manifest.ended_ns == BEGIN + 10_000
