"""The HTTP interface of precisions beside the switches: what there is, what it costs in quality, memory given back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from inference_server.front.json_response import json_response
from inference_server.front.supervisor import EngineSupervisor
from inference_server.protocol import QuantizationAction


class MeasureBody(BaseModel):
    """Body of ``POST /quantization/quality``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str | None = None
    """The user's own; ``None`` is the built-in one."""
    values: dict[str, str] = {}
    """Switches to measure, where they differ from those in use."""


class CalibrationBody(BaseModel):
    """Body of ``PUT /quantization/calibration``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str | None = None


class SaveBody(BaseModel):
    """Body of ``POST /quantization/save``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    folder: str


class QuantizationApi:
    """The handlers.

    Parameters
    ----------
    supervisor
        The engine.
    """

    def __init__(self, supervisor: EngineSupervisor) -> None:
        self._supervisor = supervisor
        self.router = APIRouter()
        for method, path, handler in (
            ("GET", "/quantization", self.status),
            ("POST", "/quantization/quality", self.measure),
            ("POST", "/quantization/cancel", self.cancel),
            ("POST", "/quantization/drop", self.drop),
            ("PUT", "/quantization/calibration", self.calibrate),
            ("POST", "/quantization/save", self.save),
        ):
            self.router.add_api_route(path, handler, methods=[method], response_model=None)

    async def status(self) -> Response:
        """Say what there is: variants, memory, results, and what is going on."""
        return await self._ask("status")

    async def measure(self, body: MeasureBody | None = None) -> Response:
        """Begin to measure quality; the result appears in the status."""
        body = body or MeasureBody()
        return await self._ask("measure", text=body.text, values=body.values)

    async def cancel(self) -> Response:
        """Give up what is being measured, and weights that are being packed."""
        return await self._ask("cancel")

    async def drop(self) -> Response:
        """Give the memory of packed weights back that are not in use."""
        return await self._ask("drop")

    async def calibrate(self, body: CalibrationBody) -> Response:
        """Set the text that GPTQ sees; ``null`` is the built-in one."""
        return await self._ask("calibrate", text=body.text)

    async def save(self, body: SaveBody) -> Response:
        """Write the packed weights in use as a new folder on the server's machine."""
        return await self._ask("save", folder=body.folder)

    async def _ask(self, action: QuantizationAction, **options: Any) -> Response:
        done = await self._supervisor.quantization(action, options)
        return json_response(done.result)
