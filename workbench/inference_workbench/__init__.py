"""Inference Workbench in Python: connect to a server, generate, measure, switch, watch.

>>> import inference_workbench as iw
>>> wb = iw.connect()
>>> run = wb.generate("Once upon a time", max_tokens=64)
>>> run.tokens, run.summary(), run.plot()
>>> wb.features.kv_cache = False
>>> wb.panel()

Importing this package is cheap: names are loaded when first used, and a Jupyter server that only needs
``inference_workbench.jupyter`` loads neither pandas nor a client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference_workbench.client import Status, Workbench, connect
    from inference_workbench.errors import (
        FeatureRefusedError,
        RequestError,
        ServerGoneError,
        ServerNotFoundError,
        ServerStartError,
        VersionMismatchError,
        WorkbenchError,
    )
    from inference_workbench.run import Run, Summary
    from inference_workbench.switches import AppliedSwitch, Switches

__all__ = [
    "AppliedSwitch",
    "FeatureRefusedError",
    "RequestError",
    "Run",
    "ServerGoneError",
    "ServerNotFoundError",
    "ServerStartError",
    "Status",
    "Summary",
    "Switches",
    "VersionMismatchError",
    "Workbench",
    "WorkbenchError",
    "connect",
]

_HOMES = {
    "client": ("Status", "Workbench", "connect"),
    "errors": (
        "FeatureRefusedError",
        "RequestError",
        "ServerGoneError",
        "ServerNotFoundError",
        "ServerStartError",
        "VersionMismatchError",
        "WorkbenchError",
    ),
    "run": ("Run", "Summary"),
    "switches": ("AppliedSwitch", "Switches"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
