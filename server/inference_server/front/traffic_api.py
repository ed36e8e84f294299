"""The HTTP interface of the server's own load: start it, change it while it runs, stop it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Body
from starlette.responses import Response

from inference_server.front.errors import ApiError
from inference_server.front.json_response import json_response
from inference_server.front.traffic import Traffic
from inference_server.workloads.workload import PRESETS, WorkloadError, convert


class TrafficApi:
    """The handlers.

    Parameters
    ----------
    traffic
        What they control.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self.router = APIRouter()
        for method, path, handler in (
            ("GET", "/traffic", self.show),
            ("POST", "/traffic", self.start),
            ("PATCH", "/traffic", self.change),
            ("POST", "/traffic/stop", self.stop),
        ):
            self.router.add_api_route(path, handler, methods=[method], response_model=None)

    async def show(self) -> Response:
        """Say what arrives, and which presets there are."""
        presets = {
            name: {"description": description, "workload": workload}
            for name, (description, workload) in PRESETS.items()
        }
        return json_response({"traffic": self._traffic.event, "presets": presets})

    async def start(self, values: dict[str, Any] = Body()) -> Response:  # noqa: B008 -- FastAPI's way
        """Let the requests of a workload arrive: ``{"preset": "chat", "seed": 3, …}`` or all of its fields."""
        try:
            workload = convert(values)
        except WorkloadError as error:
            raise ApiError(422, str(error), code="invalid_workload") from error
        return json_response(await self._traffic.start(workload))

    async def change(self, values: dict[str, Any] = Body()) -> Response:  # noqa: B008 -- FastAPI's way
        """Replace some fields of the workload that runs; from the next request on."""
        try:
            return json_response(self._traffic.change(values))
        except WorkloadError as error:
            raise ApiError(422, str(error), code="invalid_workload") from error

    async def stop(self) -> Response:
        """End it; requests under way are cancelled."""
        return json_response({"traffic": await self._traffic.stop()})
