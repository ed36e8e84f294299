"""Runs step plans on a GPU through own kernels and cuBLAS. Owns the device's block table, buffers and CUDA graphs.

A step of single positions (decode), and one that verifies a few proposed tokens of each request, go through buffers
that never move, padded to one of few sizes (:class:`Shape`), so that each can be captured once and replayed. Any other
step is launched kernel by kernel. All leave the chosen tokens on the device, from where the next step reads them: the
host may plan and launch a step before it knows the tokens of the last.

Per step one small copy goes to the device (ids, positions, seats, changes of the block table) and one comes back (the
chosen tokens); the only wait is for the latter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference_server.engine import sampler
from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.gpu import choosing, kernels, products
from inference_server.engine.gpu.buffers import Buffers, Scratch
from inference_server.engine.gpu.choosing import Alternatives, DeviceSampler
from inference_server.engine.gpu.packed_tiles import MOST_ROWS
from inference_server.engine.gpu.products import Weights, weights_of
from inference_server.engine.llama import Architecture, Layer
from inference_server.engine.quantization.variants import Variant
from inference_server.engine.request import Request
from inference_server.engine.runner import ModelRunner
from inference_server.engine.sampler import DeviceTokens, Sampled
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.protocol import Kind

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, *range(80, 257, 16))
"""Batch sizes that have a CUDA graph; a batch in between is padded to the next."""
VERIFY_ROWS = (*BUCKETS[1:], *range(288, 513, 32))
"""Numbers of positions, of all requests together, that a captured step verifies."""
VERIFY_DEPTHS = (8, 32)
"""Up to how many positions of a request such a step has: one more than there are proposals for it."""
VERIFY_TILE = 128
"""The most rows of a matrix product that these positions, times the query heads that share a KV head, may make up."""
VERIFY_GRAPHS = 64
"""Captured steps that are kept; beyond, those go that were not met for longest."""
SORTED_ROWS = 32
"""From this many rows on, attention starts with the longest contexts."""
MIXED_DECODE_ROWS = 32
"""From this many rows of single positions on, a step with others gives them to the kernel of decoding."""
SLOTS = 4
"""Host buffers in turn; at most two steps are under way at a time."""
SPARE_UPDATES = 1 << 16
"""Block-table changes that fit into the fixed input buffer of a decode step."""


@dataclass(slots=True)
class _Seat:
    """A request's row of the device's block table."""

    index: int
    blocks: list[int]
    """The very list that the request holds; another one means that it was preempted meanwhile."""
    filled: int = 0


class Shape(NamedTuple):
    """Everything that is fixed when a step is captured: steps of the same shape can replay it."""

    rows: int
    segments: int = 0
    """Requests, where some have more than a position; 0 where every row is another request."""
    depth: int = 1
    """The most positions of one request."""
    kv: str = "master"
    """How keys and values are stored, and so where they lie."""


@dataclass(slots=True)
class PackedStep:
    """A plan as numbers, in host memory that the device can read."""

    slot: int
    length: int
    """Numbers in use."""
    rows: int
    shape: Shape | None
    """``None`` where the step cannot be captured."""
    kept: list[int]
    """Rows whose token is chosen."""
    singles: int
    """Rows of single positions that come first, where a step has others too."""
    tiles: int
    updates: int


def _aligned(length: int) -> int:
    """Numbers that a column takes up: each begins at 16 bytes, since kernels are compiled anew for other alignments."""
    return -(-length // 4) * 4


class Selection(DeviceTokens):
    """The tokens chosen for the sampled rows, on their way from the device.

    Parameters
    ----------
    host : Tensor
        Where they arrive.
    events : tuple of torch.cuda.Event or None
        Before and after the step's device work, and after the copy. ``None`` without a GPU.
    final : bool
        They are what the requests asked for, not just the most likely ones.
    alternatives : Alternatives or None
        Log-probabilities that were asked for.
    """

    def __init__(
        self,
        host: Tensor,
        events: tuple[Any, Any, Any],
        *,
        final: bool,
        alternatives: Alternatives | None,
    ) -> None:
        self._host = host
        self._begin, self._end, self._arrived = events
        self.final = final
        self._alternatives = alternatives

    def wait(self) -> None:
        """Wait until the step is done on the device."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def tolist(self) -> list[int]:
        """Wait for the tokens and return them."""
        self.wait()
        tokens: list[int] = self._host.tolist()
        return tokens

    def sampled(self) -> Sampled:
        """Wait for the tokens and return them with the log-probabilities that were asked for."""
        return choosing.read(self.tolist(), self._alternatives)

    @property
    def device_ns(self) -> int | None:
        """How long the device worked on the step; call :meth:`wait` before."""
        if self._begin is None:
            return None
        return int(self._begin.elapsed_time(self._end) * 1e6)


class GpuRunner:
    """The fast path of one model.

    Parameters
    ----------
    architecture : Architecture
    plain : ModelRunner
        Shares its cache tensors, and computes steps without a KV cache.
    positions : int
        The longest text.
    rows : int
        The most requests in one step.
    pdl : bool
        Let kernels of a decode step overlap at their edges.
    """

    def __init__(
        self, architecture: Architecture, plain: ModelRunner, positions: int, rows: int, *, pdl: bool = True
    ) -> None:
        self.architecture = architecture
        self.plain = plain
        self.tensors: PagedKVTensors = plain.tensors
        self.device = self.tensors.device
        self._sampler = DeviceSampler(self.device)
        self.use_graphs = True
        """Replay captured graphs (the feature ``cuda_graphs``)."""
        self.greedy: Selection | None = None
        self._cuda = self.device.type == "cuda"
        self._pdl = pdl and self._cuda and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self._name = "fast-gpu fp32" if architecture.dtype == torch.float32 else "fast-gpu bf16"
        self.label = self._name
        self._positions = positions
        self._most = rows
        self._num_seats = rows + 8
        self._rows = next((bucket for bucket in BUCKETS if bucket >= rows), BUCKETS[-1])
        self._seats: dict[int, _Seat] = {}
        self._free: list[int] = []
        self._last_step = -1
        self._block_size = 0
        self._turn = 0
        self._variant: Variant | None = None
        self._weights = weights_of(architecture, None)
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        """With the weights in use."""
        self._master_graphs = self._graphs
        self._packed_graphs: WeakKeyDictionary[Variant, dict[Shape, torch.cuda.CUDAGraph]] = WeakKeyDictionary()
        """They end with their variant, whose addresses they hold."""
        self._verify_rows = next(each for each in VERIFY_ROWS if each >= min(max(32, 8 * rows), VERIFY_ROWS[-1]))
        self._ahead = False
        """Kernels are compiled before they are needed."""
        self._compiled_with = {self.tensors.precision}
        """Precisions of keys and values whose kernels were compiled before they were needed."""
        self._compiler: threading.Thread | None = None
        self._compile_errors: dict[str, str] = {}
        self._verifying: Buffers | None = None
        """Of verifying steps; there once the first was met."""
        self.novel = False
        """The last step compiled or captured something: how long it took says nothing about the next one like it."""
        self._pool: Any = None
        self._host = [self._pinned(4 * self._rows + 2 * SPARE_UPDATES) for _ in range(SLOTS)]
        self._host_np: list[NDArray[np.int32]] = [buffer.numpy() for buffer in self._host]
        self._tokens_host = [self._pinned(max(self._rows, rows)) for _ in range(SLOTS)]
        event: Any = torch.cuda.Event
        self._events: list[tuple[Any, Any, Any]] = [
            (event(enable_timing=True), event(enable_timing=True), event()) if self._cuda else (None, None, None)
            for _ in range(SLOTS)
        ]
        self._last = torch.zeros(self._num_seats, dtype=torch.int32, device=self.device)
        self._buffers = self._reserve()
        self._reset_tables()

    def sibling(self, tensors: PagedKVTensors | None = None, architecture: Architecture | None = None) -> GpuRunner:
        """Another runner that reads the weights that are in use.

        Parameters
        ----------
        tensors : PagedKVTensors, optional
            Its cache, where it is not this one's.
        architecture : Architecture, optional
            Where it computes only a part of the model.
        """
        plain = self.plain if tensors is None else ModelRunner(self.plain.model, tensors)
        other = GpuRunner(architecture or self.architecture, plain, self._positions, self._most, pdl=self._pdl)
        other.use(self._variant)
        return other

    def use(self, variant: Variant | None) -> None:
        """Read a packed copy of the weights from the next step on, or with ``None`` the master."""
        self._variant = variant
        self._weights = weights_of(self.architecture, variant)
        self._graphs = self._master_graphs if variant is None else self._packed_graphs.setdefault(variant, {})

    @property
    def buffer_bytes(self) -> int:
        """Memory of activations and logits."""
        return self._buffers.nbytes + (0 if self._verifying is None else self._verifying.nbytes)

    @torch.inference_mode()
    def compile_for(self, variant: Variant) -> None:
        """Compile what steps with a variant need; from any thread, while others are served."""
        if not self._cuda:
            return
        torch.cuda.set_device(self._tables.device)
        weights = weights_of(self.architecture, variant)
        with kernels.compiling():
            for bucket in [bucket for bucket in BUCKETS if bucket <= self._rows]:
                self._decode(self._buffers, bucket, self.tensors, weights)
            self._compile_many(weights)

    @torch.inference_mode()
    def compile(self, most: int) -> None:
        """Compile what the first requests need, many kernels at once: one after another takes ten seconds.

        Parameters
        ----------
        most : int
            Requests in a step, of whatever runner of the same model.
        """
        with kernels.compiling():
            for bucket in {BUCKETS[0], self._rows}:
                self._decode(self._buffers, bucket, self.tensors)
            self._compile_mixed(most, self.tensors)
            number = torch.zeros(1, dtype=torch.int32, device=self.device)
            kernels.scatter(self._tables, number, number)
            if self._fits(VERIFY_DEPTHS[0]):
                self._verifying = self._reserve_verifying()
                self._verify(self._verifying, Shape(VERIFY_ROWS[1], 2, VERIFY_DEPTHS[0]), self.tensors)

    def compile_ahead(self) -> None:
        """Compile the kernels of every other batch size in a thread of its own, while steps are served."""
        if self._cuda:
            self._ahead = True
            cache = self.tensors.viewed_as(self.tensors.precision)
            threading.Thread(target=self._compile_rest, args=(cache,), name="kernels", daemon=True).start()

    @torch.inference_mode()
    def _compile_rest(self, cache: PagedKVTensors) -> None:
        torch.cuda.set_device(self.device)
        # Sizes that are met first come first: the largest, as requests arrive, then down as they end.
        for bucket in reversed([bucket for bucket in BUCKETS if bucket <= self._rows]):
            with kernels.compiling():
                self._decode(self._buffers, bucket, cache)

    @property
    def compiling(self) -> bool:
        """Whether kernels for another precision of keys and values are being compiled."""
        return self._compiler is not None and self._compiler.is_alive()

    def take_error(self, precision: str) -> str | None:
        """Why such a compilation failed, once."""
        return self._compile_errors.pop(precision, None)

    def ready_for(self, precision: str) -> bool:
        """Whether kernels for a precision of keys and values are compiled; if not, begin to, while steps are served."""
        if not self._cuda or precision in self._compiled_with:
            return True
        if not self.compiling:
            self._compiler = threading.Thread(
                target=self._compile_beside, args=(precision,), name="kernels", daemon=True
            )
            self._compiler.start()
        return False

    def _compile_beside(self, precision: str) -> None:
        try:
            self.compile_with(precision)
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever asked is told
            self._compile_errors[precision] = f"Kernels for keys and values in {precision} do not compile: {error}"

    @torch.inference_mode()
    def compile_with(self, precision: str) -> None:
        """Compile what steps need whose keys and values are stored in a precision; from any thread.

        Kernels that read packed weights in other tiles are compiled when they are first launched.
        """
        if not self._cuda or precision in self._compiled_with:
            return
        torch.cuda.set_device(self.device)
        cache = self.tensors.viewed_as(precision)
        with kernels.compiling():
            for bucket in [bucket for bucket in BUCKETS if bucket <= self._rows]:
                self._decode(self._buffers, bucket, cache)
            self._compile_mixed(self._most, cache)
        if self._verifying is not None:
            self._compile_verifying(cache)
        self._compiled_with.add(precision)

    def _compile_mixed(self, most: int, cache: PagedKVTensors) -> None:
        """Compile steps of prompts alone, and beside as many single positions as take other tiles each."""
        for singles in [singles for singles in (0, MIXED_DECODE_ROWS, 128) if singles < most]:
            rows, kept, tiles = singles + 4, [0], 1
            length = 3 * _aligned(rows) + 2 * _aligned(1) + 4 * tiles + _aligned(singles)
            inputs = torch.zeros(length, dtype=torch.int32, device=self.device)
            self._mixed_step(PackedStep(0, length, rows, None, kept, singles, tiles, 0), inputs, cache)

    def _compile_many(self, weights: Weights) -> None:
        """Compile the products of steps with prompts: of all rows, and of the few whose token is chosen."""
        a, most = self.architecture, MOST_ROWS
        for rows in (16, 32, 64, most, most + 1):
            normed = torch.empty(rows, a.hidden, dtype=a.dtype, device=self.device)
            wide = torch.empty(rows, 2 * a.intermediate, dtype=a.dtype, device=self.device)
            attended = torch.empty(rows, a.heads * a.head_dim, dtype=a.dtype, device=self.device)
            layer = weights.layers[0]
            products.many(normed, layer.qkv, wide[:, : self._buffers.qkv.shape[1]].contiguous())
            products.many(attended, layer.output, normed)
            products.many(normed, layer.gate_up, wide)
            products.many(wide[:, : a.intermediate].contiguous(), layer.down, normed)

    @torch.inference_mode()
    def _compile_verifying(self, cache: PagedKVTensors) -> None:
        """Compile the kernels of every shape of a verifying step, the smallest first, beside the serving."""
        torch.cuda.set_device(self.device)
        for depth in filter(self._fits, VERIFY_DEPTHS):
            for rows in VERIFY_ROWS:
                buffers = self._verifying
                if buffers is None or rows > buffers.rows:
                    break
                with kernels.compiling():
                    for segments in (1, 8):  # attention takes other tiles for few requests
                        self._verify(buffers, Shape(rows, segments, depth), cache)

    # -- a step --------------------------------------------------------------------------------------------------------

    def prepare(self, plan: StepPlan) -> Any:
        """Pack a plan. Work per request and step does not grow with the length of its context."""
        if not plan.use_cache:
            return self.plain.prepare(plan)
        size = self.tensors.block_size
        if size != self._block_size:
            self._reset_tables()
        if plan.moves_blocks or plan.step != self._last_step + 1:
            # A copy on write replaced a block in the middle of a table, or may have while another path ran.
            for seat in self._seats.values():
                seat.filled = 0
        self._last_step = plan.step
        items = plan.items
        where: list[int] = []
        what: list[int] = []
        seats = [self._seat(item.request, plan, where, what) for item in items]
        kept: list[int] = []
        tiles: list[int] = []
        singles = 0
        shape = self._shape(items)
        if shape is not None and not shape.segments:
            bucket, rows = shape.rows, len(items)
            pad = _aligned(bucket) - rows
            ids = [-1 if item.start >= len(item.request.tokens) else item.request.tokens[item.start] for item in items]
            positions = [item.start for item in items]
            kept = [row for row, item in enumerate(items) if item.sample]
            # Padding after the longest contexts, which are started first.
            order = sorted(range(bucket), key=lambda row: -positions[row] if row < rows else 1)
            spare_order = [0] * (pad - (bucket - rows))
            columns = [ids, [0] * pad, positions, [-1] * pad, seats, [-1] * pad, order, spare_order]
        elif shape is not None:
            ids, positions = [], []
            columns_seats: list[int] = []
            newest: list[int] = []
            segments: list[int] = []
            for item, place in zip(items, seats, strict=True):
                first, count = len(ids), item.count
                tokens = item.tokens()
                ids += tokens if len(tokens) == count else [*tokens, -1]
                positions += range(item.start, item.start + count)
                columns_seats += [place] * count
                newest += [-1] * (count - 1) + [place]
                segments += (first, count)
                kept += range(first + count - item.num_sampled, first + count)
            rows = len(ids)
            pad = _aligned(shape.rows) - rows
            columns = [ids, [0] * pad, positions, [-1] * pad, columns_seats, [-1] * pad, newest, [-1] * pad]
            columns += (segments, [0] * (_aligned(2 * shape.segments) - len(segments)))
        else:
            # Rows of single positions first, for the kernel of decoding; the others are cut into tiles.
            single = [index for index, item in enumerate(items) if item.count == 1]
            singles = len(single) if len(single) >= MIXED_DECODE_ROWS else 0
            lone = set(single[:singles])
            ids, positions, columns_seats = [], [], []
            ends = [0] * len(items)
            per_tile = kernels.tile_tokens(self.architecture.heads, self.architecture.kv_heads)
            for index in (*single[:singles], *(index for index in range(len(items)) if index not in lone)):
                item, place = items[index], seats[index]
                offset, start, count = len(ids), item.start, item.count
                tokens = item.tokens()
                ids += tokens if len(tokens) == count else [*tokens, -1]
                positions += range(start, start + count)
                columns_seats += [place] * count
                ends[index] = offset + count
                if index not in lone:
                    for begin in range(0, count, per_tile):
                        tiles += (place, offset + begin, start + begin, min(per_tile, count - begin))
            sampled = [(end - item.num_sampled, end) for item, end in zip(items, ends, strict=True)]
            kept = [row for first, end in sampled for row in range(first, end)]
            kept_seats = [seat for seat, item in zip(seats, items, strict=True) for _ in range(item.num_sampled)]
            order = sorted(range(singles), key=lambda row: -positions[row])
            rows = len(ids)
            columns = [ids, positions, columns_seats, kept, kept_seats, tiles, order]
            columns = [column + [0] * (_aligned(len(column)) - len(column)) for column in columns]
        spare = [0] * (_aligned(len(where)) - len(where))
        columns += (where + spare, what + spare)
        length = sum(map(len, columns))
        slot = self._turn = (self._turn + 1) % SLOTS
        if length > len(self._host_np[slot]):
            self._host[slot] = self._pinned(2 * length)
            self._host_np[slot] = self._host[slot].numpy()
        packed = self._host_np[slot]
        at = 0
        for column in columns:
            if column:
                packed[at : at + len(column)] = column
                at += len(column)
        return PackedStep(slot, length, rows, shape, kept, singles, len(tiles) // 4, len(where))

    def _shape(self, items: list[Scheduled]) -> Shape | None:
        """How a step is captured; ``None`` where it cannot be."""
        count = len(items)
        if all(item.count == 1 for item in items):
            if count > self._rows:
                return None
            return Shape(next(each for each in BUCKETS if each >= count), kv=self.tensors.precision)
        rows, deepest = sum(item.count for item in items), max(item.count for item in items)
        # Not the end of a prompt, which is one of a kind.
        verifies = all(item.count == 1 or item.kind in {Kind.VERIFY, Kind.DRAFT} for item in items)
        depth = next((each for each in VERIFY_DEPTHS if each >= deepest), 0)
        if rows > self._verify_rows or not verifies or not depth or not self._fits(depth):
            return None
        if self._verifying is None:
            try:
                self._verifying = self._reserve_verifying()
            except torch.OutOfMemoryError:  # launched kernel by kernel it needs less
                return None
            if self._ahead:
                cache = self.tensors.viewed_as(self.tensors.precision)
                threading.Thread(target=self._compile_verifying, args=(cache,), name="kernels", daemon=True).start()
        # Requests that are not there cost next to nothing, so few numbers of them do.
        segments = 1 << (count - 1).bit_length()
        return Shape(next(each for each in VERIFY_ROWS if each >= rows), segments, depth, self.tensors.precision)

    def _fits(self, depth: int) -> bool:
        a = self.architecture
        return kernels.verify_rows(depth, a.heads // a.kv_heads) <= VERIFY_TILE

    @torch.inference_mode()
    def forward(self, plan: StepPlan, packed: Any) -> Tensor:
        """Launch the step; return the logits of its sampled positions, ``[S, vocab]``, valid until the next step.

        Nothing is waited for: :attr:`greedy` has the most likely tokens as soon as they arrive.
        """
        if not plan.use_cache:
            self.greedy, self.label, self.novel = None, self.plain.label, False
            return self.plain.forward(plan, packed)
        if plan.transfers:
            self.tensors.transfer(plan.transfers)
        begin, end, arrived = self._events[packed.slot]
        source = self._host[packed.slot][: packed.length]
        shape = packed.shape
        into = None if shape is None else self._buffers_of(shape).inputs
        fixed = into is not None and packed.length <= len(into)
        inputs = into[: packed.length] if into is not None and fixed else torch.empty_like(source, device=self.device)
        inputs.copy_(source, non_blocking=True)
        if packed.updates:
            where, what = inputs[packed.length - 2 * _aligned(packed.updates) :].chunk(2)
            kernels.scatter(self._tables, where[: packed.updates], what[: packed.updates])
        if into is not None and not fixed:
            used = packed.length - 2 * _aligned(packed.updates)
            into[:used].copy_(inputs[:used])
        if begin is not None:
            begin.record()
        requests = [item.request for item in plan.items if item.sample]
        if shape is not None and into is not None:
            logits, tokens = self._captured_step(shape)
            seats = into[2 * _aligned(shape.rows) :][: packed.rows]
            count = len(packed.kept)
            if count < packed.rows:  # chunks of one position in the middle of a prompt
                chosen = torch.tensor(packed.kept, dtype=torch.long, pin_memory=self._cuda)
                chosen = chosen.to(self.device, non_blocking=True)
                logits, tokens, seats = logits[chosen], tokens[chosen], seats[chosen]
            else:
                logits, tokens = logits[:count], tokens[:count]
        else:
            logits, tokens = self._mixed_step(packed, inputs, self.tensors)
            count, self.novel = len(packed.kept), False
            offset = 3 * _aligned(packed.rows) + _aligned(count)
            seats = inputs[offset : offset + count]
            self.label = self._name
        # A step whose requests all can be is done with here: the next one may start before the host knows its tokens.
        # What becomes of proposals is decided by the host.
        # Whoever proposes proposes the likeliest.
        drafting = any(item.drafts or item.kind == Kind.DRAFT for item in plan.items)
        final = not drafting and not any(map(sampler.depends_on_its_output, requests))
        alternatives = None
        if final and requests:
            self._sampler.choose(logits, requests, tokens, seats, self._last)
            alternatives = self._sampler.alternatives(logits, requests, tokens)
        if end is not None:
            end.record()
        host = self._tokens_host[packed.slot]
        if count > len(host):
            host = self._tokens_host[packed.slot] = self._pinned(2 * count)
        host = host[:count]
        host.copy_(tokens, non_blocking=True)
        if arrived is not None:
            arrived.record()
        self.greedy = Selection(host, (begin, end, arrived), final=final, alternatives=alternatives)
        return logits

    def _captured_step(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Launch the step in the fixed buffers; return logits and tokens."""
        buffers = self._buffers_of(shape)
        graph = self._graphs.pop(shape, None) if self.use_graphs else None
        self.novel = self.use_graphs and self._cuda and graph is None
        if graph is not None:
            self._graphs[shape] = graph  # the newest last
            self.label = f"{self._name}, graph"
            graph.replay()
        else:
            # The first step of a shape is launched kernel by kernel, which also compiles them, and then captured.
            self.label = self._name
            with kernels.unchanged:
                self._launch(shape)
                if self.novel:
                    try:
                        self._graphs[shape] = self._capture(shape)
                    except torch.OutOfMemoryError:  # the step itself is under way; the next of its size tries again
                        torch.cuda.empty_cache()
        logits = buffers.logits_one if shape.rows == 1 else buffers.logits
        return logits[: shape.rows], buffers.tokens[: shape.rows]

    def _capture(self, shape: Shape) -> torch.cuda.CUDAGraph:
        verifying = [each for each in self._graphs if each.segments]
        if shape.segments and len(verifying) >= VERIFY_GRAPHS:
            del self._graphs[verifying[0]]
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._launch(shape)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return graph

    def _launch(self, shape: Shape) -> None:
        if shape.segments:
            self._verify(self._buffers_of(shape), shape, self.tensors)
        else:
            self._decode(self._buffers, shape.rows, self.tensors)

    def _buffers_of(self, shape: Shape) -> Buffers:
        if not shape.segments:
            return self._buffers
        assert self._verifying is not None, "they are reserved before a step gets such a shape"
        return self._verifying

    # -- the model -----------------------------------------------------------------------------------------------------

    def _decode(self, b: Buffers, rows: int, cache: PagedKVTensors, weights: Weights | None = None) -> None:
        """One position for each of ``rows`` rows of the fixed buffers."""
        stride = _aligned(rows)
        ids, positions, seats, by_length = (b.inputs[part * stride :][:rows] for part in range(4))
        order = by_length if rows >= SORTED_ROWS else None
        splits = kernels.decode_splits(rows, self.architecture.kv_heads)

        def attend(index: int, projected: Tensor, out: Tensor) -> None:
            self._attend(cache, index, projected, positions, seats, out, order, splits=splits, pdl=self._pdl)

        self._few(b, rows, ids, seats, seats, attend, weights or self._weights)

    def _verify(self, b: Buffers, shape: Shape, cache: PagedKVTensors) -> None:
        """A few positions for each of some requests."""
        rows = shape.rows
        stride = _aligned(rows)
        # The token after a request's newest position is the one that its next step begins with.
        ids, positions, seats, newest = (b.inputs[part * stride :][:rows] for part in range(4))
        segments = b.inputs[4 * stride :][: 2 * shape.segments].view(-1, 2)

        def attend(index: int, projected: Tensor, out: Tensor) -> None:
            self._attend_segments(b, cache, index, projected, segments, positions, seats, out, shape.depth)

        self._few(b, rows, ids, seats, newest, attend, self._weights)

    def _few(
        self,
        b: Buffers,
        rows: int,
        ids: Tensor,
        seats: Tensor,
        newest: Tensor,
        attend: Callable[[int, Tensor, Tensor], None],
        weights: Weights,
    ) -> None:
        """All layers and the choice of tokens for at most some hundred rows, attention as ``attend`` has it.

        Rows that stand for a request in ``newest`` leave their token for its next step.
        """
        a, pdl = self.architecture, self._pdl
        residual, normed, qkv = b.residual[:rows], b.normed[:rows], b.qkv[:rows]
        attended, delta = b.attended[:rows], b.delta[:rows]
        both, active = b.both[:rows], b.active[:rows]
        kernels.embed(ids, seats, self._last, a.embedding, residual, pdl=pdl)
        x, copy = residual[0], None
        if rows == 1 and weights.narrow:
            kernels.embed(ids, seats, self._last, a.embedding, normed, pdl=pdl)
            x = copy = normed[0]
        pending: Tensor | None = None
        for index, (layer, read) in enumerate(zip(a.layers, weights.layers, strict=True)):
            projected = qkv
            if rows == 1:
                products.vector(x, read.qkv, out=qkv[0], gain=layer.input_norm, eps=a.eps, pdl=pdl)
            else:
                kernels.add_norm(residual, pending, layer.input_norm, a.eps, normed, pdl=pdl)
                projected = products.few(normed, read.qkv, qkv, b.qkv_parts, pdl=pdl)
            attend(index, projected, attended)
            if rows == 1:
                products.vector(attended[0], read.output, residual=residual[0], copy=copy, pdl=pdl)
                products.gated_vector(x, layer.post_norm, a.eps, read.gate_up, active[0], pdl=pdl)
                products.vector(active[0], read.down, residual=residual[0], copy=copy, pdl=pdl)
            else:
                added = products.few(attended, read.output, delta, b.delta_parts, pdl=pdl)
                kernels.add_norm(residual, added, layer.post_norm, a.eps, normed, pdl=pdl)
                products.gated_few(normed, read.gate_up, both, active, pdl=pdl)
                pending = products.few(active, read.down, delta, b.delta_parts, pdl=pdl)
        if rows == 1:
            logits = b.logits_one
            products.vector(x, weights.head, out=logits[0], gain=a.final_norm, eps=a.eps, pdl=pdl)
        else:
            logits = b.logits[:rows]
            kernels.add_norm(residual, pending, a.final_norm, a.eps, normed, pdl=pdl)
            products.whole_few(normed, weights.head, logits, pdl=pdl)
        kernels.argmax(logits, newest, b.best, b.index, b.tokens, self._last, pdl=pdl)

    def _attend(
        self,
        cache: PagedKVTensors,
        index: int,
        qkv: Tensor,
        positions: Tensor,
        seats: Tensor,
        out: Tensor,
        order: Tensor | None,
        *,
        splits: int,
        pdl: bool = False,
    ) -> None:
        """Attention of single positions in layer ``index``."""
        a, layer = self.architecture, self.architecture.layers[index]
        kernels.attend_decode(
            qkv,
            *self._vectors(layer),
            positions,
            seats,
            self._tables,
            cache.keys[index],
            cache.values[index],
            out,
            self._buffers.partial,
            self._buffers.state,
            self._buffers.counters,
            scale=a.scaling,
            eps=a.eps,
            block_size=self._block_size,
            window=layer.window,
            rotate=layer.rotate,
            splits=splits,
            order=order,
            scales=cache.scales(index),
            pdl=pdl,
        )

    def _attend_segments(
        self,
        b: Buffers,
        cache: PagedKVTensors,
        index: int,
        qkv: Tensor,
        segments: Tensor,
        positions: Tensor,
        seats: Tensor,
        out: Tensor,
        depth: int,
    ) -> None:
        """Attention of a few positions of each request in layer ``index``."""
        a, layer = self.architecture, self.architecture.layers[index]
        kernels.attend_verify(
            qkv,
            *self._vectors(layer),
            segments,
            positions,
            seats,
            self._tables,
            cache.keys[index],
            cache.values[index],
            out,
            b.partial,
            b.state,
            b.counters,
            scale=a.scaling,
            eps=a.eps,
            block_size=self._block_size,
            window=layer.window,
            rotate=layer.rotate,
            splits=kernels.decode_splits(len(segments), a.kv_heads),
            depth=depth,
            scales=cache.scales(index),
            pdl=self._pdl,
        )

    def _mixed_step(self, packed: PackedStep, inputs: Tensor, cache: PagedKVTensors) -> tuple[Tensor, Tensor]:
        """Any step: some requests compute many positions."""
        a, weights, rows, count = self.architecture, self._weights, packed.rows, len(packed.kept)
        dtype, device = a.dtype, self.device
        columns, at = [], 0
        singles = packed.singles
        for length in (rows, rows, rows, count, count, 4 * packed.tiles, singles):
            columns.append(inputs[at : at + length])
            at += _aligned(length)
        ids, positions, seats, kept, kept_seats, tiles, order = columns
        tiles = tiles.view(-1, 4)
        residual = torch.empty(rows, a.hidden, device=device)
        normed = torch.empty(rows, a.hidden, device=device, dtype=dtype)
        qkv = torch.empty(rows, (a.heads + 2 * a.kv_heads) * a.head_dim, device=device, dtype=dtype)
        attended = torch.empty(rows, a.heads * a.head_dim, device=device, dtype=dtype)
        delta = torch.empty(rows, a.hidden, device=device, dtype=dtype)
        both = torch.empty(rows, 2 * a.intermediate, device=device, dtype=dtype)
        active = torch.empty(rows, a.intermediate, device=device, dtype=dtype)
        kernels.embed(ids, seats, self._last, a.embedding, residual)
        pending: Tensor | None = None
        for index, (layer, read) in enumerate(zip(a.layers, weights.layers, strict=True)):
            keys, values, scales = cache.keys[index], cache.values[index], cache.scales(index)
            kernels.add_norm(residual, pending, layer.input_norm, a.eps, normed)
            products.many(normed, read.qkv, qkv)
            if singles:
                self._attend(cache, index, qkv[:singles], positions, seats, attended[:singles], order, splits=1)
            if packed.tiles:
                kernels.rotate_write(
                    qkv,
                    *self._vectors(layer),
                    positions,
                    seats,
                    self._tables,
                    keys,
                    values,
                    eps=a.eps,
                    block_size=self._block_size,
                    rotate=layer.rotate,
                    first=singles,
                    scales=scales,
                )
                kernels.attend_varlen(
                    qkv,
                    tiles,
                    self._tables,
                    keys,
                    values,
                    attended,
                    scale=a.scaling,
                    block_size=self._block_size,
                    window=layer.window,
                    scales=scales,
                )
            if index == len(a.layers) - 1:
                # Of the last layer the cache has what it needs; beyond, only rows whose token is chosen count.
                if not count:
                    return torch.empty(0, a.vocab, device=device), self._buffers.tokens[:0]
                attended, residual = attended.index_select(0, kept), residual.index_select(0, kept)
                normed, delta, both, active = (each[:count] for each in (normed, delta, both, active))
            products.many(attended, read.output, delta)
            kernels.add_norm(residual, delta, layer.post_norm, a.eps, normed)
            products.many(normed, read.gate_up, both)
            kernels.silu_mul(both, active)
            products.many(active, read.down, delta)
            pending = delta
        kernels.add_norm(residual, pending, a.final_norm, a.eps, normed)
        logits = torch.empty(count, a.vocab, device=device, dtype=dtype)
        products.many(normed, weights.head, logits)
        parts = -(-a.vocab // kernels.ARGMAX_BLOCK)
        best = torch.empty(count, parts, device=device)
        index_ = torch.empty(count, parts, device=device, dtype=torch.int32)
        tokens = torch.empty(count, device=device, dtype=torch.int32)
        kernels.argmax(logits, kept_seats, best, index_, tokens, self._last)
        return logits, tokens

    def _vectors(self, layer: Layer) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
        return layer.qkv_bias, layer.q_norm, layer.k_norm, self.architecture.cos, self.architecture.sin

    # -- block tables --------------------------------------------------------------------------------------------------

    def _seat(self, request: Request, plan: StepPlan, where: list[int], what: list[int]) -> int:
        """The request's row of the block table; appends to ``where`` and ``what`` how it has to change."""
        blocks = request.blocks
        seat = self._seats.get(request.handle)
        if seat is None:
            if not self._free:
                staying = {item.request.handle for item in plan.items}
                for handle in [handle for handle in self._seats if handle not in staying]:
                    self._free.append(self._seats.pop(handle).index)
            seat = self._seats[request.handle] = _Seat(self._free.pop(), blocks)
        elif seat.blocks is not blocks:
            seat.blocks, seat.filled = blocks, 0
        filled, count = seat.filled, len(blocks)
        if filled < count:
            first = seat.index * self._width
            where += range(first + filled, first + count)
            what += blocks[filled:]
            seat.filled = count
        return seat.index

    def forget_graphs(self) -> None:
        """Give up the captured graphs: they hold addresses that are about to change, and memory."""
        self._clear_graphs()
        self._verifying = None

    def _clear_graphs(self) -> None:
        for graphs in (self._master_graphs, *self._packed_graphs.values()):
            graphs.clear()
        self._pool = None  # a pool ends with the last graph in it

    def _reset_tables(self) -> None:
        self._block_size = self.tensors.block_size
        self._width = -(-self._positions // self._block_size)
        self._tables = torch.zeros(self._num_seats, self._width, dtype=torch.int32, device=self.device)
        self._clear_graphs()  # they hold the address and the width of the table
        self._seats.clear()
        self._free = list(range(self._num_seats - 1, -1, -1))

    # -- buffers -------------------------------------------------------------------------------------------------------

    def _reserve(self) -> Buffers:
        a, rows = self.architecture, self._rows
        sizes = [bucket for bucket in BUCKETS if bucket <= rows]
        heads = max(size * a.kv_heads * kernels.decode_splits(size, a.kv_heads) for size in sizes)
        heads *= kernels.padded_group(a.heads // a.kv_heads)
        return Buffers(a, rows, 4 * rows + 2 * SPARE_UPDATES, self._scratch(sizes, heads, rows), self.device)

    def _reserve_verifying(self) -> Buffers:
        a, rows = self.architecture, self._verify_rows
        sizes = [size for size in VERIFY_ROWS if size <= rows]
        splits = {1 << power: kernels.decode_splits(1 << power, a.kv_heads) for power in range(rows.bit_length() + 1)}
        heads = max((count * a.kv_heads * split for count, split in splits.items() if split > 1), default=0)
        heads *= max(kernels.verify_rows(depth, a.heads // a.kv_heads) for depth in VERIFY_DEPTHS if self._fits(depth))
        inputs = 4 * _aligned(rows) + 4 * rows + 2 * SPARE_UPDATES
        return Buffers(a, rows, inputs, self._scratch(sizes, heads, max(splits)), self.device)

    def _scratch(self, sizes: list[int], heads: int, segments: int) -> Scratch:
        layer, kv = self.architecture.layers[0], self.architecture.kv_heads
        return Scratch(
            products.space(sizes, layer.qkv), products.space(sizes, layer.output, layer.down), heads, segments * kv
        )

    def _pinned(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.int32, pin_memory=self._cuda)
