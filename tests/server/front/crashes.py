"""Kills a process of a server that records, and says what the recording lacks: shared by a test and a benchmark."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from watcher import Watcher

from inference_server.recording.convert import finish
from inference_server.recording.file import RecordingFile
from inference_server.recording.format import TABLES
from inference_server.recording.journal import is_being_written


@dataclass
class Aftermath:
    """What a recording holds after a crash, compared with what a client had heard until then."""

    heard: int
    """Tokens that the client had heard of."""
    recorded: int
    missing: int
    oldest_missing_s: float
    """How long before the crash the client had heard of the oldest token that is missing; 0 if none is."""
    recovered: bool
    torn_bytes: int


class Load:
    """Streams from a server until it is gone."""

    def __init__(self, url: str, headers: dict[str, str], streams: int) -> None:
        self._ending = threading.Event()
        self._client = httpx.Client(base_url=url, headers=headers, timeout=60)
        self._threads = [threading.Thread(target=self._stream, args=(n,), daemon=True) for n in range(streams)]
        for thread in self._threads:
            thread.start()

    def _stream(self, number: int) -> None:
        body = {"prompt": [70 + number, 71, 72], "max_tokens": 2000, "stream": True, "ignore_eos": True}
        headers = {"Accept": "text/event-stream"}  # what the JupyterLab proxy streams
        try:
            with self._client.stream("POST", "v1/completions", json=body, headers=headers) as answer:
                for _ in answer.iter_lines():
                    if self._ending.is_set():
                        return
        except httpx.HTTPError:
            return

    def close(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(10)
        self._client.close()


def compare(file: Path, watcher: Watcher, killed_at: float) -> Aftermath:
    """Open a recording, read every table, and hold it against what the watcher heard before the crash."""
    with RecordingFile(file) as recording:
        tables = {name: recording.table(name) for name in TABLES}
        manifest = recording.manifest
    columns = tables["tokens"].to_pydict()
    recorded = set(zip(columns["request"], columns["index"], strict=True))
    heard = {token: moment for token, moment in watcher.tokens().items() if moment <= killed_at}
    missing = [moment for token, moment in heard.items() if token not in recorded]
    return Aftermath(
        heard=len(heard),
        recorded=len(recorded),
        missing=len(missing),
        oldest_missing_s=max((killed_at - moment for moment in missing), default=0.0),
        recovered=manifest.recovered,
        torn_bytes=manifest.torn_bytes,
    )


def kill_front(
    url: str, headers: dict[str, str], token: str, pid: int, folder: Path, after_s: float, *, keep: Path | None = None
) -> Aftermath:
    """Record under load, kill the front ``after_s`` seconds later, and recover the journal it left in ``folder``.

    ``keep`` gets a copy of the journal.
    """
    client = httpx.Client(base_url=url, headers=headers, timeout=60)
    with Watcher(url, token) as watcher:
        client.post("recordings", json={"name": "crash"}).raise_for_status()
        load = Load(url, headers, 4)
        time.sleep(after_s)
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        load.close()
        client.close()
        [journal] = folder.glob("*.iwjournal")
        _wait_until_abandoned(journal)
        if keep is not None:
            keep.mkdir()
            shutil.copy(journal, keep)
        return compare(finish(journal), watcher, killed_at)


def kill_engine(url: str, headers: dict[str, str], token: str, folder: Path, after_s: float) -> Aftermath:
    """Record under load, kill the engine ``after_s`` seconds later, and stop the recording in good order."""
    client = httpx.Client(base_url=url, headers=headers, timeout=60)
    with Watcher(url, token) as watcher:
        identifier = client.post("recordings", json={"name": "crash"}).raise_for_status().json()["id"]
        load = Load(url, headers, 4)
        time.sleep(after_s)
        os.kill(client.get("info").json()["engine"]["pid"], signal.SIGKILL)
        load.close()
        time.sleep(0.3)  # what the engine had said is still on its way through the front
        answer = client.post(f"recordings/{identifier}/stop?wait=true", json={}).json()
        client.close()
        assert answer["state"] == "finished", answer
        return compare(folder / answer["file"], watcher, time.monotonic())


def kill_finisher(journal: Path, after_s: float) -> Path:
    """Kill the process that makes a file of a journal, then make it again."""
    process = subprocess.Popen(
        [sys.executable, "-m", "inference_server.recording.finish", str(journal)], stdout=subprocess.DEVNULL
    )
    time.sleep(after_s)
    process.kill()
    process.wait()
    target = journal.with_suffix(".iwrec")
    return target if target.exists() else finish(journal)


def _wait_until_abandoned(journal: Path) -> None:
    """A killed process holds its journal's lock until the kernel has taken down the last of its threads."""
    deadline = time.monotonic() + 10
    while is_being_written(journal) and time.monotonic() < deadline:
        time.sleep(0.01)
