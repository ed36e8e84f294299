"""The server's own HTTP interface: what it is, its switches, its requests, and its engine."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from inference_server.features import FeatureError, presets, validate
from inference_server.front.errors import ApiError
from inference_server.front.event_log import EventLog
from inference_server.front.json_response import json_response
from inference_server.front.requests import RequestTable
from inference_server.front.supervisor import EngineSupervisor
from inference_server.protocol import Ready, ServerInfo


class EngineBody(BaseModel):
    """Optional body of ``/engine/start`` and ``/engine/restart``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None


class ControlApi:
    """The handlers outside ``/v1``.

    Parameters
    ----------
    server
        Who we are.
    supervisor
        The engine.
    requests
        The active requests.
    log
        The newest event of every request and of the switches.
    """

    def __init__(self, server: ServerInfo, supervisor: EngineSupervisor, requests: RequestTable, log: EventLog) -> None:
        self._server = server
        self._supervisor = supervisor
        self._requests = requests
        self._log = log
        self.router = APIRouter()
        for method, path, handler in (
            ("GET", "/", self.root),
            ("GET", "/health", self.health),
            ("GET", "/info", self.info),
            ("GET", "/features", self.features),
            ("PATCH", "/features", self.switch),
            ("GET", "/requests", self.list_requests),
            ("POST", "/requests/{identifier}/cancel", self.cancel),
            ("POST", "/reset_prefix_cache", self.forget_caches),
            ("POST", "/engine/start", self.start),
            ("POST", "/engine/stop", self.stop),
            ("POST", "/engine/restart", self.restart),
            ("POST", "/engine/sleep", self.sleep),
            ("POST", "/engine/wake", self.wake),
        ):
            self.router.add_api_route(path, handler, methods=[method], response_model=None)

    async def root(self) -> Response:
        """Say that the front is up."""
        return json_response({"name": "inference-workbench", "version": self._server.version})

    async def health(self) -> Response:
        """Say how the engine is, to anybody."""
        return json_response(
            {
                "status": "ok",
                "engine": self._supervisor.event.state,
                "version": self._server.version,
                "instance": self._server.instance,
            }
        )

    async def info(self) -> Response:
        """Describe the server, its engine and the model."""
        ready = self._supervisor.ready
        return json_response(
            {
                "server": self._server,
                "engine": self._supervisor.event,
                "model": ready.model if ready else None,
                "capacity": ready.capacity if ready else None,
            }
        )

    async def features(self) -> Response:
        """Return the switches, their values and their descriptions."""
        ready = self._ready()
        current = self._log.features
        return json_response(
            {
                "epoch": current.epoch if current else ready.epoch,
                "values": current.values if current else ready.features,
                "specs": ready.specs,
                "presets": presets(ready.specs),
            }
        )

    async def switch(self, values: dict[str, Any] = Body()) -> Response:  # noqa: B008 -- FastAPI's way
        """Switch features; answers once they are applied."""
        ready = self._ready()
        if not values:
            raise ApiError(422, 'The body names no feature. Send for example {"kv_cache": false}.')
        specs = {spec.name: spec for spec in ready.specs}
        checked: dict[str, bool | int | str] = {}
        for name, value in values.items():
            try:
                checked[name] = validate(name, value, specs)
            except FeatureError as error:
                raise ApiError(422, str(error), param=name, code="invalid_feature") from error
        applied = await self._supervisor.set_features(checked)
        return json_response(
            {
                "epoch": applied.epoch,
                "values": applied.values,
                "changed": applied.changed,
                "cost": applied.cost,
                "apply_ns": applied.apply_ns,
                "preempted": applied.preempted,
                "recompute_tokens": applied.recompute_tokens,
            }
        )

    async def list_requests(self) -> Response:
        """List the active requests and the most recent ended ones."""
        return json_response({"requests": self._log.requests, "now_ns": time.monotonic_ns()})

    async def cancel(self, identifier: str) -> Response:
        """End a request, by its id or its handle.

        One that has ended already is answered with an empty list: whoever stops a request cannot know that it ended by
        itself while the call was on its way.
        """
        samples = self._requests.find(identifier)
        if not samples and not self._log.knows(identifier):
            raise ApiError(404, f"No request has the id {identifier!r}.", code="request_not_found")
        for sample in samples:
            self._requests.cancel_sample(sample)
        return json_response({"cancelled": [sample.handle for sample in samples]})

    async def forget_caches(self) -> Response:
        """Empty the prefix cache and the response cache, so that a measurement starts cold."""
        return json_response((await self._supervisor.forget_caches()).result)

    async def start(self, body: EngineBody | None = None) -> Response:
        """Start the engine, with another model where one is named."""
        await self._supervisor.start(model=body.model if body else None)
        return json_response(self._supervisor.event)

    async def stop(self) -> Response:
        """Stop the engine, which frees the device's memory."""
        await self._supervisor.stop()
        return json_response(self._supervisor.event)

    async def sleep(self) -> Response:
        """Give the device's memory back; running requests wait until the engine is woken."""
        return json_response((await self._supervisor.sleep()).result)

    async def wake(self) -> Response:
        """Go on after a sleep."""
        return json_response((await self._supervisor.wake()).result)

    async def restart(self, body: EngineBody | None = None) -> Response:
        """Stop and start the engine."""
        await self._supervisor.restart(model=body.model if body else None)
        return json_response(self._supervisor.event)

    def _ready(self) -> Ready:
        ready = self._supervisor.ready
        if ready is None:
            event = self._supervisor.event
            raise ApiError(503, f"The engine is {event.state}. {event.message}".strip(), code=f"engine_{event.state}")
        return ready
