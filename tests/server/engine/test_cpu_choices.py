"""The table of measured kernels: what it remembers of a busy hour does not stay for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference_server.engine.cpu import choices
from inference_server.engine.cpu.choices import OWN, TORCH, Shape

SHAPE: Shape = (64, 64)


class Machine:
    """A clock of kernels, of which torch's is the quicker one for many rows, unless something else keeps it busy."""

    def __init__(self, busy: float = 1.0) -> None:
        self.busy = busy
        self.asked = 0

    def __call__(self, kernel: str, shape: Shape, rows: int) -> float:
        del shape
        self.asked += 1
        seconds = {OWN: 1e-6 * rows, TORCH: 2e-5 + 1e-7 * rows}[kernel]
        return seconds * (self.busy if kernel == TORCH else 1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "cache_folder", lambda: tmp_path / "models")


def test_the_quicker_kernel_is_chosen_for_each_number_of_rows() -> None:
    table = choices.load_or_measure("a machine", [SHAPE], Machine())
    assert [table.kernel(SHAPE, rows) for rows in (1, 8, 16, 64, 500)] == [OWN, OWN, OWN, TORCH, TORCH]


def test_a_table_of_a_busy_hour_is_mended_by_the_next_start() -> None:
    busy = choices.load_or_measure("a machine", [SHAPE], Machine(busy=100))
    assert busy.kernel(SHAPE, 64) == OWN
    quiet = Machine()
    mended = choices.load_or_measure("a machine", [SHAPE], quiet)
    assert mended.kernel(SHAPE, 64) == TORCH
    assert quiet.asked > 0
    # And the other way round a busy start does not spoil what was found.
    kept = choices.load_or_measure("a machine", [SHAPE], Machine(busy=100))
    assert kept.seconds == mended.seconds
    # Of another machine nothing is known.
    assert choices.load_or_measure("another machine", [SHAPE], Machine(busy=100)).kernel(SHAPE, 64) == OWN
