"""Starts the GPU fast path beside the plain one: lays out the weights and proves the results."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.llama import Architecture, UnsupportedError, check_supported, fuse
from inference_server.engine.request import Request
from inference_server.engine.runner import ModelRunner
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.protocol import Kind, SamplingParams

if TYPE_CHECKING:
    from inference_server.engine.gpu.runner import GpuRunner

CHECK_LENGTH = 24
CHECK_LAYERS = 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
TIMES_ROUNDING = 5.0
"""Logits may differ by so many times what rounding the embeddings once more changes, where that is more.

The last layers of a trained model, given embeddings, can make ten percent of one rounding; a mistake makes all of it.
"""


def start(model: Any, plain: ModelRunner, positions: int, rows: int) -> GpuRunner:
    """Build and verify the fast path of a model.

    Parameters
    ----------
    model : torch.nn.Module
        Its projections are fused: they become views of larger matrices, with the same values.
    plain : ModelRunner
        The path to agree with. Its cache tensors are shared.
    positions : int
        The longest text to serve.
    rows : int
        The most requests in one step.

    Raises
    ------
    UnsupportedError
        Saying why the model cannot have one.
    """
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError("it needs the package triton, which is not installed here")
    check_supported(model, plain.tensors.dtype)
    dim = model.model.layers[0].self_attn.head_dim
    if dim & (dim - 1) or dim < 16:
        raise UnsupportedError(f"its heads have {dim} elements, not a power of two of at least 16")
    from inference_server.engine.gpu.runner import GpuRunner  # noqa: PLC0415 - imports triton

    architecture = fuse(model, plain.tensors.dtype, max(positions, CHECK_LENGTH))
    check(model, architecture, plain.tensors, rows)
    runner = GpuRunner(architecture, plain, max(positions, CHECK_LENGTH), rows)
    runner.compile_ahead()
    return runner


def check(model: Any, architecture: Architecture, like: PagedKVTensors, rows: int) -> None:
    """See that the fast path's logits are the plain path's, of four layers at a time.

    Over all of a deep model's layers rounding alone adds up to more than a mistake in one of them would. On the way the
    kernels are compiled that steps of at most ``rows`` requests need first.

    Raises
    ------
    UnsupportedError
        Saying by how much they differ, and in which layers.
    """
    every = model.model.layers
    try:
        for first in range(0, len(every), CHECK_LAYERS):
            model.model.layers = every[first : first + CHECK_LAYERS]
            part = dataclasses.replace(architecture, layers=architecture.layers[first : first + CHECK_LAYERS])
            for difference, allowed in _differences(model, part, like, rows):
                if not difference <= allowed:
                    last = min(first + CHECK_LAYERS, len(every)) - 1
                    raise UnsupportedError(
                        f"its logits differ from the plain path's by {difference:.2g} (relative) in layers {first} to "
                        f"{last}, where rounding explains {allowed:.2g}"
                    )
    finally:
        model.model.layers = every


def _differences(
    model: Any, architecture: Architecture, like: PagedKVTensors, rows: int
) -> Iterator[tuple[float, float]]:
    """How much logits differ, and how much they may.

    Of a prompt at once, some positions at once, one, one replayed, two, and some that are verified.
    """
    from inference_server.engine.gpu.runner import GpuRunner  # noqa: PLC0415 - imports triton

    size = like.block_size
    blocks = -(-CHECK_LENGTH // size)
    tensors = PagedKVTensors(2 * blocks, size, like.device, like.dtype)
    tensors.reserve(
        [(keys.shape[1], keys.shape[2], values.shape[2]) for keys, values in zip(like.keys, like.values, strict=True)]
    )
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    requests = []
    for handle in range(2):
        tokens = torch.randint(0, architecture.vocab, (CHECK_LENGTH,), generator=generator).tolist()
        request = Request(
            handle=handle, prompt_len=CHECK_LENGTH, tokens=tokens, sampling=sampling, seed=0, arrival=handle
        )
        # Last block first: a kernel that ignored the block table would give itself away.
        request.blocks = list(range(2 * blocks - 1, -1, -1))[handle * blocks :][:blocks]
        requests.append(request)
    plain = ModelRunner(model, tensors)
    fast = GpuRunner(architecture, plain, CHECK_LENGTH, 2)
    fast.compile(rows)
    a, b = requests
    plans = [
        [Scheduled(request, start, count, Kind.PREFILL, sample=True) for request, start, count in parts]
        for parts in (((a, 0, 20),), ((a, 20, 2), (b, 0, 22)), ((a, 22, 1),), ((a, 22, 1),), ((a, 23, 1), (b, 22, 1)))
    ]
    # The same text again, two of its tokens as proposals.
    shorter = dataclasses.replace(b, tokens=b.tokens[:20])
    verified = Scheduled(shorter, 19, 3, Kind.VERIFY, sample=True, drafts=b.tokens[20:22])
    plans.append([Scheduled(a, 23, 1, Kind.DECODE, sample=True), verified])
    for number, items in enumerate(plans):
        plan = StepPlan(number, items, use_cache=True)
        # Rounded once more first: its keys and values are overwritten by the others'.
        with _embeddings_rounded(model):
            rounded = plain.forward(plan, plain.prepare(plan)).float()
        expected = plain.forward(plan, plain.prepare(plan)).float()
        got = fast.forward(plan, fast.prepare(plan)).float()
        scale = expected.norm().clamp(min=1e-6)
        rounding = float((rounded - expected).norm() / scale)
        yield float((got - expected).norm() / scale), max(TOLERANCE[like.dtype], TIMES_ROUNDING * rounding)


@contextmanager
def _embeddings_rounded(model: Any) -> Iterator[None]:
    """Within, every element of the model's embeddings is half a unit in the last place more or less."""
    generator = torch.Generator().manual_seed(1)

    def jitter(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        signs = torch.randint(0, 2, embedded.shape, generator=generator).to(embedded.device) * 2 - 1
        return (embedded.float() * (1 + signs * torch.finfo(embedded.dtype).eps / 2)).to(embedded.dtype)

    hook = model.get_input_embeddings().register_forward_hook(jitter)
    try:
        yield
    finally:
        hook.remove()
