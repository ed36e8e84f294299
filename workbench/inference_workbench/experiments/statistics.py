"""How sure a difference is: studentized bootstrap intervals, sign-flip tests, a correction for asking several times.

The unit is a pair of runs (or a block of them), never a token or a request: those of one run share its accidents.
Effects are logarithms of ratios, so that twice as fast and half as fast are equally far from no difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_RESAMPLES = 10_000
_EXACT_UP_TO = 14
"""Pairs for which all sign flips are gone through."""
MIN_PAIRS = 4
"""With fewer there is no interval worth the name."""


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """A mean effect with its interval, on the scale it was given in (logarithms of ratios)."""

    estimate: float
    low: float
    high: float
    p: float
    """Chance of a mean at least as far from zero if the sign of every pair's effect were a coin's toss."""
    pairs: int

    @property
    def ratio(self) -> float:
        """Candidate / baseline."""
        return math.exp(self.estimate)

    @property
    def ratio_low(self) -> float:
        """Lower end of its interval."""
        return math.exp(self.low)

    @property
    def ratio_high(self) -> float:
        """Upper end of its interval."""
        return math.exp(self.high)


def paired_effect(effects: Sequence[float] | Floats, confidence: float = 0.95, seed: int = 0) -> Effect:
    """Estimate the mean of some effects.

    The interval is the studentized bootstrap's (Efron & Tibshirani 1993, section 12.5), which covers well with few
    pairs, where the percentile bootstrap is too narrow. The test flips signs (Fisher 1935), exactly for up to 14 pairs.

    Parameters
    ----------
    effects : array of shape (pairs,)
        Of each pair of runs; missing ones are left out.
    confidence : float
        Of the interval.
    seed : int
        Of the resampling: the same effects give the same interval.
    """
    values = np.asarray(effects, dtype=np.float64)
    values = values[np.isfinite(values)]
    count = len(values)
    if count < MIN_PAIRS:
        estimate = float(values.mean()) if count else math.nan
        return Effect(estimate=estimate, low=-math.inf, high=math.inf, p=1.0, pairs=count)
    random = np.random.default_rng(seed)
    mean = float(values.mean())
    error = _standard_error(values[None, :])[0]
    if error == 0:
        return Effect(estimate=mean, low=mean, high=mean, p=1.0 if mean == 0 else _flip_p(values, random), pairs=count)
    samples = values[random.integers(0, count, size=(_RESAMPLES, count))]
    errors = _standard_error(samples)
    usable = errors > 0
    t = (samples[usable].mean(axis=1) - mean) / errors[usable]
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(t, [tail, 1 - tail])
    return Effect(
        estimate=mean,
        low=mean - float(upper) * float(error),
        high=mean - float(lower) * float(error),
        p=_flip_p(values, random),
        pairs=count,
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for having asked as many questions (Holm 1979): all of them together err at the level of one."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - place) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def pairs_needed(effects: Sequence[float] | Floats, size: float, confidence: float = 0.95, power: float = 0.9) -> int:
    """Return about how many pairs it would take to find an effect of a size, given how these effects scatter.

    Parameters
    ----------
    size : float
        As the logarithm of a ratio.
    """
    values = np.asarray(effects, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return MIN_PAIRS
    normal = NormalDist()
    z = normal.inv_cdf(1 - (1 - confidence) / 2) + normal.inv_cdf(power)
    return max(MIN_PAIRS, math.ceil((z * float(values.std(ddof=1)) / size) ** 2))


def two_sample_p(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], seed: int = 0) -> float:
    """Test whether two sets of token sequences, one pair a request, have the same frequencies of tokens.

    The total variation between the pooled frequencies, against what exchanging the two members of random pairs gives.
    """
    names = {token: place for place, token in enumerate(sorted({*itertools.chain(*first, *second)}))}
    counts = np.zeros((2, len(first), len(names)))
    for side, sequences in enumerate((first, second)):
        for row, sequence in enumerate(sequences):
            for token in sequence:
                counts[side, row, names[token]] += 1
    difference = counts[0] - counts[1]
    observed = np.abs(difference.sum(axis=0)).sum()
    random = np.random.default_rng(seed)
    signs = random.choice([-1.0, 1.0], size=(2000, len(first)))
    flipped = np.abs(signs @ difference).sum(axis=1)
    return float((1 + (flipped >= observed - 1e-9).sum()) / (len(flipped) + 1))


def _standard_error(samples: Floats) -> Floats:
    error: Floats = samples.std(axis=1, ddof=1) / math.sqrt(samples.shape[1])
    # Equal values differ by rounding alone.
    error[error < 1e-12] = 0.0
    return error


def _flip_p(values: Floats, random: np.random.Generator) -> float:
    count = len(values)
    observed = abs(values.sum())
    if count <= _EXACT_UP_TO:
        # The first sign may stay: flipping all of them gives the same distance from zero.
        signs = np.array([(1.0, *rest) for rest in itertools.product((1.0, -1.0), repeat=count - 1)])
        return float((np.abs(signs @ values) >= observed * (1 - 1e-9)).mean())
    signs = random.choice([-1.0, 1.0], size=(20_000, count))
    return float((1 + (np.abs(signs @ values) >= observed * (1 - 1e-9)).sum()) / (len(signs) + 1))
