"""What was flushed into a journal can be read, whatever happened afterwards."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_events import manifest, some_events, step_event

from inference_server.recording.convert import finish
from inference_server.recording.format import RecordingError
from inference_server.recording.journal import JournalEnd, JournalReader, JournalWriter, is_being_written, unfinished


def test_a_journal_gives_back_the_events_in_order(journal: Path) -> None:
    records = list(JournalReader(journal))
    assert records[1:-1] == some_events()
    assert isinstance(records[-1], JournalEnd)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_journal_cut_anywhere_gives_a_prefix_of_what_was_logged(journal: Path, data: st.DataObject) -> None:
    whole = journal.with_suffix(".whole")
    if not whole.exists():
        whole.write_bytes(journal.read_bytes())
    content = whole.read_bytes()
    records = list(JournalReader(whole))
    length = data.draw(st.integers(0, len(content)))
    damage = data.draw(st.booleans())
    journal.write_bytes(content[:length] + (b"\x00\xff garbage" if damage else b""))
    try:
        reader = JournalReader(journal)
    except RecordingError:
        return  # not even the head was whole
    found = list(reader)
    assert found == records[: len(found)]
    assert reader.good_bytes + reader.torn_bytes == journal.stat().st_size
    assert journal.read_bytes()[: reader.good_bytes] == content[: reader.good_bytes]


def test_what_is_appended_reaches_the_disk_within_the_flush_interval(tmp_path: Path) -> None:
    path = tmp_path / "live.iwjournal"
    writer = JournalWriter(path, manifest(flush_interval_s=0.2), max_bytes=1 << 30)
    try:
        writer.add(step_event(1, [1], 1))
        deadline = time.monotonic() + 5
        appended = time.monotonic()
        while not list(JournalReader(path)):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert time.monotonic() - appended < 0.2 + 0.5, "half a second of grace on a busy machine"
    finally:
        writer.close("done")


def test_a_journal_that_is_being_written_is_not_taken_for_an_abandoned_one(tmp_path: Path) -> None:
    path = tmp_path / "live.iwjournal"
    writer = JournalWriter(path, manifest(), max_bytes=1 << 30)
    assert is_being_written(path)
    assert unfinished(tmp_path) == []
    with pytest.raises(RecordingError, match="in use"):
        finish(path)
    writer.close("done")
    assert not is_being_written(path)
    assert unfinished(tmp_path) == [path]


def test_a_recording_ends_by_itself_at_its_limit_and_says_so(tmp_path: Path) -> None:
    reasons: list[str] = []
    path = tmp_path / "small.iwjournal"
    writer = JournalWriter(path, manifest(), max_bytes=20_000, on_end=reasons.append)
    deadline = time.monotonic() + 10
    step = 0
    while not reasons:
        assert time.monotonic() < deadline
        writer.add(step_event(step := step + 1, [1, 2, 3], step))
        time.sleep(0.0005)
    assert "limit" in reasons[0]
    end = list(JournalReader(path))[-1]
    assert isinstance(end, JournalEnd)
    assert end.reason == reasons[0]


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.iwjournal"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(RecordingError, match="no journal"):
        JournalReader(path)
