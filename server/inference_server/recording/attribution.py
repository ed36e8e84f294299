"""Splits each token's latency into parts that add up to it. ``docs/attribution.md`` is this module in words.

Fed with every step as it is logged, and asked once per token when it has been sent. Everything is in nanoseconds on one
monotonic clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from statistics import median

from inference_server.protocol import PARTS, Kind, StepEvent

(
    TOKENIZE,
    QUEUE,
    PREFILL,
    RECOMPUTE,
    OTHERS_PREFILL,
    STALL,
    DRAFT,
    FORWARD,
    ATTENTION,
    SAMPLING,
    HOST,
    TRANSPORT,
    DETOKENIZE,
    SEND,
    UNEXPLAINED,
) = range(len(PARTS))

_REMEMBERED_STEPS = 16_384
_REMEMBERED_TURNS = 1024
_REMEMBERED_PAUSES = 64
_MEDIAN_OF = 15
_OWN_PROMPT = (Kind.PREFILL, Kind.RECOMPUTE)


class DecodeCost:
    """What a decode-only forward pass costs, by number of decoding positions, under the current switches."""

    def __init__(self) -> None:
        self._epoch = -1
        self._sizes: list[int] = []
        self._recent: dict[int, deque[int]] = {}

    def learn(self, epoch: int, size: int, forward_ns: int) -> None:
        """Take in a decode-only step."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._sizes.clear()
            self._recent.clear()
        recent = self._recent.get(size)
        if recent is None:
            recent = self._recent[size] = deque(maxlen=_MEDIAN_OF)
            insort(self._sizes, size)
        recent.append(forward_ns)

    def estimate(self, epoch: int, size: int) -> int | None:
        """Median cost for ``size`` positions, between the nearest sizes that are known; ``None`` if none is."""
        if epoch != self._epoch or not self._sizes:
            return None
        place = bisect_left(self._sizes, size)
        above = self._sizes[min(place, len(self._sizes) - 1)]
        below = self._sizes[max(place - 1, 0)] if above > size else above
        if below > size:
            below = above
        high, low = median(self._recent[above]), median(self._recent[below])
        if above == below:
            return int(high)
        return int(low + (high - low) * (size - below) / (above - below))


class StepShares:
    """One step, laid out for clipping: four moments, and how its forward pass divides."""

    __slots__ = (
        "attention", "begin", "decode", "draft", "end", "forward", "forward_end", "index", "members", "number",
        "prompt_total", "prompts", "sample_end", "since", "start_end",
    )  # fmt: skip

    def __init__(self, index: int, event: StepEvent, cost: DecodeCost) -> None:
        self.index = index
        self.number = event.step
        begin, end = event.begin_ns, event.end_ns
        wall = max(end - begin, 0)
        host, forward = event.schedule_ns + event.prepare_ns, event.forward_ns
        sample = event.sample_ns
        device = event.device_ns
        if device is not None and device > forward and wall > forward:
            # The device worked through the host's phases of this step, or the end of the one before: what the host did
            # meanwhile delayed nobody.
            longer = min(device, wall)
            scale = (wall - longer) / (wall - forward)
            host, sample, forward = int(host * scale), int(sample * scale), longer
        self.since = begin - event.before_ns
        self.begin = begin
        self.start_end = begin + host
        self.forward_end = self.start_end + forward
        self.sample_end = self.forward_end + sample
        self.end = end
        self.members = frozenset(event.request)
        self.prompts: dict[int, tuple[int, int]] = {}
        decoding = total = 0
        for request, count, kind in zip(event.request, event.scheduled, event.kind, strict=True):
            if kind in _OWN_PROMPT:
                self.prompts[request] = (PREFILL if kind == Kind.PREFILL else RECOMPUTE, count)
                total += count
            else:
                decoding += count
        self.prompt_total = total
        self.forward = max(forward, 1)
        self.draft = min(event.draft_ns, forward)
        computing = forward - self.draft
        if not total:
            self.decode = computing
            if decoding:
                cost.learn(event.epoch, decoding, computing)
        elif not decoding:
            self.decode = 0
        else:
            alone = cost.estimate(event.epoch, decoding)
            self.decode = min(computing, alone) if alone is not None else computing * decoding // (decoding + total)
        self.attention = min(event.attention_ns or 0, computing)

    def add_own(self, parts: list[int], request: int, low: int, high: int) -> None:
        """Add what lies of this step in ``[low, high)``, for a request that takes part in it."""
        parts[HOST] += _overlap(low, high, self.since, self.start_end) + _overlap(low, high, self.sample_end, self.end)
        parts[SAMPLING] += _overlap(low, high, self.forward_end, self.sample_end)
        forward = _overlap(low, high, self.start_end, self.forward_end)
        if not forward:
            return
        draft = forward * self.draft // self.forward
        decode = forward * self.decode // self.forward
        attention = decode * self.attention // max(self.forward - self.draft, 1)
        parts[DRAFT] += draft
        parts[ATTENTION] += attention
        parts[FORWARD] += decode - attention
        marginal = forward - draft - decode
        if self.prompt_total:
            kind, count = self.prompts.get(request, (PREFILL, 0))
            own = marginal * count // self.prompt_total
            parts[kind] += own
            parts[OTHERS_PREFILL] += marginal - own
        else:
            parts[FORWARD] += marginal  # what rounding left


class Attribution:
    """Remembers the newest steps and splits latencies over them."""

    def __init__(self) -> None:
        self._cost = DecodeCost()
        self._steps: deque[StepShares] = deque(maxlen=_REMEMBERED_STEPS)
        self._by_number: dict[int, StepShares] = {}
        self._count = 0
        self._front_busy: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED_TURNS)
        self._pauses: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED_PAUSES)

    def add_front_turn(self, begin_ns: int, end_ns: int) -> None:
        """Take in that the front turned the tokens of one step into text from ``begin_ns`` to ``end_ns``."""
        self._front_busy.append((begin_ns, end_ns))

    def add_pause(self, begin_ns: int, end_ns: int) -> None:
        """Take in that the engine was asleep, holding its requests, from ``begin_ns`` to ``end_ns``."""
        self._pauses.append((begin_ns, end_ns))

    def add_step(self, event: StepEvent) -> None:
        """Take in a step, before any of its tokens is asked for."""
        shares = StepShares(self._count, event, self._cost)
        self._count += 1
        if len(self._steps) == _REMEMBERED_STEPS:
            self._by_number.pop(self._steps[0].number, None)
        self._steps.append(shares)
        self._by_number[event.step] = shares

    def split(
        self,
        *,
        step: int,
        request: int,
        leader: int,
        low_ns: int,
        sent_ns: int,
        submitted_ns: int | None,
        started_ns: int | None,
        received_ns: int,
    ) -> list[int]:
        """Split the latency ``sent_ns - low_ns`` of one token.

        Parameters
        ----------
        step
            Number of the step that chose it.
        request, leader
            Its handle, and that of the sample which computes the prompt for it (itself, but for ``n`` > 1).
        low_ns
            When the token before it was sent; the request's arrival for the first.
        submitted_ns, started_ns
            When the request went to the engine and when its first step began; ``None`` but for the first token.
        received_ns
            When the front began with the step's tokens.

        Returns
        -------
        list of int
            Nanoseconds per name of :data:`~inference_server.protocol.PARTS`; they add up to the latency.
        """
        parts = [0] * len(PARTS)
        latency = sent_ns - low_ns
        if latency <= 0:
            return parts
        low = low_ns
        if submitted_ns is not None:
            parts[TOKENIZE] = _overlap(low, sent_ns, low, submitted_ns)
            low = max(low, submitted_ns)
            if started_ns is not None:
                parts[QUEUE] = _overlap(low, sent_ns, low, started_ns)
                low = max(low, started_ns)
        begun = low
        own = self._by_number.get(step)
        if own is not None:
            self._add_steps(parts, own, request, leader, low, sent_ns)
            low = max(low, own.end)
        elif received_ns > low:
            low = received_ns
        if low < sent_ns:
            self._add_way_out(parts, low, received_ns, sent_ns)
        unexplained = latency - sum(parts)
        for begin, end in self._pauses:
            # The front hears of a wake a moment later than the engine goes on: never more than what is left.
            paused = min(unexplained, _overlap(begun, sent_ns, begin, end))
            parts[STALL] += paused
            unexplained -= paused
        parts[UNEXPLAINED] = unexplained
        return parts

    def _add_steps(self, parts: list[int], own: StepShares, request: int, leader: int, low: int, high: int) -> None:
        own.add_own(parts, request, low, high)
        if own.since <= low:
            return
        # Backwards through the steps before: usually there is none, or one.
        place = own.index - (self._count - len(self._steps)) - 1
        while place >= 0:
            shares = self._steps[place]
            if shares.end <= low:
                return
            if request in shares.members:
                shares.add_own(parts, request, low, high)
            elif leader in shares.prompts and leader != request:
                shares.add_own(parts, leader, low, high)
            else:
                parts[STALL] += _overlap(low, high, shares.since, shares.end)
            place -= 1

    def _add_way_out(self, parts: list[int], low: int, received: int, sent: int) -> None:
        transport = _overlap(low, sent, low, received)
        send = sent - low - transport
        for begin, end in reversed(self._front_busy):
            if end <= low:
                break
            before, after = (
                _overlap(low, min(sent, received), begin, end),
                _overlap(max(low, received), sent, begin, end),
            )
            transport -= before
            send -= after
            parts[DETOKENIZE] += before + after
        parts[TRANSPORT] = transport
        parts[SEND] = send


def _overlap(low: int, high: int, begin: int, end: int) -> int:
    """Length of what ``[low, high)`` and ``[begin, end)`` have in common."""
    first = max(begin, low)
    last = min(end, high)
    return last - first if last > first else 0
