"""A journal and a recording made of events that a server could have logged."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_events import manifest, served, some_events

from inference_server.recording.convert import finish
from inference_server.recording.journal import JournalServed, JournalWriter


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal that was ended in an orderly way."""
    path = tmp_path / "a-recording.iwjournal"
    writer = JournalWriter(path, manifest(), max_bytes=1 << 30)
    writer.add(JournalServed(served=served()))
    for event in some_events():
        writer.add(event)
    writer.close("stopped")
    return path


@pytest.fixture
def recording(journal: Path) -> Path:
    """The same as a finished file."""
    return finish(journal)
