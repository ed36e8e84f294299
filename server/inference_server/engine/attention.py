"""Attention over a paged KV cache, as one function registered in transformers. Owns the cache's tensors.

A step is packed into one row of tokens, ``[1, total_tokens]``, the requests one after another; no mask is built. The
registered function writes the step's keys and values into the cache, then attends request by request. What it needs to
know about the step is in a :class:`StepContext`, set by the runner before the forward pass.

This is the reference backend: it gathers each request's blocks and calls scaled dot-product attention.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from inference_server.engine.kv_cache import Copy, SwapDiscard, SwapIn, SwapOut, Transfer

NAME = "inference_workbench_paged"


class In8Bits(NamedTuple):
    """What keys and values are stored as."""

    dtype: torch.dtype
    largest: float
    """What the largest of a head becomes."""


IN_8_BITS = {"int8": In8Bits(torch.int8, 127.0), "fp8": In8Bits(torch.float8_e4m3fn, 448.0)}
"""By value of the feature ``kv_cache_dtype``."""


class PagedKVTensors:
    """Keys and values of every layer, ``[slots, num_kv_heads, head_dim]`` each.

    Layers may differ in heads and head size; all are allocated by :meth:`reserve`. The same memory can hold them in 8
    bits (:meth:`store_as`), with a float32 scale for each position and head, and so more positions.
    """

    def __init__(self, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.precision = "master"
        """How they are stored: the feature ``kv_cache_dtype``."""
        self.key_scales: list[Tensor] = []
        """float32 ``[slots, num_kv_heads]`` of each layer; empty unless keys and values are stored in 8 bits."""
        self.value_scales: list[Tensor] = []
        self._master: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._host: dict[int, list[Tensor]] = {}

    def reserve(self, shapes: list[tuple[int, int, int]]) -> None:
        """Allocate all layers; ``shapes`` has (KV heads, key size, value size) for each."""
        slots = self.num_blocks * self.block_size
        self.keys = [torch.zeros(slots, heads, size, device=self.device, dtype=self.dtype) for heads, size, _ in shapes]
        self.values = [
            torch.zeros(slots, heads, size, device=self.device, dtype=self.dtype) for heads, _, size in shapes
        ]
        self._master = self.keys, self.values

    @property
    def in_8_bits(self) -> bool:
        """Whether keys and values are stored in 8 bits."""
        return self.precision != "master"

    @property
    def whole(self) -> list[Tensor]:
        """The memory of all keys and values, whatever it is used as."""
        return [*self._master[0], *self._master[1]]

    def store_as(self, precision: str) -> None:
        """Use the memory for keys and values in a precision of :data:`IN_8_BITS`, or in the model's own type again.

        What it held is lost.
        """
        self.precision = precision
        self.keys, self.values = self._master
        self.key_scales, self.value_scales = [], []
        if precision == "master":
            return
        slots = slots_in_8_bits(
            self.num_blocks * self.block_size, self.dtype, [(each.shape[1], each.shape[2]) for each in self.whole]
        )
        dtype = IN_8_BITS[precision].dtype
        keys, values = ([_in_8_bits(tensor, slots, dtype) for tensor in part] for part in self._master)
        self.keys, self.key_scales = [each for each, _ in keys], [scales for _, scales in keys]
        self.values, self.value_scales = [each for each, _ in values], [scales for _, scales in values]

    def viewed_as(self, precision: str) -> PagedKVTensors:
        """The same memory as it would be used in another precision; this one's use does not change."""
        other = copy.copy(self)
        other.store_as(precision)
        return other

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Scales of a layer's keys and values; ``None`` where there are none."""
        return (self.key_scales[layer], self.value_scales[layer]) if self.in_8_bits else None

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values, each ``[positions, num_kv_heads, head_dim]``, in ``slots`` of a layer."""
        if not self.in_8_bits:
            self.keys[layer].index_copy_(0, slots, keys.to(self.dtype))
            self.values[layer].index_copy_(0, slots, values.to(self.dtype))
            return
        dtype, largest = IN_8_BITS[self.precision]
        for cache, scales, new in (
            (self.keys[layer], self.key_scales[layer], keys),
            (self.values[layer], self.value_scales[layer], values),
        ):
            scale = new.float().abs().amax(-1) / largest
            inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
            scaled = new.float() * inverse[..., None]
            stored = scaled.to(dtype) if dtype.is_floating_point else scaled.round().to(dtype)
            _bytes_of(cache).index_copy_(0, slots, _bytes_of(stored))
            scales.index_copy_(0, slots, scale)

    def read(self, layer: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in ``slots`` of a layer, each ``[*slots, num_kv_heads, head_dim]``, as ``dtype``."""
        keys, values = (
            _bytes_of(cache)[slots].view(cache.dtype) if self.in_8_bits else cache[slots].to(dtype)
            for cache in (self.keys[layer], self.values[layer])
        )
        if not self.in_8_bits:
            return keys, values
        key_scales, value_scales = self.key_scales[layer][slots][..., None], self.value_scales[layer][slots][..., None]
        return (keys.float() * key_scales).to(dtype), (values.float() * value_scales).to(dtype)

    def transfer(self, transfers: list[Transfer]) -> None:
        """Carry out copies between blocks and to and from host memory, in the order given.

        Each leaves the list once it is done, so that what is left after an error is what is still to do.
        """
        size = self.block_size
        while transfers:
            match transfers[0]:
                case Copy(source, destination):
                    for cache in self._parts():
                        cache[destination * size : (destination + 1) * size] = cache[
                            source * size : (source + 1) * size
                        ]
                case SwapOut(handle, blocks, length):
                    slots = torch.from_numpy(slots_of(blocks, length, size)).to(self.device)
                    self._host[handle] = [cache[slots].to("cpu") for cache in self._parts()]
                case SwapIn(handle, blocks, length):
                    slots = torch.from_numpy(slots_of(blocks, length, size)).to(self.device)
                    for cache, saved in zip(self._parts(), self._host[handle], strict=True):
                        cache.index_copy_(0, slots, saved.to(self.device))
                    del self._host[handle]
                case SwapDiscard(handle):
                    self._host.pop(handle, None)
            del transfers[0]

    def _parts(self) -> tuple[Tensor, ...]:
        parts = (*self.keys, *self.values, *self.key_scales, *self.value_scales)
        return tuple(_bytes_of(each) if each.itemsize == 1 else each for each in parts)

    @property
    def swapped_bytes(self) -> int:
        """Host memory that preempted requests occupy."""
        return sum(tensor.nbytes for saved in self._host.values() for tensor in saved)


def slots_in_8_bits(slots: int, dtype: torch.dtype, shapes: Iterable[tuple[int, int]]) -> int:
    """How many positions the memory of ``slots`` positions holds in 8 bits with a float32 scale for each head.

    Parameters
    ----------
    slots : int
    dtype : torch.dtype
        What the memory was allocated for.
    shapes : iterable of tuple
        (KV heads, head size) of every key and value.
    """
    return min(slots * size * dtype.itemsize // (_aligned(size) + 4) for _, size in shapes)


def _aligned(length: int) -> int:
    return -(-length // 4) * 4


def _in_8_bits(tensor: Tensor, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The memory of a tensor as numbers of 8 bits and, behind them, their scales.

    In this order the numbers begin where the memory does, at an address that suits a GPU's widest loads.
    """
    _, heads, size = tensor.shape
    memory, count = tensor.view(-1).view(torch.uint8), slots * heads
    numbers, scales = memory[: count * size], memory[_aligned(count * size) :][: 4 * count]
    return numbers.view(dtype).view(slots, heads, size), scales.view(torch.float32).view(slots, heads)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Numbers of 8 bits as bytes: torch cannot move all types of them about."""
    return tensor.view(torch.uint8)


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
    layer = cast("int", module.layer_idx)
    output = torch.empty(q.shape[0], q.shape[1], v.shape[2], device=q.device, dtype=q.dtype)
    if context.tensors is not None and context.write_slots is not None:
        context.tensors.write(layer, context.write_slots, k, v)
        if context.decode_rows is not None and context.decode_slots is not None:
            rows, slots = context.decode_rows, context.decode_slots
            mask = _decode_mask(context, sliding_window)
            keys, values = context.tensors.read(layer, slots, q.dtype)
            output[rows] = _attend(
                q[rows].unsqueeze(2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                mask,
                scaling,
                softcap,
                sinks,
            ).squeeze(2)
    for segment in context.segments:
        rows_ = slice(segment.offset, segment.offset + segment.count)
        if segment.slots is None or context.tensors is None:
            k_, v_ = k[rows_], v[rows_]
        else:
            k_, v_ = context.tensors.read(layer, segment.slots, q.dtype)
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


def no_fp8(device: torch.device) -> str | None:
    """Why keys and values cannot be stored in 8-bit floating point on a device; ``None`` where they can."""
    needs = "8-bit floating point needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper or newer)"
    instead = "int8 takes the same memory and runs here."
    if device.type != "cuda":
        return f"{needs}, and this model is on the {device.type.upper()}. {instead}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"{needs}, and this one has {major}.{minor}. {instead}"
    return None


AttentionInterface.register(NAME, paged_attention)


def keep_out_of_compilation() -> None:
    """Have ``torch.compile`` call attention instead of compiling it: what it does depends on the step's plan."""
    disabled: Any = torch.compiler.disable(paged_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(NAME, disabled)
