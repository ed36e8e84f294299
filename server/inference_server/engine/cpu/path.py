"""Starts the fast path beside the plain one: compiles, lays out the weights, proves the results, measures kernels."""

from __future__ import annotations

import importlib.util
import threading
from typing import TYPE_CHECKING, Any

import torch

from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.llama import UnsupportedError, check_supported, fuse
from inference_server.engine.request import Request
from inference_server.engine.runner import ModelRunner
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.protocol import Kind, SamplingParams

if TYPE_CHECKING:
    from inference_server.engine.cpu.runner import FastRunner

CHECK_LENGTH = 24
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Compilation:
    """Compiles the kernels in a thread of its own, to be started before the weights are read.

    The first time on a machine takes some 10 s; later starts read the compiled code from numba's cache.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        if importlib.util.find_spec("numba") is not None:
            self._thread = threading.Thread(target=self._compile, name="compile kernels", daemon=True)
            self._thread.start()

    def _compile(self) -> None:
        try:
            importlib.import_module("inference_server.engine.cpu.kernels")
        except Exception as error:  # noqa: BLE001 - whatever a compiler says, the plain path serves without it
            self._error = error

    @property
    def running(self) -> bool:
        """Whether it is still compiling."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the kernels are there.

        Raises
        ------
        UnsupportedError
            If they cannot be.
        """
        if self._thread is None:
            raise UnsupportedError("it needs the package numba, which is not installed here")
        self._thread.join()
        if self._error is not None:
            raise UnsupportedError(f"its kernels did not compile: {type(self._error).__name__}: {self._error}")


def start(model: Any, plain: ModelRunner, positions: int, *, compilation: Compilation | None = None) -> FastRunner:
    """Build and verify the fast path of a model.

    Parameters
    ----------
    model : torch.nn.Module
        Its projections are fused: they become views of larger matrices, with the same values.
    plain : ModelRunner
        The path to agree with. Its cache tensors are shared.
    positions : int
        The longest text to serve.

    Raises
    ------
    UnsupportedError
        Saying why the model cannot have one.
    """
    tensors = plain.tensors
    if tensors.device.type != "cpu":
        raise UnsupportedError("it is for models on the CPU")
    check_supported(model, tensors.dtype, multiple=16 if tensors.dtype == torch.float32 else 32)
    (compilation or Compilation()).wait()
    from inference_server.engine.cpu.runner import FastRunner  # noqa: PLC0415 - imports the compiled kernels

    # Room for the check, however short the texts are.
    architecture = fuse(model, tensors.dtype, max(positions, CHECK_LENGTH))
    threads = torch.get_num_threads()
    difference = _difference(model, FastRunner, architecture, tensors, threads)
    if not difference <= TOLERANCE[tensors.dtype]:
        raise UnsupportedError(f"its logits differ from the plain path's by {difference:.2g} (relative)")
    runner = FastRunner(architecture, tensors, threads)
    runner.measure()
    return runner


def _difference(model: Any, build: Any, architecture: Any, like: PagedKVTensors, threads: int) -> float:
    """Largest relative difference of logits: a prompt at once, some positions at once, one, and without a cache."""
    size = like.block_size
    blocks = -(-CHECK_LENGTH // size)
    tensors = PagedKVTensors(2 * blocks, size, like.device, like.dtype)
    tensors.reserve(
        [(keys.shape[1], keys.shape[2], values.shape[2]) for keys, values in zip(like.keys, like.values, strict=True)]
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, architecture.vocab, (CHECK_LENGTH,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=1)
    request = Request(handle=0, prompt_len=CHECK_LENGTH, tokens=tokens, sampling=sampling, seed=0, arrival=0)
    # Last block first: a kernel that ignored the block table would give itself away.
    request.blocks = list(range(2 * blocks - 1, blocks - 1, -1))
    fast, plain = build(architecture, tensors, threads), ModelRunner(model, tensors)
    worst = 0.0
    for start, count, use_cache in ((0, 20, True), (20, 3, True), (23, 1, True), (0, 24, False)):
        plan = StepPlan(0, [Scheduled(request, start, count, Kind.PREFILL, sample=True)], use_cache=use_cache)
        expected = plain.forward(plan, plain.prepare(plan)).float()
        got = fast.forward(plan, fast.prepare(plan)).float()
        worst = max(worst, float((got - expected).norm() / expected.norm().clamp(min=1e-6)))
    return worst
