"""What this machine can do at best, measured: memory bandwidth and the speed of a matrix product.

The measurement comes in slices of a fraction of a second, so that an engine does it between requests and a request that
comes meanwhile waits no longer than a slice. The best of several slices counts: what else runs can only slow one down.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil
import torch

from inference_server.engine.memory import available_host_bytes
from inference_server.models.cache import cache_folder
from inference_server.protocol import Ceilings

SLICES = 8
"""Of each of the three measurements."""
_SLICE_S = 0.1
_QUIET_CORES = 0.2
_BUSY_HOLDS = dt.timedelta(hours=1)
_CPU_BYTES = 512 << 20
_CUDA_BYTES = 2 << 30
_CPU_SIZE = 2048
_CUDA_SIZE = 8192


def ceilings_key(device: torch.device, device_name: str, dtype: torch.dtype) -> str:
    """All that the figures depend on, in words."""
    return json.dumps(
        {
            "device": device.type,
            "name": device_name,
            "dtype": str(dtype),
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "torch": torch.__version__,
        },
        sort_keys=True,
    )


def remembered(key: str) -> Ceilings | None:
    """Return what was measured earlier under the same conditions.

    What was measured while others kept the machine busy holds for an hour only.
    """
    try:
        known = msgspec.json.decode(_path().read_bytes(), type=dict[str, Ceilings])
    except (OSError, msgspec.MsgspecError):
        return None
    ceilings = known.get(key)
    if ceilings is not None and ceilings.others_cores > _QUIET_CORES:
        age = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(ceilings.measured_at)
        return ceilings if age < _BUSY_HOLDS else None
    return ceilings


def remember(key: str, ceilings: Ceilings) -> None:
    """Keep the figures for the next start."""
    path = _path()
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, Ceilings])
    except (OSError, msgspec.MsgspecError):
        known = {}
    known[key] = ceilings
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{time.monotonic_ns()}")
        unfinished.write_bytes(msgspec.json.encode(known))
        unfinished.replace(path)
    except OSError:
        pass  # measured again next time; nothing else is lost


def _path() -> Path:
    return cache_folder().parent / "ceilings.json"


class Calibration:
    """A measurement in progress: call :meth:`advance` when there is nothing better to do.

    Parameters
    ----------
    device : torch.device
    device_name : str
    dtype : torch.dtype
        Of the matrix product.
    """

    def __init__(self, device: torch.device, device_name: str, dtype: torch.dtype) -> None:
        self.key = ceilings_key(device, device_name, dtype)
        self._device = device
        self._name = device_name
        self._dtype = dtype
        self._read = self._copy = self._product = 0.0
        self._spent_s = self._others_s = 0.0
        self._process = psutil.Process()
        self._slices = self._run()
        self.result: Ceilings | None = None
        """Once it is done."""

    def advance(self) -> bool:
        """Measure one slice; return whether there is more to do."""
        begin, others = time.perf_counter(), self._others_busy_s()
        more = next(self._slices, None) is not None
        self._spent_s += time.perf_counter() - begin
        self._others_s += max(self._others_busy_s() - others, 0.0)
        if not more and self.result is None:
            self.result = Ceilings(
                device=self._device.type,
                device_name=self._name,
                dtype=str(self._dtype).removeprefix("torch."),
                threads=torch.get_num_threads() if self._device.type == "cpu" else 0,
                read_bytes_per_s=self._read,
                copy_bytes_per_s=self._copy,
                flops_per_s=self._product,
                measured_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                seconds=self._spent_s,
                others_cores=self._others_s / max(self._spent_s, 1e-9),
                versions={"torch": version("torch")},
            )
            remember(self.key, self.result)
        return more

    def _others_busy_s(self) -> float:
        """Seconds for which other processes have kept cores busy, since some moment in the past."""
        machine, ours = psutil.cpu_times(), self._process.cpu_times()
        busy = sum(getattr(machine, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        return busy - ours.user - ours.system

    def _run(self) -> Iterator[bool]:
        wanted = _CUDA_BYTES if self._device.type == "cuda" else _CPU_BYTES
        room = torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else available_host_bytes()
        size = max(64 << 20, min(wanted, room // 8))
        source = torch.ones(size // 4, device=self._device)
        yield True  # pages are touched, and slow, the first time
        for _ in range(SLICES):
            self._read = max(self._read, source.nbytes * self._rate(source.sum))
            yield True
        half = source.numel() // 2
        copy = partial(source[:half].copy_, source[half : 2 * half])
        for _ in range(SLICES):
            self._copy = max(self._copy, 2 * half * source.element_size() * self._rate(copy))
            yield True
        del source, copy
        n = _CUDA_SIZE if self._device.type == "cuda" else _CPU_SIZE
        a, b = (torch.ones(n, n, device=self._device, dtype=self._dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        for _ in range(SLICES):
            self._product = max(self._product, 2 * n**3 * self._rate(product))
            yield True

    def _rate(self, work: Callable[[], object]) -> float:
        """Return the best runs per second within a slice, by the wall clock (a GPU is waited for)."""
        best = float("inf")
        until = time.perf_counter() + _SLICE_S
        with torch.inference_mode():
            while True:
                begin = time.perf_counter()
                work()
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                now = time.perf_counter()
                best = min(best, now - begin)
                if now >= until:
                    return 1 / best
