"""Runs step plans through the fast path. Owns its buffers and the program of operations; the cache is the plain path's.

The same :class:`PagedKVTensors` serve both paths, so that the engine can change path between two steps.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from inference_server.engine.attention import PagedKVTensors, slots_of
from inference_server.engine.cpu import choices, kernels
from inference_server.engine.cpu.choices import OWN, TORCH, Choices, Shape
from inference_server.engine.cpu.machine import INT, Machine, float_bits
from inference_server.engine.cpu.team import Team
from inference_server.engine.llama import Architecture
from inference_server.engine.quantization.packing import GRIDS
from inference_server.engine.quantization.variants import Variant
from inference_server.engine.runner import Capturing
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.features import MAX_DRAFTS

LONG_SEGMENT = MAX_DRAFTS + 1
"""A request that computes more positions than this in one step attends through torch, fewer through own kernel."""
PASS_BYTES = 1 << 24
"""Weights that one pass of a measurement reads, about."""


@dataclass(slots=True)
class _Table:
    """A request's block table as the kernels read it."""

    blocks: list[int]
    """The very list that the request holds; another one means that it was preempted meanwhile."""
    array: NDArray[np.int32]
    address: int
    filled: int = 0


@dataclass(slots=True)
class _Segment:
    """A request that computes many positions."""

    offset: int
    count: int
    start: int
    slots: Tensor | None
    """``[start + count]`` slots of the whole context; ``None`` if all of it is in this step."""


@dataclass(slots=True)
class PackedStep:
    """A plan in the form that the kernels take."""

    rows: int
    num_kept: int
    arrays: list[NDArray[np.int64]]
    """Keeps the memory alive that the kernels read."""
    parameters: dict[int, int]
    segments: list[_Segment]
    num_attend: int
    max_splits: int
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class _Linear:
    """A linear layer in the program."""

    index: int
    """Its row in the program."""
    weight_t: Tensor
    source: Tensor
    target: Tensor
    shape: Shape
    kept: bool
    packed: bool
    """Its weights are a packed copy, which own kernels alone read."""


Part = tuple[str, int, int] | tuple[str, Tensor, Tensor, Tensor]


class FastRunner(Capturing):
    """The fast path of one model.

    Parameters
    ----------
    architecture : Architecture
    tensors : PagedKVTensors
        Shared with the plain path.
    threads : int
        Threads of the compiled regions.
    """

    def __init__(self, architecture: Architecture, tensors: PagedKVTensors, threads: int) -> None:
        self.architecture = architecture
        self.tensors = tensors
        self.team = Team(threads)
        self.label = "fast-cpu fp32" if architecture.dtype == torch.float32 else "fast-cpu bf16"
        self.greedy: NDArray[np.int64] | None = None
        """Most likely token of each row of the last logits, computed beside them."""
        self.kernel_ns = 0
        """Time that the last step spent in kernels and in calling them; the rest of the step is the host's."""
        self._bf16 = int(architecture.dtype == torch.bfloat16)
        self._machine = Machine(self.team)
        self._parameters = self._machine.parameters
        self._rows = self._kept = 0
        self._partials = torch.zeros(0)
        self._captured = torch.zeros(0)
        self._tables: dict[int, _Table] = {}
        self._last_step = -1
        self._greedy_buffer: NDArray[np.int64] = np.zeros(0, dtype=INT)
        self._bound: dict[tuple[int, int, bool], tuple[list[Part], Tensor]] = {}
        self._choices: Choices | None = None
        self._forced: str | None = None
        self._variant: Variant | None = None
        self._turn = 0
        p = self._parameters
        p[kernels.P_COS] = architecture.cos.data_ptr()
        p[kernels.P_SIN] = architecture.sin.data_ptr()
        self._reserve(32, 32)

    def capture_at(self, layers: tuple[int, ...]) -> None:
        """Be able to keep the hidden states that enter some layers."""
        self.capture_layers = layers
        self._captured = torch.zeros(0)
        self._rebuild()

    # -- kernels by measurement ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def measure(self) -> Choices:
        """Choose the kernels of the linear layers, from the remembered table or by measuring now."""
        shapes = sorted({linear.shape for linear in self._linears})
        code = hashlib.sha256(Path(kernels.__file__).read_bytes()).hexdigest()[:16]
        key = choices.machine_key(self.architecture.dtype, self.team.threads, code, shapes)
        rows, kept = self._rows, self._kept
        self._reserve(max(choices.BATCHES), max(choices.BATCHES))
        self._choices = choices.load_or_measure(key, shapes, self._time)
        self._reserve(rows, kept, shrink=True)
        return self._choices

    def sibling(self, tensors: PagedKVTensors | None = None, architecture: Architecture | None = None) -> FastRunner:
        """Another runner that reads the weights that are in use, with the same choice of kernels.

        Parameters
        ----------
        tensors : PagedKVTensors, optional
            Its cache, where it is not this one's.
        architecture : Architecture, optional
            What it computes, where that is not all of the model. Its linear layers must have shapes that this one's
            have, such as those of some of its layers.
        """
        other = FastRunner(architecture or self.architecture, tensors or self.tensors, self.team.threads)
        other._choices = self._choices
        if self._variant is not None:
            other.use(self._variant)
        return other

    @property
    def buffer_bytes(self) -> int:
        """Memory of activations and logits."""
        buffers = {
            id(each): each.nbytes
            for each in (
                self._residual,
                self._normed,
                self._qkv,
                self._attended,
                self._delta,
                self._both,
                self._active,
                self._logits,
                self._logits_torch,
                self._partials,
            )
        }
        return sum(buffers.values())

    def force(self, kernel: str | None) -> None:
        """Use one kernel (``"own"`` or ``"torch"``) for all linear layers, or with ``None`` the measured choice."""
        self._forced = kernel
        self._bound.clear()

    def use(self, variant: Variant | None) -> None:
        """Read a packed copy of the weights from the next step on, or with ``None`` the master."""
        self._variant = variant
        self._rebuild()

    def _rebuild(self) -> None:
        """Take up that keys and values are stored otherwise, or that other weights are read."""
        self._bound.clear()
        self._build()

    def _time(self, kernel: str, shape: Shape, rows: int) -> float:
        layers = [linear for linear in self._linears if linear.shape == shape]
        # A pass is short, so that some passes are undisturbed on a busy machine. Each takes the next layers in turn,
        # so that their weights come from memory as in a real step.
        count = max(1, PASS_BYTES // (layers[0].weight_t.nbytes * -(-rows // 16)))
        linears = [layers[(self._turn + index) % len(layers)] for index in range(min(count, len(layers)))]
        self._turn += len(linears)
        self._parameters[kernels.P_ROWS] = self._parameters[kernels.P_NUM_KEPT] = rows
        if kernel == OWN:
            whole = self._machine.program
            self._machine.use(np.ascontiguousarray(whole[[linear.index for linear in linears]]))
            begin = time.perf_counter()
            self._machine.run(0, len(linears))
            elapsed = time.perf_counter() - begin
            self._machine.use(whole)
            return elapsed / len(linears)
        calls = [(linear.source[:rows], linear.weight_t, self._target(linear, TORCH)[:rows]) for linear in linears]
        begin = time.perf_counter()
        for source, weight, target in calls:
            torch.mm(source, weight, out=target)
        return (time.perf_counter() - begin) / len(linears)

    # -- a step --------------------------------------------------------------------------------------------------------

    def prepare(self, plan: StepPlan) -> PackedStep:
        """Pack a plan. Work per request and step does not grow with the length of its context."""
        size = self.tensors.block_size
        if self.tensors.precision != self._precision:
            self._rebuild()
        if plan.moves_blocks or plan.step != self._last_step + 1:
            # A copy on write replaced a block in the middle of a table, or may have while the other path ran.
            self._tables.clear()
        self._last_step = plan.step
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        kept: list[int] = []
        attend: list[int] = []
        tables: list[int] = []
        segments: list[_Segment] = []
        longest = 0
        for item in plan.items:
            offset, start, request = len(ids), item.start, item.request
            end = start + item.count
            kept += range(offset + item.count - item.num_sampled, offset + item.count)
            if not plan.use_cache:
                ids += request.tokens[start:end]
                positions += range(start, end)
                segments.append(_Segment(offset, item.count, start, None))
                continue
            if item.count == 1:
                ids.append(request.tokens[start])
                positions.append(start)
                slots.append(request.blocks[start // size] * size + start % size)
            else:
                ids += item.tokens()
                positions += range(start, end)
                blocks = request.blocks
                slots += [blocks[position // size] * size + position % size for position in range(start, end)]
            if item.count > LONG_SEGMENT:
                # In 8 bits what is attended to is what was stored, however the prompt is cut into steps.
                alone = start == 0 and not self.tensors.in_8_bits
                context = None if alone else torch.from_numpy(slots_of(request.blocks, end, size))
                segments.append(_Segment(offset, item.count, start, context))
                continue
            address = self._table(item)
            for row in range(offset, offset + item.count):
                attend.append(row)
                tables.append(address)
            longest = max(longest, end)
        if len(self._tables) > 2 * len(plan.items) + 64:
            alive = {item.request.handle for item in plan.items}
            self._tables = {handle: table for handle, table in self._tables.items() if handle in alive}
        columns = {
            kernels.P_IDS: ids,
            kernels.P_POSITIONS: positions,
            kernels.P_SLOTS: slots,
            kernels.P_KEPT: kept,
            kernels.P_ATTEND_ROWS: attend,
            kernels.P_TABLES: tables,
        }
        packed = np.array([number for column in columns.values() for number in column], dtype=INT)
        base, parameters = packed.ctypes.data, {}
        for name, column in columns.items():
            parameters[name] = base if column else 0
            base += 8 * len(column)
        return PackedStep(
            rows=len(ids),
            num_kept=len(kept),
            arrays=[packed],
            parameters=parameters,
            segments=segments,
            num_attend=len(attend),
            max_splits=-(-longest // kernels.SPLIT),
        )

    @torch.inference_mode()
    def forward(self, plan: StepPlan, packed: PackedStep) -> Tensor:
        """Compute the step; return the logits of its sampled positions, ``[S, vocab]``, valid until the next step."""
        if plan.transfers:
            self.tensors.transfer(plan.transfers)
        self._reserve(packed.rows, packed.num_kept)
        p = self._parameters
        for name, address in packed.parameters.items():
            p[name] = address
        p[kernels.P_BLOCK_SIZE] = self.tensors.block_size
        p[kernels.P_ROWS] = packed.rows
        p[kernels.P_NUM_KEPT] = packed.num_kept
        p[kernels.P_NUM_ATTEND] = packed.num_attend
        p[kernels.P_MAX_SPLITS] = packed.max_splits
        if packed.max_splits > 1:
            self._reserve_partials(packed)
        self.features = None
        if self.capture and self.capture_layers:
            width = len(self.capture_layers) * self.architecture.hidden
            if len(self._captured) < packed.rows:
                self._captured = torch.empty(2 * packed.rows, width)
            self.features = self._captured[: packed.rows]
        p[kernels.P_CAPTURED] = 0 if self.features is None else self._captured.data_ptr()
        parts, logits = self._bind(packed.rows, packed.num_kept, bool(packed.segments))
        begin = time.perf_counter_ns()
        for part in parts:
            if part[0] == "region":
                self._machine.run(part[1], part[2])  # type: ignore[arg-type]
            elif part[0] == "linear":
                torch.mm(part[1], part[2], out=part[3])  # type: ignore[misc, arg-type]
            else:
                self._attend_segments(part[1], packed)  # type: ignore[arg-type]
        self.kernel_ns = time.perf_counter_ns() - begin
        self.greedy = self._greedy_buffer[: packed.num_kept]
        return logits

    # -- private: preparing --------------------------------------------------------------------------------------------

    def _table(self, item: Scheduled) -> int:
        request = item.request
        blocks = request.blocks
        table = self._tables.get(request.handle)
        if table is None or table.blocks is not blocks or len(blocks) > len(table.array):
            array = np.empty(2 * len(blocks) + 8, dtype=np.int32)
            table = self._tables[request.handle] = _Table(blocks, array, array.ctypes.data)
        filled = table.filled
        if filled < len(blocks):
            table.array[filled : len(blocks)] = blocks[filled:]
            table.filled = len(blocks)
        return table.address

    # -- private: the program ------------------------------------------------------------------------------------------

    def _reserve(self, rows: int, kept: int, *, shrink: bool = False) -> None:
        """Provide buffers for ``rows`` tokens and ``kept`` logits rows, and build the program over them."""
        if not shrink:
            if rows <= self._rows and kept <= self._kept:
                return
            rows = self._rows if rows <= self._rows else max(rows, 2 * self._rows)
            kept = self._kept if kept <= self._kept else max(kept, 2 * self._kept)
        a, dtype = self.architecture, self.architecture.dtype
        self._rows, self._kept = rows, kept
        width = (a.heads + 2 * a.kv_heads) * a.head_dim
        self._residual = torch.empty(rows, a.hidden)
        self._normed = torch.empty(max(rows, kept), a.hidden, dtype=dtype)
        self._qkv = torch.empty(rows, width, dtype=dtype)
        self._attended = torch.empty(rows, a.heads * a.head_dim, dtype=dtype)
        self._delta = torch.empty(rows, a.hidden, dtype=dtype)
        self._both = torch.empty(rows, 2 * a.intermediate, dtype=dtype)
        self._active = torch.empty(rows, a.intermediate, dtype=dtype)
        self._logits = torch.empty(kept, a.vocab)
        self._logits_torch = self._logits if dtype == torch.float32 else torch.empty(kept, a.vocab, dtype=dtype)
        self._greedy_buffer = np.zeros(kept, dtype=INT)
        self._parameters[kernels.P_GREEDY] = self._greedy_buffer.ctypes.data
        self._bound.clear()
        self._build()

    def _reserve_partials(self, packed: PackedStep) -> None:
        a = self.architecture
        needed = packed.num_attend * a.heads * packed.max_splits * (a.head_dim + 2)
        if self._partials.numel() < needed:
            self._partials = torch.empty(2 * needed)
            self._parameters[kernels.P_PARTIALS] = self._partials.data_ptr()

    def _build(self) -> None:
        self._precision = self.tensors.precision
        a, bf16 = self.architecture, self._bf16
        eps = float_bits(a.eps)
        program: list[list[int]] = []
        self._linears: list[_Linear] = []
        self._attention_index: list[int] = []

        def linear(source: Tensor, weight: Tensor, target: Tensor, *, kept: bool = False) -> None:
            n, k = weight.shape
            narrow = int(target.dtype == torch.bfloat16)
            packed = None if self._variant is None else self._variant.of(weight)
            index = len(program)
            self._linears.append(_Linear(index, weight.t(), source, target, (n, k), kept, packed is not None))
            data = weight if packed is None else packed.data
            code = kernels.OP_LINEAR if packed is None else kernels.OP_PACKED
            op = [code, source.data_ptr(), data.data_ptr(), target.data_ptr(), k, n, bf16, narrow, int(kept)]
            if packed is not None:
                op += [packed.scheme.stored_bits, packed.group, GRIDS.index(packed.scheme.grid)]
            program.append(op)

        def norm(delta: Tensor | None, weight: Tensor, *, kept: bool = False) -> None:
            residual, change = self._residual.data_ptr(), 0 if delta is None else delta.data_ptr()
            out = self._normed.data_ptr()
            op = [kernels.OP_NORM, residual, change, weight.data_ptr(), out, a.hidden, eps, bf16]
            program.append([*op, int(kept)])

        program.append([kernels.OP_EMBED, a.embedding.data_ptr(), self._residual.data_ptr(), a.hidden, bf16])
        for index, layer in enumerate(a.layers):
            keys, values = self.tensors.keys[index].data_ptr(), self.tensors.values[index].data_ptr()
            heads = [a.heads, a.kv_heads, a.head_dim]
            norm(self._delta if index else None, layer.input_norm)
            if index in self.capture_layers:
                place, total = self.capture_layers.index(index) * a.hidden, len(self.capture_layers) * a.hidden
                program.append([kernels.OP_CAPTURE, self._residual.data_ptr(), a.hidden, place, total])
            linear(self._normed, layer.qkv, self._qkv)
            scales = [0, 0]
            if self.tensors.in_8_bits:
                scales = [self.tensors.key_scales[index].data_ptr(), self.tensors.value_scales[index].data_ptr()]
            extras = [_pointer(layer.qkv_bias), _pointer(layer.q_norm), _pointer(layer.k_norm), eps]
            qkv, attended = self._qkv.data_ptr(), self._attended.data_ptr()
            program.append([kernels.OP_ROTARY, qkv, *extras, keys, values, *heads, int(layer.rotate), bf16, *scales])
            scaling = float_bits(a.scaling)
            self._attention_index.append(len(program))
            attend = [kernels.OP_ATTEND, qkv, attended, keys, values, *heads, layer.window, scaling, bf16]
            program.append([*attend, *scales])
            program.append([kernels.OP_COMBINE, attended, *heads, layer.window, bf16])
            linear(self._attended, layer.output, self._delta)
            norm(self._delta, layer.post_norm)
            linear(self._normed, layer.gate_up, self._both)
            program.append([kernels.OP_SILU, self._both.data_ptr(), self._active.data_ptr(), a.intermediate, bf16])
            linear(self._active, layer.down, self._delta)
        norm(self._delta, a.final_norm, kept=True)
        linear(self._normed, a.head, self._logits, kept=True)
        program.append([kernels.OP_ARGMAX, self._logits.data_ptr(), a.vocab, 0])
        program.append([kernels.OP_ARGMAX, self._logits_torch.data_ptr(), a.vocab, bf16])
        self._machine.load(program)

    def _kernel(self, linear: _Linear, rows: int) -> str:
        if linear.packed:
            return OWN
        if self._forced is not None:
            return self._forced
        return OWN if self._choices is None else self._choices.kernel(linear.shape, rows)

    def _target(self, linear: _Linear, kernel: str) -> Tensor:
        return self._logits_torch if linear.kept and kernel == TORCH else linear.target

    def _bind(self, rows: int, kept: int, segmented: bool) -> tuple[list[Part], Tensor]:
        """The parts of a step of this size: ranges of the program, and torch calls between them."""
        bound = self._bound.get((rows, kept, segmented))
        if bound is not None:
            return bound
        if len(self._bound) > 64:
            self._bound.clear()
        breaks: dict[int, Part] = {}
        end, head = len(self._machine.program) - 2, self._linears[-1]
        logits = self._logits
        for linear in self._linears:
            count = kept if linear.kept else rows
            if count and self._kernel(linear, count) == TORCH:
                target = self._target(linear, TORCH)
                breaks[linear.index] = ("linear", linear.source[:count], linear.weight_t, target[:count])
                if linear is head:
                    logits = target
        parts: list[Part] = []
        first = 0
        for index in range(end):
            if index in breaks:
                if first < index:
                    parts.append(("region", first, index))
                parts.append(breaks[index])
                first = index + 1
        if segmented:
            parts = self._with_segments(parts, first, end)
            first = end
        if kept:
            own_logits = head.index not in breaks
            if first < end or own_logits:
                parts.append(("region", first, end + 1)) if own_logits else parts.append(("region", first, end))
            if not own_logits:
                parts.append(("region", end + 1, end + 2))
        else:
            parts.append(("region", first, end))
        parts = [part for part in parts if part[0] != "region" or part[1] < part[2]]
        bound = self._bound[rows, kept, segmented] = (parts, logits[:kept])
        return bound

    def _with_segments(self, parts: list[Part], first: int, end: int) -> list[Part]:
        """Split the ranges after each layer's attention, where torch attends for the long segments."""
        layer_at = {index: layer for layer, index in enumerate(self._attention_index)}
        split: list[Part] = []
        for part in [*parts, ("region", first, end)]:
            if part[0] != "region":
                split.append(part)
                continue
            begin: int = part[1]  # type: ignore[assignment]
            for index in range(begin, part[2]):
                layer = layer_at.get(index)
                if layer is not None:
                    split += [("region", begin, index + 2), ("attend", layer, 0)]
                    begin = index + 2
            split.append(("region", begin, part[2]))  # type: ignore[arg-type]
        return split

    def _attend_segments(self, layer: int, packed: PackedStep) -> None:
        a = self.architecture
        window = a.layers[layer].window
        heads, kv, dim = a.heads, a.kv_heads, a.head_dim
        for segment in packed.segments:
            rows = slice(segment.offset, segment.offset + segment.count)
            qkv = self._qkv[rows].view(segment.count, heads + 2 * kv, dim).transpose(0, 1)
            query, key, value = qkv[:heads], qkv[heads : heads + kv], qkv[heads + kv :]
            if segment.slots is not None:
                keys, values = self.tensors.read(layer, segment.slots, qkv.dtype)
                key, value = keys.transpose(0, 1), values.transpose(0, 1)
            plain = segment.start == 0 and (not window or segment.count <= window)
            if heads != kv:
                key, value = key.repeat_interleave(heads // kv, 0), value.repeat_interleave(heads // kv, 0)
            out = scaled_dot_product_attention(
                query[None],
                key[None],
                value[None],
                attn_mask=None if plain else _mask(packed, segment, window),
                is_causal=plain,
                scale=a.scaling,
            )
            self._attended[rows].view(segment.count, heads, dim).copy_(out[0].transpose(0, 1))


def _mask(packed: PackedStep, segment: _Segment, window: int) -> Tensor:
    key = (segment.start, segment.count, window)
    mask = packed.masks.get(key)
    if mask is None:
        query = torch.arange(segment.start, segment.start + segment.count)[:, None]
        position = torch.arange(segment.start + segment.count)[None]
        mask = position <= query
        if window:
            mask &= position > query - window
        packed.masks[key] = mask
    return mask


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
