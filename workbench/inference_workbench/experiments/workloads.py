"""What an experiment sends: named workloads, requests from recordings and files, and other tools' definitions of them.

A :class:`~inference_server.workloads.workload.Workload` makes requests from a name and a seed; a :class:`RequestSet`
holds them one by one. Both are plain data that survive JSON, and :func:`plan` turns either into what is sent.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from inference_server.workloads.workload import (
    PRESETS,
    ClosedLoop,
    Length,
    Poisson,
    Workload,
    WorkloadError,
    changed,
    convert,
)
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.sender import Request
from inference_workbench.experiments.target import Target
from inference_workbench.traffic import spelled_out

if TYPE_CHECKING:
    from inference_workbench.recording import Recording

_UNKNOWN_VOCABULARY = 30_000
"""Random prompts for a server that does not tell its vocabulary draw below this; every common model has more."""
_DEFAULT_OUTPUT_TOKENS = 128


class RequestSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests that are written down one by one."""

    name: str
    requests: list[Request]
    limit: int | None = None
    """Most under way at the same time; ``None`` sends each when it is due."""

    def __repr__(self) -> str:
        return f"<RequestSet {self.name!r}: {len(self.requests)} requests>"


AnyWorkload = Workload | RequestSet


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent to one server in one run."""

    requests: list[Request]
    limit: int | None = None
    estimated_lengths: bool = False
    """The server could not be asked for token counts, so prompts have the lengths asked for only about."""

    @property
    def digest(self) -> str:
        """A fingerprint of all of it."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]


def workload(base: str | AnyWorkload | Path | Recording = "chat", **values: Any) -> AnyWorkload:
    """Return a workload by name, with some of its values replaced.

    Parameters
    ----------
    base
        A preset (``chat``, ``summarize``, ``code``, ``long context``, ``shared prefix``, ``bursty``), a workload, a
        recording, or the path of a recording (``.iwrec``), of a workload that was saved (``.json``), or of a file with
        a request a line (``.jsonl``; see :func:`from_jsonl`).
    **values
        Fields of :class:`~inference_server.workloads.workload.Workload`. ``concurrency``, or ``rate`` and
        ``burstiness``, are short for ``arrivals``; lengths may be a number or a pair.

    Raises
    ------
    WorkloadError
        Saying which value is wrong and what is allowed.

    Examples
    --------
    >>> iw.workload("chat", concurrency=8, output_tokens=(32, 128))
    >>> iw.workload("summarize", rate=2.0, seed=7)
    """
    if isinstance(base, str) and base in PRESETS:
        return convert({"preset": base, **spelled_out(values, None)})
    if isinstance(base, Workload):
        return changed(base, spelled_out(values, None)) if values else base
    if isinstance(base, str | Path) and not Path(base).suffix:
        raise WorkloadError(f"There is no workload {str(base)!r}. There are: {', '.join(PRESETS)}; or give a file.")
    if isinstance(base, str | Path):
        return _from_file(Path(base), values)
    if isinstance(base, RequestSet):
        if values:
            raise WorkloadError(f"The requests of {base.name!r} are fixed; {', '.join(values)} cannot be changed.")
        return base
    return from_recording(base, **values)


def _from_file(path: Path, values: dict[str, Any]) -> AnyWorkload:
    match path.suffix:
        case ".iwrec" | ".iwjournal":
            return from_recording(path, **values)
        case ".jsonl":
            return from_jsonl(path, **values)
        case ".json":
            loaded = load_workload(path) if _is_saved(path) else from_jsonl(path, **values)
            return workload(loaded, **values) if isinstance(loaded, Workload) else loaded
        case other:
            raise WorkloadError(f"A workload is read from .json, .jsonl and .iwrec files, not from {other} ({path}).")


def _is_saved(path: Path) -> bool:
    return _read(path).lstrip().startswith(b"{")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error.strerror or error}.") from error


def save_workload(what: AnyWorkload, path: str | Path) -> Path:
    """Write a workload to a JSON file and return its path."""
    target = Path(path)
    target.write_bytes(msgspec.json.format(msgspec.json.encode(what), indent=1) + b"\n")
    return target


def load_workload(path: str | Path) -> AnyWorkload:
    """Read a workload that :func:`save_workload` wrote.

    Raises
    ------
    WorkloadError
        If it is none.
    """
    content = _read(Path(path))
    try:
        return from_plain(msgspec.json.decode(content))
    except (msgspec.DecodeError, WorkloadError) as error:
        raise WorkloadError(f"{path} holds no workload: {error}") from error


def from_plain(values: dict[str, Any]) -> AnyWorkload:
    """Make a workload of plain values, as JSON gives them."""
    if isinstance(values, dict) and isinstance(values.get("requests"), list):
        try:
            return msgspec.convert(values, RequestSet)
        except msgspec.ValidationError as error:
            raise WorkloadError(f"These are no requests: {error}.") from error
    return convert(values)


# -- from what happened, or from files --------------------------------------------------------------------------------


def from_recording(recording: Recording | str | Path, speed: float = 1.0) -> RequestSet:
    """Take a recording's requests: the same prompts, sampling and seeds, at the times they came.

    Parameters
    ----------
    recording
        A recording, or the path of one.
    speed
        2 sends them twice as fast as they came.

    Raises
    ------
    WorkbenchError
        If the recording holds no request with its prompt.
    """
    from inference_workbench.recording import open_recording  # noqa: PLC0415 -- only for who has one
    from inference_workbench.replaying import plan as recorded_plan  # noqa: PLC0415

    if isinstance(recording, str | Path):
        with open_recording(recording) as opened:
            return from_recording(opened, speed)
    planned = recorded_plan(recording, speed)
    if not planned:
        raise WorkbenchError("This recording has no request that could be sent again: none of them has its prompt.")
    first = planned[0].due_s
    requests = []
    for index, each in enumerate(planned):
        body = dict(each.body)
        requests.append(
            Request(
                index=index,
                ids=body.pop("prompt"),
                max_tokens=body.pop("max_tokens"),
                at_s=each.due_s - first,
                temperature=body.pop("temperature"),
                seed=body.pop("seed", None),
                ignore_eos=body.pop("ignore_eos"),
                extra=body,
            )
        )
    return RequestSet(name=recording.manifest.name or "recording", requests=requests)


def from_jsonl(
    path: str | Path,
    *,
    limit: int | None = None,
    concurrency: int | None = None,
    rate: float | None = None,
    burstiness: float = 1.0,
    output_tokens: int | None = None,
    seed: int = 0,
    shuffle: bool = False,
) -> RequestSet:
    """Take the requests of a file: a JSON object a line, or one JSON list (as ShareGPT is).

    What an object may have, so that the data sets of vLLM's bench, guidellm and ShareGPT are read as they are:

    * the prompt: ``prompt``, ``text``, ``messages`` (OpenAI), ``conversations`` (ShareGPT: what the human says first),
      or ``input_length`` (Mooncake: so many random tokens);
    * the length of the answer: ``output_tokens``, ``output_tokens_count``, ``max_tokens`` or ``output_length``;
    * the arrival: ``at_s`` or ``timestamp`` (milliseconds, as in Mooncake's traces).

    Parameters
    ----------
    limit
        Take so many at most.
    concurrency
        Send them in a closed loop of so many.
    rate, burstiness
        Or let them arrive by themselves, so many a second, gamma distributed. Without either, the file's own arrivals;
        where it has none, one after the other.
    output_tokens
        For objects that do not say; for ShareGPT, without it, the length of its own answer is estimated.
    seed
        Of arrivals, random prompts and the order.
    shuffle
        Whether to take them in random order.

    Raises
    ------
    WorkloadError
        Naming the line that is wrong.
    """
    source = Path(path)
    rows = list(_objects(source))
    if shuffle:
        Random(seed).shuffle(rows)  # noqa: S311 -- reproducible, no secret
    requests: list[Request] = []
    for line, row in rows:
        if limit is not None and len(requests) >= limit:
            break
        try:
            request = _request_of(row, len(requests), output_tokens, seed)
        except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
            raise WorkloadError(f"{source}, entry {line}: {error}.") from error
        if request is not None:
            requests.append(request)
    if not requests:
        raise WorkloadError(f"{source} has no request: no object with 'prompt', 'messages' or 'conversations'.")
    if rate is not None:
        arrivals = Workload(arrivals=Poisson(rate=rate, burstiness=burstiness), seed=seed)
        at, timed = 0.0, []
        for request in requests:
            timed.append(msgspec.structs.replace(request, at_s=at))
            at += arrivals.gap_s(request.index + 1)
        return RequestSet(name=source.stem, requests=timed, limit=concurrency)
    if concurrency is None and any(request.at_s for request in requests):
        first = min(request.at_s for request in requests)
        ordered = sorted(requests, key=lambda request: request.at_s)
        return RequestSet(
            name=source.stem,
            requests=[
                msgspec.structs.replace(each, index=place, at_s=each.at_s - first) for place, each in enumerate(ordered)
            ],
        )
    closed = [msgspec.structs.replace(request, at_s=0.0) for request in requests]
    return RequestSet(name=source.stem, requests=closed, limit=concurrency or 1)


def _objects(path: Path) -> Iterable[tuple[int, Any]]:
    content = _read(path)
    if content.lstrip().startswith(b"["):
        try:
            yield from enumerate(msgspec.json.decode(content), start=1)
        except msgspec.DecodeError as error:
            raise WorkloadError(f"{path} is not valid JSON: {error}.") from error
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                yield number, msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                raise WorkloadError(f"{path}, line {number} is not valid JSON: {error}.") from error


def _request_of(row: Any, index: int, output_tokens: int | None, seed: int) -> Request | None:
    """Make a request of one object; ``None`` for a conversation that no human begins."""
    if not isinstance(row, dict):
        raise TypeError("it is no JSON object")
    wanted = next(
        (row[name] for name in ("output_tokens", "output_tokens_count", "max_tokens", "output_length") if name in row),
        output_tokens,
    )
    prompt: dict[str, Any]
    if "conversations" in row:
        turns = row["conversations"]
        if not turns or turns[0].get("from") not in {"human", "user"}:
            return None
        prompt = {"messages": [{"role": "user", "content": turns[0]["value"]}]}
        if wanted is None and len(turns) > 1:
            wanted = max(1, round(len(turns[1]["value"]) / 4))
    elif "messages" in row:
        prompt = {"messages": row["messages"]}
    elif "prompt" in row or "text" in row:
        said = row.get("prompt", row.get("text"))
        prompt = {"ids": said} if isinstance(said, list) else {"text": said}
    elif "input_length" in row:
        random = Random(f"{seed}/{index}")  # noqa: S311 -- reproducible, no secret
        prompt = {"ids": [random.randrange(_UNKNOWN_VOCABULARY) for _ in range(int(row["input_length"]))]}
    else:
        raise ValueError("it has none of 'prompt', 'text', 'messages', 'conversations' and 'input_length'")
    at_s = float(row["at_s"]) if "at_s" in row else float(row.get("timestamp", 0.0)) / 1e3
    values = {
        "index": index,
        "max_tokens": int(wanted or _DEFAULT_OUTPUT_TOKENS),
        "at_s": at_s,
        "ignore_eos": bool(row.get("ignore_eos", False)),
        **prompt,
    }
    return msgspec.convert(values, Request)


# -- what is sent to one server ----------------------------------------------------------------------------------------


def plan(
    what: AnyWorkload,
    target: Target,
    *,
    requests: int | None = None,
    as_text: bool = False,
    on_progress: Callable[[int, int], object] | None = None,
) -> Load:
    """Turn a workload into the requests that are sent to one server.

    Parameters
    ----------
    what
        The workload.
    target
        The server, which is asked for the lengths of prompts in tokens.
    requests
        How many; what the workload says, where it does.
    as_text
        Send words and conversations rather than token ids, as every server understands them.
    on_progress
        Called with how many are ready and how many there will be.

    Raises
    ------
    WorkloadError
        If the workload does not say how many and neither does ``requests``, or cannot be sent as asked.
    """
    if isinstance(what, RequestSet):
        chosen = what.requests[:requests]
        return Load(requests=chosen if as_text else _with_ids(chosen, target), limit=what.limit)
    count = what.count if requests is None else min(requests, what.count or requests)
    if count is None:
        raise WorkloadError(f"The workload {what.name!r} has no end: say how many requests, with requests=….")
    encoder = target.encoder()
    try:
        made: list[Request] = []
        at_s = 0.0
        for index in range(count):
            planned = what.request(index, encoder.encode, encoder.compose, target.vocabulary or _UNKNOWN_VOCABULARY)
            at_s += what.gap_s(index) if index else 0.0
            words = as_text or not encoder.exact
            made.append(
                Request(
                    index=index,
                    ids=None if words and planned.text is not None else planned.prompt,
                    messages=[{"role": "user", "content": planned.text}]
                    if words and planned.text is not None
                    else None,
                    max_tokens=planned.output_tokens,
                    at_s=at_s,
                    temperature=what.temperature,
                    seed=planned.seed if what.temperature > 0 else None,
                    ignore_eos=what.ignore_eos,
                )
            )
            if on_progress is not None:
                on_progress(index + 1, count)
    finally:
        encoder.close()
    arrivals = what.arrivals
    lengths = what.prompt_tokens is not None or what.shared_prefix_tokens > 0
    return Load(
        requests=made,
        limit=arrivals.concurrency if isinstance(arrivals, ClosedLoop) else None,
        estimated_lengths=lengths and not encoder.exact and what.source != "random",
    )


def _with_ids(requests: Sequence[Request], target: Target) -> list[Request]:
    """Turn texts and conversations into token ids where the server can do that, so that outputs can be compared."""
    if target.tokenizes != "vllm" or all(request.ids is not None for request in requests):
        return list(requests)
    encoder = target.encoder()
    try:
        made = []
        for request in requests:
            ids = request.ids
            if request.messages is not None:
                ids = encoder.conversation(request.messages)
            elif request.text is not None:
                ids = encoder.prompt(request.text)
            made.append(msgspec.structs.replace(request, ids=ids, text=None, messages=None))
        return made
    finally:
        encoder.close()


# -- other tools' definitions ------------------------------------------------------------------------------------------


def from_vllm_bench(arguments: str | Sequence[str]) -> Workload:
    """Translate the options of ``vllm bench serve`` with its random data set.

    Raises
    ------
    WorkloadError
        For an option that changes what is sent and has no counterpart here.

    Examples
    --------
    >>> from_vllm_bench("--dataset-name random --random-input-len 512 --random-output-len 128 --request-rate 4")
    """
    options = _options(arguments)
    if options.pop("dataset-name", "random") != "random":
        raise WorkloadError(
            "Only --dataset-name random is made here; give other data sets as a file: workload('x.jsonl')."
        )
    ratio = float(options.pop("random-range-ratio", 0.0))
    prompt = int(options.pop("random-input-len", 1024))
    output = int(options.pop("random-output-len", 128))
    prefix = int(options.pop("random-prefix-len", 0))
    rate = float(options.pop("request-rate", "inf"))
    limit = options.pop("max-concurrency", None)
    count = int(options.pop("num-prompts", 1000))
    burstiness = float(options.pop("burstiness", 1.0))
    arrivals: ClosedLoop | Poisson
    if math.isinf(rate):
        arrivals = ClosedLoop(concurrency=min(int(limit) if limit else count, 512))
    elif limit is not None:
        raise WorkloadError("--request-rate and --max-concurrency together have no counterpart: choose one of them.")
    else:
        arrivals = Poisson(rate=rate, burstiness=burstiness)
    made = Workload(
        name="vllm bench random",
        source="random",
        arrivals=arrivals,
        prompt_tokens=_around(prompt, ratio, prefix),
        output_tokens=_around(output, ratio),
        shared_prefix_tokens=prefix,
        ignore_eos="ignore-eos" in options,
        temperature=float(options.pop("temperature", 0.0)),
        requests=count,
        seed=int(options.pop("seed", 0)),
    )
    options.pop("ignore-eos", None)
    _refuse_rest(options, "vllm bench serve")
    return made


def to_vllm_bench(what: Workload) -> list[str]:
    """Return the options of ``vllm bench serve`` that ask for a workload of random prompts.

    Raises
    ------
    WorkloadError
        If it cannot be said in them.
    """
    if what.source != "random" or what.prompt_tokens is None:
        raise WorkloadError(
            "Only a workload with source='random' and a length of prompts can be said in these options."
        )
    low, high = what.prompt_tokens.low, what.prompt_tokens.high
    body_low, body_high = low - what.shared_prefix_tokens, high - what.shared_prefix_tokens
    ratio = (body_high - body_low) / (body_high + body_low)
    out_low, out_high = what.output_tokens.low, what.output_tokens.high
    if abs((out_high - out_low) / (out_high + out_low) - ratio) > 0.01:
        raise WorkloadError("vllm bench spreads prompts and answers by the same ratio; here they differ.")
    options = ["--dataset-name", "random", "--random-input-len", str(round((body_low + body_high) / 2))]
    options += ["--random-output-len", str(round((out_low + out_high) / 2)), "--random-range-ratio", f"{ratio:g}"]
    options += ["--random-prefix-len", str(what.shared_prefix_tokens), "--seed", str(what.seed)]
    match what.arrivals:
        case ClosedLoop(concurrency=limit):
            options += ["--request-rate", "inf", "--max-concurrency", str(limit)]
        case Poisson(rate=rate, burstiness=burstiness):
            options += ["--request-rate", f"{rate:g}", "--burstiness", f"{burstiness:g}"]
        case _:
            raise WorkloadError("vllm bench has no arrivals from a trace.")
    if what.requests is not None:
        options += ["--num-prompts", str(what.requests)]
    return [*options, *(["--ignore-eos"] if what.ignore_eos else [])]


def from_guidellm(arguments: str | Sequence[str]) -> Workload:
    """Translate the options of guidellm with synthetic data, in the spelling of its versions up to 0.5 and from 0.8 on.

    ``--data`` as ``prompt_tokens=256,output_tokens=128`` (with ``…_min``, ``…_max`` and ``prefix_tokens``),
    ``--profile`` ``synchronous``, ``concurrent``, ``throughput``, ``constant`` or ``poisson`` with its rate, the number
    of requests, and the seed; or ``--profile kind=concurrent,streams=4``, ``--constraint kind=max_requests,count=20``,
    ``--seed kind=static,value=42``.

    Raises
    ------
    WorkloadError
        For what has no counterpart here, such as a sweep (:func:`~inference_workbench.capacity` is one).
    """
    options = _options(arguments)
    data = _pairs(options.pop("data", "prompt_tokens=256,output_tokens=128"))
    if (kind := data.pop("kind", "synthetic_text")) != "synthetic_text":
        raise WorkloadError(f"Only synthetic data is made here, not {kind}; give a file as workload('x.jsonl').")
    prefix = int(data.pop("prefix_tokens", 0))
    prompt = _guidellm_length(data, "prompt", prefix)
    output = _guidellm_length(data, "output", 0)
    if data:
        raise WorkloadError(f"These entries of --data have no counterpart here: {', '.join(data)}.")
    profile = _pairs(options.pop("profile", "") or options.pop("rate-type", "synchronous"), first="kind")
    old_rate = options.pop("rate", None)
    rate = float(profile.get("streams") or profile.get("rate") or old_rate or 1)
    constraint = _pairs(options.pop("constraint", ""), first="kind")
    if constraint.get("kind", "max_requests") != "max_requests":
        raise WorkloadError(f"A run ends after so many requests here, not by {constraint['kind']}.")
    old_count, old_seed = options.pop("max-requests", None), options.pop("random-seed", None)
    count = constraint.get("count") or old_count
    seed = _pairs(options.pop("seed", ""), first="value").get("value") or old_seed or 42
    made = Workload(
        name="guidellm",
        source="random",
        arrivals=_guidellm_arrivals(profile["kind"], rate),
        prompt_tokens=prompt,
        output_tokens=output,
        shared_prefix_tokens=prefix,
        ignore_eos=True,
        requests=None if count is None else int(count),
        seed=int(seed),
    )
    _refuse_rest(options, "guidellm")
    return made


def _guidellm_arrivals(profile: str, rate: float) -> ClosedLoop | Poisson:
    match profile:
        case "synchronous":
            return ClosedLoop(concurrency=1)
        case "concurrent":
            return ClosedLoop(concurrency=int(rate))
        case "throughput":
            return ClosedLoop(concurrency=512)
        case "poisson":
            return Poisson(rate=rate)
        case "constant":
            return Poisson(rate=rate, burstiness=1000.0)
        case other:
            raise WorkloadError(f"The profile {other!r} is no single load. For a sweep use iw.capacity(…).")


def _pairs(text: str, first: str = "kind") -> dict[str, str]:
    """Read ``name=value,…``; a value without a name is the first one's."""
    pairs = (part.partition("=") for part in text.split(",") if part)
    return dict((name, value) if sign else (first, name) for name, sign, value in pairs)


def _guidellm_length(data: dict[str, str], what: str, prefix: int) -> Length:
    mean = int(data.pop(f"{what}_tokens"))
    low = int(data.pop(f"{what}_tokens_min", mean))
    high = int(data.pop(f"{what}_tokens_max", mean))
    data.pop(f"{what}_tokens_stdev", None)
    return Length(low=low + prefix, high=high + prefix)


def _around(mean: int, ratio: float, more: int = 0) -> Length:
    return Length(low=max(1, math.floor(mean * (1 - ratio))) + more, high=math.ceil(mean * (1 + ratio)) + more)


_FLAGS = {"ignore-eos"}
_WHERE_AND_HOW = {"backend", "base-url", "host", "port", "endpoint", "model", "tokenizer", "target", "save-result",
                  "percentile-metrics", "metric-percentiles", "output-path", "max-seconds", "backend-type", "processor",
                  "disable-tqdm", "output", "disable-console", "result-dir", "result-filename"}  # fmt: skip
"""Options of other tools that do not change what is sent."""


def _options(arguments: str | Sequence[str]) -> dict[str, str]:
    words = shlex.split(arguments) if isinstance(arguments, str) else list(arguments)
    options: dict[str, str] = {}
    name: str | None = None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            options[name] = value
            name = None if value or name in _FLAGS else name
        elif name is not None:
            options[name] = word
            name = None
        elif options:
            raise WorkloadError(f"{word!r} belongs to no option.")
    return options


def _refuse_rest(options: dict[str, str], tool: str) -> None:
    rest = sorted(set(options) - _WHERE_AND_HOW)
    if rest:
        raise WorkloadError(
            f"These options of {tool} have no counterpart here: {', '.join('--' + name for name in rest)}."
        )
