"""Inference Workbench in Python: connect to a server, generate, measure, switch, watch.

>>> import inference_workbench as iw
>>> wb = iw.connect()
>>> run = wb.generate("Once upon a time", max_tokens=64)
>>> run.tokens, run.summary(), run.plot()
>>> wb.features.kv_cache = False
>>> wb.panel()
>>> with wb.record("run.iwrec") as recorded: ...
>>> iw.open_recording("run.iwrec").to_html("run.html")
>>> iw.compare({"kv_cache": True}, {"kv_cache": False}, "chat").summary()

Importing this package is cheap: names are loaded when first used, and a Jupyter server that only needs
``inference_workbench.jupyter`` loads neither pandas nor a client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference_server.recording.format import RecordingError
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
    from inference_workbench.experiments.ablation import Ablation, ablate
    from inference_workbench.experiments.bench import Benchmark, bench
    from inference_workbench.experiments.capacity import Capacity, capacity
    from inference_workbench.experiments.compare import Comparison, compare
    from inference_workbench.experiments.conductor import CancelledError
    from inference_workbench.experiments.crossover import Crossover, crossover
    from inference_workbench.experiments.files import open_result, resume
    from inference_workbench.experiments.journal import ExperimentFileError
    from inference_workbench.experiments.target import Target, target
    from inference_workbench.experiments.workloads import (
        RequestSet,
        from_guidellm,
        from_jsonl,
        from_recording,
        from_vllm_bench,
        save_workload,
        to_vllm_bench,
        workload,
    )
    from inference_workbench.recording import Recording, RecordingSummary, open_recording
    from inference_workbench.recordings import Recorded, Recordings
    from inference_workbench.replaying import WorkloadRun, replay
    from inference_workbench.run import Run, Summary
    from inference_workbench.switches import AppliedSwitch, Switches

__all__ = [
    "Ablation",
    "AppliedSwitch",
    "Benchmark",
    "CancelledError",
    "Capacity",
    "Comparison",
    "Crossover",
    "ExperimentFileError",
    "FeatureRefusedError",
    "Recorded",
    "Recording",
    "RecordingError",
    "RecordingSummary",
    "Recordings",
    "RequestError",
    "RequestSet",
    "Run",
    "ServerGoneError",
    "ServerNotFoundError",
    "ServerStartError",
    "Status",
    "Summary",
    "Switches",
    "Target",
    "VersionMismatchError",
    "Workbench",
    "WorkbenchError",
    "WorkloadRun",
    "ablate",
    "bench",
    "capacity",
    "compare",
    "connect",
    "crossover",
    "from_guidellm",
    "from_jsonl",
    "from_recording",
    "from_vllm_bench",
    "open_recording",
    "open_result",
    "replay",
    "resume",
    "save_workload",
    "target",
    "to_vllm_bench",
    "workload",
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
    "experiments.ablation": ("Ablation", "ablate"),
    "experiments.bench": ("Benchmark", "bench"),
    "experiments.capacity": ("Capacity", "capacity"),
    "experiments.compare": ("Comparison", "compare"),
    "experiments.conductor": ("CancelledError",),
    "experiments.crossover": ("Crossover", "crossover"),
    "experiments.files": ("open_result", "resume"),
    "experiments.journal": ("ExperimentFileError",),
    "experiments.target": ("Target", "target"),
    "experiments.workloads": (
        "RequestSet",
        "from_guidellm",
        "from_jsonl",
        "from_recording",
        "from_vllm_bench",
        "save_workload",
        "to_vllm_bench",
        "workload",
    ),
    "recording": ("Recording", "RecordingSummary", "open_recording"),
    "recordings": ("Recorded", "Recordings"),
    "run": ("Run", "Summary"),
    "switches": ("AppliedSwitch", "Switches"),
    "replaying": ("WorkloadRun", "replay"),
}
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}
_HOME_OF["RecordingError"] = "inference_server.recording.format"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def load_ipython_extension(ipython: Any) -> None:
    """Add ``%%infer`` to a notebook: called by ``%load_ext inference_workbench``."""
    from inference_workbench.magics import InferMagics  # noqa: PLC0415 -- only where IPython is

    ipython.register_magics(InferMagics)


def __dir__() -> list[str]:
    return sorted(__all__)
