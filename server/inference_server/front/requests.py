"""Every request from arrival to its end: handles, states, text, and the way of each token to whoever waits for it.

A *generation* is one HTTP call; its *samples* (several with ``n`` or several prompts) are what the engine knows by
handle. Tokens go from a step report into the generation's mailbox and from there to the client; the telemetry of a
token is logged once the client's connection has taken it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inference_server.front.detokenizer import Detokenizer, StopStrings
from inference_server.front.errors import ApiError
from inference_server.front.event_log import ENDED, EventLog
from inference_server.front.tokenizer import ModelTokenizer
from inference_server.protocol import (
    Cancel,
    FinishReason,
    RequestEvent,
    RequestFailed,
    RequestState,
    SamplingParams,
    StepReport,
    Submit,
    ToEngine,
)
from inference_server.recording.journal import RequestDetail

if TYPE_CHECKING:
    from inference_server.front.token_book import TokenBook

_PREVIEW_LENGTH = 80
_SENT_WITHIN_S = 0.05
"""How long the tokens of a step wait for slow connections before the ones that were sent are logged without them."""
_SLOWEST_LOOK_S = 5.0


@dataclass(slots=True, eq=False)
class Sample:
    """One request of the engine: one sequence of tokens."""

    handle: int
    choice: int
    """Index among the choices of the HTTP answer."""
    id: str
    generation: Generation
    prompt_tokens: int = 0
    cached_tokens: int = 0
    max_tokens: int = 0
    state: RequestState = "queued"
    output_tokens: int = 0
    submitted_ns: int | None = None
    started_ns: int | None = None
    preemptions: int = 0
    seed: int | None = None
    priority: int = 0
    drafted: list[int] = field(default_factory=list)
    """How often a token was proposed for it as the first, second … of a step."""
    accepted: list[int] = field(default_factory=list)
    """How often that token was accepted."""
    detail: RequestDetail | None = None
    leader: Sample | None = None
    """The sample that computes the prompt for this one; ``None`` for itself."""
    first_token_ns: int | None = None
    last_sent_ns: int | None = None
    unbooked: StepTokens | None = None
    """The step of its newest token that was sent and is not booked yet: another connection of that step is slow."""
    longest_itl_ns: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    failure: ApiError | None = None
    detokenizer: Detokenizer | None = None
    stops: StopStrings = field(default_factory=lambda: StopStrings(()))


@dataclass(slots=True, eq=False)
class Output:
    """What one step added to one sample; or, without a token, its end by something else than the engine's doing."""

    sample: Sample
    text: str
    """What may be shown: less than the token's text while a stop string may be coming."""
    token_id: int | None = None
    index: int = 0
    token_text: str = ""
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    origin: int = 0
    """:class:`~inference_server.protocol.Origin`, as a number."""
    finish: FinishReason | None = None
    step: StepTokens | None = None
    place: int = 0

    def sent(self, now_ns: int) -> None:
        """Say that the client's connection has taken it."""
        if self.step is not None:
            self.step.sent(self.place, now_ns)


SentToken = tuple[Output, int, int]
"""A token's output, its id, and when it was sent."""


class StepTokens:
    """The tokens of one step on their way out: logged once all are sent, or in parts where a connection is slow.

    The tokens of one sample are booked in their order: a token that was sent while an earlier one of its sample waits
    for somebody else's connection has that one booked first.
    """

    __slots__ = ("_book", "_delay_s", "_outputs", "_sent_ns", "_timer", "_waiting", "received_ns", "step")

    def __init__(self, step: int | None, received_ns: int, book: Callable[[StepTokens, list[SentToken]], None]) -> None:
        self.step = step
        """Number of the step; ``None`` while steps are not recorded."""
        self.received_ns = received_ns
        """When the front began with the step's tokens."""
        self._book = book
        self._delay_s = _SENT_WITHIN_S
        self._outputs: list[Output | None] = []
        self._sent_ns: list[int] = []
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, output: Output) -> None:
        """Take in one token that is about to be sent."""
        output.step, output.place = self, len(self._outputs)
        self._outputs.append(output)
        self._sent_ns.append(0)
        self._waiting += 1

    def begin(self) -> None:
        """Start waiting for the connections."""
        if self._outputs:
            self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._log_sent)

    def sent(self, place: int, now_ns: int) -> None:
        """One token was taken by its connection."""
        output = self._outputs[place]
        if self._sent_ns[place] or output is None:
            return
        earlier = output.sample.unbooked
        if earlier is not None and earlier is not self:
            earlier.book_sent()
        output.sample.unbooked = self
        self._sent_ns[place] = now_ns
        self._waiting -= 1
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._log_sent()

    def _log_sent(self) -> None:
        self.book_sent()
        self._timer = None
        if self._waiting:
            self._delay_s = min(2 * self._delay_s, _SLOWEST_LOOK_S)
            self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._log_sent)

    def book_sent(self) -> None:
        """Book the tokens that were sent and are not booked yet."""
        sent: list[SentToken] = []
        for place, output in enumerate(self._outputs):
            if output is None or output.token_id is None:
                continue
            sent_ns = self._sent_ns[place]
            if not sent_ns:
                if output.sample.generation.closed:  # it never will be
                    self._outputs[place] = None
                    self._waiting -= 1
                continue
            self._outputs[place] = None
            if output.sample.unbooked is self:
                output.sample.unbooked = None
            sent.append((output, output.token_id, sent_ns))
        if sent:
            self._book(self, sent)


class Generation:
    """One HTTP call: its samples and the mailbox that its handler reads."""

    def __init__(
        self,
        identifier: str,
        preview: str,
        *,
        samples_per_prompt: int,
        streaming: bool,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.id = identifier
        self.headers = headers or {}
        """Those of the call that say which trace it belongs to."""
        self.preview = preview
        self.arrival_ns = time.monotonic_ns()
        self.samples_per_prompt = samples_per_prompt
        self.streaming = streaming
        """Whether tokens leave one by one. Otherwise a token counts as sent once its text is known."""
        self.samples: list[Sample] = []
        self.closed = False
        """Whether the client is gone or has all it wanted."""
        self._mail: deque[Output] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = asyncio.Event()

    @property
    def active(self) -> bool:
        """Whether any sample has not ended."""
        return any(sample.state not in ENDED for sample in self.samples)

    async def ended(self) -> None:
        """Return once no sample is active."""
        await self._ended.wait()

    def post(self, output: Output) -> None:
        """Put something into the mailbox."""
        self._mail.append(output)
        if output.finish is not None and not self.active:
            self._ended.set()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def collect(self, limit_s: float | None = None) -> list[Output]:
        """Wait for something and return all there is, oldest first; nothing if ``limit_s`` passes before."""
        if not self._mail:
            self._waiter = asyncio.get_running_loop().create_future()
            if limit_s is None:
                await self._waiter
            else:
                await asyncio.wait({self._waiter}, timeout=limit_s)
        mail, self._mail = self._mail, deque()
        return list(mail)


class RequestTable:
    """All requests of the front.

    Parameters
    ----------
    log
        Gets the requests' events and their tokens.
    send
        Sends a command to the engine.
    book
        Gets every token that was sent and every request that ended.
    """

    def __init__(self, log: EventLog, send: Callable[[ToEngine], None], book: TokenBook) -> None:
        self._log = log
        self._send = send
        self._book = book
        self._handles = itertools.count(1)
        self._samples: dict[int, Sample] = {}
        self.on_detail: Callable[[RequestDetail], None] | None = None
        """Gets what each request asked for, while something is recorded."""

    def __len__(self) -> int:
        """Return how many requests have not ended."""
        return len(self._samples)

    # -- the life of a generation ------------------------------------------------------------------------------------

    def open(
        self,
        identifier: str,
        preview: str,
        *,
        prompts: int,
        n: int,
        streaming: bool,
        headers: Mapping[str, str] | None = None,
    ) -> Generation:
        """Register a call that just arrived: ``n`` samples for each of its prompts.

        Raises
        ------
        ApiError
            409 if an active request has that id.
        """
        if any(sample.generation.id == identifier for sample in self._samples.values()):
            raise ApiError(
                409,
                f"A request with the id {identifier!r} is running. Choose another request_id, or none.",
                param="request_id",
            )
        preview = " ".join(preview[: 4 * _PREVIEW_LENGTH].split())[:_PREVIEW_LENGTH]
        generation = Generation(identifier, preview, samples_per_prompt=n, streaming=streaming, headers=headers)
        choices = prompts * n
        for choice in range(choices):
            name = identifier if choices == 1 else f"{identifier}-{choice}"
            sample = Sample(next(self._handles), choice, name, generation)
            generation.samples.append(sample)
            self._samples[sample.handle] = sample
        for sample in generation.samples:
            self._tell(sample)
        return generation

    def submit(
        self,
        generation: Generation,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        *,
        tokenizer: ModelTokenizer,
        stops: Sequence[str] = (),
        priority: int = 0,
        overrides: Mapping[str, bool | int | str] | None = None,
    ) -> None:
        """Hand a generation to the engine.

        Parameters
        ----------
        prompts
            Token ids, as many as the generation was opened with.
        sampling
            One per prompt.
        tokenizer
            Turns the tokens into text.
        stops
            Strings that end a text.
        priority
            Lower runs first.
        overrides
            Feature values that hold for this generation alone.
        """
        each = generation.samples_per_prompt
        now = time.monotonic_ns()
        for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            ids = tuple(prompt)
            samples = generation.samples[number * each : (number + 1) * each]
            for sample in samples:
                sample.prompt_tokens = len(prompt)
                sample.max_tokens = params.max_tokens
                sample.detokenizer = tokenizer.detokenizer()
                sample.stops = StopStrings(stops)
                sample.priority = priority
                sample.submitted_ns = now
                sample.leader = samples[0] if sample is not samples[0] else None
                sample.detail = RequestDetail(
                    request=sample.handle,
                    prompt=ids,
                    sampling=params,
                    overrides=dict(overrides or {}),
                    stops=tuple(stops),
                    streaming=generation.streaming,
                )
                self._tell(sample)
                if self.on_detail is not None:
                    self.on_detail(sample.detail)
            self._send(
                Submit(
                    requests=tuple(sample.handle for sample in samples),
                    prompt=ids,
                    sampling=params,
                    arrival_ns=generation.arrival_ns,
                    priority=priority,
                    overrides=dict(overrides or {}),
                )
            )

    def cancel(self, generation: Generation) -> None:
        """End what is left of a generation, because nobody waits for it any more or somebody asked for it."""
        for sample in generation.samples:
            self.cancel_sample(sample)

    def cancel_sample(self, sample: Sample) -> None:
        """End one sample, if it has not ended."""
        if sample.state in ENDED:
            return
        self._send(Cancel(sample.handle))
        self._end(sample, "cancelled", "cancelled")
        sample.generation.post(Output(sample, sample.stops.finish(), finish="cancelled"))

    def fail(self, generation: Generation, error: ApiError) -> None:
        """End a generation that never reached the engine."""
        for sample in generation.samples:
            self._fail(sample, error)

    def find(self, identifier: str) -> list[Sample]:
        """Return the active samples that an id, the id of one of several choices, or a handle stands for."""
        active = list(self._samples.values())
        found = [sample for sample in active if identifier in {sample.id, sample.generation.id}]
        return found or [sample for sample in active if identifier == str(sample.handle)]

    # -- what the engine reports -------------------------------------------------------------------------------------

    def step_report(self, report: StepReport) -> None:
        """Log a step and send its tokens on their way. The hot path: constant work per token."""
        received_ns = time.monotonic_ns()
        self._book.step(report)
        started = zip(report.started, report.cached, report.seeds or itertools.repeat(None), strict=False)
        for handle, cached, seed in started:
            sample = self._samples.get(handle)
            if sample is None:
                continue
            sample.cached_tokens = max(sample.cached_tokens, cached)
            sample.seed = seed
            if sample.started_ns is None:
                sample.started_ns = report.begin_ns
                self._book.started(sample)
        for handle in report.started:
            self._change_state(handle, "running")
        for handle in report.preempted:
            if (preempted := self._samples.get(handle)) is not None:
                preempted.preemptions += 1
            self._change_state(handle, "preempted")
        for handle, drafted, accepted in zip(report.verified, report.drafted, report.accepted, strict=True):
            if (verified := self._samples.get(handle)) is not None:
                _count(verified.drafted, drafted)
                _count(verified.accepted, accepted)
        tokens = report.tokens
        outgoing = StepTokens(report.step.step if report.step else None, received_ns, self._sent)
        at_once: list[Output] = []
        for handle, index, token_id, logprob, top, finish, origin in zip(
            tokens.request,
            tokens.index,
            tokens.token_id,
            tokens.logprob,
            tokens.top,
            tokens.finish,
            tokens.origin or [0] * len(tokens.request),
            strict=True,
        ):
            sample = self._samples.get(handle)
            if sample is None:
                continue  # cancelled, or ended by a stop string, while the step ran
            output = self._output(sample, index, token_id, finish)
            output.logprob, output.top, output.origin = logprob, top, origin
            outgoing.add(output)
            sample.generation.post(output)
            if not sample.generation.streaming:
                at_once.append(output)
        outgoing.begin()
        known_ns = time.monotonic_ns()
        self._book.turned_into_text(received_ns, known_ns)
        for output in at_once:
            output.sent(known_ns)

    def _output(self, sample: Sample, index: int, token_id: int, finish: FinishReason | None) -> Output:
        assert sample.detokenizer is not None
        sample.output_tokens += 1
        if sample.state != "running":
            self._change_state(sample.handle, "running")
        # The token that ends a text is no part of it, unless a schema is what it completes (a special one has no text).
        silent = finish == "stop"
        if silent and sample.detail is not None and sample.detail.sampling.json_schema is not None:
            silent = token_id in sample.detail.sampling.stop_token_ids
        text = "" if silent else sample.detokenizer.add(token_id)
        if finish is not None:
            text += sample.detokenizer.finish()
        shown, stopped = sample.stops.add(text)
        if stopped:
            if finish is None:
                self._send(Cancel(sample.handle))
            finish = "stop"
        elif finish is not None:
            shown += sample.stops.finish()
        if finish is not None:
            self._end(sample, "failed" if finish == "error" else "finished", finish)
        return Output(sample, shown, token_id=token_id, index=index, token_text=text, finish=finish)

    def states(self) -> list[RequestState]:
        """Return the states of the requests that have not ended."""
        return [sample.state for sample in self._samples.values()]

    def details(self) -> list[RequestDetail]:
        """Return what the requests that have not ended asked for."""
        return [sample.detail for sample in self._samples.values() if sample.detail is not None]

    def request_failed(self, failure: RequestFailed) -> None:
        """End a request that the engine gave up."""
        sample = self._samples.get(failure.request)
        if sample is None:
            return
        status = {"invalid": 400, "capacity": 503, "internal": 500}[failure.code]
        self._fail(sample, ApiError(status, failure.error, code=failure.code))

    def engine_lost(self, reason: str) -> int:
        """End every request that was in the engine; return how many. Those that wait for it go on waiting."""
        lost = [sample for sample in self._samples.values() if sample.detokenizer is not None]
        for sample in lost:
            self._fail(sample, ApiError(503, reason, code="engine_died"))
        return len(lost)

    # -- states ------------------------------------------------------------------------------------------------------

    def _sent(self, step: StepTokens, tokens: list[SentToken]) -> None:
        """Book what the clients have taken; tell once more of requests whose first or last token it was."""
        self._book.tokens(step, tokens)
        for output, _, sent_ns in tokens:
            sample = output.sample
            if output.index == 0:
                sample.first_token_ns = sent_ns
            if output.finish in {"stop", "length"}:
                self._book.finished(sample)
            if output.index == 0 or output.finish is not None:
                self._tell(sample)

    def _fail(self, sample: Sample, error: ApiError) -> None:
        if sample.state in ENDED:
            return
        sample.error = error.detail.message
        sample.failure = error
        self._end(sample, "failed", "error")
        sample.generation.post(Output(sample, "", finish="error"))

    def _change_state(self, handle: int, state: RequestState) -> None:
        sample = self._samples.get(handle)
        if sample is not None and sample.state != state:
            sample.state = state
            self._tell(sample)

    def _end(self, sample: Sample, state: RequestState, reason: FinishReason) -> None:
        sample.state = state
        sample.finish_reason = reason
        self._samples.pop(sample.handle, None)
        self._book.ended(sample, reason)
        self._tell(sample)

    def _tell(self, sample: Sample) -> None:
        generation = sample.generation
        self._log.append(
            RequestEvent(
                request=sample.handle,
                id=sample.id,
                state=sample.state,
                at_ns=time.monotonic_ns(),
                arrival_ns=generation.arrival_ns,
                prompt_tokens=sample.prompt_tokens,
                output_tokens=sample.output_tokens,
                max_tokens=sample.max_tokens,
                preview=generation.preview,
                cached_tokens=sample.cached_tokens,
                first_token_ns=sample.first_token_ns,
                finish_reason=sample.finish_reason,
                error=sample.error,
                group=generation.samples[0].handle if len(generation.samples) > 1 else None,
                submitted_ns=sample.submitted_ns,
                started_ns=sample.started_ns,
                last_token_ns=sample.last_sent_ns,
                preemptions=sample.preemptions,
                seed=sample.seed,
                priority=sample.priority,
                drafted=list(sample.drafted),
                accepted=list(sample.accepted),
            )
        )


def _count(positions: list[int], count: int) -> None:
    """Count one more at each of the first ``count`` positions."""
    positions.extend([0] * (count - len(positions)))
    for place in range(count):
        positions[place] += 1
