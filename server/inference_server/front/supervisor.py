"""Keeps one engine alive: starts it, listens to it, restarts it when it dies, and says what happened.

One supervisor stands for one replica across all of its processes. Step and epoch numbers go on rising over a restart,
and every time an engine reports is converted to the front's clock here, so that nobody further on needs to care.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog
import zmq.asyncio

from inference_server.front.engine_clock import EngineClock
from inference_server.front.engine_process import EngineProcess, EngineStartError, new_log_path
from inference_server.front.errors import ApiError
from inference_server.front.settings import Settings
from inference_server.protocol import (
    EXIT_LOAD_FAILED,
    PROTOCOL_VERSION,
    Ceilings,
    CeilingsMeasured,
    CheckIntegrity,
    CommandDone,
    CommandFailed,
    EngineConfig,
    EngineEvent,
    EngineState,
    FeaturesApplied,
    FeaturesEvent,
    FeaturesSettled,
    ForgetCaches,
    FromEngine,
    Heartbeat,
    Hello,
    KvEvents,
    LoadFailed,
    LoadProgress,
    MeasureCeilings,
    Notice,
    NoticeEvent,
    Ping,
    Pong,
    Quantization,
    QuantizationAction,
    Ready,
    RequestCancelled,
    RequestFailed,
    SetFeatures,
    Shutdown,
    Sleep,
    StepReport,
    StepWork,
    TaskEvent,
    TaskProgress,
    ToEngine,
    Wake,
)

_log = structlog.get_logger(__name__)

_WATCH_S = 0.5
_LAST_WORDS_S = 5.0
_QUIET_S = 0.25
"""When nothing has come for so long from an engine that has ended, nothing more will."""
_PINGS_AT_START = 8
_PING_GAP_S = 0.02
_PING_EVERY_S = 10.0
_COMMAND_TIMEOUT_S = 120.0
_SWITCH_TIMEOUT_S = 900.0
"""A switch may have to wait until the weights of a large model are packed."""
_PROGRESS_EVERY_NS = 50_000_000


class RestartPolicy:
    """Decides whether and when an engine that died is started again.

    At once the first time, after a pause the second, and not at all once three deaths fall within a minute: then
    starting again will not help, and a person has to look.
    """

    WINDOW_S = 60.0
    DEATHS = 3

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=self.DEATHS)

    def died(self, now_s: float) -> float | None:
        """Record a death; return how many seconds to wait before the next start, ``None`` for not at all."""
        self._deaths.append(now_s)
        recent = sum(now_s - death < self.WINDOW_S for death in self._deaths)
        if recent >= self.DEATHS:
            return None
        return 0.0 if recent == 1 else 2.0 ** (recent - 1)

    def forget(self) -> None:
        """Start afresh, because a person asked for a restart."""
        self._deaths.clear()


class Listener(Protocol):
    """What the rest of the front does with an engine's news."""

    async def engine_loaded(self, ready: Ready) -> None:
        """Get ready to serve the model. An exception makes the start a failure."""

    def engine_event(self, event: EngineEvent) -> None:
        """The engine changed state, or progressed."""

    def features_event(self, event: FeaturesEvent) -> None:
        """A switch took effect."""

    def features_settled(self, epoch: int, settled_ns: int) -> None:
        """The requests that a switch interrupted have all gone on."""

    def notice(self, event: NoticeEvent) -> None:
        """The engine has something to say to a person."""

    def work_changed(self, work: StepWork) -> None:
        """Later steps have to read and compute as much as this says."""

    def task(self, event: TaskEvent) -> None:
        """The engine does something beside serving, and progressed with it."""

    def step_report(self, report: StepReport) -> None:
        """A step ended."""

    def kv_events(self, events: KvEvents) -> None:
        """KV blocks changed hands between two steps."""

    def request_failed(self, failure: RequestFailed) -> None:
        """The engine gave up a request."""

    def request_cancelled(self, cancelled: RequestCancelled) -> None:
        """The engine confirmed a cancellation."""

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        """The engine gave its sign of life, with its counters."""

    def ceilings_measured(self, ceilings: Ceilings) -> None:
        """It became known what the machine can do at best."""

    def engine_lost(self, reason: str) -> int:
        """Every request in the engine is lost; end them and return how many."""


class EngineSupervisor:
    """One replica.

    Parameters
    ----------
    settings
        Command, time limits.
    config
        What the engine is started with first.
    listener
        Gets the engine's news, on the event loop.
    log_folder
        For the engine's output.
    """

    def __init__(self, settings: Settings, config: EngineConfig, listener: Listener, log_folder: Path) -> None:
        self._settings = settings
        self._config = config
        self._first_features = config.features
        self._listener = listener
        self._log_folder = log_folder
        self._context = zmq.asyncio.Context()
        self._policy = RestartPolicy()
        self._process: EngineProcess | None = None
        self._runner: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._correlations = itertools.count(1)
        self._answers: dict[int, asyncio.Future[FeaturesApplied | CommandDone]] = {}
        self._requested_ns: dict[int, int] = {}
        self._clock = EngineClock()
        self._last_heard_s = 0.0
        self._spoke = False
        self._load_failed = False
        self._was_ready = False
        self._step_base = self._next_step = 0
        self._epoch_base = self._next_epoch = 0
        self._last_progress_ns = 0
        self._restarts = 0
        self.ready: Ready | None = None
        """What the engine said when it was ready; ``None`` whenever it is not."""
        self.versions: dict[str, str] = {}
        """Of the engine's libraries, as its newest process said."""
        self.event = EngineEvent(state="stopped", at_ns=time.monotonic_ns(), message="The engine was not started.")
        """The newest state."""

    # -- what others ask for -----------------------------------------------------------------------------------------

    async def start(self, *, model: str | None = None) -> None:
        """Start the engine, if it is not running already, with another model where one is named."""
        async with self._lock:
            if self._runner is not None and not self._runner.done():
                if model is None or model == self._config.model:
                    if self.event.state == "asleep":
                        await self._wake()
                    return
                await self._halt("The engine was stopped to load another model.")
            self._launch(model)

    async def stop(self) -> None:
        """End the engine and free the device's memory. Requests in it fail."""
        async with self._lock:
            await self._halt("The engine was stopped.")
            self._tell("stopped", message="The engine was stopped; start it again to use it.")

    async def sleep(self) -> CommandDone:
        """Let the engine give the device's memory back and keep its requests.

        Raises
        ------
        ApiError
            409 or 422 with the reason if it cannot; 503 or 504 if it did not answer.
        """
        async with self._lock:
            answer = await self._done(Sleep)
            freed, waiting = answer.result["device_bytes"], answer.result["requests"]
            requests = "No request waits." if not waiting else f"{waiting} requests wait and will go on."
            self._tell("asleep", message=f"Asleep: {freed / 1e9:.2f} GB were given back. {requests} Wake it to use it.")
            return answer

    async def wake(self) -> CommandDone:
        """Let a sleeping engine go on.

        Raises
        ------
        ApiError
            As :meth:`sleep`.
        """
        async with self._lock:
            return await self._wake()

    async def _wake(self) -> CommandDone:
        answer = await self._done(Wake)
        self._tell("ready", message=f"Awake after {answer.result['duration_ns'] / 1e9:.2f} s.")
        return answer

    async def restart(self, *, model: str | None = None) -> None:
        """Stop and start. Requests in the engine fail."""
        async with self._lock:
            await self._halt("The engine was restarted.")
            self._restarts += 1
            self._launch(model)

    async def close(self) -> None:
        """End the engine for good."""
        async with self._lock:
            await self._halt("The server is shutting down.")
        self._context.destroy(linger=0)

    async def wait_ready(self, limit_s: float) -> Ready:
        """Return what the engine serves, once it does.

        Raises
        ------
        ApiError
            503, with the reason, if it does not come up within ``limit_s`` or is not coming up at all.
        """
        deadline = time.monotonic() + limit_s
        while self.ready is None:
            if self.event.state in {"failed", "stopped"}:
                raise ApiError(503, self.event.message, code=f"engine_{self.event.state}")
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                raise ApiError(
                    503,
                    f"The engine is not ready yet ({self.event.state}: {self.event.stage or 'no stage reported'}). "
                    "Try again when it is.",
                    code="engine_loading",
                ) from None
        if self.event.state == "asleep":
            raise ApiError(503, f"The engine is asleep. {self.event.message}", code="engine_asleep")
        return self.ready

    def send(self, command: ToEngine) -> None:
        """Send a command to the running engine; without one, nothing happens."""
        if self._process is not None:
            self._process.send(command)

    async def set_features(self, values: dict[str, bool | int | str]) -> FeaturesApplied:
        """Switch features and return what came of it, in the front's time and epoch.

        Raises
        ------
        ApiError
            422 if the engine refused the values, 503 or 504 if it did not answer.
        """
        answer = await self._ask(lambda correlation: SetFeatures(correlation, values), _SWITCH_TIMEOUT_S)
        if not isinstance(answer, FeaturesApplied):
            raise ApiError(500, "The engine answered something else than a switch.")
        return answer

    async def check_integrity(self) -> CommandDone:
        """Let the engine verify its KV blocks.

        Raises
        ------
        ApiError
            422 with what is wrong; 503 or 504 if it did not answer.
        """
        return await self._done(CheckIntegrity)

    async def forget_caches(self) -> CommandDone:
        """Let the engine empty its prefix cache and its response cache.

        Raises
        ------
        ApiError
            503 or 504 if it did not answer.
        """
        return await self._done(ForgetCaches)

    async def _done(self, command: Callable[[int], ToEngine]) -> CommandDone:
        answer = await self._ask(command)
        if not isinstance(answer, CommandDone):
            raise ApiError(500, f"The engine answered something else than {command}.")
        return answer

    async def quantization(self, action: QuantizationAction, options: dict[str, Any]) -> CommandDone:
        """Do something about precisions that is no switch.

        Raises
        ------
        ApiError
            422 with the reason of a refusal; 503 or 504 if it did not answer.
        """
        return await self._done(lambda correlation: Quantization(correlation, action, options))

    async def measure_ceilings(self) -> None:
        """Let the engine measure what the machine can do at best, when it is idle; returns once it has.

        Raises
        ------
        ApiError
            503 or 504 if it did not answer.
        """
        await self._ask(lambda correlation: MeasureCeilings(correlation, again=True))

    async def _ask(
        self, command: Callable[[int], ToEngine], patience_s: float = _COMMAND_TIMEOUT_S
    ) -> FeaturesApplied | CommandDone:
        if self.ready is None:
            raise ApiError(503, f"The engine is {self.event.state}. {self.event.message}".strip(), code="engine_down")
        correlation = next(self._correlations)
        future: asyncio.Future[FeaturesApplied | CommandDone] = asyncio.get_running_loop().create_future()
        self._answers[correlation] = future
        self._requested_ns[correlation] = time.monotonic_ns()
        self.send(command(correlation))
        try:
            return await asyncio.wait_for(future, patience_s)
        except TimeoutError:
            raise ApiError(
                504, f"The engine did not answer within {patience_s:.0f} s; it may still do what was asked."
            ) from None
        finally:
            self._answers.pop(correlation, None)

    # -- the life of the process -------------------------------------------------------------------------------------

    def _launch(self, model: str | None) -> None:
        if model is not None and model != self._config.model:
            # What was chosen to propose tokens for one model is for that model.
            self._config = msgspec.structs.replace(
                self._config, model=model, served_name=None, draft_model=None, eagle_head=None
            )
        self._policy.forget()
        self._was_ready = False
        self._runner = asyncio.create_task(self._run())

    async def _halt(self, reason: str) -> None:
        """End the process, if there is one, and stop looking after it."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await runner
        process, self._process = self._process, None
        self._lose(reason)
        if process is not None:
            process.send(Shutdown())
            await process.end(self._settings.engine_shutdown_s)
            process.close()

    async def _run(self) -> None:
        """Start the engine again and again, until there is no point in it."""
        while True:
            self._tell("starting", message="The engine process is starting.")
            try:
                obituary = await self._live_once()
            except EngineStartError as error:
                self._tell("failed", message=str(error))
                return
            failed = self._lose(obituary)
            if self._load_failed:
                self._tell("failed", message=self.event.message, failed_requests=failed)
                return
            delay = self._policy.died(time.monotonic()) if self._was_ready else None
            if delay is None:
                often = f"It died {RestartPolicy.DEATHS} times within a minute." if self._was_ready else ""
                message = f"{obituary}\n{often} It is not started again by itself: restart it when this is mended."
                # A switch may be what kills it: the next start is with the switches of the first.
                self._config = msgspec.structs.replace(self._config, features=self._first_features)
                self._tell("failed", message=message, failed_requests=failed)
                return
            self._restarts += 1
            self._tell("restarting", message=obituary, failed_requests=failed)
            await asyncio.sleep(delay)

    async def _live_once(self) -> str:
        """Run one process until it ends; return how it ended."""
        self._clock = EngineClock()
        self._spoke = self._load_failed = False
        self._last_heard_s = time.monotonic()
        self._process = process = await EngineProcess.spawn(
            self._settings.engine_command,
            self._config,
            context=self._context,
            log_path=new_log_path(self._log_folder),
        )
        _log.info("engine started", pid=process.pid, output=str(process.log_path))
        tasks = [
            asyncio.create_task(self._listen(process)),
            asyncio.create_task(self._watch(process)),
            asyncio.create_task(self._keep_time()),
        ]
        try:
            status = await process.wait()
            # What it said before it died is still in the socket.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained(status), _LAST_WORDS_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._process = None
        obituary = process.obituary(status)
        process.close()
        _log.warning("engine ended", pid=process.pid, status=status)
        return obituary

    async def _drained(self, status: int) -> None:
        """Return when the listener has been idle for a moment, and has heard what ``status`` promises."""
        heard = -1.0
        while heard != self._last_heard_s or (status == EXIT_LOAD_FAILED and not self._load_failed):
            heard = self._last_heard_s
            await asyncio.sleep(_QUIET_S)

    async def _listen(self, process: EngineProcess) -> None:
        while True:
            try:
                message = await process.receive()
            except msgspec.MsgspecError as error:
                process.kill(f"it sent a message that cannot be understood ({error}); its version may be another one")
                return
            self._last_heard_s = time.monotonic()
            self._spoke = True
            try:
                await self._handle(process, message)
            except Exception:  # noqa: BLE001 -- one bad message must not make the front deaf
                _log.exception("a message of the engine could not be handled", message=type(message).__name__)

    async def _watch(self, process: EngineProcess) -> None:
        """Kill an engine that has gone silent."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            if now - before > 4 * _WATCH_S:
                self._last_heard_s = max(self._last_heard_s, now - _WATCH_S)  # we were asleep, not the engine
                continue
            limit = self._settings.engine_silence_s if self._spoke else self._settings.engine_first_word_s
            if now - self._last_heard_s > limit:
                process.kill(f"it gave no sign of life for {limit:g} s")
                return

    async def _keep_time(self) -> None:
        while self.ready is None:  # noqa: ASYNC110 -- half a second more or less does not matter here
            await asyncio.sleep(_WATCH_S)
        for count in itertools.count():
            self.send(Ping(time.monotonic_ns()))
            await asyncio.sleep(_PING_GAP_S if count < _PINGS_AT_START else _PING_EVERY_S)

    def _lose(self, reason: str) -> int:
        """The engine is gone: end everything that waited for it. Returns the number of lost requests."""
        self.ready = None
        self._step_base, self._epoch_base = self._next_step, self._next_epoch
        for future in self._answers.values():
            if not future.done():
                future.set_exception(ApiError(503, reason, code="engine_died"))
        self._answers.clear()
        return self._listener.engine_lost(reason)

    def _tell(
        self,
        state: EngineState,
        *,
        stage: str = "",
        fraction: float | None = None,
        message: str = "",
        failed_requests: int = 0,
    ) -> None:
        self.event = EngineEvent(
            state=state,
            at_ns=time.monotonic_ns(),
            stage=stage,
            fraction=fraction,
            message=message,
            pid=self._process.pid if self._process else None,
            restarts=self._restarts,
            failed_requests=failed_requests,
        )
        self._listener.engine_event(self.event)
        self._changed.set()

    # -- what the engine says ----------------------------------------------------------------------------------------

    async def _handle(self, process: EngineProcess, message: FromEngine) -> None:
        match message:
            case StepReport():
                self._listener.step_report(self._in_front_terms(message))
            case KvEvents():
                step = message.step + self._step_base
                self._listener.kv_events(msgspec.structs.replace(message, step=step))
            case Heartbeat():
                self._listener.heartbeat(message)
            case CeilingsMeasured():
                self._listener.ceilings_measured(message.ceilings)
            case Pong():
                self._clock.sample(
                    sent_ns=message.sent_ns, engine_ns=message.engine_ns, received_ns=time.monotonic_ns()
                )
            case RequestFailed():
                self._listener.request_failed(message)
            case RequestCancelled():
                self._listener.request_cancelled(message)
            case FeaturesApplied():
                self._features_applied(message)
            case FeaturesSettled():
                self._features_settled(message)
            case CommandDone():
                self._resolve(message.correlation, message)
            case CommandFailed():
                self._reject(message)
            case TaskProgress(name, fraction, detail):
                self._listener.task(TaskEvent(name, fraction, detail, time.monotonic_ns()))
            case Notice(severity, text):
                self._listener.notice(NoticeEvent(severity, time.monotonic_ns(), text))
            case Hello():
                self.versions = message.versions
                if message.protocol != PROTOCOL_VERSION:
                    process.kill(f"it speaks protocol {message.protocol} and the server {PROTOCOL_VERSION}")
                    return
                self._tell("loading", stage="Starting", message="The engine process is up.")
            case LoadProgress():
                self._progress(message)
            case Ready():
                await self._become_ready(process, message)
            case LoadFailed():
                self._load_failed = True
                self._tell("failed", message=f"{message.error}\n{message.hint}".strip())
                asyncio.get_running_loop().call_later(
                    self._settings.engine_shutdown_s, process.kill, "it did not end after failing to load"
                )

    def _progress(self, progress: LoadProgress) -> None:
        now = time.monotonic_ns()
        if progress.stage == self.event.stage and now - self._last_progress_ns < _PROGRESS_EVERY_NS:
            return
        self._last_progress_ns = now
        self._tell("loading", stage=progress.stage, fraction=progress.fraction, message=progress.detail)

    async def _become_ready(self, process: EngineProcess, ready: Ready) -> None:
        try:
            await self._listener.engine_loaded(ready)
        except Exception as error:  # noqa: BLE001 -- whatever is wrong with the model's files, say it
            self._load_failed = True
            self._tell("failed", message=f"The model was loaded but cannot be served: {error}")
            process.kill("its model cannot be served")
            return
        self.ready = msgspec.structs.replace(ready, epoch=ready.epoch + self._epoch_base)
        self._was_ready = True
        self._next_epoch = max(self._next_epoch, self.ready.epoch + 1)
        now = time.monotonic_ns()
        self._listener.features_event(
            FeaturesEvent(
                epoch=self.ready.epoch,
                values=ready.features,
                changed=[],
                cost="rebuild",
                requested_ns=now,
                applied_ns=now,
                apply_ns=0,
                preempted=0,
                recompute_tokens=0,
                settled_ns=now,
            )
        )
        if ready.ceilings is not None:
            self._listener.ceilings_measured(ready.ceilings)
        self._tell("ready", message=f"{ready.model.name} is ready ({ready.load_ns / 1e9:.1f} s).")

    def _features_applied(self, applied: FeaturesApplied) -> None:
        applied = msgspec.structs.replace(
            applied,
            epoch=applied.epoch + self._epoch_base,
            applied_at_ns=applied.applied_at_ns + self._clock.offset_ns,
        )
        self._next_epoch = max(self._next_epoch, applied.epoch + 1)
        # An engine that dies comes back with the switches as they were.
        self._config = msgspec.structs.replace(self._config, features=applied.values)
        requested_ns = self._requested_ns.pop(applied.correlation, applied.applied_at_ns)
        self._listener.features_event(
            FeaturesEvent(
                epoch=applied.epoch,
                values=applied.values,
                changed=applied.changed,
                cost=applied.cost,
                requested_ns=requested_ns,
                applied_ns=applied.applied_at_ns,
                apply_ns=applied.apply_ns,
                preempted=applied.preempted,
                recompute_tokens=applied.recompute_tokens,
                settled_ns=None if applied.preempted else applied.applied_at_ns,
            )
        )
        if applied.max_model_len is not None and self.ready is not None:
            capacity = msgspec.structs.replace(self.ready.capacity, max_model_len=applied.max_model_len)
            self.ready = msgspec.structs.replace(self.ready, capacity=capacity)
        if applied.work is not None:
            self._listener.work_changed(applied.work)
        self._resolve(applied.correlation, applied)

    def _features_settled(self, settled: FeaturesSettled) -> None:
        self._listener.features_settled(settled.epoch + self._epoch_base, settled.settled_at_ns + self._clock.offset_ns)

    def _resolve(self, correlation: int, answer: FeaturesApplied | CommandDone) -> None:
        self._requested_ns.pop(correlation, None)
        future = self._answers.get(correlation)
        if future is not None and not future.done():
            future.set_result(answer)

    def _reject(self, refusal: CommandFailed) -> None:
        self._requested_ns.pop(refusal.correlation, None)
        future = self._answers.get(refusal.correlation)
        if future is not None and not future.done():
            future.set_exception(ApiError(422, refusal.error, code="refused"))

    def _in_front_terms(self, report: StepReport) -> StepReport:
        step, offset = report.step, self._clock.offset_ns
        if offset:
            report = msgspec.structs.replace(report, begin_ns=report.begin_ns + offset)
        if step is None:
            return report
        number, epoch = step.step + self._step_base, step.epoch + self._epoch_base
        self._next_step = number + 1
        if number == step.step and epoch == step.epoch and not offset:
            return report
        step = msgspec.structs.replace(
            step, step=number, epoch=epoch, begin_ns=step.begin_ns + offset, end_ns=step.end_ns + offset
        )
        events = report.kv_events
        if events is not None:
            events = msgspec.structs.replace(events, step=step.step)
        return msgspec.structs.replace(report, step=step, kv_events=events)
