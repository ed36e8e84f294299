"""Goes through the runs of an experiment on one server, one after the other, and keeps each as soon as it is done.

Before a run: the engine is ready, nobody else's requests are under way, the switches stand as its setting says, and the
prefix and response caches are empty, so that no run profits from the one before. Afterwards, however it ends, the
switches are put back.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from inference_workbench.errors import RequestError, ServerGoneError, WorkbenchError
from inference_workbench.experiments.journal import (
    Features,
    Journal,
    RunRecord,
    ServerSide,
    differing,
    now,
)
from inference_workbench.experiments.progress import Progress, Report
from inference_workbench.experiments.sender import Answer, Sending, send
from inference_workbench.experiments.target import Target
from inference_workbench.store import ENDED

if TYPE_CHECKING:
    from inference_workbench.client import Workbench

_BUSY_PATIENCE_S = 60.0
_SERVER_PATIENCE_S = 300.0
_ATTEMPTS = 3
_TELEMETRY_PATIENCE_S = 5.0


class CancelledError(WorkbenchError):
    """An experiment was cancelled before there was enough for a result; what is done is kept."""


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One run that is to be made."""

    key: str
    setting: str
    load: str
    block: int
    warm_up: bool = False


class Conductor:
    """Makes the runs of an experiment.

    Parameters
    ----------
    workbench
        Of the server.
    journal
        Where finished runs are kept; those it holds already are not made again.
    progress
        Shows how far it is.
    cancel
        When set, the run under way is ended, and :meth:`run` returns.
    tolerant
        Whether failed requests are a result (as in a search for the server's limit) rather than an error.
    """

    def __init__(
        self,
        workbench: Workbench,
        journal: Journal,
        *,
        progress: Progress,
        cancel: threading.Event,
        tolerant: bool = False,
    ) -> None:
        self._wb = workbench
        self._journal = journal
        self._progress = progress
        self._cancel = cancel
        self._tolerant = tolerant
        self._target: Target | None = None

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to stop."""
        return self._cancel.is_set()

    def run(self, slots: Sequence[Slot]) -> None:
        """Make the runs that are not in the journal yet.

        Raises
        ------
        WorkbenchError
            If a request fails, the server stays busy or is gone; the message says how to go on. What was done is kept.
        """
        for place, slot in enumerate(slots):
            if self.cancelled:
                return
            if slot.key not in self._journal.runs:
                self._tell(slots, place)
                self.one(slot, place)
        self._tell(slots, len(slots))

    @contextlib.contextmanager
    def switches_restored(self) -> Iterator[None]:
        """Put the switches back at the end of a ``with`` block, to what they were when the experiment was begun."""
        try:
            yield
        except ServerGoneError as error:
            raise WorkbenchError(f"{error} {self._how_to_go_on()}") from error
        finally:
            # A server that is gone has no switches any more; the error that is on its way says so.
            with contextlib.suppress(WorkbenchError):
                self._switch(self._journal.manifest.features_before)

    def one(self, slot: Slot, place: int) -> RunRecord | None:
        """Make one run and keep it; ``None`` if it was cancelled."""
        load = self._journal.loads[slot.load]
        for attempt in range(1, _ATTEMPTS + 1):
            self._wait_ready()
            self._wait_idle()
            self._switch(self._journal.manifest.settings[slot.setting])
            self._wb.store.wait_for_tasks(_SERVER_PATIENCE_S)
            instance = self._wb.store.instance
            self._wb._call("POST", "/reset_prefix_cache", json={})  # noqa: SLF001 -- our own
            started, began = now(), time.monotonic()
            sending = send(
                self._found_target(),
                load.requests,
                limit=load.limit,
                cancel=self._cancel,
                label=f"exp-{secrets.token_hex(4)}",
                on_end=self._progress.requests,
            )
            if sending.cancelled:
                return None
            failed = [answer for answer in sending.answers if not answer.finished]
            if failed and self._server_was_lost(instance) and attempt < _ATTEMPTS:
                self._target = None
                continue
            if failed and not self._tolerant:
                raise WorkbenchError(
                    f"{len(failed)} of {len(load.requests)} requests of the run {slot.key!r} failed, the first with: "
                    f"{failed[0].error} {self._how_to_go_on()}"
                )
            record = RunRecord(
                key=slot.key,
                setting=slot.setting,
                load=slot.load,
                block=slot.block,
                place=place,
                warm_up=slot.warm_up,
                started=started,
                seconds=time.monotonic() - began,
                lag_ms=sending.lag_ms,
                answers=sending.answers,
                server=self._server_side(sending),
            )
            self._journal.append(record)
            return record
        raise WorkbenchError(f"The server was lost {_ATTEMPTS} times in the run {slot.key!r}. {self._how_to_go_on()}")

    def switch(self, setting: str) -> None:
        """Let the switches stand as a setting says."""
        self._switch(self._journal.manifest.settings[setting])

    # -- private -----------------------------------------------------------------------------------------------------

    def _found_target(self) -> Target:
        if self._target is None:
            self._target = target_of(self._wb)
        return self._target

    def _how_to_go_on(self) -> str:
        return f"{len(self._journal.runs)} runs are kept; go on with resume({str(self._journal.path)!r})."

    def _wait_ready(self) -> None:
        """Wait for the engine, also of a server that is being started again."""
        deadline = time.monotonic() + _SERVER_PATIENCE_S
        while True:
            try:
                self._wb.wait_ready(max(1.0, deadline - time.monotonic()))
            except ServerGoneError:
                if time.monotonic() > deadline or self._cancel.wait(1.0):
                    raise
            else:
                return

    def _wait_idle(self) -> None:
        deadline = time.monotonic() + _BUSY_PATIENCE_S
        while True:
            answer = self._wb._call("GET", "/requests")["requests"]  # noqa: SLF001 -- our own
            active = [each for each in answer if each["state"] not in ENDED]
            if not active or self.cancelled:
                return
            if time.monotonic() > deadline:
                raise WorkbenchError(
                    f"The server is busy with {len(active)} requests of somebody else (such as {active[0]['id']!r}), "
                    f"which would be measured, too. End them, or wb.traffic.stop(). {self._how_to_go_on()}"
                )
            time.sleep(0.05)

    def _switch(self, wanted: Features) -> None:
        current = self._wb._call("GET", "/features")["values"]  # noqa: SLF001 -- what the server says, not telemetry
        values = {name: wanted[name] for name in differing(current, wanted) if name in wanted and name in current}
        if values:
            self._wb.features.update(values)

    def _server_was_lost(self, instance: str | None) -> bool:
        """Whether a failure was the server's or the engine's end, rather than a refusal."""
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline:
            try:
                info = self._wb._call("GET", "/info")  # noqa: SLF001 -- our own
            except (WorkbenchError, RequestError):
                return True
            if info["engine"]["state"] != "ready" or info["server"]["instance"] != instance:
                return True
            time.sleep(0.2)
        return False

    def _server_side(self, sending: Sending) -> ServerSide | None:
        store = self._wb.store
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

    def _tell(self, slots: Sequence[Slot], place: int) -> None:
        done = [run for run in self._journal.runs.values() if run.seconds > 0]
        known: dict[tuple[str, str], list[float]] = {}
        for run in done:
            known.setdefault((run.setting, run.load), []).append(run.seconds)
        typical = float(np.mean([run.seconds for run in done])) if done else None
        left: float | None = None
        if typical is not None:
            left = sum(
                float(np.mean(known[slot.setting, slot.load])) if (slot.setting, slot.load) in known else typical
                for slot in slots[place:]
                if slot.key not in self._journal.runs
            )
        name = slots[place].key if place < len(slots) else "done"
        self._progress.report(Report(done=place, total=len(slots), name=name, left_s=left))


def target_of(workbench: Workbench) -> Target:
    """Return a workbench's server as a target."""
    return Target.probe(workbench._server.endpoint)  # noqa: SLF001 -- our own


def output_ids(answers: Sequence[Answer]) -> dict[int, list[int]]:
    """Return each finished request's output tokens."""
    return {answer.index: answer.token_ids for answer in answers if answer.finished}


def _mean(values: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> float | None:
    return float(np.mean(values)) if len(values) else None
