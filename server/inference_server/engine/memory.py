"""How much memory there is: on the host, with or without psutil."""

from __future__ import annotations

import os


def available_host_bytes() -> int:
    """Memory that programs could still take without swapping."""
    try:
        import psutil  # noqa: PLC0415 - the engine runs without it too
    except ModuleNotFoundError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.virtual_memory().available)
