"""How much memory there is on the host, and how running out of it looks, on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_CPU_ALLOCATOR = "DefaultCPUAllocator"


def available_host_bytes() -> int:
    """Memory that programs could still take without swapping."""
    try:
        import psutil  # noqa: PLC0415 - the engine runs without it too
    except ModuleNotFoundError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.virtual_memory().available)


def available_bytes(device: torch.device) -> int:
    """Memory that this process could still take on a device, with what its allocator keeps for later."""
    if device.type != "cuda":
        return available_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def give_free_memory_back() -> None:
    """Hand memory that was freed in this process back to the system, where its allocator keeps it for later."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: torch has a type of its own for a GPU alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
