"""Measures what a precision costs in quality: perplexity, divergence from the master, and where it is worst.

A text is cut into windows. Each is computed twice, with the master's weights and keys and with the ones in question, by
the very kernels that serve; the distributions of the next token are compared at every position. It is done in small
portions between the engine's steps, so that requests hardly notice.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.request import Request
from inference_server.engine.runner import Runner
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.protocol import Kind, SamplingParams

WINDOW = 256
"""Tokens that are read from nothing on; the first of them is not predicted."""
BLOCK = 16
WORST = 12
"""Positions that are kept of those that differ most."""
ROWS_IDLE, ROWS_BUSY = 32, 8
"""Positions of one portion, while there is nothing else to do and beside requests."""


class WorstPosition(msgspec.Struct, frozen=True):
    """A position where the two distributions differ much."""

    position: int
    """Of the predicted token in the text."""
    divergence: float
    """KL divergence there, nats."""
    before: str
    """The text just before."""
    token: str
    """What the text goes on with."""
    probability_master: float
    probability: float
    """Of that token."""
    likeliest_master: str
    likeliest: str


class QualityResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a precision costs on a text."""

    number: int
    """Counts the measurements of an engine."""
    label: str
    values: dict[str, str]
    """The switches that were measured."""
    text: str
    """``"built-in"``, or the beginning of the user's."""
    tokens: int
    """Predicted tokens."""
    perplexity: float
    perplexity_master: float
    divergence: float
    """Mean KL divergence of the master's distribution from the measured one, nats per token."""
    divergence_max: float
    same_top1: float
    """Share of positions whose likeliest token is the same."""
    worst: list[WorstPosition]
    seconds: float
    """From start to end, however busy the engine was."""
    baseline: str | None = None
    """Set when the master weights were themselves dequantized, e.g. ``"Q4_1"``."""


@dataclass(slots=True)
class _Sums:
    count: int = 0
    loss: float = 0.0
    loss_master: float = 0.0
    divergence: float = 0.0
    divergence_max: float = 0.0
    same: int = 0
    worst: list[tuple[float, int, float, float, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Side:
    """One of the two ways to compute a text."""

    runner: Runner
    tensors: PagedKVTensors
    around: Callable[[Callable[[], Tensor]], Tensor] = lambda compute: compute()
    """Called with the forward pass; puts the right weights in use for its length where that is necessary."""


class Measurement:
    """One measurement, carried out in portions by :meth:`advance`.

    Parameters
    ----------
    tokens : list of int
        The text.
    sides : tuple of Side
        The master's and the measured one.
    decode : callable
        Turns token ids into text.
    about : dict
        ``number``, ``label``, ``values``, ``text`` and ``baseline`` of the result.

    Raises
    ------
    ValueError
        If the text has fewer than two tokens.
    """

    def __init__(
        self,
        tokens: list[int],
        sides: tuple[Side, Side],
        decode: Callable[[list[int]], str],
        about: dict[str, Any],
    ) -> None:
        if len(tokens) < 2:
            raise ValueError("the text has fewer than two tokens, so that there is nothing to predict")
        self._tokens = tokens
        self._sides = sides
        self._decode = decode
        self._about = about
        self._begin = time.monotonic()
        self._place = 0
        self._step = 0
        self._window: Request | None = None
        self._sums = _Sums()

    @property
    def fraction(self) -> float:
        """How much is done."""
        return self._place / len(self._tokens)

    @torch.inference_mode()
    def advance(self, rows: int) -> QualityResult | None:
        """Compute the next ``rows`` positions or fewer; the result once all are done."""
        at = self._place % WINDOW
        first = self._place - at
        if at == 0 or self._window is None:
            self._window = _request(self._tokens[first : first + WINDOW])
        length = len(self._window.tokens)
        count = min(rows, length - at)
        logits = [self._compute(side, at, count) for side in self._sides]
        self._place += count
        predicted = min(count, length - 1 - at)
        if predicted > 0:
            self._compare(logits[0][:predicted], logits[1][:predicted], first + at + 1)
        return self._result() if self._place == len(self._tokens) else None

    def _compute(self, side: Side, at: int, count: int) -> Tensor:
        assert self._window is not None
        # One share for each position: their logits are all wanted, and they go the way of decoding.
        items = [Scheduled(self._window, at + i, 1, Kind.PREFILL, sample=True) for i in range(count)]
        self._step += 1
        plan = StepPlan(self._step, items, use_cache=True)
        packed = side.runner.prepare(plan)
        return side.around(lambda: side.runner.forward(plan, packed)).float()

    def _compare(self, master: Tensor, other: Tensor, first: int) -> None:
        sums = self._sums
        targets = torch.tensor(self._tokens[first : first + len(master)], device=master.device)[:, None]
        log_master, log_other = torch.log_softmax(master, -1), torch.log_softmax(other, -1)
        divergence = (log_master.exp() * (log_master - log_other)).sum(-1).clamp(min=0)
        loss_master, loss = -log_master.gather(1, targets)[:, 0], -log_other.gather(1, targets)[:, 0]
        top_master, top = master.argmax(-1), other.argmax(-1)
        sums.count += len(master)
        sums.loss += float(loss.double().sum())
        sums.loss_master += float(loss_master.double().sum())
        sums.divergence += float(divergence.double().sum())
        sums.divergence_max = max(sums.divergence_max, float(divergence.max()))
        sums.same += int((top_master == top).sum())
        columns = (divergence, (-loss_master).exp(), (-loss).exp(), top_master, top)
        for index, (kl, p_master, p, likeliest_master, likeliest) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            entry = (kl, first + index, p_master, p, likeliest_master, likeliest)
            (heapq.heappush if len(sums.worst) < WORST else heapq.heappushpop)(sums.worst, entry)

    def _result(self) -> QualityResult:
        sums, decode, tokens = self._sums, self._decode, self._tokens
        worst = [
            WorstPosition(
                position=position,
                divergence=kl,
                before=decode(tokens[max(position - 8, 0) : position]),
                token=decode([tokens[position]]),
                probability_master=p_master,
                probability=p,
                likeliest_master=decode([likeliest_master]),
                likeliest=decode([likeliest]),
            )
            for kl, position, p_master, p, likeliest_master, likeliest in sorted(sums.worst, reverse=True)
        ]
        return QualityResult(
            tokens=sums.count,
            perplexity=math.exp(sums.loss / sums.count),
            perplexity_master=math.exp(sums.loss_master / sums.count),
            divergence=sums.divergence / sums.count,
            divergence_max=sums.divergence_max,
            same_top1=sums.same / sums.count,
            worst=worst,
            seconds=time.monotonic() - self._begin,
            **self._about,
        )


def tensors_for(like: PagedKVTensors, precision: str) -> PagedKVTensors:
    """A cache for one window, laid out as ``like``, that stores in ``precision``."""
    tensors = PagedKVTensors(WINDOW // BLOCK, BLOCK, like.device, like.dtype)
    whole = like.whole
    half = len(whole) // 2
    pairs = zip(whole[:half], whole[half:], strict=True)
    tensors.reserve([(keys.shape[1], keys.shape[2], values.shape[2]) for keys, values in pairs])
    tensors.store_as(precision)
    return tensors


def _request(tokens: list[int]) -> Request:
    sampling = SamplingParams(max_tokens=1)
    request = Request(handle=0, prompt_len=len(tokens), tokens=tokens, sampling=sampling, seed=0, arrival=0)
    request.blocks = list(range(WINDOW // BLOCK))
    return request
