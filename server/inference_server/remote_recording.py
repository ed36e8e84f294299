"""Records a running server from the command line: starts, shows how it goes, stops, and says where the file is."""

from __future__ import annotations

import time
from typing import Any

import httpx
from rich.console import Console

from inference_server.discovery import ServerFile

_LOOK_EVERY_S = 0.5


class RemoteRecordingError(Exception):
    """The server cannot be recorded. The message says why."""


def record(server: ServerFile, console: Console, *, name: str, note: str, seconds: float | None) -> str:
    """Record until ``seconds`` have passed, the server ends the recording, or Ctrl-C.

    Parameters
    ----------
    server
        As discovery found it.
    console
        Shows the progress.
    name, note
        For the recording.
    seconds
        ``None`` records until Ctrl-C.

    Returns
    -------
    str
        Path of the finished file.

    Raises
    ------
    RemoteRecordingError
        If the server refuses, or is gone.
    """
    transport = httpx.HTTPTransport(uds=server.uds) if server.uds else None
    headers = {"Authorization": f"Bearer {server.token}"}
    base = server.url or "http://localhost"
    try:
        with httpx.Client(base_url=base, headers=headers, transport=transport, timeout=600, trust_env=False) as client:
            event = _checked(client.post("/recordings", json={"name": name, "note": note}))
            address = f"/recordings/{event['id']}"
            try:
                _watch(client, console, address, seconds)
            except KeyboardInterrupt:
                console.print()
            if _checked(client.get(address))["state"] == "recording":
                console.print("Making the file …")
                event = _checked(client.post(f"{address}/stop", params={"wait": "true"}, json={}))
            while (event := _checked(client.get(address)))["state"] in {"recording", "finishing"}:
                time.sleep(_LOOK_EVERY_S)
            if event["state"] != "finished":
                raise RemoteRecordingError(event["message"])
            folder = _checked(client.get("/recordings"))["folder"]
    except httpx.TransportError as error:
        raise RemoteRecordingError(f"The server (pid {server.pid}) does not answer: {error}.") from error
    console.print(f"{event['tokens']:,} tokens, {event['bytes'] / 1e6:.1f} MB. {event['message']}", markup=False)
    return f"{folder}/{event['file']}"


def _watch(client: httpx.Client, console: Console, address: str, seconds: float | None) -> None:
    begin = time.monotonic()
    with console.status("Recording; Ctrl-C ends it.") as status:
        while seconds is None or time.monotonic() - begin < seconds:
            event = _checked(client.get(address))
            if event["state"] != "recording":
                return
            status.update(
                f"Recording for {time.monotonic() - begin:.0f} s: {event['tokens']:,} tokens, "
                f"{event['bytes'] / 1e6:.1f} MB. Ctrl-C ends it."
            )
            left = _LOOK_EVERY_S if seconds is None else begin + seconds - time.monotonic()
            time.sleep(max(0.0, min(_LOOK_EVERY_S, left)))


def _checked(answer: httpx.Response) -> dict[str, Any]:
    content: dict[str, Any] = answer.json()
    if answer.is_error:
        raise RemoteRecordingError(content["error"]["message"])
    return content
