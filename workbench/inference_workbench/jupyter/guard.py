"""Who may use the handlers of this package, and how they say no."""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Any
from urllib.parse import urlparse

from jupyter_server.base.handlers import JupyterHandler
from tornado import web

_UNKNOWN_USER = "Jupyter does not know this user: send its token as 'Authorization: Bearer TOKEN'."


class Guarded(JupyterHandler):
    """Refuses foreign pages and unknown users before anything is started; errors have OpenAI's shape."""

    async def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Look at the page first, then at the user.

        A foreign ``Origin`` is refused even with a valid token, unless Jupyter's own ``allow_origin`` settings admit
        it, because a page elsewhere has no business driving somebody's GPU.
        """
        if not self._origin_is_welcome():
            message = (
                f"A page from {self.request.headers['Origin']} may not use this Jupyter server's inference "
                "server. Allow it with ServerApp.allow_origin if it should."
            )
            self._finish_with_error(403, message, "foreign_origin")
            return
        await super().prepare(*args, **kwargs)

    def get_login_url(self) -> str:
        """Answer 401 instead of sending an API client to a login page."""
        raise web.HTTPError(401, _UNKNOWN_USER)

    def check_xsrf_cookie(self) -> None:
        """Keep Jupyter's own protection, which the proxy's class turns off; token-authenticated requests need none."""
        if getattr(self, "_jupyter_current_user", self) is None:
            raise web.HTTPError(401, _UNKNOWN_USER)
        JupyterHandler.check_xsrf_cookie(self)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer in OpenAI's error shape: whoever asks here is a program."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        message = (error.log_message if isinstance(error, web.HTTPError) else None) or HTTPStatus(status_code).phrase
        self.set_header("Content-Type", "application/json")
        self.finish(_error_body(message, "proxy_error", None))

    def check_origin(self, origin: str | None = None) -> bool:
        """Whether a WebSocket of a page from ``origin`` is accepted."""
        del origin  # the same as the header's
        return self._origin_is_welcome()

    def _origin_is_welcome(self) -> bool:
        origin = self.request.headers.get("Origin")
        if origin is None or self.allow_origin in {"*", origin}:
            return True
        if urlparse(origin).netloc.lower() == self.request.headers.get("Host", "").lower():
            return True
        return bool(self.allow_origin_pat and re.match(self.allow_origin_pat, origin))

    def _finish_with_error(self, status: int, message: str, code: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(_error_body(message, "proxy_error", code))


def _error_body(message: str, kind: str, code: str | None) -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
