"""The HTTP interface of what is measured: recordings, Prometheus metrics, the latency summary, SLOs and ceilings."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Body, Query
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse, Response

from inference_server.front.errors import ApiError
from inference_server.front.event_log import EventLog
from inference_server.front.json_response import json_response
from inference_server.front.latency_summary import Slo
from inference_server.front.metrics import Metrics
from inference_server.front.recorder import Recorder
from inference_server.front.supervisor import EngineSupervisor


class RecordingBody(BaseModel):
    """Optional body of ``POST /recordings``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(default="", max_length=200)
    note: str = Field(default="", max_length=10_000)


class MeasurementApi:
    """The handlers.

    Parameters
    ----------
    recorder
        Recordings.
    metrics
        What is counted.
    supervisor
        Of the engine, which measures ceilings.
    log
        Knows the ceilings.
    """

    def __init__(self, recorder: Recorder, metrics: Metrics, supervisor: EngineSupervisor, log: EventLog) -> None:
        self._recorder = recorder
        self._metrics = metrics
        self._supervisor = supervisor
        self._log = log
        self.router = APIRouter()
        for method, path, handler in (
            ("POST", "/recordings", self.start),
            ("GET", "/recordings", self.list_recordings),
            ("GET", "/recordings/{identifier}", self.recording),
            ("POST", "/recordings/{identifier}/stop", self.stop),
            ("GET", "/recordings/{identifier}/download", self.download),
            ("DELETE", "/recordings/{identifier}", self.delete),
            ("GET", "/metrics", self.prometheus),
            ("GET", "/metrics/summary", self.summary),
            ("PUT", "/slo", self.set_slo),
            ("GET", "/ceilings", self.ceilings),
            ("POST", "/ceilings/measure", self.measure_ceilings),
        ):
            self.router.add_api_route(path, handler, methods=[method], response_model=None)

    async def start(self, body: RecordingBody | None = None) -> Response:
        """Begin a recording."""
        body = body or RecordingBody()
        return json_response(self._recorder.start(body.name, body.note), status=201)

    async def list_recordings(self) -> Response:
        """List the recordings, newest first."""
        recorder = self._recorder
        recordings = await asyncio.to_thread(recorder.list)  # it opens each file that it does not know yet
        return json_response({"folder": str(recorder.folder), "active": recorder.active, "recordings": recordings})

    async def recording(self, identifier: str) -> Response:
        """Say how one recording is."""
        return json_response(self._recorder.get(identifier))

    async def stop(self, identifier: str, wait: Annotated[bool, Query()] = False) -> Response:
        """End the recording that runs; with ``wait`` the answer comes when its file is there."""
        task = self._recorder.stop(identifier)
        return json_response(await task if wait else self._recorder.get(identifier))

    async def download(self, identifier: str) -> Response:
        """Send the file."""
        path = self._recorder.file(identifier)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    async def delete(self, identifier: str) -> Response:
        """Remove the file."""
        self._recorder.delete(identifier)
        return json_response({"deleted": identifier})

    async def prometheus(self) -> Response:
        """Return the metrics as Prometheus reads them."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def summary(self, window_s: Annotated[float | None, Query(gt=0)] = None) -> Response:
        """Return percentiles and goodput, of the last ``window_s`` seconds or since the start."""
        return json_response(self._metrics.statistics.summary(window_s))

    async def set_slo(self, body: Annotated[dict[str, float | None], Body()]) -> Response:
        """Set what makes a request good, from now on."""
        try:
            slo = msgspec.convert(body, Slo)
        except msgspec.ValidationError as error:
            names = ", ".join(Slo.__struct_fields__)
            raise ApiError(422, f"The objectives are {names}, in milliseconds or null: {error}.") from error
        if (problem := slo.problem()) is not None:
            raise ApiError(422, problem, code="invalid_slo")
        self._metrics.statistics.set_slo(slo)
        return json_response(slo)

    async def ceilings(self) -> Response:
        """Return what the machine can do at best."""
        event = self._log.ceilings
        if event is None:
            raise ApiError(
                404,
                "The machine's ceilings are not measured yet: the engine does it when it has been idle for some "
                "seconds, or at POST /ceilings/measure.",
                code="ceilings_unknown",
            )
        return json_response(event.ceilings)

    async def measure_ceilings(self) -> Response:
        """Measure again, once the engine is idle; the answer comes when it is done."""
        await self._supervisor.measure_ceilings()
        return await self.ceilings()
