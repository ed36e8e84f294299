"""Processes that tests start: where they may listen, and how they are ended."""

from __future__ import annotations

import signal
import socket
import subprocess


def free_port() -> int:
    """Return a TCP port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Ask a process to end, and after ``patience_s`` do not ask any more."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
