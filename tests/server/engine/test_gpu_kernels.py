"""The GPU kernels agree with float64, and the GPU runner with the plain path.

Without a GPU they run in Triton's interpreter on the CPU: the same code, slowly, so the shapes are small.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
pytest.importorskip("triton")

import triton
import triton.language as tl
from architectures import build

from inference_server.engine.attention import IN_8_BITS, NAME, PagedKVTensors
from inference_server.engine.gpu import kernels, path, runner
from inference_server.engine.gpu.runner import GpuRunner
from inference_server.engine.llama import UnsupportedError, fuse
from inference_server.engine.request import Request
from inference_server.engine.runner import ModelRunner
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.engine.speculation.sequential import EarlyExitProposer, Passes, first_layers
from inference_server.features import Features
from inference_server.protocol import Kind, SamplingParams

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
KV = ["master", *IN_8_BITS]
BF16_STEP = 2.0**-7  # the interpreter cuts where a device rounds


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else BF16_STEP


def normed(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * gain.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(7, 32), (33, 96), (64, 2080)])
def test_matrix_times_vector_agrees_with_float64(dtype: torch.dtype, n: int, k: int) -> None:
    torch.manual_seed(n)
    weight = torch.randn(n, k, device=DEVICE).to(dtype)
    x, gain = torch.randn(k, device=DEVICE), torch.randn(k, device=DEVICE)
    out = torch.full((n,), torch.nan, device=DEVICE)
    kernels.gemv(x.to(dtype), weight, out=out)
    assert relative(out, weight.double() @ x.to(dtype).double()) < 1e-5
    kernels.gemv(x, weight, out=out.fill_(torch.nan), gain=gain, eps=1e-5)
    expected = weight.double() @ normed(x, gain, 1e-5)
    assert relative(out, expected) < 1e-5
    residual = torch.randn(n, device=DEVICE)
    before = residual.double()
    kernels.gemv(x.to(dtype), weight, residual=residual)
    assert relative(residual, before + weight.double() @ x.to(dtype).double()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 48])
def test_gate_and_up_of_one_vector_agree_with_float64(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2 * width, 96, device=DEVICE).to(dtype)
    x, gain = torch.randn(96, device=DEVICE), torch.randn(96, device=DEVICE)
    out = torch.full((width,), torch.nan, device=DEVICE, dtype=dtype)
    kernels.gemv_gate_up(x, gain, 1e-6, weight, out)
    gate, up = (weight.double() @ normed(x, gain, 1e-6)).chunk(2)
    assert relative(out, torch.nn.functional.silu(gate) * up) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_kernels_agree_with_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    residual, delta = torch.randn(5, 96, device=DEVICE), torch.randn(5, 96, device=DEVICE).to(dtype)
    gain, out = torch.randn(96, device=DEVICE), torch.full((5, 96), torch.nan, device=DEVICE, dtype=dtype)
    summed = residual.double() + delta.double()
    kernels.add_norm(residual, delta, gain, 1e-5, out)
    assert relative(residual, summed) < 1e-6
    assert relative(out, normed(summed, gain, 1e-5)) < tolerance(dtype)
    both, active = (30 * torch.randn(3, 80, device=DEVICE)).to(dtype), torch.empty(3, 40, device=DEVICE, dtype=dtype)
    kernels.silu_mul(both, active)
    gate, up = both.double().chunk(2, dim=1)
    assert relative(active, torch.nn.functional.silu(gate) * up) < tolerance(dtype)


def test_argmax_takes_the_first_of_equals_and_notes_it_by_seat() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 3 * kernels.ARGMAX_BLOCK + 5, device=DEVICE)
    logits[0, -1] = logits[0, 77] = 9.0
    logits[1, kernels.ARGMAX_BLOCK] = 9.0
    best, index = torch.empty(3, 4, device=DEVICE), torch.empty(3, 4, device=DEVICE, dtype=torch.int32)
    tokens, last = (torch.full((size,), -7, device=DEVICE, dtype=torch.int32) for size in (3, 4))
    kernels.argmax(logits, torch.tensor([2, 0, -1], device=DEVICE, dtype=torch.int32), best, index, tokens, last)
    third = int(logits[2].argmax())
    assert tokens.tolist() == [77, kernels.ARGMAX_BLOCK, third]
    assert last.tolist() == [kernels.ARGMAX_BLOCK, -7, 77, -7]


@triton.jit
def _expand_kernel(units, cache, like, even, odd, count: tl.constexpr):
    place = tl.arange(0, count)
    unit, one = tl.load(units + place), tl.load(like)
    tl.store(even + place, kernels._bytes(unit, cache, 0, one).to(tl.float32))
    tl.store(odd + place, kernels._bytes(unit, cache, 1, one).to(tl.float32))


@pytest.mark.parametrize("dtype", DTYPES if CUDA else DTYPES[:1])
@pytest.mark.parametrize("precision", list(IN_8_BITS))
def test_every_byte_becomes_the_number_that_it_stands_for(dtype: torch.dtype, precision: str) -> None:
    stored = torch.arange(256, device=DEVICE).to(torch.uint8)
    numbers = stored.view(IN_8_BITS[precision].dtype)
    pairs = torch.stack([stored, stored.roll(77)], dim=1)
    even, odd = (torch.full((256,), torch.nan, device=DEVICE) for _ in range(2))
    like = torch.zeros(1, device=DEVICE, dtype=dtype)
    _expand_kernel[(1,)](pairs.view(torch.int16).flatten(), numbers, like, even, odd, 256)
    kept = ~numbers.float().isnan()
    assert torch.equal(even[kept], numbers.float()[kept])
    assert torch.equal(odd.roll(-77)[kept], numbers.float()[kept])


class Case:
    """Contexts of several requests over scattered blocks, with rotation and q/k norm."""

    heads, kv, dim, block, positions = 6, 2, 32, 8, 400

    def __init__(
        self, dtype: torch.dtype, lengths: list[int], *, bias: bool, norm: bool, precision: str = "master"
    ) -> None:
        torch.manual_seed(0)
        self.dtype, self.lengths = dtype, lengths
        blocks = torch.randperm(160).tolist()
        self.cache = PagedKVTensors(160, self.block, torch.device(DEVICE), dtype)
        self.cache.reserve([(self.kv, self.dim, self.dim)])
        self.cache.store_as(precision)
        everywhere = torch.arange(160 * self.block, device=DEVICE)
        self.cache.write(
            0, everywhere, *(torch.randn(len(everywhere), self.kv, self.dim, device=DEVICE) for _ in range(2))
        )
        self.tensors = (self.cache.keys[0], self.cache.values[0])
        self.before = [each.clone().view(torch.uint8) for each in self.tensors]
        width = -(-self.positions // self.block)
        self.tables = torch.zeros(len(lengths), width, dtype=torch.int32, device=DEVICE)
        for seat, length in enumerate(lengths):
            count = -(-length // self.block)
            self.tables[seat, :count] = torch.tensor([blocks.pop() for _ in range(count)])
        angles = torch.arange(self.positions)[:, None] / 100.0 ** (torch.arange(self.dim // 2) / (self.dim // 2))
        self.cos, self.sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
        total = (self.heads + 2 * self.kv) * self.dim
        self.bias = torch.randn(total, device=DEVICE) if bias else None
        self.q_gain, self.k_gain = (torch.randn(self.dim, device=DEVICE) if norm else None for _ in range(2))

    def heads_of(self, qkv: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values in float64, ``[T, heads, D]``."""
        x = qkv.double() if self.bias is None else qkv.double() + self.bias.double()
        q, k, v = x.view(len(qkv), -1, self.dim).split([self.heads, self.kv, self.kv], dim=1)
        if self.q_gain is not None and self.k_gain is not None:
            q, k = normed(q, self.q_gain, 1e-6), normed(k, self.k_gain, 1e-6)
        cos, sin = (part[positions].double()[:, None].repeat(1, 1, 2) for part in (self.cos, self.sin))

        def rotate(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat([-second, first], -1) * sin

        return rotate(q), rotate(k), v

    def slots(self, seat: int, length: int) -> torch.Tensor:
        places = torch.arange(length, device=DEVICE)
        return self.tables[seat].long()[places // self.block] * self.block + places % self.block

    def stored(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they are in the cache, float64."""
        return self.cache.read(0, slots, torch.float64)

    def check_written(self, slot: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """The key and value of a new position are in the cache, ``[KV, D]`` each, as the plain path writes them."""
        read = self.stored(slot[None])
        if not self.cache.in_8_bits:
            assert relative(read[0][0], k) < tolerance(self.dtype)
            assert relative(read[1][0], v) < tolerance(self.dtype)
            return
        like = PagedKVTensors(1, 4, torch.device(DEVICE), self.dtype)
        like.reserve([(self.kv, self.dim, self.dim)])
        like.store_as(self.cache.precision)
        first = torch.zeros(1, dtype=torch.long, device=DEVICE)
        like.write(0, first, k[None].float(), v[None].float())
        for got, expected, scale in zip(read, like.read(0, first, torch.float64), like.scales(0) or (), strict=True):
            step = scale[0, :, None].expand_as(got)
            if self.cache.precision == "fp8":
                if not CUDA:  # the interpreter loses the carry where it rounds up to a power of two
                    assert relative(got, expected) < 0.2
                    continue
                step = (expected.abs() / 8).maximum(step / 512)
            away = (got - expected).abs() / step
            assert away.max() < 1.001, "never more than a step"
            assert (away > 1e-3).double().mean() < 0.05, "and that where it was between two"

    def check_untouched(self, written: torch.Tensor) -> None:
        """Nothing but the slots ``written`` changed."""
        kept = torch.ones(len(self.tensors[0]), dtype=torch.bool, device=DEVICE)
        kept[written] = False
        for now, before in zip(self.tensors, self.before, strict=True):
            assert torch.equal(now.view(torch.uint8)[kept], before[kept]), "nothing else was written"

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, window: int) -> torch.Tensor:
        first = max(0, position + 1 - window) if window else 0
        k, v = (each[first : position + 1].double().repeat_interleave(self.heads // self.kv, 1) for each in (k, v))
        weights = torch.softmax(torch.einsum("hd,shd->hs", q, k) * self.dim**-0.5, dim=-1)
        return torch.einsum("hs,shd->hd", weights, v)


@pytest.mark.parametrize("precision", KV)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "bias", "norm"), [(0, False, True), (20, True, False)])
def test_decode_attention_over_scattered_blocks_agrees_with_float64(
    dtype: torch.dtype, window: int, bias: bool, norm: bool, precision: str
) -> None:
    lengths = [1, 8, 9, 64, 65, 300]
    for splits in (1, 4):
        case = Case(dtype, lengths, bias=bias, norm=norm, precision=precision)
        qkv = torch.randn(len(lengths) + 1, (case.heads + 2 * case.kv) * case.dim, device=DEVICE).to(dtype)
        out = torch.full((len(qkv), case.heads * case.dim), torch.nan, device=DEVICE, dtype=dtype)
        positions = torch.tensor([*(length - 1 for length in lengths), -1], device=DEVICE, dtype=torch.int32)
        seats = torch.tensor([*range(len(lengths)), -1], device=DEVICE, dtype=torch.int32)
        # The same projection whole, and in parts that the kernel adds, its rows started in another order.
        part = torch.randn_like(qkv, dtype=torch.float32)
        given = qkv if splits == 1 else torch.stack([qkv.float() - part, part])
        order = None if splits == 1 else torch.randperm(len(qkv)).to(DEVICE, torch.int32)
        count = len(qkv) * case.kv
        counters = torch.zeros(count, dtype=torch.int32, device=DEVICE)
        scratch = count * splits * kernels.padded_group(case.heads // case.kv)
        kernels.attend_decode(
            given, case.bias, case.q_gain, case.k_gain, case.cos, case.sin, positions, seats, case.tables,
            *case.tensors, out, torch.empty(scratch * case.dim, device=DEVICE),
            torch.empty(scratch * 2, device=DEVICE), counters,
            scale=case.dim**-0.5, eps=1e-6, block_size=case.block, window=window, rotate=True, splits=splits, block=16,
            order=order, scales=case.cache.scales(0),
        )  # fmt: skip
        q, k, v = case.heads_of(qkv[:-1], positions[:-1].long())
        for row, length in enumerate(lengths):
            slots = case.slots(row, length)
            case.check_written(slots[-1], k[row], v[row])
            expected = case.attend(q[row], *case.stored(slots), length - 1, window)
            assert relative(out[row], expected.flatten()) < 2 * tolerance(dtype), f"context {length}, {splits} splits"
        assert not out[-1].any(), "padding attends to nothing"
        assert not counters.any(), "the counters are ready for the next step"
        case.check_untouched(torch.cat([case.slots(row, length)[-1:] for row, length in enumerate(lengths)]))


@pytest.mark.parametrize("precision", KV)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "bias", "norm"), [(0, True, True), (20, False, False)])
def test_attention_of_prompts_and_single_positions_agrees_with_float64(
    dtype: torch.dtype, window: int, bias: bool, norm: bool, precision: str
) -> None:
    starts, counts = [0, 30, 63], [50, 1, 45]
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    case = Case(dtype, lengths, bias=bias, norm=norm, precision=precision)
    total = sum(counts)
    qkv = torch.randn(total, (case.heads + 2 * case.kv) * case.dim, device=DEVICE).to(dtype)
    positions = torch.cat([torch.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
    seats = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    positions, seats = positions.to(DEVICE, torch.int32), seats.to(DEVICE, torch.int32)
    per_tile = kernels.tile_tokens(case.heads, case.kv)
    tiles, offset = [], 0
    for seat, (start, count) in enumerate(zip(starts, counts, strict=True)):
        tiles += [
            [seat, offset + begin, start + begin, min(per_tile, count - begin)] for begin in range(0, count, per_tile)
        ]
        offset += count
    q, k, v = case.heads_of(qkv, positions.long())
    vectors = (case.bias, case.q_gain, case.k_gain, case.cos, case.sin)
    kernels.rotate_write(
        qkv, *vectors, positions, seats, case.tables, *case.tensors,
        eps=1e-6, block_size=case.block, rotate=True, scales=case.cache.scales(0),
    )  # fmt: skip
    out = torch.full((total, case.heads * case.dim), torch.nan, device=DEVICE, dtype=dtype)
    kernels.attend_varlen(
        qkv, torch.tensor(tiles, device=DEVICE, dtype=torch.int32), case.tables, *case.tensors, out,
        scale=case.dim**-0.5, block_size=case.block, window=window, block=16, scales=case.cache.scales(0),
    )  # fmt: skip
    for row in range(total):
        seat, position = int(seats[row]), int(positions[row])
        slots = case.slots(seat, position + 1)
        case.check_written(slots[-1], k[row], v[row])
        expected = case.attend(q[row], *case.stored(slots), position, window)
        assert relative(out[row], expected.flatten()) < 4 * tolerance(dtype), f"request {seat}, position {position}"


@pytest.mark.parametrize("precision", KV)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("begins", "counts", "depth", "window", "bias", "norm"),
    [
        ([0, 7, 8, 64, 300], [1, 5, 8, 3, 2], 8, 0, False, True),
        ([3, 90], [7, 1], 8, 20, True, False),
        ([100], [17], 32, 5, True, True),
    ],
)
def test_attention_of_a_few_positions_each_agrees_with_float64(
    dtype: torch.dtype,
    begins: list[int],
    counts: list[int],
    depth: int,
    window: int,
    bias: bool,
    norm: bool,
    precision: str,
) -> None:
    lengths = [begin + count for begin, count in zip(begins, counts, strict=True)]
    total, places = sum(counts), [sum(counts[:n]) for n in range(len(counts))]
    positions = torch.cat([torch.arange(b, b + c) for b, c in zip(begins, counts, strict=True)])
    positions = torch.cat([positions, torch.tensor([-1])]).to(DEVICE, torch.int32)
    seats = [seat for seat, count in enumerate(counts) for _ in range(count)]
    segments = [each for pair in zip(places, counts, strict=True) for each in pair]
    for splits in (1, 4):
        case = Case(dtype, lengths, bias=bias, norm=norm, precision=precision)
        qkv = torch.randn(total + 1, (case.heads + 2 * case.kv) * case.dim, device=DEVICE).to(dtype)
        part = torch.randn_like(qkv, dtype=torch.float32)
        given = qkv if splits == 1 else torch.stack([qkv.float() - part, part])
        out = torch.full((total + 1, case.heads * case.dim), torch.nan, device=DEVICE, dtype=dtype)
        count = (len(counts) + 1) * case.kv
        counters = torch.zeros(count, dtype=torch.int32, device=DEVICE)
        scratch = count * splits * kernels.verify_rows(depth, case.heads // case.kv)
        kernels.attend_verify(
            given, case.bias, case.q_gain, case.k_gain, case.cos, case.sin,
            torch.tensor([*segments, 0, 0], device=DEVICE, dtype=torch.int32).view(-1, 2), positions,
            torch.tensor([*seats, -1], device=DEVICE, dtype=torch.int32), case.tables, *case.tensors, out,
            torch.empty(scratch * case.dim, device=DEVICE), torch.empty(scratch * 2, device=DEVICE), counters,
            scale=case.dim**-0.5, eps=1e-6, block_size=case.block, window=window, rotate=True, splits=splits,
            depth=depth, block=16, scales=case.cache.scales(0),
        )  # fmt: skip
        q, k, v = case.heads_of(qkv[:-1], positions[:-1].long())
        written = []
        for row in range(total):
            position = int(positions[row])
            slots = case.slots(seats[row], position + 1)
            case.check_written(slots[-1], k[row], v[row])
            expected = case.attend(q[row], *case.stored(slots), position, window)
            difference = relative(out[row], expected.flatten())
            assert difference < 4 * tolerance(dtype), f"request {seats[row]}, position {position}, {splits} splits"
            written.append(slots[-1])
        assert out[-1].isnan().all(), "a row of no request is left alone"
        assert not counters.any(), "the counters are ready for the next step"
        case.check_untouched(torch.stack(written))


@pytest.mark.parametrize(
    ("name", "mixed_decode_rows", "precision"),
    [
        ("mistral-window", 1, "master"),
        ("qwen3", 100, "master"),
        ("qwen3", 1, "int8"),
        *([("llama-mha", 1, "master"), ("qwen3", 1, "master"), ("mistral-window", 100, "master")] if CUDA else []),
        *([("mistral-window", 100, each) for each in IN_8_BITS] if CUDA else []),
    ],
)
def test_the_gpu_runner_gives_the_logits_of_the_plain_path_for_every_shape_of_step(
    name: str, mixed_decode_rows: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both paths round alike, but for numbers that were between two: one of those moves a score by a thousandth.
    allowed = 1e-5 if precision == "master" else 2e-3
    monkeypatch.setattr(runner, "MIXED_DECODE_ROWS", mixed_decode_rows)
    monkeypatch.setattr(runner, "SORTED_ROWS", mixed_decode_rows)
    model: Any = build(name).to(DEVICE)
    model.set_attn_implementation(NAME)
    tensors = PagedKVTensors(64, 16, torch.device(DEVICE), torch.float32)
    config = model.config
    tensors.reserve([(config.num_key_value_heads, 16, 16)] * config.num_hidden_layers)
    tensors.store_as(precision)
    plain = ModelRunner(model, tensors)
    fast = GpuRunner(fuse(model, torch.float32, 400), plain, 400, 4)
    requests = []
    blocks = list(range(64))
    random.Random(0).shuffle(blocks)
    for handle, length in enumerate((120, 40, 17, 5)):
        tokens = torch.randint(3, 256, (length + 8,)).tolist()
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        request = Request(handle=handle, prompt_len=length, tokens=tokens, sampling=sampling, seed=0, arrival=handle)
        request.blocks = [blocks.pop() for _ in range(1 - (-len(tokens) // 16))]
        requests.append(request)
    a, b, c, d = requests
    steps: list[list[tuple[Request, int, int]]] = [
        [(a, 0, 70), (b, 0, 40)],
        [(a, 70, 50), (b, 40, 1), (c, 0, 17)],
        [(b, 41, 3), (c, 17, 1), (d, 0, 5)],
        [(a, 120, 1), (b, 44, 1), (c, 18, 1), (d, 5, 1)],
        [(a, 121, 1)],
        [(a, 122, 1), (c, 19, 1), (d, 6, 1)],
        [(a, 123, 1), (c, 20, 1), (d, 7, 1)],
    ]
    for number, parts in enumerate(steps):
        items = [Scheduled(request, start, count, Kind.PREFILL, sample=True) for request, start, count in parts]
        plan = StepPlan(number, items, use_cache=True)
        expected = plain.forward(plan, plain.prepare(plan)).clone()
        got = fast.forward(plan, fast.prepare(plan))
        assert relative(got, expected) <= allowed, (
            f"step {number}: {[relative(*rows) for rows in zip(got, expected, strict=True)]}"
        )
        assert fast.greedy is not None
        assert fast.greedy.tolist() == got.argmax(-1).tolist()
    # The tokens just chosen are on the device: the next step may be launched before the host knows them.
    chosen = fast.greedy.tolist()
    after = [(request, start + count) for request, start, count in steps[-1]]
    for (request, start), token in zip(after, chosen, strict=True):
        request.tokens[start:] = [token]
    items = [Scheduled(request, start, 1, Kind.DECODE, sample=True) for request, start in after]
    plan = StepPlan(len(steps), items, use_cache=True)
    expected = plain.forward(plan, plain.prepare(plan)).clone()
    for request, start in after:
        del request.tokens[start:]
    got = fast.forward(plan, fast.prepare(plan))
    assert relative(got, expected) <= allowed
    # Positions in the middle of prompts, one each or several: nothing is chosen.
    for count in (1, 2):
        middle = [Scheduled(request, 3, count, Kind.RECOMPUTE, sample=False) for request in (a, b)]
        plan = StepPlan(len(steps), middle, use_cache=True)
        assert len(fast.forward(plan, fast.prepare(plan))) == 0
        assert fast.greedy is not None
        assert fast.greedy.tolist() == []
    # Proposals to verify, beside single positions: logits of them all, but for a position in the middle of a prompt.
    a.tokens.append(5)
    c.tokens.append(8)
    for number, (drafts, more, sample) in enumerate(
        (([7, 9, 11], [], True), ([7, 9, 11], [4], False), ([3] * 9, [], True))
    ):
        verify = Scheduled(a, len(a.tokens) - 1, 1 + len(drafts), Kind.VERIFY, sample=True)
        verify.propose(drafts)
        items = [Scheduled(c, len(c.tokens) - 1, 1, Kind.DECODE, sample=sample), verify]
        if more:
            items.append(Scheduled(d, len(d.tokens) - 1, 2, Kind.VERIFY, sample=True, drafts=more))
        plan = StepPlan(len(steps) + 1 + number, items, use_cache=True)
        expected = plain.forward(plan, plain.prepare(plan)).clone()
        for depths in (runner.VERIFY_DEPTHS, ()):  # in the fixed buffers, and as any step
            with monkeypatch.context() as patch:
                patch.setattr(runner, "VERIFY_DEPTHS", depths)
                packed = fast.prepare(plan)
            assert (packed.shape is not None) == bool(depths)
            got = fast.forward(plan, packed)
            assert len(got) == sample + 1 + len(drafts) + 2 * len(more)
            assert relative(got, expected) <= allowed
            assert fast.greedy is not None
            assert not fast.greedy.final, "the host decides"
            assert fast.greedy.tolist() == got.argmax(-1).tolist()


def test_a_proposing_model_on_the_gpu_path_says_what_it_says_on_the_plain_one() -> None:
    model: Any = build("llama").to(DEVICE)
    model.set_attn_implementation(NAME)
    tensors = PagedKVTensors(16, 16, torch.device(DEVICE), torch.float32)
    tensors.reserve([(2, 16, 16)] * 3)
    plain = ModelRunner(model, tensors)
    architecture = fuse(model, torch.float32, 64)
    fast = GpuRunner(architecture, plain, 64, 2).sibling(
        architecture=replace(architecture, layers=architecture.layers[:2])
    )
    short = ModelRunner(first_layers(model, 2), tensors)
    said = []
    for each in (short, fast):
        # Tokens are drawn for the request, but proposed are the likeliest.
        sampling = SamplingParams(max_tokens=9, temperature=5.0)
        request = Request(handle=0, prompt_len=20, tokens=list(range(3, 23)), sampling=sampling, seed=1, arrival=0)
        request.blocks = [3, 5, 1]
        passes = Passes(each)
        passes.follow(Features(cuda_graphs=True))
        start, tokens = 0, []
        for place in range(6):
            count = len(request.tokens) - start
            tokens += passes.run([Scheduled(request, start, count, Kind.DRAFT, sample=True)]).tolist()
            start += count
            request.tokens.append(tokens[-1])
            if place == 2:  # what it said was right, and the model said one more
                request.tokens.append(9)
        passes.forget_graphs()
        # One after another, on the GPU before the host knows what the last one said.
        proposer = EarlyExitProposer(tensors, lambda _, runner=each: runner)
        items = [Scheduled(request, start, 1 + count, Kind.VERIFY, sample=True) for count in (4, 4)]
        items[1].request = replace(request, handle=1, tokens=[*request.tokens[:-1], 77], blocks=[2, 6, 4])
        for keys in (*tensors.keys, *tensors.values):
            for old, new in zip(request.blocks, (2, 6, 4), strict=True):
                keys[16 * new :][:16] = keys[16 * old :][:16]
        for number, count in enumerate((4, 1, 3)):
            items[0].count = 1 + count
            tokens += proposer.propose(StepPlan(number, items, use_cache=True), items, Features(early_exit_layers=2))
        assert len(request.tokens) == start + 1, "the request has none of it"
        said.append(tokens)
    assert said[0] == said[1]
    assert len(set(map(str, said[0]))) > 4


def test_the_fast_paths_check_finds_a_single_wrong_matrix_in_a_deep_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "CHECK_LAYERS", 2)
    model: Any = build("llama").to(DEVICE)
    model.set_attn_implementation(NAME)
    tensors = PagedKVTensors(4, 16, torch.device(DEVICE), torch.float32)
    tensors.reserve([(2, 16, 16)] * 3)
    architecture = fuse(model, torch.float32, 64)
    every = list(model.model.layers)
    path.check(model, architecture, tensors, 2)
    assert list(model.model.layers) == every
    architecture.layers[2].down = architecture.layers[2].down * 1.02
    with pytest.raises(UnsupportedError, match="layers 2 to 2"):
        path.check(model, architecture, tensors, 2)
