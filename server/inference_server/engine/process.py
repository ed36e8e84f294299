"""The engine as a process: two sockets, two I/O threads, and the loop between them.

The receiver thread only decodes commands; the sender thread only encodes and sends, so that the engine's own thread
spends nothing on the wire. A third sends a heartbeat, so that loading a model does not look like death.
"""

from __future__ import annotations

import argparse
import os
import queue
import sys
import threading
import time
import traceback
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec
import psutil
import zmq

from inference_server.features import FeatureError
from inference_server.garbage import keep_what_is_loaded
from inference_server.lifetime import die_with_parent
from inference_server.protocol import (
    EXIT_LOAD_FAILED,
    PROTOCOL_VERSION,
    Cancel,
    CeilingsMeasured,
    CheckIntegrity,
    CommandDone,
    CommandFailed,
    EngineConfig,
    ForgetCaches,
    FromEngine,
    Heartbeat,
    Hello,
    LoadFailed,
    LoadProgress,
    MeasureCeilings,
    Notice,
    Ping,
    Pong,
    Quantization,
    Ready,
    RequestFailed,
    SetFeatures,
    Shutdown,
    Sleep,
    StepReport,
    Submit,
    ToEngine,
    Wake,
)

if TYPE_CHECKING:
    from inference_server.engine.calibration import Calibration
    from inference_server.engine.core import Engine

IDLE_CHECK_SECONDS = 1.0
CALIBRATE_AFTER_IDLE_SECONDS = 3.0
LINGER_MS = 2000
NICENESS_ON_CPU = 10


class EngineProcess:
    """Connects an engine to its front.

    Parameters
    ----------
    config : EngineConfig
    receive, send : str
        ZeroMQ addresses that the front has bound: commands come from the first, everything else goes to the second.
    """

    def __init__(self, config: EngineConfig, receive: str, send: str) -> None:
        self.config = config
        self.started_ns = time.monotonic_ns()
        self.steps = 0
        self._engine: Engine | None = None
        self._encode_ns = 0
        self._calibration: Calibration | None = None
        self._asked_to_calibrate: list[int] = []
        self._idle_since = time.monotonic()
        self._commands: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._context = zmq.Context()
        self._receive = receive
        self._send = send
        self._sender = threading.Thread(target=self._send_loop, name="sender", daemon=True)
        self._sender.start()
        for target in (self._receive_loop, self._heartbeat_loop):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def run(self) -> int:
        """Load, serve until told to stop, and return the exit status."""
        self._emit(
            Hello(
                pid=os.getpid(),
                protocol=PROTOCOL_VERSION,
                versions={
                    name: version(name) for name in ("torch", "transformers", "inference-workbench") if _has(name)
                },
            )
        )
        self._progress("importing torch", None, "")
        # Imported here, after the threads have said hello: torch and transformers take seconds.
        from inference_server.engine import lean_imports  # noqa: PLC0415

        lean_imports.start_device(self.config.device)
        with lean_imports.unused_hidden():
            from inference_server.engine import calibration, loader  # noqa: PLC0415
            from inference_server.engine.core import Engine, RequestError  # noqa: PLC0415
            from inference_server.engine.sleeping import SleepError  # noqa: PLC0415
            from inference_server.models.errors import ModelError  # noqa: PLC0415

        try:
            if loader.resolve_device(self.config.device).type == "cpu":
                # The model would run on the cores that the front, JupyterLab and the page need: let them go first.
                # Measured on two cores with eight streams, from server to screen, p95: 27 to 33 ms instead of 42 to 49.
                # Alone on the machine the engine loses nothing. OpenMP's threads start later and inherit it.
                os.nice(NICENESS_ON_CPU)
            engine = Engine.load(self.config, self._progress)
        except ModelError as error:
            self._emit(LoadFailed(str(error)))
            return self._close(EXIT_LOAD_FAILED)
        except MemoryError as error:
            self._emit(
                LoadFailed(f"out of memory while loading: {error}", "choose a smaller model or --dtype bfloat16")
            )
            return self._close(EXIT_LOAD_FAILED)
        except Exception as error:  # noqa: BLE001 - whatever it is, a person must get to read it
            traceback.print_exc()
            self._emit(LoadFailed(f"{type(error).__name__}: {error}", "the traceback is in the engine's log"))
            return self._close(EXIT_LOAD_FAILED)
        self._engine = engine
        keep_what_is_loaded()
        model = engine.model_info()
        key = calibration.ceilings_key(engine.loaded.device, model.device_name, engine.loaded.dtype)
        known = calibration.remembered(key)
        if known is None:
            self._calibrate(engine)
        self._emit(
            Ready(
                model=model,
                capacity=engine.capacity,
                features=engine.features.as_dict(),
                specs=engine.specs,
                epoch=engine.epoch,
                load_ns=time.monotonic_ns() - self.started_ns,
                work=engine.work,
                ceilings=known,
            )
        )

        self._idle_since = time.monotonic()
        while True:
            idle = not engine.has_work()
            commands = self._pending(wait=idle and not engine.precision.has_work)
            if idle:
                engine.woke()
            for command in commands:
                match command:
                    case Submit():
                        try:
                            engine.submit(command)
                        except RequestError as error:
                            for handle in command.requests:
                                self._emit(RequestFailed(handle, str(error), "invalid"))
                    case Cancel(handle):
                        cancelled = engine.cancel(handle)
                        if cancelled is not None:
                            self._emit(cancelled)
                    case SetFeatures(correlation, values):
                        try:
                            for message in engine.set_features(correlation, values):
                                self._emit(message)
                        except FeatureError as error:
                            self._emit(CommandFailed(correlation, str(error)))
                    case CheckIntegrity(correlation):
                        try:
                            self._emit(CommandDone(correlation, engine.check_integrity()))
                        except AssertionError as error:
                            self._emit(CommandFailed(correlation, str(error)))
                    case ForgetCaches(correlation):
                        self._emit(CommandDone(correlation, engine.forget_caches()))
                    case Sleep(correlation) | Wake(correlation):
                        try:
                            change = engine.sleep if isinstance(command, Sleep) else engine.wake
                            self._emit(CommandDone(correlation, msgspec.to_builtins(change())))
                        except SleepError as error:
                            self._emit(CommandFailed(correlation, str(error)))
                    case MeasureCeilings(correlation, _) if engine.asleep:
                        self._emit(CommandFailed(correlation, "The engine is asleep; wake it to measure the machine."))
                    case MeasureCeilings(correlation, again):
                        self._asked_to_calibrate.append(correlation)
                        if again or calibration.remembered(key) is None:
                            self._calibrate(engine)
                    case Quantization(correlation, action, options):
                        try:
                            self._emit(CommandDone(correlation, getattr(engine.precision, action)(**options)))
                        except FeatureError as error:
                            self._emit(CommandFailed(correlation, str(error)))
                    case Shutdown():
                        for failed in engine.fail_all("the engine was stopped"):
                            self._emit(failed)
                        return self._close(0)
                    case Ping():
                        pass  # answered by the receiver thread, which is never busy
            for told in engine.take_news():
                self._emit(told)
            if not engine.has_work():
                if engine.precision.has_work and not engine.asleep:
                    engine.precision.advance()
                    continue
                if not commands and not engine.asleep:  # it would take memory that was given back
                    self._advance_calibration()
                continue
            self._idle_since = time.monotonic()
            try:
                report, settled = engine.step()
            except Exception as error:  # noqa: BLE001 - one bad step must not take the server down
                traceback.print_exc()
                for failed in engine.fail_all(f"the engine failed in this step: {type(error).__name__}: {error}"):
                    self._emit(failed)
                continue
            self.steps += 1
            if report is not None:
                self._emit(report)
            for news in (*settled, *engine.take_news()):
                self._emit(news)
            engine.precision.advance_beside()
            if not engine.has_work():
                try:
                    engine.check_integrity()
                except AssertionError as error:
                    # A leak costs memory, not answers: go on serving, and say it on the screen and in the log.
                    print(f"integrity check: {error}", file=sys.stderr, flush=True)
                    text = f"The check of the KV cache's blocks found: {error}. Restart the engine to free them."
                    self._emit(Notice("error", text))

    # -- private -------------------------------------------------------------------------------------------------------

    def _pending(self, *, wait: bool) -> list[ToEngine]:
        commands: list[ToEngine] = []
        if wait:
            try:
                # Between two slices of a measurement it only looks.
                patience = 0.01 if self._may_calibrate() or self._waits_for_weights() else IDLE_CHECK_SECONDS
                commands.append(self._commands.get(timeout=patience))
            except queue.Empty:
                return commands
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except queue.Empty:
                return commands

    def _waits_for_weights(self) -> bool:
        return self._engine is not None and self._engine.waits_for_weights

    def _calibrate(self, engine: Engine) -> None:
        """Measure the machine's ceilings when there is nothing else to do."""
        from inference_server.engine.calibration import Calibration  # noqa: PLC0415

        loaded = engine.loaded
        self._calibration = Calibration(loaded.device, engine.model_info().device_name, loaded.dtype)

    def _may_calibrate(self) -> bool:
        """Whether a measurement is due: at once when somebody waits for it, else after a while without requests."""
        if self._calibration is None:
            return False
        idle = time.monotonic() - self._idle_since
        return bool(self._asked_to_calibrate) or idle >= CALIBRATE_AFTER_IDLE_SECONDS

    def _advance_calibration(self) -> None:
        if self._calibration is not None and self._may_calibrate() and not self._calibration.advance():
            result, self._calibration = self._calibration.result, None
            if result is not None:
                self._emit(CeilingsMeasured(result))
        if self._calibration is None and self._asked_to_calibrate:
            asked, self._asked_to_calibrate = self._asked_to_calibrate, []
            for correlation in asked:
                self._emit(CommandDone(correlation))

    def _emit(self, message: FromEngine) -> None:
        self._outbox.put(message)

    def _progress(self, stage: str, fraction: float | None, detail: str) -> None:
        self._emit(LoadProgress(stage, fraction, detail))

    def _close(self, status: int) -> int:
        self._outbox.put(None)
        self._sender.join(timeout=5)
        return status

    def _send_loop(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(self._send)
        encoder = msgspec.msgpack.Encoder()
        while (message := self._outbox.get()) is not None:
            if isinstance(message, StepReport):
                begin = time.thread_time_ns()
                encoded = encoder.encode(message)
                self._encode_ns += time.thread_time_ns() - begin
                socket.send(encoded)
            else:
                socket.send(encoder.encode(message))
        socket.close()
        context.term()  # returns when the last words have left this process: they may say why it ends

    def _receive_loop(self) -> None:
        socket = self._context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.connect(self._receive)
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while True:
            message = decoder.decode(socket.recv())
            if isinstance(message, Ping):
                self._emit(Pong(message.sent_ns, time.monotonic_ns()))
            else:
                self._commands.put(message)

    def _heartbeat_loop(self) -> None:
        process = psutil.Process()
        while True:
            engine = self._engine
            self._emit(
                Heartbeat(
                    engine_ns=time.monotonic_ns(),
                    steps=self.steps,
                    rss_bytes=process.memory_info().rss,
                    telemetry_ns=engine.telemetry_ns if engine else 0,
                    encode_ns=self._encode_ns,
                    busy_ns=engine.busy_ns if engine else 0,
                )
            )
            time.sleep(1)


def _has(distribution: str) -> bool:
    try:
        version(distribution)
    except ModuleNotFoundError:
        return False
    return True


def main() -> int:
    """Entry point of ``python -m inference_server.engine``."""
    parser = argparse.ArgumentParser(prog="inference_server.engine", description="One inference engine process.")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    parser.add_argument("--receive", required=True, help="ZeroMQ address that commands come from")
    parser.add_argument("--send", required=True, help="ZeroMQ address that reports go to")
    arguments = parser.parse_args()
    die_with_parent()
    # Read by OpenMP when torch loads it. Its default, spinning between parallel regions, multiplies a token's time as
    # soon as anything else wants a core (10 times, measured on two cores); sleeping costs little when nothing does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = msgspec.json.decode(arguments.config, type=EngineConfig)
    status = EngineProcess(config, arguments.receive, arguments.send).run()
    sys.stdout.flush()
    sys.stderr.flush()
    # torch's and zmq's threads have nothing left to say; waiting for them can hang the exit.
    os._exit(status)
