"""Runs single operations of the CPU fast path."""

from __future__ import annotations

import numpy as np

from inference_server.engine.cpu import kernels
from inference_server.engine.cpu.team import Team


def run_operation(op: list[int], threads: int = 2, **parameters: int) -> None:
    """Run one operation of a program on a team, as a step does."""
    program = np.zeros((1, kernels.OP_WIDTH), dtype=np.int64)
    program[0, : len(op)] = op
    counter = np.zeros(1, dtype=np.int64)
    values = np.zeros(kernels.NUM_PARAMETERS, dtype=np.int64)
    team = Team(threads)
    values[kernels.P_PROGRAM] = program.ctypes.data
    values[kernels.P_LAST] = 1
    values[kernels.P_BARRIER] = counter.ctypes.data
    values[kernels.P_THREADS] = team.num_threads_address
    values[kernels.P_THREAD] = team.thread_num_address
    values[kernels.P_YIELD] = team.yield_address
    for name, value in parameters.items():
        values[getattr(kernels, f"P_{name.upper()}")] = value
    team.run(kernels.region.address, values.ctypes.data)
