"""Goes through the runs of an experiment on one server, one after the other, and keeps each as soon as it is done.

Before a run: the engine is ready, nobody else's requests are under way, the switches stand as its setting says, and the
prefix and response caches are empty, so that no run profits from the one before. Afterwards, however it ends, the
switches are put back.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from inference_workbench.errors import ServerGoneError, WorkbenchError
from inference_workbench.experiments.journal import Journal, RunRecord, now
from inference_workbench.experiments.progress import Progress, Report
from inference_workbench.experiments.sender import Answer, send
from inference_workbench.experiments.sites import Site

_ATTEMPTS = 3


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
    site
        The server. When its ``cancel`` is set, the run under way is ended, and :meth:`run` returns.
    journal
        Where finished runs are kept; those it holds already are not made again.
    progress
        Shows how far it is.
    tolerant
        Whether failed requests are a result (as in a search for the server's limit) rather than an error.
    """

    def __init__(
        self,
        site: Site,
        journal: Journal,
        *,
        progress: Progress,
        tolerant: bool = False,
    ) -> None:
        self.site = site
        self._journal = journal
        self._progress = progress
        self._tolerant = tolerant

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to stop."""
        return self.site.cancel.is_set()

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
                self.site.switch(self._journal.manifest.features_before)

    def one(self, slot: Slot, place: int) -> RunRecord | None:
        """Make one run and keep it; ``None`` if it was cancelled."""
        load = self._journal.loads[slot.load]
        for attempt in range(1, _ATTEMPTS + 1):
            self.site.prepare(self._journal.manifest.settings[slot.setting])
            started, began = now(), time.monotonic()
            sending = send(
                self.site.target(),
                load.requests,
                limit=load.limit,
                cancel=self.site.cancel,
                label=f"exp-{secrets.token_hex(4)}",
                on_end=self._progress.requests,
            )
            if sending.cancelled:
                return None
            failed = [answer for answer in sending.answers if not answer.finished]
            if failed and attempt < _ATTEMPTS and self.site.was_lost():
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
                server=self.site.observed(sending),
            )
            self._journal.append(record)
            return record
        raise WorkbenchError(f"The server was lost {_ATTEMPTS} times in the run {slot.key!r}. {self._how_to_go_on()}")

    def switch(self, setting: str) -> None:
        """Let the switches stand as a setting says."""
        self.site.switch(self._journal.manifest.settings[setting])

    # -- private -----------------------------------------------------------------------------------------------------

    def _how_to_go_on(self) -> str:
        return f"{len(self._journal.runs)} runs are kept; go on with resume({str(self._journal.path)!r})."

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


def output_ids(answers: Sequence[Answer]) -> dict[int, list[int]]:
    """Return each finished request's output tokens."""
    return {answer.index: answer.token_ids for answer in answers if answer.finished}
