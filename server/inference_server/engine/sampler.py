"""Chooses tokens from logits. Owns penalties, filters and the random numbers; one row per request, whole batch at once.

Random numbers are counter-based: the number for output token ``i`` of a request is a hash of (seed, i). So a seeded
request draws the same numbers whatever else is in the batch, after any preemption, and on replay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from struct import pack
from typing import Protocol

import torch
from torch import Tensor

from inference_server.engine.request import Request


def uniform(seed: int, index: int) -> float:
    """Uniform number in [0, 1) for output token ``index`` of a request with ``seed`` (53 bits of BLAKE2b)."""
    digest = blake2b(pack("<Qq", seed & 0xFFFFFFFFFFFFFFFF, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Tokens(Protocol):
    """Tokens that may still be on their way, such as an array of them."""

    def tolist(self) -> list[int]:
        """Wait for them and return them."""


class DeviceTokens(ABC):
    """Tokens that a GPU chose where the logits are. A class and no protocol: it is asked for in every step."""

    final: bool
    """Whether they are what :func:`sample` would choose, in every row; otherwise they are just the most likely ones."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the device is done with the step."""

    @abstractmethod
    def tolist(self) -> list[int]:
        """Wait for them and return them."""

    @abstractmethod
    def sampled(self) -> Sampled:
        """Wait for them and return them with what was asked for."""

    @property
    @abstractmethod
    def device_ns(self) -> int | None:
        """How long the step took the device; call :meth:`wait` before."""


@dataclass(slots=True)
class Sampled:
    """Tokens of one step, in row order."""

    tokens: list[int]
    logprobs: list[float | None]
    """Log-probability of each token under the model's own distribution (before penalties, temperature and filters)."""
    top: list[list[tuple[int, float]] | None]


def sample(
    logits: Tensor, requests: list[Request], greedy: Tokens | None = None, ahead: Sequence[Sequence[int]] | None = None
) -> Sampled:
    """Sample one token per row.

    Parameters
    ----------
    logits : Tensor
        ``[S, vocab]``, any floating dtype.
    requests : list of Request
        One per row.
    greedy : Tokens, optional
        The most likely token of each row, if the forward pass finds it.
    ahead : sequence of sequence of int, optional
        For each row, tokens that are supposed to stand between the request's last one and the one to sample.
    """
    if not requests:
        return Sampled([], [], [])
    if isinstance(greedy, DeviceTokens) and greedy.final:
        return greedy.sampled()
    if greedy is not None and all(map(takes_most_likely, requests)):
        # No copy of the logits and no search: at 32 rows of a large vocabulary they cost milliseconds.
        count = len(requests)
        return Sampled(greedy.tolist(), [None] * count, [None] * count)
    if ahead is None:
        ahead = [()] * len(requests)
    raw = logits.float()
    rows = raw
    if any(_has_penalties(request) or request.constraint is not None for request in requests):
        rows = raw.clone()
        for row, request in enumerate(requests):
            if _has_penalties(request):
                _penalize(rows[row], request, ahead[row])
            if request.constraint is not None:
                request.constraint.mask(rows[row], ahead[row])
    tokens = rows.argmax(dim=-1)
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        probabilities = filtered_probabilities(rows[index], [requests[row] for row in drawn])
        numbers = torch.tensor(
            [uniform(requests[row].seed, requests[row].num_output + len(ahead[row])) for row in drawn],
            dtype=torch.float64,
            device=logits.device,
        )
        tokens[index] = invert_cdf(probabilities, numbers)
    chosen = tokens.tolist()
    logprobs: list[float | None] = [None] * len(requests)
    top: list[list[tuple[int, float]] | None] = [None] * len(requests)
    wanted = [row for row, request in enumerate(requests) if request.sampling.logprobs is not None]
    if wanted:
        logs = torch.log_softmax(raw[wanted], dim=-1)
        for place, row in enumerate(wanted):
            logprobs[row] = float(logs[place, chosen[row]])
            count = requests[row].sampling.logprobs or 0
            values, ids = logs[place].topk(min(count, logs.shape[1]))
            top[row] = list(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(chosen, logprobs, top)


def filtered_probabilities(logits: Tensor, requests: list[Request]) -> Tensor:
    """The exact distribution that each row is sampled from, ``[S, vocab]`` in float64.

    Temperature, then top-k, then top-p, then min-p, each renormalized, which is the order of vLLM and transformers.
    Ties at a threshold are kept.
    """
    filters = Filters.of(requests, logits.shape[1])
    columns = torch.tensor(filters.columns, dtype=torch.float64, device=logits.device)
    return filter_probabilities(logits, filters.on(columns))


@dataclass(slots=True)
class Filters:
    """Temperatures and filters of some rows, and which of them change anything."""

    columns: list[list[float]]
    """Temperature, top-k, top-p and min-p of each row."""
    largest: bool
    """Some row keeps its likeliest tokens only (top-k or top-p)."""
    least: bool
    """Some row drops its least likely tokens (min-p)."""
    values: Tensor | None = None

    @classmethod
    def of(cls, requests: list[Request], vocab: int) -> Filters:
        """The filters that the requests ask for."""
        settings = [request.sampling for request in requests]
        # What is asked for is decided here: asking the device would mean waiting for it.
        return cls(
            columns=[
                [each.temperature for each in settings],
                [float(min(each.top_k or vocab, vocab)) for each in settings],
                [each.top_p for each in settings],
                [each.min_p for each in settings],
            ],
            largest=any(0 < each.top_k < vocab or each.top_p < 1 for each in settings),
            least=any(each.min_p > 0 for each in settings),
        )

    def on(self, values: Tensor) -> Filters:
        """The same with the columns where the logits are, ``[4, S]`` in float64."""
        return replace(self, values=values)


def filter_probabilities(logits: Tensor, filters: Filters) -> Tensor:
    """:func:`filtered_probabilities` with the filters on the device already; waits for nothing."""
    if filters.values is None:
        raise ValueError("the filters have to be where the logits are: see Filters.on")
    temperature, top_k, top_p, min_p = filters.values
    probabilities = torch.softmax(logits.double() / temperature[:, None], dim=-1)
    if filters.largest:
        descending = probabilities.sort(dim=-1, descending=True).values
        threshold = descending.gather(1, (top_k.long() - 1)[:, None])
        probabilities = probabilities.where(probabilities >= threshold, 0.0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
        descending = probabilities.sort(dim=-1, descending=True).values
        # Keep the smallest set whose mass reaches top_p: a token stays while the mass before it is below top_p.
        before = descending.cumsum(dim=-1) - descending
        kept = (before < top_p[:, None]).sum(dim=-1).clamp(min=1)
        threshold = descending.gather(1, (kept - 1)[:, None])
        restricted = (top_p < 1)[:, None]
        probabilities = probabilities.where((probabilities >= threshold) | ~restricted, 0.0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if filters.least:
        peak = probabilities.max(dim=-1, keepdim=True).values
        probabilities = probabilities.where(probabilities >= min_p[:, None] * peak, 0.0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def invert_cdf(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Token whose interval of the cumulative distribution contains each number, ``[S]``."""
    cumulative = probabilities.cumsum(dim=-1)
    # Scaling by the last entry keeps a number next to 1 from falling past it through rounding.
    target = numbers[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    last = probabilities.shape[1] - 1 - probabilities.flip(1).gt(0).to(torch.int8).argmax(dim=1)
    return torch.minimum(token, last)


def takes_most_likely(request: Request) -> bool:
    """Whether the answer is the most likely token and nothing else is asked for."""
    sampling = request.sampling
    plain = request.constraint is None and not _has_penalties(request)
    return plain and sampling.temperature == 0 and sampling.logprobs is None


def depends_on_its_output(request: Request) -> bool:
    """Whether choosing a token needs to know the ones before it: penalties and constraints do."""
    return request.constraint is not None or _has_penalties(request)


def _has_penalties(request: Request) -> bool:
    sampling = request.sampling
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _penalize(row: Tensor, request: Request, ahead: Sequence[int]) -> None:
    """Apply penalties in place: repetition over prompt and output (Keskar et al. 2019), the others over the output."""
    sampling = request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*request.tokens, *ahead}), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    output = [*request.tokens[request.prompt_len :], *ahead]
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.unique(torch.tensor(output, device=row.device), return_counts=True)
        row[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
