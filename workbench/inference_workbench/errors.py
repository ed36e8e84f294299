"""What can go wrong between a notebook and a server, as exceptions whose messages say what to do."""

from __future__ import annotations


class WorkbenchError(RuntimeError):
    """Base of all errors of this package."""


class ServerNotFoundError(WorkbenchError):
    """No server runs, and none could be started."""


class ServerStartError(WorkbenchError):
    """A server was started and ended before it could serve, or its engine could not load the model."""


class ServerGoneError(WorkbenchError):
    """The server stopped answering."""


class VersionMismatchError(WorkbenchError):
    """Server and client speak different versions of the protocol."""


class RequestError(WorkbenchError):
    """The server refused a request or could not finish it.

    Parameters
    ----------
    message
        The server's own words.
    status
        HTTP status, or ``None`` when the answer had already begun.
    code
        The server's word for programs, where it gave one.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class FeatureRefusedError(WorkbenchError, ValueError):
    """A switch was refused, and nothing was changed."""
