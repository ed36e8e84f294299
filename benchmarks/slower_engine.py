"""The real engine, 5 % slower while the batch cap is 31: what a comparison has to find.

Run by a front as its engine: ``INFERENCE_WORKBENCH_ENGINE_COMMAND='["python", "benchmarks/slower_engine.py"]'``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from inference_server.engine import process
from inference_server.engine.core import Engine

MARK = 31
SLOWDOWN = 0.05

_step = Engine.step


def _slower(self: Engine) -> Any:
    if self.features.max_num_seqs != MARK:
        return _step(self)
    begin = time.perf_counter()
    result = _step(self)
    end = time.perf_counter() + SLOWDOWN * (time.perf_counter() - begin)
    while time.perf_counter() < end:
        pass  # a sleep would last longer than asked for where anything else wants the processor
    return result


if __name__ == "__main__":
    # At the priority of other programs, so that these have no more say in the measurement than they must.
    process.NICENESS_ON_CPU = 0
    Engine.step = _slower  # type: ignore[method-assign]
    sys.exit(process.main())
