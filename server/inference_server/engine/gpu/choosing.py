"""Chooses the tokens of sampled requests on the device, so that the next step can start before the host knows them.

The distribution, the random numbers and the arithmetic are those of :mod:`inference_server.engine.sampler`: a seeded
request gets the same tokens whether its step was looked ahead of or not. What the host knows beforehand (temperatures,
filters and the random numbers, which depend on seed and index alone) goes over in one copy without waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference_server.engine import sampler
from inference_server.engine.request import Request
from inference_server.engine.sampler import Filters


@dataclass(slots=True)
class Alternatives:
    """Log-probabilities on their way to the host, for the rows that asked for them."""

    rows: list[int]
    counts: list[int]
    """How many alternatives each of them asked for."""
    chosen: Tensor
    values: Tensor
    ids: Tensor


class DeviceSampler:
    """Chooses tokens where the logits are.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pin = device.type == "cuda"

    def choose(self, logits: Tensor, requests: list[Request], tokens: Tensor, seats: Tensor, last: Tensor) -> None:
        """Replace the most likely token by a drawn one in the rows of requests with a temperature.

        Parameters
        ----------
        logits : Tensor
            ``[S, vocab]``, one row for each request.
        requests : list of Request
            None of them with penalties or a constraint.
        tokens, seats : Tensor
            int32 ``[S]``: the most likely tokens, replaced in place; and the request's entry in ``last``.
        last : Tensor
            int32, the newest token by seat, which the next step begins with.
        """
        drawn = [row for row, request in enumerate(requests) if request.sampling.temperature > 0]
        if not drawn:
            return
        those = [requests[row] for row in drawn]
        numbers = [sampler.uniform(request.seed, request.num_output) for request in those]
        filters = Filters.of(those, logits.shape[1])
        packed = self._send([[float(row) for row in drawn], numbers, *filters.columns])
        index = packed[0].long()
        probabilities = sampler.filter_probabilities(logits[index], filters.on(packed[2:]))
        chosen = sampler.invert_cdf(probabilities, packed[1]).to(torch.int32)
        tokens[index] = chosen
        last[seats[index].long()] = chosen

    def alternatives(self, logits: Tensor, requests: list[Request], tokens: Tensor) -> Alternatives | None:
        """Log-probabilities of the tokens and of the likeliest others, for the requests that ask for them."""
        wanted = [row for row, request in enumerate(requests) if request.sampling.logprobs is not None]
        if not wanted:
            return None
        vocab = logits.shape[1]
        counts = [min(requests[row].sampling.logprobs or 0, vocab) for row in wanted]
        index = self._send([[float(row) for row in wanted]])[0].long()
        logs = torch.log_softmax(logits[index].float(), dim=-1)
        values, ids = logs.topk(max(counts), dim=-1)
        chosen = logs.gather(1, tokens[index].long()[:, None])[:, 0]
        return Alternatives(wanted, counts, *(self._fetch(part) for part in (chosen, values, ids)))

    def _send(self, columns: list[list[float]]) -> Tensor:
        """Columns as float64 on the device. The copy is queued; nothing is waited for."""
        host = torch.tensor(columns, dtype=torch.float64, pin_memory=self._pin)
        return host.to(self._device, non_blocking=True)

    def _fetch(self, part: Tensor) -> Tensor:
        host = torch.empty(part.shape, dtype=part.dtype, pin_memory=self._pin)
        host.copy_(part, non_blocking=True)
        return host


def read(tokens: list[int], alternatives: Alternatives | None) -> sampler.Sampled:
    """What :func:`inference_server.engine.sampler.sample` would have returned; call when the copies have arrived."""
    logprobs: list[float | None] = [None] * len(tokens)
    top: list[list[tuple[int, float]] | None] = [None] * len(tokens)
    if alternatives is not None:
        rows = zip(alternatives.rows, alternatives.counts, strict=True)
        chosen, values, ids = (part.tolist() for part in (alternatives.chosen, alternatives.values, alternatives.ids))
        for place, (row, count) in enumerate(rows):
            logprobs[row] = chosen[place]
            top[row] = list(zip(ids[place][:count], values[place][:count], strict=True))
    return sampler.Sampled(tokens, logprobs, top)
