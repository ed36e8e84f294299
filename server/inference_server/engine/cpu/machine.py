"""What a program of compiled operations runs on: threads, the integers that it is given, and the barrier's counter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from inference_server.engine.cpu import kernels
from inference_server.engine.cpu.team import Team

INT = np.int64


class Machine:
    """Runs ranges of a program on a team.

    Parameters
    ----------
    team : Team
    """

    def __init__(self, team: Team) -> None:
        self.parameters: NDArray[np.int64] = np.zeros(kernels.NUM_PARAMETERS, dtype=INT)
        """By the kernels' ``P_…``."""
        self.program: NDArray[np.int64] = np.zeros((0, kernels.OP_WIDTH), dtype=INT)
        """A row for each operation."""
        self._team = team
        self._address: int = self.parameters.ctypes.data
        # The counter has a cache line of its own: all threads write to it.
        self._counter = np.zeros(24, dtype=INT)
        address = (self._counter.ctypes.data + 127) // 64 * 64
        self._counter_index = (address - self._counter.ctypes.data) // 8
        self._region = int(kernels.region.address or 0)
        self.parameters[kernels.P_BARRIER] = address
        self.parameters[kernels.P_THREADS] = team.num_threads_address
        self.parameters[kernels.P_THREAD] = team.thread_num_address
        self.parameters[kernels.P_YIELD] = team.yield_address

    def load(self, operations: Sequence[Sequence[int]]) -> None:
        """Take up a program."""
        program = np.zeros((len(operations), kernels.OP_WIDTH), dtype=INT)
        for row, operation in enumerate(operations):
            program[row, : len(operation)] = operation
        self.use(program)

    def use(self, program: NDArray[np.int64]) -> None:
        """Take up a program that is laid out already, ``[operations, OP_WIDTH]``."""
        self.program = program
        self.parameters[kernels.P_PROGRAM] = program.ctypes.data

    def run(self, first: int, last: int) -> None:
        """Run operations ``[first, last)``."""
        self.parameters[kernels.P_FIRST] = first
        self.parameters[kernels.P_LAST] = last
        self._counter[self._counter_index] = 0
        self._team.run(self._region, self._address)


def float_bits(value: float) -> int:
    """The bits of a float32, as operations are given numbers that are not whole."""
    return int(np.float32(value).view(np.uint32))
