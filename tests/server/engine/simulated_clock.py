"""A machine whose step times are known, and requests whose proposals are accepted by known chances.

Adaptive speculation decides here through its real interface, and its decisions cost what they would cost on machines
that were measured (docs/speculation.md, benchmarks/results/speculation.jsonl). Deterministic: a seed fixes everything.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduled
from inference_server.engine.speculation.adaptive import Adaptive
from inference_server.protocol import Kind, SamplingParams

K = 4
"""Proposals of a request in a step, at most."""


def line(points: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """A function through some points: straight between them, beyond the last as between the last two."""
    xs = [x for x, _ in points]

    def at(x: int) -> float:
        place = min(max(bisect_left(xs, x), 1), len(points) - 1)
        (left, low), (right, high) = points[place - 1], points[place]
        return low + (high - low) * (max(x, xs[0]) - left) / (right - left)

    return at


@dataclass(frozen=True)
class Machine:
    """What steps take, in milliseconds."""

    plain: Callable[[int], float]
    """By number of requests."""
    verifying: Callable[[int], float]
    """By number of positions."""
    host: float = 0.0
    """What a plain step takes more that was not launched ahead, and a verifying one at least."""
    draft: Callable[[int], float] = lambda rows: 0.0
    """One pass of the proposer, by number of requests."""
    overlaps: bool = False
    """While speculation rests steps are launched ahead, and nobody is asked."""

    def step(self, rows: int, proposed: int, *, ahead: bool) -> float:
        if not proposed:
            return self.plain(rows) + (0.0 if ahead else self.host)
        return max(self.plain(rows) + self.host, self.verifying(rows + proposed))


_LLAMA8B_PLAIN = line([(1, 5.37), (2, 5.63), (4, 5.67), (8, 5.76), (16, 5.88), (32, 6.12), (64, 6.72)])
_LLAMA8B_VERIFYING = line([(2, 6.16), (5, 6.3), (10, 6.3), (20, 6.34), (40, 6.58), (80, 7.4), (160, 8.96), (320, 12.2)])
_QWEN06B_PLAIN = line([(1, 0.79), (2, 0.95), (4, 0.94), (8, 1.01), (16, 1.11), (32, 1.25), (64, 1.78)])
_QWEN06B_VERIFYING = line([(2, 1.13), (5, 1.3), (10, 1.4), (20, 1.4), (40, 1.6), (80, 2.0), (160, 2.8), (320, 3.9)])
_CPU = line([(1, 1.0), (2, 1.169), (3, 1.228), (4, 1.196), (5, 1.186), (6, 1.231), (9, 1.294), (16, 1.908)])
"""Of the smallest model in float32, beside a plain step of one request; beyond 16 positions as between 9 and 16."""

MACHINES = {
    "gpu 8b": Machine(_LLAMA8B_PLAIN, _LLAMA8B_VERIFYING, host=0.4, overlaps=True),
    "gpu 8b draft": Machine(
        _LLAMA8B_PLAIN, _LLAMA8B_VERIFYING, host=0.4, draft=line([(2, 1.18), (64, 2.02)]), overlaps=True
    ),
    "gpu 0.6b": Machine(_QWEN06B_PLAIN, _QWEN06B_VERIFYING, host=0.3, overlaps=True),
    "cpu": Machine(lambda rows: 20 * _CPU(rows), lambda rows: 20 * _CPU(rows)),
    "cpu early exit": Machine(
        lambda rows: 20 * _CPU(rows), lambda rows: 20 * _CPU(rows), draft=lambda rows: 2.5 * _CPU(rows)
    ),
}


@dataclass(eq=False)
class Text:
    """A request, as the simulation sees it."""

    rate: float
    """How often a proposed token is accepted if those before it were."""
    has: float = 1.0
    """How often there is a proposal at all."""
    left: int = 1 << 30
    """Steps until it ends."""
    request: Request = field(init=False)

    def __post_init__(self) -> None:
        self.request = Request(0, 4, [1, 2, 3, 4, 5], SamplingParams(max_tokens=100_000), 0, 0)


class Simulation:
    """Steps of one machine that follow one another.

    Parameters
    ----------
    machine : Machine
    mode : str or Adaptive
        ``on``, ``off`` or what decides.
    seed : int
    noise : float
        Standard deviation of measured times, relative.
    outliers : float
        Share of steps that are seen to take three times as long.
    """

    def __init__(
        self, machine: Machine, mode: str | Adaptive, seed: int = 0, noise: float = 0.07, outliers: float = 0.01
    ) -> None:
        self._machine, self._mode, self._noise, self._outliers = machine, mode, noise, outliers
        self._random = Random(seed)
        self.proposed = 0
        """Tokens proposed so far."""
        self._requests = 0
        self._verified = False

    def run(self, texts: list[Text], steps: int) -> tuple[float, float]:
        """Return tokens said and milliseconds gone. A text that was not seen before begins with its prompt."""
        tokens = time = 0.0
        for _ in range(steps):
            said, took = self._step(texts)
            tokens, time = tokens + said, time + took
        return tokens, time

    def speed(self, texts: list[Text], steps: int) -> float:
        """Tokens per millisecond."""
        tokens, time = self.run(texts, steps)
        return tokens / time

    def _step(self, texts: list[Text]) -> tuple[float, float]:
        """Time is counted without its noise, and of tokens the expectation: luck does not count, decisions do."""
        new = [text for text in texts if text.request.handle == 0]
        for text in new:
            self._requests += 1
            text.request.handle = self._requests
        # Drawn for every request in every mode, so that modes differ in nothing but their decisions.
        luck = [(self._random.random() < text.has, [self._random.random() for _ in range(K)]) for text in texts]
        jitter, outlier = self._random.gauss(0, self._noise), self._random.random() < self._outliers
        factor = max(1 + jitter, 0.7) * (3 if outlier else 1)
        guessable = [text for text, (has, _) in zip(texts, luck, strict=True) if has and text not in new]
        counts, ahead = self._decide(guessable, len(texts) - len(new))
        items, verified, expected = [], [], float(len(texts))
        for text, (_, draws) in zip(texts, luck, strict=True):
            count = counts.get(text.request.handle, 0)
            item = Scheduled(text.request, 4, 1 + count, Kind.PREFILL if text in new else Kind.DECODE, sample=True)
            items.append(item)
            if count:
                item.propose([0] * count)
                accepted = next((place for place, draw in enumerate(draws[:count]) if draw >= text.rate), count)
                verified.append((item, "m", accepted))
                expected += sum(text.rate**place for place in range(1, count + 1))
        self.proposed += sum(counts.values())
        took = self._machine.step(len(texts), sum(counts.values()), ahead=ahead)
        drafting = max(counts.values(), default=0) * self._machine.draft(len(verified))
        self._verified = bool(verified)
        if isinstance(self._mode, Adaptive):
            step_ns, draft_ns = int(took * factor * 1e6), int(drafting * factor * 1e6)
            self._mode.observe(items, verified, step_ns, draft_ns, ahead=ahead)
        for text in texts:
            text.left -= 1
            if text.left == 0:
                text.request.finish_reason = "length"
        return expected, took + drafting

    def _decide(self, guessable: list[Text], decoding: int) -> tuple[dict[int, int], bool]:
        """Proposals by request, and whether the step is launched ahead."""
        mode = self._mode
        if mode == "off":
            return {}, self._machine.overlaps
        if not isinstance(mode, Adaptive):
            return {text.request.handle: K for text in guessable}, False
        if self._machine.overlaps and not self._verified and mode.resting:
            return {}, True
        return mode.decide([(text.request, "m", K) for text in guessable], decoding - len(guessable)), False


def alike(rate: float, rows: int) -> list[Text]:
    """Requests that do not end, all of the same acceptance."""
    return [Text(rate) for _ in range(rows)]


def best_fixed(machine: Machine, rate: float, rows: int) -> float:
    """Tokens per millisecond of the better of always and never."""
    return max(Simulation(machine, mode).speed(alike(rate, rows), 20) for mode in ("on", "off"))


KINDS = {"chat": (0.25, 0.5), "code": (0.8, 0.9), "summary": (0.6, 0.7), "story": (0.1, 0.3)}
"""About how often a text's proposals are accepted, and how often there are any."""
DAY = (
    (1, ("chat", "story")),
    (4, ("chat", "chat", "code")),
    (16, ("code", "summary")),
    (64, ("chat", "code", "summary")),
    (48, ("story", "chat")),
    (64, ("code",)),
    (24, ("chat", "summary")),
    (8, ("summary",)),
    (2, ("story", "chat", "code")),
    (1, ("code",)),
)
"""Phases: requests at once, and the kinds of which new ones are."""


def day(machine: Machine, mode: str | Adaptive, seed: int, steps: int, *, always: bool) -> list[tuple[float, float]]:
    """Live through a day, each phase so many steps long; return tokens said and milliseconds gone of each phase.

    Requests end, others take their places, and about once a phase each becomes another text. Where ``always``, there
    are proposals in every step, as a model makes them.
    """
    random, simulation, result = Random(seed), Simulation(machine, mode, seed), []
    texts: list[Text] = []

    def renew(text: Text, kind: str) -> None:
        rate, has = KINDS[kind]
        text.rate = min(max(random.gauss(rate, 0.1), 0.0), 0.98)
        text.has = 1.0 if always else has

    for rows, kinds in DAY:
        tokens = time = 0.0
        for _ in range(steps):
            texts = [text for text in texts if text.left > 0]
            for text in texts[rows:]:
                text.left = min(text.left, random.randrange(1, 200))
            while len(texts) < rows:
                texts.append(Text(0.0, left=random.randrange(60, 400)))
                renew(texts[-1], random.choice(kinds))
            for text in texts:
                if random.random() < 1 / steps:
                    renew(text, random.choice(kinds))
            said, took = simulation.run(texts, 1)
            tokens, time = tokens + said, time + took
        result.append((tokens, time))
    return result
