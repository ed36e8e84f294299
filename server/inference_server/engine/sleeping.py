"""Gives a device's memory back while an engine lives on: weights wait in host memory, keys and values are dropped.

Every tensor keeps its identity. On a GPU only the storage behind it is emptied and later filled again, so that views
(fused projections and the modules' own weights) go on sharing memory. On a CPU the weights stay where they are, since
host memory is where they would go, and the pages of the KV cache are handed back to the operating system.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor


class SleepError(RuntimeError):
    """The engine cannot sleep or wake now; the message says why and what to do."""


class Freed(msgspec.Struct, frozen=True, kw_only=True):
    """What going to sleep gave back, or waking took again. Measured."""

    device_bytes: int
    """Change of the memory in use on the device, by the driver's count; on a CPU, of this process's resident set."""
    host_bytes: int
    """Weights that wait in host memory."""
    duration_ns: int
    requests: int
    """Requests that wait, or waited, for the engine to wake."""


@dataclass(slots=True)
class _Held:
    """One storage that was emptied, and what was in it."""

    storage: torch.UntypedStorage
    size: int
    content: Tensor | None
    """On the host; ``None`` where nothing needs to come back."""


class Sleeper:
    """Empties storages and fills them again.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: list[_Held] = []

    def release(self, kept: Iterable[Tensor], dropped: Iterable[Tensor]) -> int:
        """Empty the storages of ``kept`` (they come back) and of ``dropped`` (zeros come back).

        Returns
        -------
        int
            Bytes that wait in host memory.

        Raises
        ------
        SleepError
            If the host has no memory for them. Then nothing was changed.
        """
        if self.device.type == "cpu":
            for tensor in dropped:
                _give_pages_back(tensor)
            return 0
        forgotten = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in dropped}
        wanted = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kept}
        held = [_Held(storage, storage.nbytes(), None) for storage in forgotten.values()]
        try:
            for address, storage in wanted.items():
                if address and address not in forgotten and storage.device.type == "cuda":
                    content = torch.empty(storage.nbytes(), dtype=torch.uint8)
                    content.copy_(_bytes_of(storage))
                    held.append(_Held(storage, storage.nbytes(), content))
        except (MemoryError, RuntimeError) as error:
            raise SleepError(
                f"The host has no memory for the weights ({error}). Stop the engine instead: it then loads them anew."
            ) from error
        for each in held:
            each.storage.resize_(0)
        self._held = held
        torch.cuda.empty_cache()
        return sum(each.content.nbytes for each in held if each.content is not None)

    def restore(self) -> None:
        """Bring everything back.

        Raises
        ------
        SleepError
            If the device has no memory for it; it can be tried again.
        """
        for each in self._held:
            if each.storage.nbytes() == each.size:
                continue
            try:
                each.storage.resize_(each.size)
            except torch.OutOfMemoryError as error:
                free, _ = torch.cuda.mem_get_info(self.device)
                missing = sum(other.size for other in self._held if not other.storage.nbytes())
                raise SleepError(
                    f"The device has {free:,} bytes free, and {missing:,} more are needed to wake. Free some of it "
                    "(another program holds it) and wake the engine again; its requests still wait."
                ) from error
            into = _bytes_of(each.storage)
            if each.content is None:
                into.zero_()
            else:
                into.copy_(each.content)
        self._held = []

    def memory_in_use(self) -> int:
        """Bytes in use on the device, by whomever; on a CPU, resident bytes of this process."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            return int(total - free)
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


class Stopwatch:
    """Measures one change of the memory in use."""

    def __init__(self, sleeper: Sleeper) -> None:
        self._sleeper = sleeper
        self._before = sleeper.memory_in_use()
        self._begin = time.monotonic_ns()

    def result(self, host_bytes: int, requests: int) -> Freed:
        """What changed since this was made; a positive number of device bytes was freed."""
        return Freed(
            device_bytes=self._before - self._sleeper.memory_in_use(),
            host_bytes=host_bytes,
            duration_ns=time.monotonic_ns() - self._begin,
            requests=requests,
        )


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _give_pages_back(tensor: Tensor) -> None:
    """Hand the whole pages inside a tensor of host memory back; they read as zeros from then on.

    Its address stays the same, which compiled code may have noted. Where the system cannot, nothing happens.
    """
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > begin and hasattr(mmap, "MADV_DONTNEED"):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
