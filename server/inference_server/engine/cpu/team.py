"""Runs compiled regions on torch's own OpenMP threads.

torch's operators and the kernels here take turns many times a step. With a pool of threads each, the idle pool spins
on the cores that the other needs; so the regions are launched in the runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

RUNTIMES = ("libgomp*.so*", "libomp*.so*", "libiomp5*.so*", "libomp*.dylib", "libiomp5*.dylib")


def _torch_runtime() -> ctypes.CDLL | None:
    """The OpenMP library that torch runs on, or ``None`` if it cannot be had."""
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for pattern in RUNTIMES:
            for path in sorted(folder.glob(pattern)):
                try:
                    library = ctypes.CDLL(str(path))
                    _ = library.GOMP_parallel, library.omp_get_num_threads, library.omp_get_thread_num
                    # Another copy of the library would be another pool, with another number of threads.
                    if library.omp_get_max_threads() == torch.get_num_threads():
                        return library
                except (OSError, AttributeError):
                    continue
    return None


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


class Team:
    """The threads that a region runs on.

    Parameters
    ----------
    threads : int
        How many at most; without a usable OpenMP runtime there is one.
    """

    def __init__(self, threads: int) -> None:
        library = _torch_runtime() if threads > 1 else None
        self.threads = threads if library is not None else 1
        self.num_threads_address = self.thread_num_address = self.yield_address = 0
        self._parallel = None
        if library is None:
            return
        self.num_threads_address = _address(library.omp_get_num_threads)
        self.thread_num_address = _address(library.omp_get_thread_num)
        if sys.platform != "win32":
            self.yield_address = _address(ctypes.CDLL(None).sched_yield)
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._parallel.restype = None

    def run(self, function: int, argument: int) -> None:
        """Call the C function at address ``function`` with ``argument`` on every thread; return when all are done."""
        if self._parallel is not None:
            self._parallel(function, argument, self.threads, 0)
        else:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
