"""What a precision costs, from a notebook: ``wb.quantization.measure(weight_precision="int8")``, and its memory."""

from __future__ import annotations

import time
from typing import Any

import pandas as pd

from inference_workbench.errors import RequestError
from inference_workbench.switches import Call

_POLL_S = 0.3


class Quantization:
    """Measures quality and memory of the precisions that the switches offer.

    Examples
    --------
    >>> wb.quantization.measure(weight_precision="int4", int4_group="64")["perplexity"]
    >>> wb.quantization.results  # one row for each precision measured so far
    >>> wb.quantization.memory
    >>> wb.quantization.drop()  # packed weights that are not in use
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    @property
    def status(self) -> dict[str, Any]:
        """What there is: packed variants, memory, results, and what is going on."""
        status: dict[str, Any] = self._call("GET", "/quantization")
        return status

    @property
    def memory(self) -> pd.Series:
        """Bytes by what they are for."""
        return pd.Series(self.status["memory"], name="bytes")

    @property
    def results(self) -> pd.DataFrame:
        """One row for each precision and text measured so far; the worst positions are in :meth:`worst`."""
        rows = [{name: value for name, value in row.items() if name != "worst"} for row in self.status["results"]]
        return pd.DataFrame(rows)

    @property
    def speeds(self) -> pd.DataFrame:
        """Median time of the newest decode steps, one row for each path and one column for each batch size, in ms.

        The path names the weights: ``"fast-cpu fp32 int8"``, and nothing after the dtype for the master.
        """
        steps = pd.DataFrame(self.status["measured_steps"], columns=["path", "batch", "median_ms", "steps"])
        return steps.pivot_table(index="path", columns="batch", values="median_ms")

    def worst(self, label: str) -> pd.DataFrame:
        """Where a precision differs most from the master, worst first, in the newest result with that label."""
        found = [row for row in self.status["results"] if row["label"] == label]
        if not found:
            raise KeyError(f"nothing was measured under {label!r}; the labels are in wb.quantization.results")
        return pd.DataFrame(found[-1]["worst"])

    def measure(self, text: str | None = None, *, timeout: float = 3600.0, **values: str) -> dict[str, Any]:
        """Measure quality beside whatever is served, and wait for the result.

        Parameters
        ----------
        text : str, optional
            Your own; a built-in one, in the public domain, without.
        timeout : float
            Seconds to wait.
        **values
            Switches to measure where they differ from those in use: ``weight_precision``, ``int4_group``,
            ``int4_grid``, ``int4_rounding``, ``kv_cache_dtype``. None of them is switched.

        Raises
        ------
        RequestError
            If it cannot be measured, or was cancelled.
        TimeoutError
            If it takes longer; it goes on.
        """
        number = self._call("POST", "/quantization/quality", json={"text": text, "values": values})["number"]
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            status = self.status
            for row in status["results"]:
                if row["number"] == number:
                    result: dict[str, Any] = row
                    return result
            if status["measuring"] is None and not status["waiting"]:
                raise RequestError(f"The measurement ended without a result: {status['last_failure']}")
            time.sleep(_POLL_S)
        raise TimeoutError(f"the measurement goes on after {timeout:.0f} s; see wb.quantization.status")

    def cancel(self) -> list[str]:
        """Give up what is being measured, and weights that are being packed; return what that was."""
        stopped: list[str] = self._call("POST", "/quantization/cancel", json={})["stopped"]
        return stopped

    def drop(self) -> int:
        """Give the memory of packed weights back that are not in use; return how many bytes."""
        freed: int = self._call("POST", "/quantization/drop", json={})["freed"]
        return freed

    def save(self, folder: str) -> int:
        """Write the packed weights in use as a folder that transformers and vLLM load; return the weights' bytes.

        Parameters
        ----------
        folder : str
            A new folder on the server's machine, as an absolute path.
        """
        written: int = self._call("POST", "/quantization/save", json={"folder": folder}, timeout=900.0)["bytes"]
        return written

    def calibrate(self, text: str | None = None) -> int:
        """Set the text that GPTQ sees, or the built-in one again; return its length in tokens."""
        tokens: int = self._call("PUT", "/quantization/calibration", json={"text": text})["tokens"]
        return tokens
