"""Runs single operations of the CPU fast path."""

from __future__ import annotations

from inference_server.engine.cpu import kernels
from inference_server.engine.cpu.machine import Machine
from inference_server.engine.cpu.team import Team


def run_operation(op: list[int], threads: int = 2, **parameters: int) -> None:
    """Run one operation of a program on a team, as a step does."""
    machine = Machine(Team(threads))
    machine.load([op])
    for name, value in parameters.items():
        machine.parameters[getattr(kernels, f"P_{name.upper()}")] = value
    machine.run(0, 1)
