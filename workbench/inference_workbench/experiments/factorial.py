"""Two-level factorial designs: which combinations of switches to run, and what a fraction of them cannot tell apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from inference_workbench.errors import WorkbenchError

Design = Literal["full", "half", "quarter", "smallest"]

# Generators of the usual fractions (Box, Hunter & Hunter 2005, table 6.22): factor = product of the basic ones.
_GENERATORS: dict[tuple[int, int], tuple[str, ...]] = {
    (3, 1): ("AB",),
    (4, 1): ("ABC",),
    (5, 1): ("ABCD",),
    (5, 2): ("AB", "AC"),
    (6, 1): ("ABCDE",),
    (6, 2): ("ABC", "BCD"),
    (6, 3): ("AB", "AC", "BC"),
    (7, 1): ("ABCDEF",),
    (7, 2): ("ABCD", "ABDE"),
    (7, 3): ("ABC", "BCD", "ACD"),
    (7, 4): ("AB", "AC", "BC", "ABC"),
    (8, 2): ("ABCD", "ABEF"),
    (8, 3): ("ABC", "ABD", "BCDE"),
    (8, 4): ("BCD", "ACD", "ABC", "ABD"),
}
_LETTERS = "ABCDEFGH"
MAX_FACTORS = len(_LETTERS)


def design_points(factors: int, design: Design) -> npt.NDArray[np.int64]:
    """Return the combinations to run.

    Parameters
    ----------
    factors : int
        How many switches.
    design
        ``full``: all 2^k combinations. ``half`` and ``quarter``: so many of them, chosen so that main effects are mixed
        up with interactions of the highest order possible. ``smallest``: the fewest that there is a design for.

    Returns
    -------
    array of shape (runs, factors)
        Levels −1 and +1.

    Raises
    ------
    WorkbenchError
        If there is no such design.
    """
    if not 2 <= factors <= MAX_FACTORS:
        raise WorkbenchError(f"An ablation takes 2 to {MAX_FACTORS} switches, not {factors}.")
    known = sorted(p for k, p in _GENERATORS if k == factors)
    removed = {"full": 0, "half": 1, "quarter": 2, "smallest": known[-1] if known else 0}[design]
    if removed and (factors, removed) not in _GENERATORS:
        possible = ["full"] + [name for name, p in (("half", 1), ("quarter", 2)) if p in known]
        raise WorkbenchError(f"There is no {design!r} design for {factors} switches; there are: {', '.join(possible)}.")
    basic = np.array(list(itertools.product((-1, 1), repeat=factors - removed)), dtype=np.int64)
    columns = [basic[:, place] for place in range(factors - removed)]
    for word in _GENERATORS.get((factors, removed), ()) if removed else ():
        columns.append(np.prod([columns[_LETTERS.index(letter)] for letter in word], axis=0))
    return np.stack(columns, axis=1)


def contrasts(points: npt.NDArray[np.int64], names: Sequence[str]) -> dict[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the column of signs of each main effect and each interaction of two switches."""
    columns: dict[tuple[str, ...], npt.NDArray[np.int64]] = {
        (name,): points[:, place] for place, name in enumerate(names)
    }
    for (one, first), (other, second) in itertools.combinations(enumerate(names), 2):
        columns[first, second] = points[:, one] * points[:, other]
    return columns


def aliases(columns: Mapping[tuple[str, ...], npt.NDArray[np.int64]]) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Return, for each effect, those that a design cannot tell from it: their columns are the same, or opposite."""
    return {
        effect: [
            other
            for other, column in columns.items()
            if other != effect and abs(int(column @ columns[effect])) == len(column)
        ]
        for effect in columns
    }
