"""A workload: seeded and serializable, so that the same name, seed and settings always mean the same requests.

The draws are made by :class:`random.Random` in a fixed order, one generator for each request, so that changing how many
there are or how they arrive changes none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Annotated, Literal

import msgspec

from inference_server.workloads import texts

Source = Literal["chat", "summarize", "code", "story", "random"]
Encode = Callable[[str], list[int]]
"""Token ids of a text, without special tokens."""
Compose = Callable[[str], list[int]]
"""Token ids of a whole prompt that says a user's words: in the model's chat template, where it has one."""

MAX_CONCURRENCY = 512
_PARAGRAPH = "\n\n"


class WorkloadError(ValueError):
    """A workload that cannot be run; the message says what to change."""


class ClosedLoop(msgspec.Struct, frozen=True, kw_only=True, tag="closed", tag_field="kind", forbid_unknown_fields=True):
    """Always the same number of requests under way: whoever gets an answer asks again at once."""

    concurrency: Annotated[int, msgspec.Meta(ge=1, le=MAX_CONCURRENCY)] = 4


class Poisson(msgspec.Struct, frozen=True, kw_only=True, tag="poisson", tag_field="kind", forbid_unknown_fields=True):
    """Requests arrive by themselves, whether the server keeps up or not.

    Gaps are gamma distributed, as in ``vllm bench serve``: with ``burstiness`` 1 a Poisson process, below 1 in bursts,
    above 1 more evenly.
    """

    rate: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    """Requests per second."""
    burstiness: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0


class Trace(msgspec.Struct, frozen=True, kw_only=True, tag="trace", tag_field="kind", forbid_unknown_fields=True):
    """Requests arrive at the times of a trace, and end with it."""

    times_s: Annotated[tuple[float, ...], msgspec.Meta(min_length=1)]
    """Seconds after the start, ascending."""

    def __post_init__(self) -> None:
        if any(later < earlier for earlier, later in zip(self.times_s, self.times_s[1:], strict=False)):
            raise ValueError("the times of a trace have to ascend")
        if self.times_s[0] < 0:
            raise ValueError("the times of a trace begin at 0 or later")


Arrivals = ClosedLoop | Poisson | Trace


class Length(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number of tokens, uniform between both bounds."""

    low: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    high: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]

    def draw(self, random: Random) -> int:
        """One number."""
        return random.randint(self.low, max(self.low, self.high))


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What arrives. Two workloads that are equal bring the same requests."""

    name: str = "custom"
    source: Source = "chat"
    arrivals: Arrivals = ClosedLoop()
    prompt_tokens: Length | None = None
    """``None`` takes the text as it is: a question, a passage, a function."""
    output_tokens: Length = Length(low=16, high=128)
    ignore_eos: bool = False
    """Whether answers are exactly as long as drawn, whatever the model says."""
    shared_prefix_tokens: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    """Tokens at the beginning that all requests have in common."""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    requests: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """How many; ``None`` goes on until it is stopped."""
    seed: int = 0

    @property
    def count(self) -> int | None:
        """How many requests there are before the workload ends by itself; ``None`` if it does not."""
        if not isinstance(self.arrivals, Trace):
            return self.requests
        return min(len(self.arrivals.times_s), self.requests or len(self.arrivals.times_s))

    def gap_s(self, index: int) -> float:
        """Seconds between the arrival of request ``index - 1`` and of ``index``; 0 in a closed loop."""
        if isinstance(self.arrivals, ClosedLoop):
            return 0.0
        if isinstance(self.arrivals, Trace):
            times = self.arrivals.times_s
            return times[index] - (times[index - 1] if index else 0.0)
        shape = self.arrivals.burstiness
        return Random(f"{self.seed}/gap/{index}").gammavariate(shape, 1 / (self.arrivals.rate * shape))

    def request(self, index: int, encode: Encode, compose: Compose | None, vocabulary: int) -> Planned:
        """Make request number ``index``.

        Parameters
        ----------
        index : int
        encode : callable
            The model's tokenizer.
        compose : callable, optional
            Makes a prompt of a user's words; ``encode`` where the model has no chat template.
        vocabulary : int
            Number of tokens, for random prompts.
        """
        random = Random(f"{self.seed}/{index}")
        length = self.prompt_tokens.draw(random) if self.prompt_tokens is not None else None
        output = self.output_tokens.draw(random)
        seed = random.getrandbits(62)
        if self.source == "random":
            count = length or 64
            shared = Random(f"{self.seed}/shared")
            prefix = [shared.randrange(vocabulary) for _ in range(min(self.shared_prefix_tokens, count - 1))]
            ids = prefix + [random.randrange(vocabulary) for _ in range(count - len(prefix))]
            preview = f"{count} random tokens"
            return Planned(index=index, prompt=ids, text=None, preview=preview, output_tokens=output, seed=seed)
        task, body = self._words(random)
        preview = task if self.source in {"chat", "story"} else f"{task} {body}"
        instructions = _filled(texts.INSTRUCTIONS, self.shared_prefix_tokens, encode, Random(f"{self.seed}/shared"))
        begin = f"{instructions}{_PARAGRAPH}" if instructions else ""

        def words(body: str) -> str:
            return f"{begin}{task}{_PARAGRAPH}{body}" if body else begin + task

        def whole(body: str) -> list[int]:
            return (compose or encode)(words(body))

        ids = whole(body)
        if length is not None:
            if len(ids) < length:
                body = _filled(body, length - len(whole("")), encode, random)
            body = _cut(body, length, whole, encode)
            ids = whole(body)
        return Planned(index=index, prompt=ids, text=words(body), preview=preview, output_tokens=output, seed=seed)

    def _words(self, random: Random) -> tuple[str, str]:
        """A task, and what it is about."""
        match self.source:
            case "summarize":
                return "Summarize this in two sentences:", random.choice(texts.PASSAGES)
            case "code":
                return random.choice(texts.CODE_TASKS), random.choice(texts.FUNCTIONS)
            case "story":
                return "Go on with this story:", random.choice(texts.PASSAGES)
            case _:
                return random.choice(texts.QUESTIONS), ""


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a workload."""

    index: int
    prompt: list[int]
    """Token ids."""
    text: str | None
    """The user's words, before a chat template; ``None`` where the prompt is random tokens."""
    preview: str
    output_tokens: int
    seed: int


def _filled(text: str, tokens: int, encode: Encode, random: Random) -> str:
    """A text of about as many tokens: ``text``, followed by passages as needed."""
    if tokens <= 0:
        return ""
    parts = [text] if text else []
    count = len(encode(text)) if text else 0
    while count < tokens:
        passage = random.choice(texts.PASSAGES)
        parts.append(passage)
        count += len(encode(passage)) + 1
    return _prefix_of(_PARAGRAPH.join(parts), tokens, encode)


def _prefix_of(text: str, tokens: int, encode: Encode) -> str:
    """The longest run of whole words of ``text`` that has at most ``tokens`` tokens."""
    words = text.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = math.ceil((low + high) / 2)
        if len(encode(" ".join(words[:middle]))) <= tokens:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def _cut(body: str, length: int, whole: Callable[[str], list[int]], encode: Encode) -> str:
    """Shorten ``body`` until the whole prompt has at most ``length`` tokens, or nothing of it is left."""
    over = len(whole(body)) - length
    while over > 0 and body:
        body = _prefix_of(body, max(len(encode(body)) - over, 0), encode)
        over = len(whole(body)) - length
    return body


PRESETS: dict[str, tuple[str, Workload]] = {
    "chat": ("Short questions, answers of medium length", Workload(name="chat", source="chat")),
    "summarize": (
        "Long prompts, short answers: prefill dominates",
        Workload(
            name="summarize",
            source="summarize",
            prompt_tokens=Length(low=200, high=600),
            output_tokens=Length(low=16, high=64),
        ),
    ),
    "code": (
        "Functions to explain and to mend: answers repeat the prompt",
        Workload(name="code", source="code", output_tokens=Length(low=64, high=192)),
    ),
    "long context": (
        "Few requests with very long prompts: the KV cache fills",
        Workload(
            name="long context",
            source="story",
            arrivals=ClosedLoop(concurrency=2),
            prompt_tokens=Length(low=1000, high=1500),
            output_tokens=Length(low=64, high=128),
        ),
    ),
    "shared prefix": (
        "One long instruction before every question: what prefix caching is for",
        Workload(name="shared prefix", source="chat", shared_prefix_tokens=400),
    ),
    "bursty": (
        "Questions that arrive by themselves, in bursts",
        Workload(name="bursty", source="chat", arrivals=Poisson(rate=1.5, burstiness=0.3)),
    ),
}
"""Name → what it shows, and the workload."""


def convert(values: dict[str, object]) -> Workload:
    """Make a workload from plain values; ``preset`` names one to start from.

    Raises
    ------
    WorkloadError
        Saying which value is wrong and what is allowed.
    """
    values = dict(values)
    preset = values.pop("preset", None)
    base = Workload()
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise WorkloadError(f"There is no preset {preset!r}. There are: {', '.join(PRESETS)}.")
        base = PRESETS[preset][1]
    return changed(base, values)


def changed(workload: Workload, values: dict[str, object]) -> Workload:
    """Replace some values of a workload.

    Raises
    ------
    WorkloadError
        Saying which value is wrong and what is allowed.
    """
    merged = msgspec.to_builtins(workload) | values
    try:
        return msgspec.convert(merged, Workload)
    except msgspec.ValidationError as error:
        known = ", ".join(Workload.__struct_fields__)
        raise WorkloadError(f"This is no workload: {error}. Its fields are {known}.") from error
