"""Samples the hardware: a GPU through NVML where there is one, the processes and the machine through psutil."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import structlog

from inference_server.protocol import DeviceEvent

_log = structlog.get_logger(__name__)
_QUIET_EVERY_S = 15.0


class DeviceSampler:
    """Makes a :class:`~inference_server.protocol.DeviceEvent` about once a second while there is work.

    Parameters
    ----------
    interval_s
        Seconds between samples while there is work; a quiet server is looked at every 15 s only, so that its page and
        its disk may sleep.
    processes
        Returns the processes to look at, by name.
    device
        Returns the engine's device, such as ``"cuda:0"``, once it is known.
    busy
        Whether there is work.
    log
        Gets the samples.
    """

    def __init__(
        self,
        interval_s: float,
        *,
        processes: Callable[[], dict[str, int]],
        device: Callable[[], str | None],
        busy: Callable[[], bool],
        log: Callable[[DeviceEvent], None],
    ) -> None:
        self._interval_s = interval_s
        self._processes = processes
        self._device = device
        self._busy = busy
        self._log = log
        self._known: dict[int, psutil.Process] = {}
        self._gpu: Any = None
        self._gpu_of: str | None = None
        psutil.cpu_percent()  # the first call only sets the clock

    async def run(self) -> None:
        """Sample until cancelled."""
        last, known = 0.0, None
        while True:
            await asyncio.sleep(self._interval_s)
            processes, device = self._processes(), self._device()
            # An engine that has loaded is looked at also where nobody asks it for anything.
            news = (processes, device) != known
            if not self._busy() and not news and time.monotonic() - last < _QUIET_EVERY_S:
                continue
            last, known = time.monotonic(), (processes, device)
            # A driver may take milliseconds to answer: not on the event loop.
            self._log(await asyncio.to_thread(self.sample, processes, device))

    def sample(self, processes: dict[str, int], device: str | None) -> DeviceEvent:
        """Look once.

        Parameters
        ----------
        processes
            Process ids by name; one that is gone is left out.
        device
            The engine's device.
        """
        memory = psutil.virtual_memory()
        cores = psutil.cpu_count() or 1
        rows: list[tuple[str, int, float, int]] = []
        for name, pid in processes.items():
            try:
                process = self._known.get(pid)
                if process is None:
                    process = self._known[pid] = psutil.Process(pid)
                    process.cpu_percent()
                rows.append((name, pid, process.cpu_percent() / 100, process.memory_info().rss))
            except psutil.Error:
                self._known.pop(pid, None)
        return DeviceEvent(
            at_ns=time.monotonic_ns(),
            cores=cores,
            system_cpu=psutil.cpu_percent() / 100 * cores,
            system_memory_used=memory.total - memory.available,
            system_memory_total=memory.total,
            process=[row[0] for row in rows],
            pid=[row[1] for row in rows],
            cpu=[row[2] for row in rows],
            rss=[row[3] for row in rows],
            **self._sample_gpu(device),
        )

    def _sample_gpu(self, device: str | None) -> dict[str, Any]:
        if device is None or not device.startswith("cuda"):
            return {}
        import pynvml as nvml  # noqa: PLC0415 -- of use on a machine with a GPU only

        try:
            if self._gpu_of != device:
                nvml.nvmlInit()
                self._gpu = _nvml_handle(nvml, int(device.partition(":")[2] or 0))
                self._gpu_of = device
        except nvml.NVMLError as error:
            if self._gpu_of is None:
                _log.warning("the GPU cannot be watched", error=str(error))
                self._gpu_of = device
            return {}
        if self._gpu is None:
            return {}
        gpu = self._gpu

        def ask(question: Callable[[], Any]) -> Any:
            try:
                return question()
            except nvml.NVMLError:  # not every driver answers every question
                return None

        used = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu))
        power = ask(lambda: nvml.nvmlDeviceGetPowerUsage(gpu))
        busy = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu))
        return {
            "gpu_name": ask(lambda: nvml.nvmlDeviceGetName(gpu)),
            "gpu_memory_used": used.used if used else None,
            "gpu_memory_total": used.total if used else None,
            "gpu_power_w": power / 1000 if power is not None else None,
            "gpu_clock_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            "gpu_memory_clock_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
            "gpu_utilization": busy.gpu / 100 if busy else None,
            "gpu_memory_utilization": busy.memory / 100 if busy else None,
            "gpu_temperature_c": ask(lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
        }


def _nvml_handle(nvml: Any, index: int) -> Any:
    """Return NVML's handle of torch's device ``index``: CUDA_VISIBLE_DEVICES renumbers, NVML does not."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    chosen = visible[index] if index < len(visible) else str(index)
    if chosen.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(chosen))
    return nvml.nvmlDeviceGetHandleByUUID(chosen)
