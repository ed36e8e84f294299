"""Errors as an OpenAI client reads them: one exception type, one JSON shape."""

from __future__ import annotations

import msgspec


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """The ``error`` object of OpenAI's API."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """A whole error answer."""

    error: ErrorDetail


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """Something to tell the client: what was wrong and what to do.

    Parameters
    ----------
    status
        HTTP status code.
    message
        For a person.
    param
        The field of the request that was wrong.
    code
        For a program.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}
        """Further headers of the answer."""
        self.detail = ErrorDetail(
            message=message, type=_TYPES.get(status, "server_error"), param=param, code=code or None
        )

    def body(self) -> bytes:
        """Return the answer as JSON."""
        return msgspec.json.encode(ErrorBody(self.detail))
