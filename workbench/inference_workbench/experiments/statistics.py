"""How sure a difference is: bootstrap intervals, sign-flip tests, and a correction for asking about several metrics.

The unit is a pair of runs (or a block of them), never a token or a request: those of one run share its accidents.
Effects are logarithms of ratios, so that twice as fast and half as fast are equally far from no difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
K = TypeVar("K")

_RESAMPLES = 10_000
_EXACT_UP_TO = 14
"""Pairs for which all sign flips are gone through."""
_MIN_FOR_INTERVAL = 3
_NORMAL = NormalDist()


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

    def found(self, confidence: float, p: float | None = None) -> bool:
        """Whether there is a difference: both the test (with ``p`` where it is adjusted) and the interval say so."""
        return (self.p if p is None else p) <= 1 - confidence and not self.low <= 0 <= self.high


def paired_effect(effects: Sequence[float] | Floats, confidence: float = 0.95, seed: int = 0) -> Effect:
    """Estimate the mean of some effects.

    The interval is the percentile bootstrap's, taken at quantiles that make up for few pairs as Student's t does
    (Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3.2): the plain one is too narrow. The
    test flips signs (Fisher 1935), exactly for up to 14 pairs.

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
    if count < _MIN_FOR_INTERVAL:
        estimate = float(values.mean()) if count else math.nan
        return Effect(estimate=estimate, low=-math.inf, high=math.inf, p=1.0, pairs=count)
    random = np.random.default_rng(seed)
    means = values[random.integers(0, count, size=(_RESAMPLES, count))].mean(axis=1)
    low, high = np.quantile(means, expanded_quantiles(count, confidence))
    p = joint_p({"": values})[""]
    return Effect(estimate=float(values.mean()), low=float(low), high=float(high), p=p, pairs=count)


def expanded_quantiles(count: int, confidence: float) -> tuple[float, float]:
    """Return where the bootstrap distribution of a mean of so few values is cut for an interval that covers."""
    t = _student_quantile((1 + confidence) / 2, count - 1) * math.sqrt(count / (count - 1))
    tail = _NORMAL.cdf(-t)
    return tail, 1 - tail


def joint_p(effects: Mapping[K, Sequence[float] | Floats], seed: int = 0) -> dict[K, float]:
    """Test several metrics of the same pairs, so that the chance of *any* false alarm is what the p-values say.

    Signs are flipped for all metrics of a pair at once, and each metric is compared with the largest standardized mean
    among all of them (Westfall & Young 1993, single-step maxT). With n pairs no p-value is below 2 / 2^n.

    Parameters
    ----------
    effects
        An array of shape (pairs,) for each metric. Metrics with missing values are not tested (p = 1).
    """
    values = {name: np.asarray(each, dtype=np.float64) for name, each in effects.items()}
    tested = [name for name, each in values.items() if len(each) and np.isfinite(each).all() and np.any(each)]
    adjusted = dict.fromkeys(values, 1.0)
    if not tested:
        return adjusted
    table = np.stack([values[name] for name in tested])
    # Standardized by what no flip changes, so that no metric outweighs the others.
    table = table / np.sqrt((table**2).sum(axis=1, keepdims=True))
    count = table.shape[1]
    observed = np.abs(table.sum(axis=1))
    if count <= _EXACT_UP_TO:
        # The first sign may stay: flipping all of them gives the same distance from zero.
        signs = np.array([(1.0, *rest) for rest in itertools.product((1.0, -1.0), repeat=count - 1)])
        more, all_ = 0, len(signs)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(20_000, count))
        more, all_ = 1, len(signs) + 1
    largest = np.abs(signs @ table.T).max(axis=1)
    for name, distance in zip(tested, observed, strict=True):
        adjusted[name] = float((more + (largest >= distance * (1 - 1e-9)).sum()) / all_)
    return adjusted


def joint_effects(effects: Mapping[K, Sequence[float] | Floats], confidence: float) -> dict[K, Effect]:
    """Estimate several effects on the same pairs, each with the p-value of :func:`joint_p`."""
    p = joint_p(effects)
    return {
        name: msgspec.structs.replace(paired_effect(values, confidence), p=p[name]) for name, values in effects.items()
    }


def pairs_for(confidence: float) -> int:
    """Return how many pairs it takes at least for a difference to be found at all."""
    return math.ceil(1 - math.log2(1 - confidence))


def pairs_needed(effects: Sequence[float] | Floats, size: float, confidence: float = 0.95, power: float = 0.9) -> int:
    """Return about how many pairs it would take to find an effect of a size, given how these effects scatter.

    Parameters
    ----------
    size : float
        As the logarithm of a ratio.
    """
    values = np.asarray(effects, dtype=np.float64)
    values = values[np.isfinite(values)]
    least = pairs_for(confidence)
    if len(values) < 2:
        return least
    level = _NORMAL.inv_cdf((1 + confidence) / 2)
    scatter = float(values.std(ddof=1)) / size
    # The second term makes up for a scatter that has to be estimated (Guenther 1981).
    return max(least, math.ceil(((level + _NORMAL.inv_cdf(power)) * scatter) ** 2 + level**2 / 2))


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


def _student_quantile(q: float, freedom: int) -> float:
    """Return a quantile above the median of Student's t distribution, by integrating its density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    # Substituting t = tan(u) maps the half line to (0, π/2).
    u = np.linspace(0, math.pi / 2, 20_001)[:-1]
    density = scale * (1 + np.tan(u) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(u) ** 2
    cumulative = 0.5 + np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(u))])
    return float(np.tan(np.interp(q, cumulative, u)))
