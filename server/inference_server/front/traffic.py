"""The server's own load: requests of a workload that arrive one after another until they are stopped.

They take the way of any streamed request from the tokenizer to the text, short of the HTTP connection, so that a page
that shows the load does not also have to carry it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable

import msgspec
import structlog

from inference_server.front.chat_template import ChatTemplateError
from inference_server.front.errors import ApiError
from inference_server.front.event_log import EventLog
from inference_server.front.requests import Generation, RequestTable
from inference_server.front.supervisor import EngineSupervisor
from inference_server.front.tokenizer import ModelTokenizer
from inference_server.protocol import Ready, SamplingParams, TrafficEvent, TrafficState
from inference_server.workloads.workload import MAX_CONCURRENCY, ClosedLoop, Planned, Workload, changed

_log = structlog.get_logger(__name__)

_TELL_EVERY_S = 1.0
_WAIT_FOR_ENGINE_S = 600.0
_AFTER_FAILURE_S = 0.5
"""Pause of a closed loop's place after a failure, so that a refusing engine is not asked a thousand times a second."""
_GIVE_UP_AFTER = 20
"""Failures in a row after which the traffic stops."""


class Traffic:
    """Runs one workload at a time.

    Parameters
    ----------
    supervisor
        Says when the engine can serve.
    requests
        Carries the requests.
    tokenizer
        Returns the tokenizer of the model that is loaded.
    log
        Gets :class:`TrafficEvent`.
    """

    def __init__(
        self,
        supervisor: EngineSupervisor,
        requests: RequestTable,
        tokenizer: Callable[[], ModelTokenizer],
        log: EventLog,
    ) -> None:
        self._supervisor = supervisor
        self._requests = requests
        self._tokenizer = tokenizer
        self._log = log
        self._task: asyncio.Task[None] | None = None
        self._workload = Workload()
        self._changed = asyncio.Event()
        self._started_ns = 0
        self._name = ""
        self._sent = self._finished = self._failed = self._dropped = self._output_tokens = self._in_a_row = 0
        self._under_way: dict[asyncio.Task[None], Generation | None] = {}
        self._message = ""
        """Of the last failure."""
        self._reason = ""
        """Why it ended."""
        self.event: TrafficEvent | None = None
        """The newest; ``None`` if there never was any traffic."""

    @property
    def running(self) -> bool:
        """Whether requests arrive."""
        return self._task is not None and not self._task.done()

    async def start(self, workload: Workload) -> TrafficEvent:
        """Begin; traffic that runs already is stopped first."""
        await self.stop("Another workload was started.")
        self._workload = workload
        self._name = f"traffic-{secrets.token_hex(3)}"
        self._started_ns = time.monotonic_ns()
        self._sent = self._finished = self._failed = self._dropped = self._output_tokens = self._in_a_row = 0
        self._message = self._reason = ""
        self._task = asyncio.create_task(self._run())
        return self._tell("running")

    def change(self, values: dict[str, object]) -> TrafficEvent:
        """Go on with some values of the workload replaced.

        Raises
        ------
        WorkloadError
            If a value is wrong; then the traffic goes on as it was.
        ApiError
            409 if there is no traffic.
        """
        if not self.running:
            raise ApiError(409, "There is no traffic to change. Start it first.", code="no_traffic")
        self._workload = changed(self._workload, values)
        self._changed.set()
        return self._tell("running")

    async def stop(self, reason: str = "Stopped.") -> TrafficEvent | None:
        """End it; requests under way are cancelled."""
        task, self._task = self._task, None
        if task is None:
            return self.event
        if not task.done():
            self._reason = reason
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return self.event

    # -- private -------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        teller = asyncio.create_task(self._tell_now_and_then())
        try:
            await self._arrive()
            while self._under_way:
                await asyncio.wait(set(self._under_way))
            self._reason = self._reason or f"All {self._sent} requests are done."
        finally:
            teller.cancel()
            for task, generation in list(self._under_way.items()):
                if generation is not None:
                    generation.closed = True
                    self._requests.cancel(generation)
                task.cancel()
            if self._under_way:
                await asyncio.wait(set(self._under_way))
            self._tell("stopped")

    async def _arrive(self) -> None:
        """Let requests arrive until all have, or too many failed."""
        due = time.monotonic()
        for index in itertools.count():
            workload = self._workload
            if workload.count is not None and index >= workload.count:
                return
            if isinstance(workload.arrivals, ClosedLoop):
                await self._free_place()
                due = time.monotonic()
            else:
                due += workload.gap_s(index)
                if await self._changed_before(due):
                    due = time.monotonic()
            if self._in_a_row >= _GIVE_UP_AFTER:
                self._reason = f"Stopped after {_GIVE_UP_AFTER} failures in a row. The last: {self._message}"
                return
            if len(self._under_way) >= MAX_CONCURRENCY:
                self._dropped += 1
                continue
            task = asyncio.create_task(self._one(index))
            self._under_way[task] = None
            task.add_done_callback(self._ended)

    async def _free_place(self) -> None:
        """Wait until the closed loop has a place; it may be made larger or smaller meanwhile."""
        while True:
            arrivals = self._workload.arrivals
            if not isinstance(arrivals, ClosedLoop) or len(self._under_way) < arrivals.concurrency:
                return
            self._changed.clear()
            change = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait({change, *self._under_way}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                change.cancel()

    async def _changed_before(self, due: float) -> bool:
        """Wait for an arrival; return early, with true, when the workload is changed: then the next comes at once."""
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), max(due - time.monotonic(), 0))
        except TimeoutError:
            return False
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a request of the traffic failed inside the server", error=repr(error))
            self._count_failure(repr(error))

    def _count_failure(self, message: str) -> None:
        self._failed += 1
        self._in_a_row += 1
        self._message = message

    async def _one(self, index: int) -> None:
        """Carry one request from arrival to end."""
        workload = self._workload
        task = asyncio.current_task()
        assert task is not None
        generation: Generation | None = None
        try:
            ready = await self._supervisor.wait_ready(_WAIT_FOR_ENGINE_S)
            tokenizer = self._tokenizer()
            planned = await asyncio.to_thread(self._plan, workload, index, tokenizer, ready.model.vocab_size)
            generation = self._requests.open(f"{self._name}-{index}", planned.preview, prompts=1, n=1, streaming=True)
            self._under_way[task] = generation
            self._sent += 1
            room = _room(planned, ready)
            sampling = SamplingParams(
                max_tokens=min(planned.output_tokens, room),
                temperature=workload.temperature,
                seed=planned.seed,
                ignore_eos=workload.ignore_eos,
            )
            self._requests.submit(generation, [planned.prompt], [sampling], tokenizer=tokenizer)
            await self._read(generation)
        except ApiError as error:
            if generation is not None:
                self._requests.fail(generation, error)
            self._count_failure(error.detail.message)
            await asyncio.sleep(_AFTER_FAILURE_S)
        finally:
            if generation is not None:
                generation.closed = True
                self._requests.cancel(generation)

    @staticmethod
    def _plan(workload: Workload, index: int, tokenizer: ModelTokenizer, vocabulary: int) -> Planned:
        template = tokenizer.chat_template

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        def compose(text: str) -> list[int]:
            assert template is not None
            message = {"role": "user", "content": text}
            try:
                return encode(template.render([message], add_generation_prompt=True, variables={}))
            except ChatTemplateError as error:
                raise ApiError(400, str(error)) from error

        return workload.request(index, encode, compose if template is not None else None, vocabulary)

    async def _read(self, generation: Generation) -> None:
        """Take the answer as a client would."""
        sample = generation.samples[0]
        ended = False
        while not ended:
            outputs = await generation.collect()
            now = time.monotonic_ns()
            for output in outputs:
                output.sent(now)
                self._output_tokens += output.token_id is not None
                ended = ended or output.finish is not None
        if sample.failure is not None:
            raise sample.failure
        if sample.state == "finished":
            self._finished += 1
            self._in_a_row = 0

    async def _tell_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            self._tell("running")

    def _tell(self, state: TrafficState) -> TrafficEvent:
        self.event = TrafficEvent(
            at_ns=time.monotonic_ns(),
            state=state,
            workload=msgspec.to_builtins(self._workload),
            started_ns=self._started_ns,
            sent=self._sent,
            in_flight=len(self._under_way),
            finished=self._finished,
            failed=self._failed,
            dropped=self._dropped,
            output_tokens=self._output_tokens,
            message=self._reason or self._message,
        )
        self._log.append(self.event)
        return self.event


def _room(planned: Planned, ready: Ready) -> int:
    """How long an answer may be."""
    room = ready.capacity.max_model_len - len(planned.prompt)
    if room < 1:
        raise ApiError(
            400,
            f"A prompt of {len(planned.prompt)} tokens leaves no room for an answer in this model's context of "
            f"{ready.capacity.max_model_len}; make the prompts shorter.",
        )
    return room
