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
    TokensEvent,
)

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
    first_token_ns: int | None = None
    last_sent_ns: int | None = None
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
    finish: FinishReason | None = None
    step: StepTokens | None = None
    place: int = 0

    def sent(self, now_ns: int) -> None:
        """Say that the client's connection has taken it."""
        if self.step is not None:
            self.step.sent(self.place, now_ns)


class StepTokens:
    """The tokens of one step on their way out: logged once all are sent, or in parts where a connection is slow."""

    __slots__ = ("_delay_s", "_first_sent", "_log", "_outputs", "_sent_ns", "_step", "_timer", "_waiting")

    def __init__(self, step: int, log: EventLog, first_sent: Callable[[Sample, int], None]) -> None:
        self._step = step
        self._log = log
        self._first_sent = first_sent
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
        if self._sent_ns[place]:
            return
        self._sent_ns[place] = now_ns
        self._waiting -= 1
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._log_sent()

    def _log_sent(self) -> None:
        event = TokensEvent(
            step=self._step, request=[], index=[], token_id=[], text=[], logprob=[], sent_ns=[], latency_ns=[]
        )
        first: list[tuple[Sample, int]] = []
        for place, output in enumerate(self._outputs):
            if output is None or output.token_id is None:
                continue
            sample, sent_ns = output.sample, self._sent_ns[place]
            if not sent_ns:
                if sample.generation.closed:  # it never will be
                    self._outputs[place] = None
                    self._waiting -= 1
                continue
            self._outputs[place] = None
            if output.index == 0:
                first.append((sample, sent_ns))
            before = sample.last_sent_ns if sample.last_sent_ns is not None else sample.generation.arrival_ns
            sample.last_sent_ns = sent_ns
            event.request.append(sample.handle)
            event.index.append(output.index)
            event.token_id.append(output.token_id)
            event.text.append(output.token_text)
            event.logprob.append(output.logprob)
            event.sent_ns.append(sent_ns)
            event.latency_ns.append(sent_ns - before)
        if event.request:
            self._log.append(event)
        for sample, sent_ns in first:
            self._first_sent(sample, sent_ns)
        self._timer = None
        if self._waiting:
            self._delay_s = min(2 * self._delay_s, _SLOWEST_LOOK_S)
            self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._log_sent)


class Generation:
    """One HTTP call: its samples and the mailbox that its handler reads."""

    def __init__(self, identifier: str, preview: str, *, samples_per_prompt: int, streaming: bool) -> None:
        self.id = identifier
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
    """

    def __init__(self, log: EventLog, send: Callable[[ToEngine], None]) -> None:
        self._log = log
        self._send = send
        self._handles = itertools.count(1)
        self._samples: dict[int, Sample] = {}
        self._preempted: set[int] = set()

    def __len__(self) -> int:
        """Return how many requests have not ended."""
        return len(self._samples)

    # -- the life of a generation ------------------------------------------------------------------------------------

    def open(self, identifier: str, preview: str, *, prompts: int, n: int, streaming: bool) -> Generation:
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
        generation = Generation(identifier, preview, samples_per_prompt=n, streaming=streaming)
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
        for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            samples = generation.samples[number * each : (number + 1) * each]
            for sample in samples:
                sample.prompt_tokens = len(prompt)
                sample.max_tokens = params.max_tokens
                sample.detokenizer = tokenizer.detokenizer()
                sample.stops = StopStrings(stops)
                self._tell(sample)
            self._send(
                Submit(
                    requests=tuple(sample.handle for sample in samples),
                    prompt=tuple(prompt),
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
        if report.step is not None:
            self._log.append(report.step)
        if report.kv_events is not None:
            self._log.append(report.kv_events)
        for handle, cached in zip(report.started, report.cached, strict=False):
            if (started := self._samples.get(handle)) is not None:
                started.cached_tokens = max(started.cached_tokens, cached)
        for handle in report.started:
            self._change_state(handle, "running")
        if self._preempted:
            for handle in self._preempted.intersection(report.resumed):
                self._preempted.discard(handle)
                self._change_state(handle, "running")
        for handle in report.preempted:
            self._preempted.add(handle)
            self._change_state(handle, "preempted")
        tokens = report.tokens
        outgoing = StepTokens(report.step.step if report.step else 0, self._log, self._first_sent)
        at_once: list[Output] = []
        for handle, index, token_id, logprob, top, finish in zip(
            tokens.request, tokens.index, tokens.token_id, tokens.logprob, tokens.top, tokens.finish, strict=True
        ):
            sample = self._samples.get(handle)
            if sample is None:
                continue  # cancelled, or ended by a stop string, while the step ran
            output = self._output(sample, index, token_id, finish)
            output.logprob, output.top = logprob, top
            outgoing.add(output)
            sample.generation.post(output)
            if not sample.generation.streaming:
                at_once.append(output)
        outgoing.begin()
        if at_once:
            now = time.monotonic_ns()
            for output in at_once:
                output.sent(now)

    def _output(self, sample: Sample, index: int, token_id: int, finish: FinishReason | None) -> Output:
        assert sample.detokenizer is not None
        sample.output_tokens += 1
        if sample.state != "running":
            self._change_state(sample.handle, "running")
        silent = finish == "stop"  # the token that ends a text is no part of it
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

    def _first_sent(self, sample: Sample, sent_ns: int) -> None:
        sample.first_token_ns = sent_ns
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
        self._preempted.discard(sample.handle)
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
            )
        )
