"""The front put together: one engine, its requests, the event log, HTTP and the telemetry WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from platformdirs import user_log_path
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.websockets import WebSocket

from inference_server.front.auth import TOKEN_HEADER, Gate
from inference_server.front.control_api import ControlApi
from inference_server.front.device_sampler import DeviceSampler
from inference_server.front.errors import ApiError
from inference_server.front.event_log import EventLog
from inference_server.front.latency_summary import LatencyStatistics
from inference_server.front.measurement_api import MeasurementApi
from inference_server.front.metrics import Metrics
from inference_server.front.openai_api import OpenAiApi
from inference_server.front.quantization_api import QuantizationApi
from inference_server.front.recorder import Recorder
from inference_server.front.requests import RequestTable, Sample
from inference_server.front.settings import Settings
from inference_server.front.supervisor import EngineSupervisor
from inference_server.front.telemetry import Served, TelemetryHub
from inference_server.front.telemetry_cost import FrontCost, TelemetryCost
from inference_server.front.token_book import TokenBook
from inference_server.front.tokenize_api import TokenizeApi
from inference_server.front.tokenizer import ModelTokenizer
from inference_server.front.tracing import Tracer
from inference_server.front.traffic import Traffic
from inference_server.front.traffic_api import TrafficApi
from inference_server.garbage import keep_what_is_loaded
from inference_server.protocol import (
    PROTOCOL_VERSION,
    Ceilings,
    CeilingsEvent,
    EngineEvent,
    FeaturesEvent,
    Heartbeat,
    Instrumentation,
    KvEvents,
    NoticeEvent,
    Ready,
    RequestCancelled,
    RequestFailed,
    ServerInfo,
    StepReport,
    StepWork,
    TaskEvent,
)
from inference_server.version import distribution_version

_log = structlog.get_logger(__name__)
_RECOVER_AGAIN_S = 15.0


class Front:
    """Everything behind the HTTP interface; receives the engine's news.

    Parameters
    ----------
    settings
        How it is configured.
    on_engine_event
        Called with every change of the engine, for a terminal that shows it.
    """

    def __init__(self, settings: Settings, on_engine_event: Callable[[EngineEvent], None] | None = None) -> None:
        self.settings = settings
        self.server = ServerInfo(
            version=distribution_version(),
            protocol=PROTOCOL_VERSION,
            instance=secrets.token_hex(8),
            pid=os.getpid(),
            started_ns=time.monotonic_ns(),
        )
        self.log = EventLog(max_events=settings.log_events, max_bytes=settings.log_bytes)
        self.supervisor = EngineSupervisor(settings, settings.engine_config(), self, _log_folder())
        self.metrics = Metrics(LatencyStatistics(settings.slo()))
        self.book = TokenBook(self.log, self.metrics)
        self.requests = RequestTable(self.log, self.supervisor.send, self.book)
        self.metrics.states = self.requests.states
        self.recorder = Recorder(
            settings.recording_folder,
            flush_s=settings.recording_flush_s,
            max_bytes=settings.recording_max_bytes,
            server=self.server,
            log=self.log,
            requests=self.requests,
        )
        self.traffic = Traffic(self.supervisor, self.requests, self.tokenizer, self.log)
        self.telemetry = TelemetryHub(self.log, self._served)
        self._cost = TelemetryCost()
        self._sampler = DeviceSampler(
            settings.device_sample_s,
            processes=self._processes,
            device=lambda: self.supervisor.ready.model.device if self.supervisor.ready else None,
            busy=lambda: bool(len(self.requests)) or self.recorder.active is not None,
            log=self.log.append,
        )
        self._sampling: asyncio.Task[None] | None = None
        self._tracer: Tracer | None = None
        if settings.otlp_endpoint is not None:
            self._tracer = Tracer(settings.otlp_endpoint, self.server.version)
            self.book.on_end = self._trace
        self._on_engine_event = on_engine_event
        self._tokenizer: ModelTokenizer | None = None
        self.log.append(self.supervisor.event)

    async def start(self) -> None:
        """Start the engine and what goes on beside it."""
        await self.supervisor.start()
        self._sampling = asyncio.create_task(self._sampler.run())
        self.recorder.recover()
        # The kernel may still be taking down a server that was killed a moment ago.
        asyncio.get_running_loop().call_later(_RECOVER_AGAIN_S, self.recorder.recover)

    async def close(self) -> None:
        """End all of it."""
        await self.traffic.stop("The server is shutting down.")
        if self._sampling is not None:
            self._sampling.cancel()
        await self.supervisor.close()
        await self.recorder.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    def _trace(self, sample: Sample) -> None:
        if self._tracer is not None:
            self._tracer.request(sample, self.metrics.model_name)

    def _processes(self) -> dict[str, int]:
        engine = self.supervisor.event.pid
        return {"front": os.getpid()} | ({"engine": engine} if engine is not None else {})

    def tokenizer(self) -> ModelTokenizer:
        """Return the loaded model's tokenizer."""
        if self._tokenizer is None:
            raise ApiError(503, "No model is loaded.", code="engine_down")
        return self._tokenizer

    def _served(self) -> Served:
        ready = self.supervisor.ready
        return Served(
            server=self.server,
            engine=self.supervisor.event,
            model=ready.model if ready else None,
            capacity=ready.capacity if ready else None,
            specs=ready.specs if ready else (),
        )

    # -- the engine's news (supervisor.Listener) ---------------------------------------------------------------------

    async def engine_loaded(self, ready: Ready) -> None:
        """Load the model's tokenizer."""
        self._tokenizer = await asyncio.to_thread(ModelTokenizer, ready.model.path)
        keep_what_is_loaded()
        self.metrics.ready(ready)
        self.book.work = ready.work
        self.recorder.ready(ready, self.supervisor.versions)

    def engine_event(self, event: EngineEvent) -> None:
        """Log a change of the engine."""
        self.log.append(event)
        self.book.engine_event(event)
        if self._on_engine_event is not None:
            self._on_engine_event(event)

    def features_event(self, event: FeaturesEvent) -> None:
        """Log a switch."""
        self.log.append(event)
        level = event.values.get("instrumentation", "full")
        self.book.level = msgspec.convert(level, Instrumentation)

    def features_settled(self, epoch: int, settled_ns: int) -> None:
        """Log that a switch has settled, unless it was known to need nothing."""
        event = self.log.features
        if event is not None and event.epoch == epoch and event.settled_ns is None:
            self.log.append(msgspec.structs.replace(event, settled_ns=settled_ns))

    def notice(self, event: NoticeEvent) -> None:
        """Log something that a person should know."""
        self.log.append(event)
        _log.warning("notice of the engine", severity=event.severity, text=event.text)

    def work_changed(self, work: StepWork) -> None:
        """Count the bytes and operations of later steps by it."""
        self.book.work = work

    def task(self, event: TaskEvent) -> None:
        """Log how far the engine is with something it does beside serving."""
        self.log.append(event)

    def step_report(self, report: StepReport) -> None:
        """Log a step and pass its tokens on."""
        self.requests.step_report(report)

    def kv_events(self, events: KvEvents) -> None:
        """Log what happened to KV blocks while no step ran."""
        self.log.append(events)

    def request_failed(self, failure: RequestFailed) -> None:
        """Pass a failure on to whoever waits."""
        self.requests.request_failed(failure)

    def request_cancelled(self, cancelled: RequestCancelled) -> None:
        """Nothing to do: the request was ended when the cancellation was sent."""

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        """Work out what watching costs."""
        cost = FrontCost(
            front_ns=self.log.spent_ns + self.book.spent_ns + self.telemetry.spent_ns,
            journal_ns=self.recorder.journal_ns,
            events=self.log.end,
            bytes=self.log.appended_bytes,
        )
        event = self._cost.measure(heartbeat, cost, self.book.level)
        if event is not None:
            self.log.append(event)

    def ceilings_measured(self, ceilings: Ceilings) -> None:
        """Log what the machine can do at best."""
        self.log.append(CeilingsEvent(at_ns=time.monotonic_ns(), ceilings=ceilings))

    def engine_lost(self, reason: str) -> int:
        """Fail the requests that were in the engine."""
        return self.requests.engine_lost(reason)


def create_app(front: Front) -> FastAPI:
    """Return the ASGI application of a front; its lifespan is the engine's."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await front.start()
        yield
        await front.close()

    app = FastAPI(
        title="Inference Workbench",
        version=front.server.version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    settings = front.settings
    app.add_middleware(
        Gate,
        token=settings.token,
        allowed_origins=settings.allowed_origins,
        max_body_bytes=settings.max_body_bytes,
    )
    if settings.allowed_origins:  # answers the browser's preflight requests, which carry no token, before the gate
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "PATCH", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", TOKEN_HEADER],
            expose_headers=["X-Request-Id"],
        )
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_body)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_bug)
    openai = OpenAiApi(front.supervisor, front.requests, front.tokenizer, loading_wait_s=settings.loading_wait_s)
    app.include_router(openai.router)
    app.include_router(TokenizeApi(front.supervisor, front.tokenizer).router)
    app.include_router(TrafficApi(front.traffic).router)
    app.include_router(QuantizationApi(front.supervisor).router)
    app.include_router(ControlApi(front.server, front.supervisor, front.requests, front.log).router)
    app.include_router(MeasurementApi(front.recorder, front.metrics, front.supervisor, front.log).router)

    async def telemetry(websocket: WebSocket) -> None:
        await websocket.accept()
        await front.telemetry.handle(websocket)

    app.add_api_websocket_route("/telemetry", telemetry)
    return app


# Where several types are possible, the complaint about one of them would mislead.
_UNION_FIELDS = {
    "prompt": "'prompt' is a text, a list of token ids, a list of texts, or a list of lists of token ids.",
    "stop": "'stop' is a text of one character at least, or a list of up to 16 of them.",
}


def _log_folder() -> Path:
    return user_log_path("inference-workbench", appauthor=False)


def _answer(error: ApiError) -> Response:
    return Response(error.body(), status_code=error.status, media_type="application/json", headers=error.headers)


async def _answer_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _answer(error)


async def _answer_invalid_body(_request: Request, error: Exception) -> Response:
    """Say which field was wrong and why."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return _answer(ApiError(422, f"The body is not valid JSON: {reason}.", code="invalid_json"))
    place = [str(part) for part in first["loc"] if part != "body"]
    if not place:
        return _answer(ApiError(422, f"The body must be a JSON object: {first['msg']}.", code="invalid_body"))
    field = place[0]
    where = ".".join(place)
    message = _UNION_FIELDS.get(field) or f"{where!r}: {first['msg']}."
    if len(problems) > 1:
        others = sorted({str(p["loc"][1]) for p in problems[1:] if len(p["loc"]) > 1} - {field})
        message += f" Also wrong: {', '.join(others)}." if others else ""
    return _answer(ApiError(422, message, param=field, code=str(first["type"])))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is nothing at {request.url.path!r}."
    elif error.status_code == 405:
        message = f"{request.method} is not possible at {request.url.path!r}."
    answer = ApiError(error.status_code, message)
    answer.headers.update(error.headers or {})
    return _answer(answer)


async def _answer_bug(_request: Request, error: Exception) -> Response:
    _log.error("a request failed inside the server", error=repr(error))
    return _answer(ApiError(500, f"The server failed on this request: {error!r}. Its log says more."))
