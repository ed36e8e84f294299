"""No child outlives its parent, however the parent goes; and none dies of a thread of its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest
from running_front import gone

CHILD = """
import signal, sys, time
from inference_server.lifetime import die_with_parent
die_with_parent(signal.SIGTERM, even_if_hung=sys.argv[1] == "hung")
print("up", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, threading, time
from inference_server.lifetime import lifeline
children = []
def spawn():
    with lifeline() as line:
        fds, environment = ((line.child_fd,), line.environment) if {lifeline} else ((), {{}})
        children.append(subprocess.Popen(
            [sys.executable, "-c", sys.argv[1], {kind!r}], pass_fds=fds, env=os.environ | environment,
            stdout=subprocess.PIPE,
        ))
{start}
children[0].stdout.readline()
if {fork} and os.fork() == 0:
    time.sleep(5)
    os._exit(0)
print(children[0].pid, flush=True)
time.sleep(60)
"""
IN_MAIN = "spawn()"
IN_THREAD = "thread = threading.Thread(target=spawn); thread.start(); thread.join()"


def start(kind: str, *, lifeline: bool = True, fork: bool = False, how: str = IN_MAIN) -> tuple[subprocess.Popen, int]:
    script = textwrap.dedent(PARENT).format(kind=kind, lifeline=lifeline, fork=fork, start=how)
    parent = subprocess.Popen(
        [sys.executable, "-c", script, CHILD],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def within(seconds: float, happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("kind", ["hung", "watching"])
@pytest.mark.parametrize("lifeline", [True, False])
def test_a_child_dies_with_a_parent_that_is_killed(kind: str, lifeline: bool) -> None:
    parent, child = start(kind, lifeline=lifeline)
    assert not gone(child)
    parent.kill()
    parent.wait()
    assert within(5, lambda: gone(child))


def test_a_fork_of_the_parent_that_still_holds_the_pipe_keeps_no_child_alive() -> None:
    parent, child = start("watching", fork=True)
    parent.kill()
    parent.wait()
    assert within(3, lambda: gone(child))


def test_a_child_survives_the_thread_that_started_it() -> None:
    parent, child = start("watching", how=IN_THREAD)
    time.sleep(1.5)
    assert not gone(child)
    parent.kill()
    parent.wait()
    assert within(5, lambda: gone(child))


def test_a_stopped_child_is_ended_by_the_kernel() -> None:
    """Its own thread cannot notice anything while it holds still; the kernel's signal waits for it."""
    import signal

    parent, child = start("hung")
    os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    os.kill(child, signal.SIGCONT)
    assert within(0.8, lambda: gone(child))
