"""Dying with the parent: no process that holds a GPU may outlive the one that it works for, SIGKILL included.

Two mechanisms, because each has a gap. Linux sends a signal, which nothing can hold up, but when the parent's forking
*thread* ends (``PR_SET_PDEATHSIG``). Everywhere, a pipe whose only write end the parent holds reads end-of-file when
the parent is gone, however it went; a thread of the child has to notice that.

The parent calls :func:`lifeline` when it spawns; the child calls :func:`die_with_parent` first thing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_PARENT_VARIABLE = "INFERENCE_WORKBENCH_PARENT_PID"
_PIPE_VARIABLE = "INFERENCE_WORKBENCH_LIFELINE_FD"
_PR_SET_PDEATHSIG = 1
_POLL_MS = 1000


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


def die_with_parent(signal_number: int = signal.SIGKILL, *, even_if_hung: bool = True) -> None:
    """Arrange for this process to get ``signal_number`` when its parent is gone, and at once if it already is.

    Without a lifeline (the parent is somebody else's code) the parent is whoever it is now.

    Parameters
    ----------
    signal_number
        ``SIGKILL`` for a process that has nothing to tidy up; ``SIGTERM`` for one that has.
    even_if_hung
        Ask the kernel to send the signal too, so that not even a process that is stuck in foreign code survives. Only
        for a child that was spawned from a thread that lives as long as its parent.
    """
    expected = int(os.environ.pop(_PARENT_VARIABLE, 0)) or os.getppid()
    pipe = os.environ.pop(_PIPE_VARIABLE, None)
    if even_if_hung:
        _ask_kernel_for_signal(signal_number)
    if os.getppid() != expected:  # the parent went away before we asked
        os.kill(os.getpid(), signal_number)
        return

    def watch() -> None:
        _wait_until_gone(expected, int(pipe) if pipe is not None else None)
        os.kill(os.getpid(), signal_number)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _ask_kernel_for_signal(signal_number: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def _wait_until_gone(parent: int, pipe: int | None) -> None:
    """Return at once when the pipe ends; within a second when only the parent's id tells (a fork may hold the pipe)."""
    poll = select.poll()
    if pipe is not None:
        try:
            os.set_inheritable(pipe, False)
        except OSError:  # the parent passed the variable on but not the pipe
            pipe = None
        else:
            poll.register(pipe, select.POLLIN)
    while os.getppid() == parent:
        if poll.poll(_POLL_MS) and pipe is not None and not os.read(pipe, 1):
            return
