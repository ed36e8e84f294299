"""A front in a process of its own, as a user would have it, with the real engine or with a scripted one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import openai
import psutil

from inference_server.discovery import ServerFile

SCRIPTED = Path(__file__).parent / "scripted_engine.py"
TOKEN = "a-token-for-tests"
T = TypeVar("T")


class RunningFront:
    """``inference-workbench serve`` on a free port."""

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        *options: str,
        program: tuple[str, ...] = ("-m", "inference_server.cli"),
    ) -> None:
        self.folder = folder
        self.log = folder / "front.log"
        environment = {
            **os.environ,
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_DATA_HOME": str(folder / "data"),
            "INFERENCE_WORKBENCH_TOKEN": TOKEN,
            "PYTHONPATH": os.pathsep.join(sys.path),
            **environment,
        }
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", "--port", "0", *options],
            env=environment,
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
        )
        try:
            self.file = self.wait_for(self._server_file, "an info file")
        except BaseException:
            self.process.kill()
            raise
        assert self.file.url is not None
        self.url = self.file.url
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)

    def _server_file(self) -> ServerFile | None:
        import msgspec

        assert self.process.poll() is None, self.log.read_text()
        for path in (self.folder / "runtime").glob("inference-workbench-*.json"):
            return msgspec.json.decode(path.read_bytes(), type=ServerFile)
        return None

    def wait_for(self, look: Callable[[], T | None], what: str, within_s: float = 30) -> T:
        deadline = time.monotonic() + within_s
        while not (found := look()):
            assert time.monotonic() < deadline, f"no {what} within {within_s} s\n{self.log.read_text()}"
            time.sleep(0.02)
        return found

    def engine(self) -> dict:
        return self.http.get("/info").json()["engine"]

    def wait_for_engine(self, state: str, within_s: float = 60) -> dict:
        return self.wait_for(lambda: (e := self.engine())["state"] == state and e, f"engine {state}", within_s)

    def wait_until_idle(self) -> None:
        self.wait_for(lambda: not self.active(), "idle server")

    def active(self) -> list[dict]:
        ended = {"finished", "cancelled", "failed"}
        return [r for r in self.http.get("/requests").json()["requests"] if r["state"] not in ended]

    def engine_output(self) -> str:
        return "".join(path.read_text() for path in (self.folder / "state").rglob("engine-*.log"))

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=60)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=60)

    def close(self) -> None:
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()


def scripted_command(tokenizer: Path, behaviour: str, **options: object) -> str:
    """Return the setting that makes a front run the scripted engine."""
    command = [sys.executable, str(SCRIPTED), "--tokenizer", str(tokenizer), "--behaviour", behaviour]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return json.dumps(command)


@contextlib.contextmanager
def running(
    folder: Path, environment: dict[str, str], *options: str, **more: tuple[str, ...]
) -> Iterator[RunningFront]:
    front = RunningFront(folder, environment, *options, **more)
    try:
        yield front
    finally:
        front.close()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
