"""The command ``inference-workbench bench``: from options to a workload, and from a result to the screen and a file."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from inference_server.discovery import ServerFile
from inference_workbench.endpoint import Endpoint
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.bench import Benchmark, bench, parse_length, parse_slo
from inference_workbench.experiments.capacity import Capacity, capacity
from inference_workbench.experiments.progress import progress_for
from inference_workbench.experiments.target import Target
from inference_workbench.experiments.target import target as find_target
from inference_workbench.experiments.workloads import AnyWorkload, from_guidellm, from_vllm_bench, workload


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What the command was called with."""

    server: ServerFile | None
    url: str | None
    token: str | None
    model: str | None
    workload: str
    values: dict[str, Any]
    vllm: str | None
    guidellm: str | None
    requests: int | None
    as_text: bool
    warm_up: int
    slo: str | None
    find_capacity: bool
    output: Path | None
    details: bool
    json_only: bool


def run_bench(options: BenchOptions, out: Console, err: Console) -> None:
    """Do it.

    Raises
    ------
    WorkbenchError, WorkloadError
        With a message that says what to do.
    """
    target = _target(options)
    what = _workload(options)
    slo = parse_slo(options.slo) if options.slo else None
    if options.find_capacity:
        if slo is None:
            raise WorkbenchError("A search for the capacity needs objectives: --slo ttft=500,tpot=50")
        found = capacity(slo, what, requests=options.requests, wb=target, path=_experiment_path(options))
        plain = _plain(found)
        _show(options, out, plain, found.summary())
        return
    cancel = threading.Event()
    progress = progress_for(wanted=not options.json_only, title="bench", cancel=cancel)
    try:
        result: Benchmark = bench(
            target,
            what,
            requests=options.requests,
            warm_up=options.warm_up,
            as_text=options.as_text,
            slo=slo,
            cancel=cancel,
            on_end=progress.requests,
        )
    finally:
        progress.close("")
    _show(options, out, result.to_dict(details=options.details), result.summary())
    if result.figures()["failed"]:
        err.print("Some requests failed.", style="red")


def _target(options: BenchOptions) -> Target:
    if options.url is not None:
        return find_target(options.url, token=options.token, model=options.model)
    assert options.server is not None
    return Target.probe(Endpoint.of(options.server), options.model)


def _workload(options: BenchOptions) -> AnyWorkload:
    values = dict(options.values)
    for name in ("prompt_tokens", "output_tokens"):
        if name in values:
            values[name] = parse_length(values[name])
    if options.vllm is None and options.guidellm is None:
        return workload(options.workload, **values)
    if options.vllm is not None and options.guidellm is not None:
        raise WorkbenchError("Give the options of one tool: --vllm or --guidellm.")
    theirs = from_vllm_bench(options.vllm) if options.vllm is not None else from_guidellm(options.guidellm or "")
    return workload(theirs, **values)


def _experiment_path(options: BenchOptions) -> Path | None:
    """Beside the JSON file, so that a search that was interrupted goes on where it was."""
    return None if options.output is None else options.output.with_suffix(".iwexp")


def _plain(found: Capacity) -> dict[str, Any]:
    passed, failed = found.bracket
    curve = found.curve().to_dict("records")
    return {"slo": found.slo, "capacity": passed, "fails_at": failed, "full_load": found.saturation, "curve": curve}


def _show(options: BenchOptions, out: Console, plain: dict[str, Any], words: str) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(plain), indent=1)
    if options.output is not None:
        try:
            options.output.write_bytes(encoded + b"\n")
        except OSError as error:
            raise WorkbenchError(f"{options.output} cannot be written: {error.strerror or error}.") from error
    out.print(encoded.decode() if options.json_only else words, markup=False)
