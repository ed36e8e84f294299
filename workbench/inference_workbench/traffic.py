"""The server's own load from a notebook: ``wb.traffic.start("chat", concurrency=8)``, ``wb.traffic.stop()``."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from inference_server.protocol import TrafficEvent
from inference_server.workloads.workload import PRESETS, Workload, WorkloadError, changed, convert
from inference_workbench.switches import Call


class Traffic:
    """Starts, changes and stops requests that the server sends to itself.

    Examples
    --------
    >>> wb.traffic.start("shared prefix", concurrency=16)
    >>> wb.traffic.set(rate=3.0)  # requests now arrive by themselves, three a second
    >>> wb.traffic.stop()
    >>> with wb.traffic.start("chat"):  # stopped at the end
    ...     time.sleep(10)
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    @property
    def presets(self) -> dict[str, str]:
        """Name of each preset, and what it shows."""
        return {name: description for name, (description, _) in PRESETS.items()}

    @property
    def status(self) -> TrafficEvent | None:
        """What arrives now, or arrived last; ``None`` if there never was anything."""
        return _event(self._call("GET", "/traffic")["traffic"])

    def start(self, workload: str | Workload = "chat", **values: Any) -> Self:
        """Let requests arrive; what arrived before is stopped.

        Parameters
        ----------
        workload : str or Workload
            A preset's name, or a workload of your own.
        **values
            Fields of :class:`~inference_server.workloads.workload.Workload` to replace. ``concurrency`` and ``rate``
            (requests per second, with ``burstiness``) are short for ``arrivals``; lengths may be a number or a pair.

        Raises
        ------
        WorkloadError
            If a value is wrong.
        """
        plain = spelled_out(values, None)
        made = convert({"preset": workload, **plain}) if isinstance(workload, str) else changed(workload, plain)
        self._call("POST", "/traffic", json=msgspec.to_builtins(made))
        return self

    def set(self, **values: Any) -> TrafficEvent | None:
        """Change the workload that runs, from the next request on; values as in :meth:`start`."""
        status = self.status
        return _event(self._call("PATCH", "/traffic", json=spelled_out(values, status)))

    def command(self, action: Literal["start", "change", "stop"], values: dict[str, Any]) -> None:
        """Pass on what a view asks for, in the server's own terms."""
        if action == "stop":
            self._call("POST", "/traffic/stop", json={})
        else:
            self._call("POST" if action == "start" else "PATCH", "/traffic", json=values)

    def stop(self) -> TrafficEvent | None:
        """Stop; requests under way are cancelled. Returns what became of them all."""
        return _event(self._call("POST", "/traffic/stop", json={})["traffic"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        status = self.status
        if status is None:
            return f"no traffic; presets: {', '.join(self.presets)}"
        return (
            f"{status.workload['name']}: {status.state}, {status.in_flight} under way, {status.finished} finished, "
            f"{status.failed} failed, {status.output_tokens} tokens. {status.message}".strip()
        )


def spelled_out(values: dict[str, Any], running: TrafficEvent | None) -> dict[str, Any]:
    """Write the short forms of a workload's values in full: ``concurrency``, ``rate``, lengths as numbers and pairs.

    Parameters
    ----------
    values : dict
        Fields of a workload.
    running : TrafficEvent, optional
        What arrives now: a new rate keeps its burstiness.
    """
    plain = {name: msgspec.to_builtins(value) for name, value in values.items()}
    closed = "concurrency" in plain
    if closed and ("rate" in plain or "burstiness" in plain):
        raise WorkloadError("Requests arrive by 'concurrency' (a closed loop) or by 'rate', not both.")
    if closed:
        plain["arrivals"] = {"kind": "closed", "concurrency": plain.pop("concurrency")}
    elif "rate" in plain or "burstiness" in plain:
        before = (running.workload if running is not None else {}).get("arrivals", {})
        kept = before if before.get("kind") == "poisson" else {}
        given = {name: plain.pop(name) for name in ("rate", "burstiness") if name in plain}
        plain["arrivals"] = {"kind": "poisson", **kept, **given}
    for name in ("prompt_tokens", "output_tokens"):
        value = plain.get(name)
        if isinstance(value, int):
            plain[name] = {"low": value, "high": value}
        elif isinstance(value, list | tuple):
            low, high = value
            plain[name] = {"low": low, "high": high}
    return plain


def _event(values: dict[str, Any] | None) -> TrafficEvent | None:
    return None if values is None else msgspec.convert({"t": "traffic", **values}, TrafficEvent)
