"""Where runs are made: our own server with its switches and telemetry, or any server of OpenAI's API."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from inference_server.features import FeatureError, apply, validate
from inference_server.features import Features as KnownFeatures
from inference_server.protocol import FeatureSpec
from inference_server.version import distribution_version
from inference_workbench.errors import FeatureRefusedError, RequestError, ServerGoneError, WorkbenchError
from inference_workbench.experiments.journal import Environment, Features, ServerSide, differing
from inference_workbench.experiments.sender import Sending
from inference_workbench.experiments.target import Target
from inference_workbench.store import ENDED

if TYPE_CHECKING:
    from inference_workbench.client import Workbench

_BUSY_PATIENCE_S = 60.0
_SERVER_PATIENCE_S = 300.0
_TELEMETRY_PATIENCE_S = 5.0


class Site(Protocol):
    """A server on which runs are made."""

    cancel: threading.Event

    def target(self) -> Target:
        """Whom to send to."""

    def environment(self) -> Environment:
        """Describe the server and the machine."""

    def switches(self) -> Features:
        """Return the switches that can be changed, as they stand."""

    def defaults(self) -> Features:
        """Return what they are by default."""

    def check(self, values: Mapping[str, object]) -> Features:
        """Return the switches of a setting, or raise what is wrong with them."""

    def switch(self, wanted: Features) -> None:
        """Let the switches stand so."""

    def prepare(self, wanted: Features) -> None:
        """Make sure that a run can begin under such switches, from a cold cache."""

    def was_lost(self) -> bool:
        """Whether the failure of a request was the end of the server rather than a refusal."""

    def observed(self, sending: Sending) -> ServerSide | None:
        """Return what the server tells of a run."""


class OwnServer:
    """A server of ours, through a workbench.

    Parameters
    ----------
    workbench
        The connection.
    """

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.cancel = threading.Event()
        self._target: Target | None = None
        self._instance: str | None = None

    def target(self) -> Target:
        """Where it is now: a server that was started again may be elsewhere."""
        if self._target is None:
            self._target = Target.probe(self.workbench._server.endpoint)  # noqa: SLF001 -- our own
        return self._target

    def environment(self) -> Environment:
        """Describe the server, the model and the machine, once the model is loaded.

        Raises
        ------
        WorkbenchError
            If it cannot be loaded.
        """
        self._wait_ready()
        status = self.workbench.status()
        model = status.model
        if model is None:
            raise WorkbenchError("The server has no model loaded.")
        return Environment(
            server=status.server.version,
            client=distribution_version(),
            model=model.name,
            model_source=model.source,
            dtype=model.dtype,
            device=model.device_name,
            weights=model.quantized_source or "",
            capacity={} if status.capacity is None else msgspec.to_builtins(status.capacity),
            platform=platform.platform(),
            cores=usable_cores(),
        )

    def switches(self) -> Features:
        """Return the switches that can be changed here, as the server says now."""
        specs = self.workbench.features.specs()
        current = self.workbench._call("GET", "/features")["values"]  # noqa: SLF001 -- not what telemetry said last
        return {name: value for name, value in current.items() if name in specs and specs[name].available}

    def defaults(self) -> Features:
        """Return the server's own defaults."""
        return {name: spec.default for name, spec in self.workbench.features.specs().items() if spec.available}

    def check(self, values: Mapping[str, object]) -> Features:
        """Check the switches of a setting, each and together.

        Raises
        ------
        FeatureRefusedError
            If one of them does not exist, cannot be changed here, or they exclude each other.
        """
        specs: Mapping[str, FeatureSpec] = self.workbench.features.specs()
        known = set(KnownFeatures.__struct_fields__)
        try:
            checked = {name: validate(name, value, specs) for name, value in values.items()}
            apply(KnownFeatures(), {name: value for name, value in checked.items() if name in known}, specs)
        except FeatureError as error:
            raise FeatureRefusedError(str(error)) from None
        return checked

    def switch(self, wanted: Features) -> None:
        """Throw the switches that stand otherwise."""
        current = self.workbench._call("GET", "/features")["values"]  # noqa: SLF001 -- our own
        values = {name: wanted[name] for name in differing(current, wanted) if name in wanted and name in current}
        if values:
            self.workbench.features.update(values)

    def prepare(self, wanted: Features) -> None:
        """Wait until the engine is ready and nobody uses it; throw the switches; empty the caches.

        Raises
        ------
        WorkbenchError
            If others keep it busy.
        FeatureRefusedError
            If it does not have one of the switches.
        ServerGoneError
            If it is gone and does not come back.
        """
        self._wait_ready()
        self._wait_idle()
        missing = sorted(set(wanted) - set(self.switches()))
        if missing:
            raise FeatureRefusedError(
                f"The server has no switch {', '.join(missing)} any more: it was started otherwise, or is of another "
                "version."
            )
        self.switch(wanted)
        self.workbench.store.wait_for_tasks(_SERVER_PATIENCE_S)
        self._instance = self.workbench.store.instance
        self.workbench._call("POST", "/reset_prefix_cache", json={})  # noqa: SLF001 -- our own

    def was_lost(self) -> bool:
        """Whether the server or its engine has ended since the run began."""
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline:
            try:
                info = self.workbench._call("GET", "/info")  # noqa: SLF001 -- our own
            except (WorkbenchError, RequestError):
                break
            if info["engine"]["state"] != "ready" or info["server"]["instance"] != self._instance:
                break
            time.sleep(0.2)
        else:
            return False
        self._target = None
        return True

    def observed(self, sending: Sending) -> ServerSide | None:
        """Return the run's figures by the server's clock, from telemetry; ``None`` if some of it is missing."""
        store = self.workbench.store
        ids = [answer.id for answer in sending.answers if answer.id]
        deadline = time.monotonic() + _TELEMETRY_PATIENCE_S
        handles = [store.wait_for_request(each, max(0.0, deadline - time.monotonic())) for each in ids]
        events = [event for handle in handles if handle is not None and (event := store.request(handle)) is not None]
        if not events or len(events) < len(ids):
            return None  # figures of a part would be figures of something else
        own = {event.request for event in events}
        begin = min(event.arrival_ns for event in events)
        end = max(event.at_ns for event in events)
        ttft = [(e.first_token_ns - e.arrival_ns) / 1e6 for e in events if e.first_token_ns is not None]
        queue = [(e.started_ns - e.arrival_ns) / 1e6 for e in events if e.started_ns is not None]
        tpot = [
            (e.last_token_ns - e.first_token_ns) / 1e6 / (e.output_tokens - 1)
            for e in events
            if e.last_token_ns is not None and e.first_token_ns is not None and e.output_tokens > 1
        ]
        steps = store.steps()
        steps = steps[(steps["begin_ns"] >= begin) & (steps["begin_ns"] <= end)]
        others = [
            event
            for event in store.requests()
            if event.request not in own and event.arrival_ns < end and (event.state not in ENDED or event.at_ns > begin)
        ]
        return ServerSide(
            ttft_ms=_mean(ttft),
            queue_ms=_mean(queue),
            tpot_ms=_mean(tpot),
            steps=len(steps) or None,
            step_ms=_mean(((steps["end_ns"] - steps["begin_ns"]) / 1e6).to_numpy()),
            batch_size=_mean(steps["batch_size"].to_numpy()),
            kv_peak=float((steps["kv_used_blocks"] / steps["kv_total_blocks"]).max()) if len(steps) else None,
            cached_tokens=sum(event.cached_tokens for event in events),
            preemptions=sum(event.preemptions for event in events),
            others=len(others),
        )

    def _wait_ready(self) -> None:
        """Wait for the engine, also of a server that is being started again."""
        deadline = time.monotonic() + _SERVER_PATIENCE_S
        while True:
            try:
                self.workbench.wait_ready(max(1.0, deadline - time.monotonic()))
            except ServerGoneError:
                if time.monotonic() > deadline or self.cancel.wait(1.0):
                    raise
            else:
                return

    def _wait_idle(self) -> None:
        deadline = time.monotonic() + _BUSY_PATIENCE_S
        while True:
            answer = self.workbench._call("GET", "/requests")["requests"]  # noqa: SLF001 -- our own
            active = [each for each in answer if each["state"] not in ENDED]
            if not active or self.cancel.is_set():
                return
            if time.monotonic() > deadline:
                raise WorkbenchError(
                    f"The server is busy with {len(active)} requests of somebody else (such as {active[0]['id']!r}), "
                    "which would be measured, too. End them, or wb.traffic.stop()."
                )
            time.sleep(0.05)


class AnyServer:
    """A server of which nothing is known but OpenAI's API: it has no switches, and its caches stay warm.

    Parameters
    ----------
    target
        The server.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self.cancel = threading.Event()

    def target(self) -> Target:
        """Return it."""
        return self._target

    def environment(self) -> Environment:
        """Describe what is known."""
        return Environment(
            server=self._target.endpoint.place,
            client=distribution_version(),
            model=self._target.model,
            model_source="",
            dtype="",
            device="",
            platform=platform.platform(),
            cores=usable_cores(),
        )

    def switches(self) -> Features:
        """There are none."""
        return {}

    def defaults(self) -> Features:
        """There are none."""
        return {}

    def check(self, values: Mapping[str, object]) -> Features:
        """Refuse any switch.

        Raises
        ------
        FeatureRefusedError
            If there is one.
        """
        if values:
            raise FeatureRefusedError(f"{self._target.endpoint.place} has no switches that could be set from here.")
        return {}

    def switch(self, wanted: Features) -> None:
        """There is nothing to switch."""

    def prepare(self, wanted: Features) -> None:
        """There is nothing to prepare."""

    def was_lost(self) -> bool:
        """Nobody could start it again: every failure is one."""
        return False

    def observed(self, sending: Sending) -> ServerSide | None:
        """It tells nothing."""
        del sending
        return None


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mean(values: Sequence[float] | npt.NDArray[np.float64]) -> float | None:
    return float(np.mean(values)) if len(values) else None
