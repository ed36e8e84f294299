"""Answers of this server's own interfaces: JSON of messages and plain values alike."""

from __future__ import annotations

import msgspec
from starlette.responses import Response


def json_response(content: object, *, status: int = 200) -> Response:
    """Encode ``content``, with messages and their tuples as msgspec writes them."""
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")
