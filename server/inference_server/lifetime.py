"""Dying with the parent: no process that holds a GPU may outlive the one that it works for, SIGKILL included.

Two mechanisms, because each has a gap. Linux sends a signal when the parent's forking *thread* ends
(``PR_SET_PDEATHSIG``), so a child must be spawned from a thread that lives as long as the parent. Everywhere, a pipe
whose only write end the parent holds reads end-of-file when the parent is gone, however it went.

The parent calls :func:`lifeline` when it spawns; the child calls :func:`die_with_parent` first thing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_PARENT_VARIABLE = "INFERENCE_WORKBENCH_PARENT_PID"
_PIPE_VARIABLE = "INFERENCE_WORKBENCH_LIFELINE_FD"
_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Lifeline:
    """What a parent hands to a child that shall not outlive it."""

    environment: dict[str, str]
    """To be added to the child's environment."""
    child_fd: int
    """Read end of the pipe, for ``pass_fds``."""
    parent_fd: int
    """Write end: never written to, and kept open for as long as the child may live."""

    def release(self) -> None:
        """Close the parent's end, once the child is gone (a child still there would die of it)."""
        with contextlib.suppress(OSError):
            os.close(self.parent_fd)


@contextlib.contextmanager
def lifeline() -> Iterator[Lifeline]:
    """Make a :class:`Lifeline` around a spawn: the child's end is closed here when the block ends.

    When the block raises, nothing was spawned, and the parent's end is closed too.
    """
    read_fd, write_fd = os.pipe()  # neither is inherited unless passed on
    line = Lifeline(
        environment={_PARENT_VARIABLE: str(os.getpid()), _PIPE_VARIABLE: str(read_fd)},
        child_fd=read_fd,
        parent_fd=write_fd,
    )
    try:
        yield line
    except BaseException:
        line.release()
        raise
    finally:
        os.close(read_fd)


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Arrange for this process to get ``signal_number`` when its parent is gone, and at once if it already is.

    Without a lifeline (the parent is somebody else's code) the parent is whoever it is now, and where the kernel sends
    no signal a thread looks once a second.

    Parameters
    ----------
    signal_number
        ``SIGKILL`` for a process that has nothing to tidy up; ``SIGTERM`` for one that has.
    """
    expected = int(os.environ.pop(_PARENT_VARIABLE, 0)) or os.getppid()
    pipe = os.environ.pop(_PIPE_VARIABLE, None)
    signalled = _ask_kernel_for_signal(signal_number)
    if os.getppid() != expected:  # the parent went away before we asked
        os.kill(os.getpid(), signal_number)
    if pipe is not None:
        _watch(lambda: _wait_for_end_of_file(int(pipe)), signal_number)
    elif not signalled:
        _watch(lambda: _wait_for_other_parent(expected), signal_number)


def _ask_kernel_for_signal(signal_number: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0) == 0)


def _watch(wait: Callable[[], None], signal_number: int) -> None:
    def run() -> None:
        wait()
        os.kill(os.getpid(), signal_number)

    threading.Thread(target=run, name="parent-watch", daemon=True).start()


def _wait_for_end_of_file(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.set_inheritable(descriptor, False)
        while os.read(descriptor, 1):
            pass


def _wait_for_other_parent(expected: int) -> None:
    while os.getppid() == expected:
        time.sleep(_POLL_S)
