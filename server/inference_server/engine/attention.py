"""Attention over a paged KV cache, as one function registered in transformers. Owns the cache's tensors.

A step is packed into one row of tokens, ``[1, total_tokens]``, the requests one after another; no mask is built. The
registered function writes the step's keys and values into the cache, then attends request by request. What it needs to
know about the step is in a :class:`StepContext`, set by the runner before the forward pass.

This is the reference backend: it gathers each request's blocks and calls scaled dot-product attention.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from inference_server.engine.kv_cache import Copy, SwapDiscard, SwapIn, SwapOut, Transfer

NAME = "inference_workbench_paged"


class PagedKVTensors:
    """Keys and values of every layer, ``[num_blocks, block_size, num_kv_heads, head_dim]`` each.

    Layers may differ in heads and head size; each is allocated when the load-time check first sees it, through
    :meth:`reserve`.
    """

    def __init__(self, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._host: dict[int, list[Tensor]] = {}

    def reserve(self, shapes: list[tuple[int, int, int]]) -> None:
        """Allocate all layers; ``shapes`` has (KV heads, key size, value size) for each."""
        slots = self.num_blocks * self.block_size
        self.keys = [torch.zeros(slots, heads, size, device=self.device, dtype=self.dtype) for heads, size, _ in shapes]
        self.values = [
            torch.zeros(slots, heads, size, device=self.device, dtype=self.dtype) for heads, _, size in shapes
        ]

    def transfer(self, transfers: list[Transfer]) -> None:
        """Carry out copies between blocks and to and from host memory, in the order given.

        Each leaves the list once it is done, so that what is left after an error is what is still to do.
        """
        size = self.block_size
        while transfers:
            match transfers[0]:
                case Copy(source, destination):
                    for cache in (*self.keys, *self.values):
                        cache[destination * size : (destination + 1) * size] = cache[
                            source * size : (source + 1) * size
                        ]
                case SwapOut(handle, blocks, length):
                    slots = torch.from_numpy(slots_of(blocks, length, size)).to(self.device)
                    self._host[handle] = [cache[slots].to("cpu") for cache in (*self.keys, *self.values)]
                case SwapIn(handle, blocks, length):
                    slots = torch.from_numpy(slots_of(blocks, length, size)).to(self.device)
                    for cache, saved in zip((*self.keys, *self.values), self._host[handle], strict=True):
                        cache.index_copy_(0, slots, saved.to(self.device))
                    del self._host[handle]
                case SwapDiscard(handle):
                    self._host.pop(handle, None)
            del transfers[0]

    @property
    def swapped_bytes(self) -> int:
        """Host memory that preempted requests occupy."""
        return sum(tensor.nbytes for saved in self._host.values() for tensor in saved)


@dataclass(slots=True)
class Segment:
    """One request's tokens in the packed row."""

    offset: int
    """Where they begin in the row."""
    count: int
    start: int
    """Position of the first of them in the request's text."""
    slots: Tensor | None
    """``[start + count]`` cache slots of the whole context; ``None`` without a KV cache."""


@dataclass(slots=True)
class StepContext:
    """What attention must know about the step being computed."""

    tensors: PagedKVTensors | None
    write_slots: Tensor | None
    """``[total_tokens]`` cache slots for the step's own keys and values."""
    segments: list[Segment]
    """Requests that compute several positions."""
    decode_rows: Tensor | None = None
    """``[D]`` places in the row of the requests that compute one position."""
    decode_slots: Tensor | None = None
    """``[D, longest context]`` their cache slots, padded with slot 0."""
    decode_lengths: Tensor | None = None
    """``[D]`` their context lengths."""
    calls: int = 0
    """Attention calls so far in this step; the load-time check compares it with the number of layers."""
    spent_ns: int = 0
    """Time spent in these calls."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)


class _PerThread(threading.local):
    context: StepContext | None = None


_per_thread = _PerThread()
"""transformers gives attention functions no other way to reach per-step state; a model may run in several threads."""


def set_context(context: StepContext | None) -> None:
    """Announce the step that the next forward pass computes."""
    _per_thread.context = context


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - part of the interface
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - part of the interface; zero when evaluating
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each request of the packed step.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer; ``layer_idx`` selects its part of the cache.
    query : Tensor
        ``[1, num_heads, total_tokens, head_dim]``
    key, value : Tensor
        ``[1, num_kv_heads, total_tokens, head_dim]``
    attention_mask : Tensor or None
        Ignored: causality comes from the positions.

    Returns
    -------
    tuple
        ``[1, total_tokens, num_heads, value_dim]`` and ``None``.
    """
    if _per_thread.context is None:
        raise RuntimeError("paged attention was called outside a step of the engine")
    context = _per_thread.context
    begin = time.monotonic_ns()
    context.calls += 1
    sinks: Tensor | None = kwargs.get("s_aux")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    q = query[0].transpose(0, 1)  # [T, H, D]
    k = key[0].transpose(0, 1)
    v = value[0].transpose(0, 1)
    keys: Tensor | None = None
    values: Tensor | None = None
    output = torch.empty(q.shape[0], q.shape[1], v.shape[2], device=q.device, dtype=q.dtype)
    if context.tensors is not None and context.write_slots is not None:
        layer = cast("int", module.layer_idx)
        keys, values = context.tensors.keys[layer], context.tensors.values[layer]
        keys.index_copy_(0, context.write_slots, k.to(keys.dtype))
        values.index_copy_(0, context.write_slots, v.to(values.dtype))
        if context.decode_rows is not None and context.decode_slots is not None:
            rows, slots = context.decode_rows, context.decode_slots
            mask = _decode_mask(context, sliding_window)
            output[rows] = _attend(
                q[rows].unsqueeze(2),
                keys[slots].transpose(1, 2).to(q.dtype),
                values[slots].transpose(1, 2).to(q.dtype),
                mask,
                scaling,
                softcap,
                sinks,
            ).squeeze(2)
    for segment in context.segments:
        rows_ = slice(segment.offset, segment.offset + segment.count)
        if segment.slots is None or keys is None or values is None:
            k_, v_ = k[rows_], v[rows_]
        else:
            k_, v_ = keys[segment.slots].to(q.dtype), values[segment.slots].to(q.dtype)
        mask = _causal_mask(context, segment.start, segment.count, sliding_window, q.device)
        attended = _attend(
            q[rows_].transpose(0, 1).unsqueeze(0),
            k_.transpose(0, 1).unsqueeze(0),
            v_.transpose(0, 1).unsqueeze(0),
            mask,
            scaling,
            softcap,
            sinks,
        )
        output[rows_] = attended[0].transpose(0, 1)
    context.spent_ns += time.monotonic_ns() - begin
    return output.unsqueeze(0), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of ``[B, H, Q, D]`` queries on ``[B, KH, K, D]`` keys; ``mask`` is true where attending is allowed.

    ``softcap`` bounds the scores (Gemma 2); ``sinks`` ``[H]`` are scores of a key that has no value (gpt-oss).
    """
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights[..., : k.shape[2]] @ v


def _decode_mask(context: StepContext, window: int | None) -> Tensor:
    assert context.decode_slots is not None
    assert context.decode_lengths is not None
    mask = context.masks.get((-1, window))
    if mask is None:
        positions = torch.arange(context.decode_slots.shape[1], device=context.decode_slots.device)
        lengths = context.decode_lengths[:, None]
        mask = positions < lengths
        if window is not None:
            mask &= positions >= lengths - window
        mask = mask[:, None, None, :]
        context.masks[(-1, window)] = mask
    return mask


def _causal_mask(context: StepContext, start: int, count: int, window: int | None, device: torch.device) -> Tensor:
    key = (start << 32 | count, window)
    mask = context.masks.get(key)
    if mask is None:
        query = torch.arange(start, start + count, device=device)[:, None]
        positions = torch.arange(start + count, device=device)[None, :]
        mask = positions <= query
        if window is not None:
            mask &= positions > query - window
        mask = mask[None, None]
        context.masks[key] = mask
    return mask


def slots_of(blocks: list[int], length: int, block_size: int) -> NDArray[np.int64]:
    """Cache slots of positions ``[0, length)`` for a block table, ``[length]``."""
    table = np.asarray(blocks[: -(-length // block_size)], dtype=np.int64)
    return (table[:, None] * block_size + np.arange(block_size)).reshape(-1)[:length]


AttentionInterface.register(NAME, paged_attention)


def keep_out_of_compilation() -> None:
    """Have ``torch.compile`` call attention instead of compiling it: what it does depends on the step's plan."""
    disabled: Any = torch.compiler.disable(paged_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(NAME, disabled)
