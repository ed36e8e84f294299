"""``torch.compile`` for the plain path, behind the serving: compiles in a thread, proves the result, then offers it.

The thread runs the compiled model on steps of every kind over cache blocks of its own, which makes torch compile what
such steps need, and compares each with the plain path. Only then do the engine's steps go through it. A step that would
need yet another compilation runs uncompiled instead, so that nobody ever waits for one.
"""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference_server.engine import attention
from inference_server.engine.attention import PagedKVTensors, StepContext
from inference_server.engine.request import Request
from inference_server.engine.runner import ModelRunner
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.protocol import Kind, Notice, SamplingParams, TaskProgress

TASK = "compile"
BACKEND = "inductor"
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 2.5e-2
"""Of the logits behind one layer in 16 bits; fused operations round less often, and rounding adds up like a walk."""
STEPS: tuple[tuple[str, tuple[tuple[int, int, int, bool], ...]], ...] = (
    ("a prompt", ((0, 0, 11, True),)),
    ("two prompts", ((0, 0, 12, True), (1, 0, 5, True))),
    ("a part of a prompt", ((1, 5, 4, False), (0, 12, 1, True))),
    ("one position", ((0, 13, 1, True),)),
    ("several positions", ((0, 14, 1, True), (1, 9, 1, True), (2, 0, 1, True))),
    ("a prompt beside a position", ((0, 15, 1, True), (2, 1, 9, True))),
    ("two positions", ((0, 16, 1, True), (1, 10, 1, True))),
)
"""Kinds of steps: request, start, count and whether a token is chosen, of each share."""


def unavailable_reason(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot work here; ``None`` if nothing speaks against it."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return "torch.compile needs a C++ compiler, and there is none here; install g++."
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "torch.compile needs Python's header files, which are not installed here (python3-dev)."
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "On a GPU torch.compile needs the package triton, which is not installed here."
    return None


class CompiledRunner(ModelRunner):
    """The plain path through a compiled model."""

    label = "compiled"

    def forward(self, plan: StepPlan, packed: tuple[Tensor, Tensor, Tensor, StepContext]) -> Tensor:
        """Compute the step as :class:`ModelRunner` does, never compiling anything on the way."""
        self.capture = False  # a hook would be compiled in
        with torch.compiler.set_stance("eager_on_recompile"):
            return super().forward(plan, packed)


class Compilation:
    """One attempt to compile a model.

    Parameters
    ----------
    plain : ModelRunner
        The path to compile. It goes on serving meanwhile.
    shapes : list of tuple
        (KV heads, key size, value size) of each layer.
    report : callable
        Takes what a person should see; called from the thread.
    """

    def __init__(
        self,
        plain: ModelRunner,
        shapes: list[tuple[int, int, int]],
        report: Callable[[TaskProgress | Notice], None],
    ) -> None:
        self.runner: CompiledRunner | None = None
        """Set once it may be used."""
        self.failed = False
        self._plain = plain
        self._shapes = shapes
        self._report = report
        self._thread = threading.Thread(target=self._run, name="torch.compile", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has neither succeeded nor failed yet."""
        return self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it has succeeded or failed."""
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self.runner = self._compile()
        except Exception as error:  # noqa: BLE001 - whatever a compiler stumbles over, the engine serves on without it
            self.failed = True
            cause = str(error).strip().splitlines() or [""]
            text = f"torch.compile failed and the model runs uncompiled: {type(error).__name__}: {cause[0][:300]}"
            self._report(TaskProgress(TASK, 1.0, "failed"))
            self._report(Notice("error", text))
        else:
            self._report(TaskProgress(TASK, 1.0, "ready"))

    def _compile(self) -> CompiledRunner:
        device, dtype = self._plain.device, self._plain.tensors.dtype
        if device.type == "cuda":
            torch.cuda.set_device(device)
        attention.keep_out_of_compilation()
        model: Any = torch.compile(self._plain.model, dynamic=True, backend=BACKEND)
        tensors = [PagedKVTensors(8, 8, device, dtype) for _ in range(2)]
        for each in tensors:
            each.reserve(self._shapes)
        plain, compiled = ModelRunner(self._plain.model, tensors[0]), ModelRunner(model, tensors[1])
        requests = [_request(handle, self._plain.model) for handle in range(3)]
        allowed = TOLERANCE.get(dtype, HALF_TOLERANCE * len(self._shapes) ** 0.5)
        for number, (what, shares) in enumerate(STEPS):
            self._report(TaskProgress(TASK, number / len(STEPS), what))
            items = [
                Scheduled(requests[handle], start, count, Kind.PREFILL, sample=sample)
                for handle, start, count, sample in shares
            ]
            # With and without the cache the same code runs: attention is not part of it.
            plan = StepPlan(number, items, use_cache=True)
            expected = plain.forward(plan, plain.prepare(plan)).float()
            got = compiled.forward(plan, compiled.prepare(plan)).float()
            difference = float((got - expected).norm() / expected.norm().clamp(min=1e-6))
            if not difference <= allowed:
                raise ArithmeticError(
                    f"compiled logits for {what} differ by {difference:.2g} (relative; allowed {allowed:.2g})"
                )
        return CompiledRunner(model, self._plain.tensors)


def _request(handle: int, model: nn.Module) -> Request:
    vocab = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    generator = torch.Generator().manual_seed(handle)
    tokens = torch.randint(0, vocab, (20,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    request = Request(handle=handle, prompt_len=20, tokens=tokens, sampling=sampling, seed=0, arrival=handle)
    request.blocks = [handle + 5, handle, 3] if handle == 0 else [handle + 5, handle]
    return request
