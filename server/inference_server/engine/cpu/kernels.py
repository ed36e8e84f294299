"""Compiled kernels of the CPU fast path, and the region that runs a whole list of them on all cores at once.

A forward pass is a *program*: rows of integers, one row per operation, each an operation code and its arguments
(addresses, sizes, flags). :data:`region` is entered by every thread of one OpenMP team and walks over a range of the
program with a barrier after each operation, so that 30 layers cost one launch instead of some 300 calls from Python.

The matrix kernel is generated as LLVM vector code, 16 lanes wide, which becomes AVX-512, AVX2 or NEON. It sums every
dot product in the same order whatever the batch is, so a row's result does not depend on its neighbours.

All of it is in one file because numba's cache of compiled code is keyed by this file alone.
"""

# numba's decorators turn these functions into something else than mypy reads.
# mypy: disable-error-code="attr-defined, call-arg, misc, no-untyped-call, var-annotated"

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SPLIT = 256
"""Context positions that one unit of attention work covers. Fixed, so that results do not depend on the batch."""
MAX_GROUP = 16
"""Most query heads per KV head that attention knows."""
MAX_HEAD_DIM = 256
TILE_N = 8
"""Rows of a weight matrix that one step of the matrix kernel covers."""
ROW_BLOCK = 64
"""Activations that are multiplied with all of a thread's weights before the next ones."""
PACK_BLOCK = 32
"""Neighbouring weights of a row that a packed matrix keeps together."""
REGISTER_ROWS = 4
"""Rows up to which packed weights are expanded in registers for each of them; for more, once into the cache."""
GRID_SYMMETRIC, GRID_ZERO_POINT, GRID_MINIMUM = 0, 1, 2
"""What a packed 4-bit group says beside its scale: nothing (zero is at 8), an integer zero, or the least value."""
OP_WIDTH = 16
"""Integers in one row of a program."""

NATIVE_BF16 = bool(llvm.get_host_cpu_features().get("avx512bf16", False))
LOOKS_UP = bool(llvm.get_host_cpu_features().get("avx512f", False))
"""Whether one instruction looks 16 numbers up in a register: the 16 values on a 4-bit group's grid are made once."""

# Operation codes, and what columns 1… of their row mean.
OP_EMBED = 0  # table, out (float32), width, bf16
OP_NORM = 1  # x (float32, updated), delta or 0, weight (float32), out, width, eps (float32 bits), bf16, kept rows only
OP_LINEAR = 2  # x, weight, out, in features, out features, bf16, bf16 out, kept rows only
OP_ROTARY = (
    3  # qkv, bias or 0, q norm or 0, k norm or 0, eps bits, keys, values, heads, kv heads, head dim, rotate, bf16,
    # scales of the keys and of the values (0: stored whole)
)
OP_ATTEND = (
    4  # qkv, out, keys, values, heads, kv heads, head dim, window or 0, scaling (float32 bits), bf16, scales as above
)
OP_COMBINE = 5  # out, heads, kv heads, head dim, window or 0, bf16
OP_SILU = 6  # gate and up, out, width, bf16
OP_ARGMAX = 7  # logits, width, bf16
OP_CAPTURE = 8  # x (float32), width, place of it in a captured row, width of a captured row
OP_PACKED = 9  # x, packed weight, out, in features, out features, bf16, bf16 out, kept rows only, bits, group, grid

# What the step parameters mean: the integers that :data:`region` is given.
P_PROGRAM = 0
P_FIRST = 1
P_LAST = 2
P_BARRIER = 3
"""Address of the barrier's counter, zero at entry."""
P_THREADS = 4
"""Address of the OpenMP runtime's ``omp_get_num_threads``, or 0: one thread."""
P_THREAD = 5
"""Address of ``omp_get_thread_num``."""
P_YIELD = 6
"""Address of ``sched_yield``, or 0."""
P_ROWS = 7
P_IDS = 8
"""Token ids, int64 per row."""
P_POSITIONS = 9
P_SLOTS = 10
"""Cache slot to write per row, int64; address 0: write none."""
P_KEPT = 11
"""Rows to keep logits of, int64."""
P_NUM_KEPT = 12
P_ATTEND_ROWS = 13
"""Rows that the attention kernel serves, int64."""
P_NUM_ATTEND = 14
P_TABLES = 15
"""Per attended row, the address of its int32 block table."""
P_BLOCK_SIZE = 16
P_MAX_SPLITS = 17
P_PARTIALS = 18
"""float32 ``[attended rows, kv heads, max splits, group, head dim + 2]``."""
P_COS = 19
"""float32 ``[positions, head dim / 2]``"""
P_SIN = 20
P_GREEDY = 21
"""int64 per kept row: where the argmax goes."""
P_CAPTURED = 22
"""Where captured rows go, float32; address 0: capture none."""
NUM_PARAMETERS = 23

LANES = 16
_LOWEST = np.float32(-3.0e38)
_i8, _i16, _i32, _i64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_float = ir.FloatType()
_vector = ir.VectorType(_float, LANES)


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


# -- building blocks that numba has no words for -----------------------------------------------------------------------


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return pointer


_pointer_f32 = _pointer_to(types.float32)
_pointer_i8 = _pointer_to(types.int8)
_pointer_u16 = _pointer_to(types.uint16)
_pointer_i32 = _pointer_to(types.int32)
_pointer_i64 = _pointer_to(types.int64)


@intrinsic
def _float_from_bits(typingctx: Any, bits: Any) -> Any:  # noqa: ARG001
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(builder.trunc(args[0], _i32), _float)

    return types.float32(types.int64), codegen


@intrinsic
def _power_of_two(typingctx: Any, exponent: Any) -> Any:  # noqa: ARG001
    """2 ** exponent for a whole float32 in [-126, 127]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        whole = builder.fptosi(args[0], _i32)
        return builder.bitcast(builder.shl(builder.add(whole, _i32(127)), _i32(23)), _float)

    return types.float32(types.float32), codegen


@intrinsic
def _widen(typingctx: Any, bits: Any) -> Any:  # noqa: ARG001
    """bfloat16 bits to float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(builder.shl(builder.zext(args[0], _i32), _i32(16)), _float)

    return types.float32(types.uint16), codegen


def _narrow_value(builder: Any, value: Any) -> Any:
    """float32 (scalar or vector) to bfloat16 bits, to nearest, ties to even."""
    vector = isinstance(value.type, ir.VectorType)
    wide = ir.VectorType(_i32, value.type.count) if vector else _i32
    narrow = ir.VectorType(_i16, value.type.count) if vector else _i16

    def constant(number: int) -> Any:
        return ir.Constant(wide, [number] * value.type.count) if vector else _i32(number)

    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    return builder.trunc(builder.lshr(rounded, constant(16)), narrow)


@intrinsic
def _narrow(typingctx: Any, value: Any) -> Any:  # noqa: ARG001
    """float32 to bfloat16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return _narrow_value(builder, args[0])

    return types.uint16(types.float32), codegen


@intrinsic
def _atomic_add(typingctx: Any, address: Any, amount: Any) -> Any:  # noqa: ARG001
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        pointer = builder.inttoptr(args[0], _i64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _atomic_load(typingctx: Any, address: Any) -> Any:  # noqa: ARG001
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        pointer = builder.inttoptr(args[0], _i64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:  # noqa: ARG001
    """Tell the core that this is a waiting loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        triple = llvm.get_process_triple()
        if triple.startswith(("x86", "i386", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif triple.startswith(("aarch64", "arm64")):
            kind = ir.FunctionType(ir.VoidType(), [_i32])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint"), [_i32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typingctx: Any, address: Any) -> Any:  # noqa: ARG001
    """Call a C function ``int f(void)`` by its address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        kind = ir.FunctionType(_i32, [])
        result = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return builder.sext(result, _i64)

    return types.int64(types.int64), codegen


# -- vector code -------------------------------------------------------------------------------------------------------


def _loop(builder: Any, end: Any, step: int, carried: list[Any], body: Any) -> list[Any]:
    """Emit ``for offset in range(0, end, step): carried = body(offset, carried)``; return the last ones."""
    before = builder.block
    head = builder.append_basic_block("loop.head")
    inside = builder.append_basic_block("loop.body")
    after = builder.append_basic_block("loop.end")
    builder.branch(head)
    builder.position_at_end(head)
    offset = builder.phi(_i64)
    offset.add_incoming(_i64(0), before)
    values = []
    for initial in carried:
        value = builder.phi(initial.type)
        value.add_incoming(initial, before)
        values.append(value)
    builder.cbranch(builder.icmp_signed("<", offset, end), inside, after)
    builder.position_at_end(inside)
    results = body(offset, values)
    for value, result in zip(values, results, strict=True):
        value.add_incoming(result, builder.block)
    offset.add_incoming(builder.add(offset, _i64(step)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def _splat(number: float) -> Any:
    # As float32: LLVM refuses a constant that float32 cannot hold exactly.
    return ir.Constant(_vector, [float(np.float32(number))] * LANES)


def _broadcast(builder: Any, scalar: Any) -> Any:
    single = builder.insert_element(ir.Constant(_vector, ir.Undefined), scalar, _i32(0))
    return _shuffle(builder, single, single, [0] * LANES)


def _call_vector(builder: Any, name: str, *arguments: Any) -> Any:
    kind = ir.FunctionType(_vector, [_vector] * len(arguments))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{LANES}f32"), list(arguments))


def _read(builder: Any, address: Any, bf16: bool) -> Any:
    """16 numbers as float32."""
    if not bf16:
        return builder.load(builder.inttoptr(address, _vector.as_pointer()), align=4)
    narrow = ir.VectorType(_i16, LANES)
    wide = ir.VectorType(_i32, LANES)
    bits = builder.zext(builder.load(builder.inttoptr(address, narrow.as_pointer()), align=2), wide)
    return builder.bitcast(builder.shl(bits, ir.Constant(wide, [16] * LANES)), _vector)


def _write(builder: Any, value: Any, address: Any, bf16: bool) -> None:
    stored = _narrow_value(builder, value) if bf16 else value
    builder.store(stored, builder.inttoptr(address, stored.type.as_pointer()), align=2 if bf16 else 4)


def _exp_vector(builder: Any, x: Any) -> Any:
    """Compute e ** x without a branch (Cephes' expf; relative error below 2e-7)."""
    limit, lowest = _splat(87.0), _splat(-87.0)
    x = builder.select(builder.fcmp_ordered("<", x, limit), x, limit)
    x = builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest)
    whole = _call_vector(
        builder, "llvm.floor", _call_vector(builder, "llvm.fma", x, _splat(1.44269504088896341), _splat(0.5))
    )
    x = _call_vector(builder, "llvm.fma", whole, _splat(-0.693359375), x)
    x = _call_vector(builder, "llvm.fma", whole, _splat(2.12194440e-4), x)
    y = _splat(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        y = _call_vector(builder, "llvm.fma", y, x, _splat(factor))
    wide = ir.VectorType(_i32, LANES)
    exponent = builder.add(builder.fptosi(whole, wide), ir.Constant(wide, [127] * LANES))
    return builder.fmul(y, builder.bitcast(builder.shl(exponent, ir.Constant(wide, [23] * LANES)), _vector))


def _silu_of(*, bf16: bool) -> Any:
    """Generate ``out = gate / (1 + exp(-gate)) * up`` over a multiple of 16 numbers, given three addresses."""
    size = 2 if bf16 else 4

    @intrinsic
    def silu(typingctx: Any, gate: Any, up: Any, out: Any, count: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            gate, up, out, count = args

            def step(offset: Any, carried: list[Any]) -> list[Any]:
                g = _read(builder, builder.add(gate, offset), bf16)
                u = _read(builder, builder.add(up, offset), bf16)
                bottom = builder.fadd(_splat(1.0), _exp_vector(builder, builder.fneg(g)))
                _write(builder, builder.fmul(builder.fdiv(g, bottom), u), builder.add(out, offset), bf16)
                return carried

            _loop(builder, builder.mul(count, _i64(size)), LANES * size, [], step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return silu


_silu_f32 = _silu_of(bf16=False)
_silu_bf16 = _silu_of(bf16=True)


@intrinsic
def _largest_of(typingctx: Any, line: Any, count: Any) -> Any:  # noqa: ARG001
    """Largest of a multiple of 16 float32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        line, count = args

        def step(offset: Any, carried: list[Any]) -> list[Any]:
            value = _read(builder, builder.add(line, offset), False)
            return [builder.select(builder.fcmp_ordered(">", value, carried[0]), value, carried[0])]

        (most,) = _loop(builder, builder.mul(count, _i64(4)), LANES * 4, [_splat(float(_LOWEST))], step)
        kind = ir.FunctionType(_float, [_vector])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{LANES}f32")
        return builder.call(reduce, [most])

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def _exp_and_sum(typingctx: Any, line: Any, count: Any, scaling: Any, most: Any) -> Any:  # noqa: ARG001
    """Replace a multiple of 16 float32 by ``exp(scaling * (x - most))`` and return their sum."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        line, count, scaling, most = args
        scaling, most = _broadcast(builder, scaling), _broadcast(builder, most)

        def step(offset: Any, carried: list[Any]) -> list[Any]:
            address = builder.add(line, offset)
            value = builder.fmul(builder.fsub(_read(builder, address, False), most), scaling)
            value = _exp_vector(builder, value)
            _write(builder, value, address, False)
            return [builder.fadd(carried[0], value)]

        (total,) = _loop(builder, builder.mul(count, _i64(4)), LANES * 4, [_splat(0.0)], step)
        return builder.extract_element(_reduce(builder, [total]), _i32(0))

    return types.float32(types.int64, types.int64, types.float32, types.float32), codegen


def _weighted_sum(rows: int, vectors: int, *, bf16: bool) -> Any:
    """Generate ``out[i] += sum(weights[i, p] * values[p])`` for ``rows`` × 16 ``vectors`` sums kept in registers.

    The arguments: address of the values and their stride in bytes, address of the float32 weights and the stride of
    their rows, address of the float32 sums and the stride of theirs, and the number of positions.
    """
    size = 2 if bf16 else 4

    @intrinsic
    def weighted(
        typingctx: Any,  # noqa: ARG001
        values: Any,  # noqa: ARG001
        value_stride: Any,  # noqa: ARG001
        weights: Any,  # noqa: ARG001
        weight_stride: Any,  # noqa: ARG001
        out: Any,  # noqa: ARG001
        out_stride: Any,  # noqa: ARG001
        count: Any,  # noqa: ARG001
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            values, value_stride, weights, weight_stride, out, out_stride, count = args
            targets = [
                builder.add(builder.add(out, builder.mul(out_stride, _i64(i))), _i64(v * LANES * 4))
                for i in range(rows)
                for v in range(vectors)
            ]
            lines = [builder.add(weights, builder.mul(weight_stride, _i64(i))) for i in range(rows)]

            def step(position: Any, sums: list[Any]) -> list[Any]:
                base = builder.add(values, builder.mul(value_stride, position))
                parts = [_read(builder, builder.add(base, _i64(v * LANES * size)), bf16) for v in range(vectors)]
                after = []
                for i, line in enumerate(lines):
                    address = builder.add(line, builder.mul(position, _i64(4)))
                    weight = builder.load(builder.inttoptr(address, _float.as_pointer()), align=4)
                    factor = _broadcast(builder, weight)
                    after += [
                        _call_vector(builder, "llvm.fma", factor, part, sums[i * vectors + v])
                        for v, part in enumerate(parts)
                    ]
                return after

            sums = _loop(builder, count, 1, [_read(builder, target, False) for target in targets], step)
            for target, value in zip(targets, sums, strict=True):
                _write(builder, value, target, False)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return weighted


# -- the matrix kernel -------------------------------------------------------------------------------------------------


def _tile(rows: int, columns: int, *, bf16: bool) -> Any:
    """Generate ``out[i, j] = sum(x[i] * weight[j])`` for ``rows`` × ``columns`` results that all stay in registers.

    The arguments of the generated function: addresses of ``x``, ``weight`` and ``out``, their row strides in bytes,
    the length of a row (a multiple of 16, or of 32 in bfloat16), and whether ``out`` is bfloat16.
    """
    width = 2 * LANES if bf16 else LANES
    size = 2 if bf16 else 4

    @intrinsic
    def tile(
        typingctx: Any,  # noqa: ARG001
        x: Any,  # noqa: ARG001
        x_stride: Any,  # noqa: ARG001
        w: Any,  # noqa: ARG001
        w_stride: Any,  # noqa: ARG001
        out: Any,  # noqa: ARG001
        out_stride: Any,  # noqa: ARG001
        length: Any,  # noqa: ARG001
        narrow: Any,  # noqa: ARG001
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            x, x_stride, w, w_stride, out, out_stride, length, narrow = args
            x_rows = [builder.add(x, builder.mul(x_stride, _i64(i))) for i in range(rows)]
            w_rows = [builder.add(w, builder.mul(w_stride, _i64(j))) for j in range(columns)]
            ahead = builder.mul(w_stride, _i64(columns))

            def step(offset: Any, sums: list[Any]) -> list[Any]:
                if rows > 1:
                    # The next tile's weights are on their way while this one's are multiplied: with several rows
                    # there is enough to do meanwhile, and waiting for memory would come on top of it.
                    for row in w_rows:
                        _prefetch(builder, builder.add(builder.add(row, offset), ahead))
                w_values = [_load(builder, builder.add(row, offset), bf16) for row in w_rows]
                after = []
                for i, row in enumerate(x_rows):
                    x_value = _load(builder, builder.add(row, offset), bf16)
                    after += [
                        _multiply_add(builder, sums[i * columns + j], x_value, w_value, bf16)
                        for j, w_value in enumerate(w_values)
                    ]
                return after

            end = builder.mul(length, _i64(size))
            sums = _loop(builder, end, width * size, [_splat(0.0)] * (rows * columns), step)
            _store_tile(builder, sums, rows, columns, out, out_stride, narrow)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


def _power_of_two_parts(total: int, most: int) -> list[tuple[int, int]]:
    """Cut ``total`` into powers of two of at most ``most``; return where each begins, and its size."""
    parts, first = [], 0
    while first < total:
        size = min(1 << (total - first).bit_length() - 1, most)
        parts.append((first, size))
        first += size
    return parts


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address, which need not be anybody's."""
    kind = ir.FunctionType(ir.VoidType(), [_i8.as_pointer(), _i32, _i32, _i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, _i8.as_pointer()), _i32(0), _i32(3), _i32(1)])


def _store_tile(builder: Any, sums: list[Any], rows: int, columns: int, out: Any, out_stride: Any, narrow: Any) -> None:
    """Add up the lanes and write the results, as bfloat16 where ``narrow`` is not zero."""
    # As many rows at a time as make a power of two of vectors, 16 at most.
    for first, count in _power_of_two_parts(rows, LANES // columns):
        part = sums[first * columns : (first + count) * columns]
        target = builder.add(out, builder.mul(out_stride, _i64(first)))
        results = _reduce(builder, part)
        narrowed = _narrow_value(builder, results)
        with builder.if_else(builder.icmp_signed("!=", narrow, _i64(0))) as (to_bf16, to_f32):
            with to_bf16:
                _store(builder, narrowed, count, columns, target, out_stride, 2)
            with to_f32:
                _store(builder, results, count, columns, target, out_stride, 4)


def _load(builder: Any, address: Any, bf16: bool) -> Any:
    if not bf16:
        return builder.load(builder.inttoptr(address, _vector.as_pointer()), align=4)
    kind = ir.VectorType(_BFloat(), 32) if NATIVE_BF16 else ir.VectorType(_i32, LANES)
    value = builder.load(builder.inttoptr(address, kind.as_pointer()), align=2)
    if NATIVE_BF16:
        return value
    # Two bfloat16 in 32 bits: the low half shifted up and the high half masked are both valid float32.
    low = builder.shl(value, ir.Constant(kind, [16] * LANES))
    high = builder.and_(value, ir.Constant(kind, [0xFFFF0000] * LANES))
    return builder.bitcast(low, _vector), builder.bitcast(high, _vector)


def _multiply_add(builder: Any, total: Any, x: Any, w: Any, bf16: bool) -> Any:
    if bf16 and NATIVE_BF16:
        pairs = ir.VectorType(_BFloat(), 32)
        kind = ir.FunctionType(_vector, [_vector, pairs, pairs])
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(dot, [total, x, w])
    kind = ir.FunctionType(_vector, [_vector] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    if not bf16:
        return builder.call(fma, [x, w, total])
    for x_half, w_half in zip(x, w, strict=True):
        total = builder.call(fma, [x_half, w_half, total])
    return total


def _reduce(builder: Any, vectors: list[Any]) -> Any:
    """Sum the lanes of each of ``vectors`` (a power of two of them); return the sums as one vector, in order.

    Every level adds the upper half of each vector to its lower half and packs two vectors into one, so that 16
    vectors take 45 instructions rather than 128.
    """
    lanes = LANES
    while len(vectors) > 1:
        half = lanes // 2
        groups = LANES // lanes
        low, high = [], []
        for side in range(2):
            for group in range(groups):
                begin = side * LANES + group * lanes
                low += list(range(begin, begin + half))
                high += list(range(begin + half, begin + lanes))
        vectors = [
            builder.fadd(_shuffle(builder, a, b, low), _shuffle(builder, a, b, high))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        lanes = half
    (value,) = vectors
    while lanes > 1:
        half = lanes // 2
        count = value.type.count
        low = [begin + lane for begin in range(0, count, lanes) for lane in range(half)]
        high = [index + half for index in low]
        value = builder.fadd(_shuffle(builder, value, value, low), _shuffle(builder, value, value, high))
        lanes = half
    return value


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_i32, len(lanes)), lanes))


def _store(builder: Any, results: Any, rows: int, columns: int, out: Any, stride: Any, size: int) -> None:
    for i in range(rows):
        part = results
        if rows > 1:
            part = _shuffle(builder, results, results, list(range(i * columns, (i + 1) * columns)))
        address = builder.add(out, builder.mul(stride, _i64(i)))
        builder.store(part, builder.inttoptr(address, part.type.as_pointer()), align=size)


# -- packed weights ----------------------------------------------------------------------------------------------------
#
# A packed matrix is a list of tiles, each of 8 rows. A tile is a list of groups along the rows; a group has the scales
# of the 8 rows (float32 for 8 bits, float16 for 4), with 4 bits their zeros or minima unless the grid is symmetric, and
# then its blocks: for each row 32 weights, in 4 bits the first 16 in the low halves of 16 bytes and the others in the
# high halves. So a thread reads its weights as one stream. ``inference_server.engine.quantization.packing`` writes it.


class _Packed:
    """Emits the reading of a packed tile: ``scale * q + offset`` in float32, or that rounded to bfloat16."""

    def __init__(self, builder: Any, bits: int, bf16: bool, columns: int, first: Any, kind: Any) -> None:
        self.builder, self.bits, self.bf16, self.columns, self.kind = builder, bits, bf16, columns, kind
        size = 4 if bits == 8 else 2
        self.scales_at = builder.mul(first, _i64(size))
        self.data_at = builder.mul(first, _i64(PACK_BLOCK * bits // 8))
        self.block_bytes = TILE_N * PACK_BLOCK * bits // 8
        symmetric = builder.icmp_signed("==", kind, _i64(GRID_SYMMETRIC))
        self.header = _i64(TILE_N * size) if bits == 8 else builder.select(symmetric, _i64(16), _i64(32))

    def parameters(self, group: Any) -> tuple[list[Any], list[Any]]:
        """Scale and offset of each column, broadcast; or all values on its grid, and then, as in 8 bits, no offsets."""
        builder = self.builder
        scales = self._numbers(builder.add(group, self.scales_at))
        if self.bits == 8:
            return [self._spread(scales, j) for j in range(self.columns)], []
        # In a symmetric group these are the first weights; they are read and not used.
        second = self._numbers(builder.add(group, builder.add(self.scales_at, _i64(2 * TILE_N))))
        eight = ir.Constant(second.type, [8.0] * TILE_N)
        zero = builder.select(builder.icmp_signed("==", self.kind, _i64(GRID_SYMMETRIC)), eight, second)
        below = builder.fneg(builder.fmul(zero, scales))
        offsets = builder.select(builder.icmp_signed("==", self.kind, _i64(GRID_MINIMUM)), second, below)
        columns = range(self.columns)
        if LOOKS_UP:
            every = ir.Constant(_vector, [float(value) for value in range(LANES)])
            return [
                _call_vector(builder, "llvm.fma", self._spread(scales, j), every, self._spread(offsets, j))
                for j in columns
            ], []
        return [self._spread(scales, j) for j in columns], [self._spread(offsets, j) for j in columns]

    def weights(self, block: Any, column: int, scale: Any, offset: Any) -> Any:
        """32 weights of a row, as the tiles of whole weights have them."""
        builder = self.builder
        address = builder.add(builder.add(block, self.data_at), _i64(column * PACK_BLOCK * self.bits // 8))
        bytes16, wide = ir.VectorType(_i8, LANES), ir.VectorType(_i32, LANES)
        if self.bits == 8:
            halves = [
                builder.sext(
                    builder.load(builder.inttoptr(builder.add(address, _i64(at)), bytes16.as_pointer()), align=1), wide
                )
                for at in (0, LANES)
            ]
            values = [builder.fmul(builder.sitofp(each, _vector), scale) for each in halves]
        else:
            both = builder.zext(builder.load(builder.inttoptr(address, bytes16.as_pointer()), align=1), wide)
            if LOOKS_UP:  # it takes the lowest four bits and ignores the others
                values = [
                    _look_up(builder, scale, each)
                    for each in (both, builder.lshr(both, ir.Constant(wide, [4] * LANES)))
                ]
                return _round_pairs(builder, *values) if self.bf16 and NATIVE_BF16 else values
            low = builder.and_(both, ir.Constant(wide, [15] * LANES))
            high = builder.lshr(both, ir.Constant(wide, [4] * LANES))
            values = [
                _call_vector(builder, "llvm.fma", scale, builder.sitofp(each, _vector), offset) for each in (low, high)
            ]
        return _round_pairs(builder, *values) if self.bf16 and NATIVE_BF16 else values

    def _numbers(self, address: Any) -> Any:
        builder, floats = self.builder, ir.VectorType(_float, TILE_N)
        if self.bits == 8:
            return builder.load(builder.inttoptr(address, floats.as_pointer()), align=4)
        halves = ir.VectorType(ir.HalfType(), TILE_N)
        return builder.fpext(builder.load(builder.inttoptr(address, halves.as_pointer()), align=2), floats)

    def _spread(self, numbers: Any, lane: int) -> Any:
        return _shuffle(self.builder, numbers, numbers, [lane] * LANES)


def _look_up(builder: Any, table: Any, places: Any) -> Any:
    """Read numbers of a vector at the places given by another's lowest four bits."""
    kind = ir.FunctionType(_vector, [_vector, places.type])
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    return builder.call(permute, [table, places])


def _round_pairs(builder: Any, low: Any, high: Any) -> Any:
    """Two vectors of float32 as one of bfloat16, in order."""
    kind = ir.FunctionType(ir.VectorType(_BFloat(), 32), [_vector, _vector])
    convert = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    return builder.call(convert, [high, low])


def _packed_tile(rows: int, columns: int, *, bits: int, bf16: bool) -> Any:
    """Generate what :func:`_tile` does for packed weights, in the same order of sums, expanding them in registers.

    The arguments: addresses of ``x`` and its stride, of the packed tile, the first of its columns to compute, address
    of ``out`` and its stride, the number of groups and of blocks in each, the grid, and whether ``out`` is bfloat16.
    """
    size = 2 if bf16 else 4

    @intrinsic
    def tile(
        typingctx: Any,  # noqa: ARG001
        x: Any,  # noqa: ARG001
        x_stride: Any,  # noqa: ARG001
        w: Any,  # noqa: ARG001
        first: Any,  # noqa: ARG001
        out: Any,  # noqa: ARG001
        out_stride: Any,  # noqa: ARG001
        groups: Any,  # noqa: ARG001
        blocks: Any,  # noqa: ARG001
        grid: Any,  # noqa: ARG001
        narrow: Any,  # noqa: ARG001
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            x, x_stride, w, first, out, out_stride, groups, blocks, grid, narrow = args
            packed = _Packed(builder, bits, bf16, columns, first, grid)
            data_bytes = builder.mul(blocks, _i64(packed.block_bytes))
            group_bytes = builder.add(packed.header, data_bytes)
            row_bytes = builder.mul(blocks, _i64(PACK_BLOCK * size))
            x_rows = [builder.add(x, builder.mul(x_stride, _i64(i))) for i in range(rows)]

            def group_step(group: Any, sums: list[Any]) -> list[Any]:
                at = builder.add(w, builder.mul(group, group_bytes))
                scales, offsets = packed.parameters(at)
                begin = builder.mul(group, row_bytes)
                data = builder.add(at, packed.header)

                def block_step(block: Any, sums: list[Any]) -> list[Any]:
                    after = list(sums)
                    place = builder.add(data, builder.mul(block, _i64(packed.block_bytes)))
                    offset = builder.add(begin, builder.mul(block, _i64(PACK_BLOCK * size)))
                    x_values = [_load_block(builder, builder.add(row, offset), bf16) for row in x_rows]
                    for j in range(columns):
                        w_values = packed.weights(place, j, scales[j], offsets[j] if offsets else None)
                        for i, x_value in enumerate(x_values):
                            index = i * columns + j
                            if bf16:
                                after[index] = _multiply_add(builder, after[index], x_value, w_values, True)
                            else:
                                for x_half, w_half in zip(x_value, w_values, strict=True):
                                    after[index] = _multiply_add(builder, after[index], x_half, w_half, False)
                    return after

                return _loop(builder, blocks, 1, sums, block_step)

            sums = _loop(builder, groups, 1, [_splat(0.0)] * (rows * columns), group_step)
            _store_tile(builder, sums, rows, columns, out, out_stride, narrow)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return tile


def _load_block(builder: Any, address: Any, bf16: bool) -> Any:
    """32 activations: one vector of bfloat16, or two of float32."""
    if bf16:
        return _load(builder, address, True)
    return [_load(builder, builder.add(address, _i64(at)), False) for at in (0, LANES * 4)]


def _expand_tile(*, bits: int, bf16: bool) -> Any:
    """Generate the expansion of a packed tile into 8 rows of whole weights at an address."""
    size = 2 if bf16 else 4

    @intrinsic
    def expand(typingctx: Any, w: Any, out: Any, groups: Any, blocks: Any, grid: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            w, out, groups, blocks, grid = args
            packed = _Packed(builder, bits, bf16, TILE_N, _i64(0), grid)
            group_bytes = builder.add(packed.header, builder.mul(blocks, _i64(packed.block_bytes)))
            row_bytes = builder.mul(blocks, _i64(PACK_BLOCK * size))
            stride = builder.mul(groups, row_bytes)

            def group_step(group: Any, carried: list[Any]) -> list[Any]:
                at = builder.add(w, builder.mul(group, group_bytes))
                scales, offsets = packed.parameters(at)
                data = builder.add(at, packed.header)
                target = builder.add(out, builder.mul(group, row_bytes))

                def block_step(block: Any, carried: list[Any]) -> list[Any]:
                    place = builder.add(data, builder.mul(block, _i64(packed.block_bytes)))
                    line = builder.add(target, builder.mul(block, _i64(PACK_BLOCK * size)))
                    for j in range(TILE_N):
                        values = packed.weights(place, j, scales[j], offsets[j] if offsets else None)
                        address = builder.add(line, builder.mul(stride, _i64(j)))
                        if bf16 and NATIVE_BF16:
                            builder.store(values, builder.inttoptr(address, values.type.as_pointer()), align=2)
                            continue
                        for half, value in enumerate(values):
                            _write(builder, value, builder.add(address, _i64(half * LANES * size)), bf16)
                    return carried

                return _loop(builder, blocks, 1, carried, block_step)

            _loop(builder, groups, 1, [], group_step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return expand


_sum_1x1_f32 = _weighted_sum(1, 1, bf16=False)
_sum_1x4_f32 = _weighted_sum(1, 4, bf16=False)
_sum_3x4_f32 = _weighted_sum(3, 4, bf16=False)
_sum_4x4_f32 = _weighted_sum(4, 4, bf16=False)
_sum_1x1_bf16 = _weighted_sum(1, 1, bf16=True)
_sum_1x4_bf16 = _weighted_sum(1, 4, bf16=True)
_sum_3x4_bf16 = _weighted_sum(3, 4, bf16=True)
_sum_4x4_bf16 = _weighted_sum(4, 4, bf16=True)
_tile_1x8_f32 = _tile(1, 8, bf16=False)
_tile_2x8_f32 = _tile(2, 8, bf16=False)
_tile_3x4_f32 = _tile(3, 4, bf16=False)
_tile_4x4_f32 = _tile(4, 4, bf16=False)
_tile_5x4_f32 = _tile(5, 4, bf16=False)
_tile_6x4_f32 = _tile(6, 4, bf16=False)
_tile_1x1_f32 = _tile(1, 1, bf16=False)
_tile_1x8_bf16 = _tile(1, 8, bf16=True)
_tile_2x8_bf16 = _tile(2, 8, bf16=True)
_tile_3x4_bf16 = _tile(3, 4, bf16=True)
_tile_4x4_bf16 = _tile(4, 4, bf16=True)
_tile_5x4_bf16 = _tile(5, 4, bf16=True)
_tile_6x4_bf16 = _tile(6, 4, bf16=True)
_tile_1x1_bf16 = _tile(1, 1, bf16=True)
_packed_1x8_f32_8 = _packed_tile(1, 8, bits=8, bf16=False)
_packed_2x8_f32_8 = _packed_tile(2, 8, bits=8, bf16=False)
_packed_1x8_f32_4 = _packed_tile(1, 8, bits=4, bf16=False)
_packed_2x8_f32_4 = _packed_tile(2, 8, bits=4, bf16=False)
_packed_1x8_bf16_8 = _packed_tile(1, 8, bits=8, bf16=True)
_packed_2x8_bf16_8 = _packed_tile(2, 8, bits=8, bf16=True)
_packed_1x8_bf16_4 = _packed_tile(1, 8, bits=4, bf16=True)
_packed_2x8_bf16_4 = _packed_tile(2, 8, bits=4, bf16=True)
_expand_f32_8 = _expand_tile(bits=8, bf16=False)
_expand_f32_4 = _expand_tile(bits=4, bf16=False)
_expand_bf16_8 = _expand_tile(bits=8, bf16=True)
_expand_bf16_4 = _expand_tile(bits=4, bf16=True)


@njit(cache=True, nogil=True, inline="never")
def _matrix_f32(
    x: int, x_stride: int, w: int, w_stride: int, out: int, out_stride: int, m: int, n: int, k: int
) -> None:
    j = 0
    while j + 8 <= n:
        i = 0
        wj, oj = w + j * w_stride, out + j * 4
        wh, oh = wj + 4 * w_stride, oj + 16
        # As many rows at once as registers hold: each pass over the weights but the first is time lost.
        while i < m:
            xi, to = x + i * x_stride, i * out_stride
            left = m - i
            if left == 1:
                _tile_1x8_f32(xi, x_stride, wj, w_stride, oj + to, out_stride, k, 0)
                i += 1
            elif left == 2:
                _tile_2x8_f32(xi, x_stride, wj, w_stride, oj + to, out_stride, k, 0)
                i += 2
            elif left == 3:
                _tile_3x4_f32(xi, x_stride, wj, w_stride, oj + to, out_stride, k, 0)
                _tile_3x4_f32(xi, x_stride, wh, w_stride, oh + to, out_stride, k, 0)
                i += 3
            elif left == 5:
                _tile_5x4_f32(xi, x_stride, wj, w_stride, oj + to, out_stride, k, 0)
                _tile_5x4_f32(xi, x_stride, wh, w_stride, oh + to, out_stride, k, 0)
                i += 5
            elif left == 6:
                _tile_6x4_f32(xi, x_stride, wj, w_stride, oj + to, out_stride, k, 0)
                _tile_6x4_f32(xi, x_stride, wh, w_stride, oh + to, out_stride, k, 0)
                i += 6
            else:
                _tile_4x4_f32(xi, x_stride, wj, w_stride, oj + to, out_stride, k, 0)
                _tile_4x4_f32(xi, x_stride, wh, w_stride, oh + to, out_stride, k, 0)
                i += 4
        j += 8
    while j < n:
        wj, oj = w + j * w_stride, out + j * 4
        for i in range(m):
            _tile_1x1_f32(x + i * x_stride, x_stride, wj, w_stride, oj + i * out_stride, out_stride, k, 0)
        j += 1


@njit(cache=True, nogil=True, inline="never")
def _matrix_bf16(
    x: int, x_stride: int, w: int, w_stride: int, out: int, out_stride: int, m: int, n: int, k: int, narrow: int
) -> None:
    size = 2 if narrow else 4
    j = 0
    while j + 8 <= n:
        i = 0
        wj, oj = w + j * w_stride, out + j * size
        wh, oh = wj + 4 * w_stride, oj + 4 * size
        # As many rows at once as registers hold: each pass over the weights but the first is time lost.
        while i < m:
            xi, to = x + i * x_stride, i * out_stride
            left = m - i
            if left == 1:
                _tile_1x8_bf16(xi, x_stride, wj, w_stride, oj + to, out_stride, k, narrow)
                i += 1
            elif left == 2:
                _tile_2x8_bf16(xi, x_stride, wj, w_stride, oj + to, out_stride, k, narrow)
                i += 2
            elif left == 3:
                _tile_3x4_bf16(xi, x_stride, wj, w_stride, oj + to, out_stride, k, narrow)
                _tile_3x4_bf16(xi, x_stride, wh, w_stride, oh + to, out_stride, k, narrow)
                i += 3
            elif left == 5:
                _tile_5x4_bf16(xi, x_stride, wj, w_stride, oj + to, out_stride, k, narrow)
                _tile_5x4_bf16(xi, x_stride, wh, w_stride, oh + to, out_stride, k, narrow)
                i += 5
            elif left == 6:
                _tile_6x4_bf16(xi, x_stride, wj, w_stride, oj + to, out_stride, k, narrow)
                _tile_6x4_bf16(xi, x_stride, wh, w_stride, oh + to, out_stride, k, narrow)
                i += 6
            else:
                _tile_4x4_bf16(xi, x_stride, wj, w_stride, oj + to, out_stride, k, narrow)
                _tile_4x4_bf16(xi, x_stride, wh, w_stride, oh + to, out_stride, k, narrow)
                i += 4
        j += 8
    while j < n:
        wj, oj = w + j * w_stride, out + j * size
        for i in range(m):
            _tile_1x1_bf16(x + i * x_stride, x_stride, wj, w_stride, oj + i * out_stride, out_stride, k, narrow)
        j += 1


@njit(cache=True, nogil=True)
def _linear(thread: int, threads: int, m: int, op: Any) -> None:
    x, w, out, k, n, bf16, narrow = op[1], op[2], op[3], op[4], op[5], op[6], op[7]
    # Whole tiles per thread, as even as tiles allow.
    tiles = (n + TILE_N - 1) // TILE_N
    begin = tiles * thread // threads * TILE_N
    end = min(tiles * (thread + 1) // threads * TILE_N, n)
    if begin >= end:
        return
    # Rows in blocks that stay in the second-level cache while the weights pass by.
    for row in range(0, m, ROW_BLOCK):
        count = min(ROW_BLOCK, m - row)
        if bf16:
            size = 2 if narrow else 4
            source, target = x + row * k * 2, out + (row * n + begin) * size
            _matrix_bf16(source, k * 2, w + begin * k * 2, k * 2, target, n * size, count, end - begin, k, narrow)
        else:
            source, target = x + row * k * 4, out + (row * n + begin) * 4
            _matrix_f32(source, k * 4, w + begin * k * 4, k * 4, target, n * 4, count, end - begin, k)


@njit(cache=True, nogil=True, inline="never")
def _packed_rows(
    x: int, stride: int, w: int, out: int, out_stride: int, m: int, groups: int, blocks: int, op: Any
) -> None:
    """Multiply a few rows with one tile, whose weights stay packed in memory and are expanded in registers."""
    bf16, narrow, bits, grid = op[6], op[7], op[9], op[11]
    i = 0
    while i < m:
        two = i + 2 <= m
        a, o = x + i * stride, out + i * out_stride
        if bf16 and NATIVE_BF16:
            if bits == 8 and two:
                _packed_2x8_bf16_8(a, stride, w, 0, o, out_stride, groups, blocks, grid, narrow)
            elif bits == 8:
                _packed_1x8_bf16_8(a, stride, w, 0, o, out_stride, groups, blocks, grid, narrow)
            elif two:
                _packed_2x8_bf16_4(a, stride, w, 0, o, out_stride, groups, blocks, grid, narrow)
            else:
                _packed_1x8_bf16_4(a, stride, w, 0, o, out_stride, groups, blocks, grid, narrow)
        elif bits == 8 and two:
            _packed_2x8_f32_8(a, stride, w, 0, o, out_stride, groups, blocks, grid, narrow)
        elif bits == 8:
            _packed_1x8_f32_8(a, stride, w, 0, o, out_stride, groups, blocks, grid, narrow)
        elif two:
            _packed_2x8_f32_4(a, stride, w, 0, o, out_stride, groups, blocks, grid, narrow)
        else:
            _packed_1x8_f32_4(a, stride, w, 0, o, out_stride, groups, blocks, grid, narrow)
        i += 2 if two else 1


@njit(cache=True, nogil=True)
def _linear_packed(thread: int, threads: int, m: int, op: Any) -> None:
    x, w, out, k, n, bf16, narrow = op[1], op[2], op[3], op[4], op[5], op[6], op[7]
    bits, group, grid = op[9], op[10], op[11]
    groups, blocks = k // group, group // PACK_BLOCK
    header = TILE_N * 4 if bits == 8 else (TILE_N * 2 if grid == GRID_SYMMETRIC else TILE_N * 4)
    tile_bytes = groups * (header + blocks * TILE_N * PACK_BLOCK * bits // 8)
    tiles = (n + TILE_N - 1) // TILE_N
    first, last = tiles * thread // threads, tiles * (thread + 1) // threads
    size, out_size = (2 if bf16 else 4), (2 if narrow else 4)
    # In bfloat16 a product takes half the instructions, and expanding once more is dearer beside it.
    in_registers = m <= REGISTER_ROWS // 2 and NATIVE_BF16 if bf16 else m <= REGISTER_ROWS
    whole = np.empty(TILE_N * k * size, dtype=np.uint8)
    whole_ = whole.ctypes.data
    # Rows in blocks that stay in the second-level cache, as in _linear; a tile is expanded once for each.
    for row in range(0, m, ROW_BLOCK):
        count = min(ROW_BLOCK, m - row)
        for tile in range(first, last):
            columns = min(TILE_N, n - tile * TILE_N)
            source, packed = x + row * k * size, w + tile * tile_bytes
            target = out + (row * n + tile * TILE_N) * out_size
            if in_registers and columns == TILE_N:
                _packed_rows(source, k * size, packed, target, n * out_size, count, groups, blocks, op)
            elif bf16:
                if bits == 8:
                    _expand_bf16_8(packed, whole_, groups, blocks, grid)
                else:
                    _expand_bf16_4(packed, whole_, groups, blocks, grid)
                _matrix_bf16(source, k * 2, whole_, k * 2, target, n * out_size, count, columns, k, narrow)
            else:
                if bits == 8:
                    _expand_f32_8(packed, whole_, groups, blocks, grid)
                else:
                    _expand_f32_4(packed, whole_, groups, blocks, grid)
                _matrix_f32(source, k * 4, whole_, k * 4, target, n * 4, count, columns, k)


# -- element-wise operations -------------------------------------------------------------------------------------------

_ONE = np.float32(1)
_HALF = np.float32(0.5)
_ZERO = np.float32(0)
_INT8_MOST = np.float32(127)
_LOG2E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_EXP_LIMIT = np.float32(87)
_E0 = np.float32(1.9875691500e-4)
_E1 = np.float32(1.3981999507e-3)
_E2 = np.float32(8.3334519073e-3)
_E3 = np.float32(4.1665795894e-2)
_E4 = np.float32(1.6666665459e-1)
_E5 = np.float32(5.0000001201e-1)


@njit(cache=True, nogil=True, inline="always")
def _exp(x: Any) -> Any:
    """Compute e ** x for one float32, as :func:`_exp_vector` does for 16."""
    x = min(max(x, -_EXP_LIMIT), _EXP_LIMIT)
    whole = np.floor(x * _LOG2E + _HALF)
    x = x - whole * _LN2_HIGH - whole * _LN2_LOW
    y = ((((_E0 * x + _E1) * x + _E2) * x + _E3) * x + _E4) * x + _E5
    return (y * x * x + x + _ONE) * _power_of_two(whole)


@njit(cache=True, nogil=True)
def _embed(thread: int, threads: int, m: int, ids: Any, op: Any) -> None:
    table, out, width, bf16 = op[1], op[2], op[3], op[4]
    for row in range(thread, m, threads):
        target = carray(_pointer_f32(out + row * width * 4), (width,))
        if bf16:
            narrow = carray(_pointer_u16(table + ids[row] * width * 2), (width,))
            for i in range(width):
                target[i] = _widen(narrow[i])
        else:
            source = carray(_pointer_f32(table + ids[row] * width * 4), (width,))
            for i in range(width):
                target[i] = source[i]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _sum_of_squares(x: Any, width: int) -> Any:
    total = _ZERO
    for i in range(width):
        total += x[i] * x[i]
    return total


@njit(cache=True, nogil=True)
def _norm(thread: int, threads: int, m: int, kept: Any, op: Any) -> None:
    x_, delta_, weight_, out_, width, bf16, only_kept = op[1], op[2], op[3], op[4], op[5], op[7], op[8]
    eps = _float_from_bits(op[6])
    weight = carray(_pointer_f32(weight_), (width,))
    for place in range(thread, m, threads):
        row = kept[place] if only_kept else place
        x = carray(_pointer_f32(x_ + row * width * 4), (width,))
        if delta_:
            if bf16:
                narrow = carray(_pointer_u16(delta_ + row * width * 2), (width,))
                for i in range(width):
                    x[i] += _widen(narrow[i])
            else:
                delta = carray(_pointer_f32(delta_ + row * width * 4), (width,))
                for i in range(width):
                    x[i] += delta[i]
        scale = _ONE / np.sqrt(_sum_of_squares(x, width) / np.float32(width) + eps)
        if bf16:
            narrow = carray(_pointer_u16(out_ + place * width * 2), (width,))
            for i in range(width):
                narrow[i] = _narrow(x[i] * scale * weight[i])
        else:
            out = carray(_pointer_f32(out_ + place * width * 4), (width,))
            for i in range(width):
                out[i] = x[i] * scale * weight[i]


@njit(cache=True, nogil=True)
def _capture(thread: int, threads: int, m: int, target_: int, op: Any) -> None:
    """Keep rows of the residual stream."""
    x_, width, place, total = op[1], op[2], op[3], op[4]
    for row in range(thread, m, threads):
        x = carray(_pointer_f32(x_ + row * width * 4), (width,))
        target = carray(_pointer_f32(target_ + (row * total + place) * 4), (width,))
        for i in range(width):
            target[i] = x[i]


@njit(cache=True, nogil=True)
def _silu(thread: int, threads: int, m: int, op: Any) -> None:
    both_, out_, width, bf16 = op[1], op[2], op[3], op[4]
    size = 2 if bf16 else 4
    # One row is shared by all threads: with a single request there is nothing else to divide.
    chunk = (width // LANES + threads - 1) // threads * LANES
    begin = min(thread * chunk, width)
    count = min(begin + chunk, width) - begin
    if thread == threads - 1:
        count = width - begin
    for row in range(m):
        gate, out = both_ + (row * 2 * width + begin) * size, out_ + (row * width + begin) * size
        if bf16:
            _silu_bf16(gate, gate + width * size, out, count)
        else:
            _silu_f32(gate, gate + width * size, out, count)


@njit(cache=True, nogil=True)
def _store_int8(head: Any, dim: int, base: int, scales: int, place: int) -> None:
    """Round one key or value to 8 bits, with a scale of its own."""
    most = _ZERO
    for i in range(dim):
        most = max(most, abs(head[i]))
    scale = most / _INT8_MOST
    inverse = _ONE / scale if scale > _ZERO else _ZERO
    carray(_pointer_f32(scales + place * 4), (1,))[0] = scale
    target = carray(_pointer_i8(base + place * dim), (dim,))
    for i in range(dim):
        target[i] = np.int8(np.rint(head[i] * inverse))


@njit(cache=True, nogil=True, inline="never")
def _expand_int8(source: int, stride: int, target: int, run: int, dim: int, bf16: int) -> None:
    """Write ``run`` heads of 8-bit integers as float32, or bfloat16: both hold them exactly."""
    for position in range(run):
        integers = carray(_pointer_i8(source + position * stride), (dim,))
        if bf16:
            narrow = carray(_pointer_u16(target + position * dim * 2), (dim,))
            for i in range(dim):
                narrow[i] = _narrow(np.float32(integers[i]))
        else:
            wide = carray(_pointer_f32(target + position * dim * 4), (dim,))
            for i in range(dim):
                wide[i] = np.float32(integers[i])


@njit(cache=True, nogil=True)
def _rotary(thread: int, threads: int, m: int, params: Any, op: Any) -> None:
    qkv_, bias_, q_norm_, k_norm_, keys_, values_ = op[1], op[2], op[3], op[4], op[6], op[7]
    heads, kv_heads, dim, rotate, bf16 = op[8], op[9], op[10], op[11], op[12]
    key_scales_, value_scales_ = op[13], op[14]
    eps = _float_from_bits(op[5])
    size = 2 if bf16 else 4
    half = dim // 2
    total = heads + 2 * kv_heads
    positions = carray(_pointer_i64(params[P_POSITIONS]), (m,))
    head = np.empty(MAX_HEAD_DIM, dtype=np.float32)
    for unit in range(thread, m * total, threads):
        row, index = unit // total, unit % total
        address = qkv_ + unit * dim * size
        wide = carray(_pointer_f32(address), (dim,))
        narrow = carray(_pointer_u16(address), (dim,))
        if bf16:
            for i in range(dim):
                head[i] = _widen(narrow[i])
        else:
            for i in range(dim):
                head[i] = wide[i]
        if bias_:
            bias = carray(_pointer_f32(bias_ + index * dim * 4), (dim,))
            for i in range(dim):
                head[i] += bias[i]
        if index < heads + kv_heads:
            norm_ = q_norm_ if index < heads else k_norm_
            if norm_:
                norm = carray(_pointer_f32(norm_), (dim,))
                scale = _ONE / np.sqrt(_sum_of_squares(head, dim) / np.float32(dim) + eps)
                for i in range(dim):
                    head[i] *= scale * norm[i]
            if rotate:
                cos = carray(_pointer_f32(params[P_COS] + positions[row] * half * 4), (half,))
                sin = carray(_pointer_f32(params[P_SIN] + positions[row] * half * 4), (half,))
                for i in range(half):
                    a, b = head[i], head[i + half]
                    head[i] = a * cos[i] - b * sin[i]
                    head[i + half] = b * cos[i] + a * sin[i]
        if bf16:
            for i in range(dim):
                narrow[i] = _narrow(head[i])
        else:
            for i in range(dim):
                wide[i] = head[i]
        if index >= heads and params[P_SLOTS]:
            slot = carray(_pointer_i64(params[P_SLOTS]), (m,))[row]
            base = keys_ if index < heads + kv_heads else values_
            place = (index - heads) % kv_heads
            if key_scales_:
                scales_ = key_scales_ if index < heads + kv_heads else value_scales_
                if bf16:  # what the following operations read, not what it was rounded from
                    for i in range(dim):
                        head[i] = _widen(narrow[i])
                _store_int8(head, dim, base, scales_, slot * kv_heads + place)
                continue
            target = base + (slot * kv_heads + place) * dim * size
            if bf16:
                to_narrow = carray(_pointer_u16(target), (dim,))
                for i in range(dim):
                    to_narrow[i] = narrow[i]
            else:
                to_wide = carray(_pointer_f32(target), (dim,))
                for i in range(dim):
                    to_wide[i] = wide[i]


@njit(cache=True, nogil=True, inline="never")
def _sum_values(source: int, stride: int, weights: int, sums: int, group: int, dim: int, run: int, bf16: int) -> None:
    """Add ``run`` weighted values to the sums of all query heads of a group, 64 columns at a time."""
    line, width, size = SPLIT * 4, MAX_HEAD_DIM * 4, 2 if bf16 else 4
    d = 0
    while d < dim:
        wide = d + 64 <= dim
        g = 0
        while g < group:
            v, w, t = source + d * size, weights + g * line, sums + g * width + d * 4
            if wide and g + 4 <= group:
                if bf16:
                    _sum_4x4_bf16(v, stride, w, line, t, width, run)
                else:
                    _sum_4x4_f32(v, stride, w, line, t, width, run)
                g += 4
            elif wide and g + 3 <= group:
                if bf16:
                    _sum_3x4_bf16(v, stride, w, line, t, width, run)
                else:
                    _sum_3x4_f32(v, stride, w, line, t, width, run)
                g += 3
            elif wide:
                if bf16:
                    _sum_1x4_bf16(v, stride, w, line, t, width, run)
                else:
                    _sum_1x4_f32(v, stride, w, line, t, width, run)
                g += 1
            else:
                if bf16:
                    _sum_1x1_bf16(v, stride, w, line, t, width, run)
                else:
                    _sum_1x1_f32(v, stride, w, line, t, width, run)
                g += 1
        d += 64 if wide else LANES


@njit(cache=True, nogil=True)
def _attend(thread: int, threads: int, params: Any, op: Any) -> None:
    qkv_, out_, keys_, values_ = op[1], op[2], op[3], op[4]
    heads, kv_heads, dim, window, bf16 = op[5], op[6], op[7], op[8], op[10]
    scaling = _float_from_bits(op[9])
    key_scales_, value_scales_ = op[11], op[12]
    int8 = key_scales_ != 0
    size = 2 if bf16 else 4
    group = heads // kv_heads
    count, splits, block = params[P_NUM_ATTEND], params[P_MAX_SPLITS], params[P_BLOCK_SIZE]
    rows = carray(_pointer_i64(params[P_ATTEND_ROWS]), (count,))
    positions = carray(_pointer_i64(params[P_POSITIONS]), (params[P_ROWS],))
    tables = carray(_pointer_i64(params[P_TABLES]), (count,))
    scores = np.empty((MAX_GROUP, SPLIT), dtype=np.float32)
    sums = np.empty((MAX_GROUP, MAX_HEAD_DIM), dtype=np.float32)
    inverses = np.empty(MAX_GROUP, dtype=np.float32)
    stored = 1 if int8 else size
    stride = kv_heads * dim * stored
    expanded = np.empty(SPLIT * dim * size if int8 else 1, dtype=np.uint8)
    expanded_ = expanded.ctypes.data
    scores_, sums_ = scores.ctypes.data, sums.ctypes.data
    for unit in range(thread, count * kv_heads * splits, threads):
        place = unit // (kv_heads * splits)
        kv_head = unit // splits % kv_heads
        split = unit % splits
        row = rows[place]
        end = positions[row] + 1
        start = max(end - window, 0) if window else 0
        low = start + split * SPLIT
        if low >= end:
            continue
        high = min(low + SPLIT, end)
        length = high - low
        table = carray(_pointer_i32(tables[place]), ((end + block - 1) // block,))
        query = qkv_ + (row * (heads + 2 * kv_heads) + kv_head * group) * dim * size
        position = low
        while position < high:
            offset = position % block
            run = min(block - offset, high - position)
            place_ = (table[position // block] * block + offset) * kv_heads + kv_head
            source, step = keys_ + place_ * dim * stored, stride
            target = scores_ + (position - low) * 4
            if int8:
                _expand_int8(source, stride, expanded_, run, dim, bf16)
                source, step = expanded_, dim * size
            if bf16:
                _matrix_bf16(query, dim * 2, source, step, target, SPLIT * 4, group, run, dim, 0)
            else:
                _matrix_f32(query, dim * 4, source, step, target, SPLIT * 4, group, run, dim)
            if int8:
                for i in range(run):
                    scale = carray(_pointer_f32(key_scales_ + (place_ + i * kv_heads) * 4), (1,))[0]
                    for g in range(group):
                        scores[g, position - low + i] *= scale
            position += run
        several = end - start > SPLIT
        partial_ = params[P_PARTIALS] + unit * group * (dim + 2) * 4
        padded = (length + LANES - 1) // LANES * LANES
        for g in range(group):
            line = scores[g]
            for i in range(length, padded):
                line[i] = _LOWEST
            most = _largest_of(scores_ + g * SPLIT * 4, padded)
            total = _exp_and_sum(scores_ + g * SPLIT * 4, padded, scaling, most)
            inverse = _ONE
            if several:
                partial = carray(_pointer_f32(partial_ + g * (dim + 2) * 4), (dim + 2,))
                partial[dim] = most * scaling
                partial[dim + 1] = total
            else:
                inverse = _ONE / total
            inverses[g] = inverse
            for i in range(dim):
                sums[g, i] = _ZERO
        position = low
        while position < high:
            offset = position % block
            run = min(block - offset, high - position)
            place_ = (table[position // block] * block + offset) * kv_heads + kv_head
            source, step = values_ + place_ * dim * stored, stride
            if int8:
                _expand_int8(source, stride, expanded_, run, dim, bf16)
                source, step = expanded_, dim * size
                for i in range(run):
                    scale = carray(_pointer_f32(value_scales_ + (place_ + i * kv_heads) * 4), (1,))[0]
                    for g in range(group):
                        scores[g, position - low + i] *= scale
            _sum_values(source, step, scores_ + (position - low) * 4, sums_, group, dim, run, bf16)
            position += run
        for g in range(group):
            for d in range(dim):
                sums[g, d] *= inverses[g]
        for g in range(group):
            if several:
                partial = carray(_pointer_f32(partial_ + g * (dim + 2) * 4), (dim,))
                for d in range(dim):
                    partial[d] = sums[g, d]
            else:
                target = out_ + (row * heads + kv_head * group + g) * dim * size
                if bf16:
                    out_n = carray(_pointer_u16(target), (dim,))
                    for d in range(dim):
                        out_n[d] = _narrow(sums[g, d])
                else:
                    out = carray(_pointer_f32(target), (dim,))
                    for d in range(dim):
                        out[d] = sums[g, d]


@njit(cache=True, nogil=True)
def _combine(thread: int, threads: int, params: Any, op: Any) -> None:
    """Put the splits of long contexts together (the log-sum-exp merge of FlashDecoding)."""
    out_, heads, kv_heads, dim, window, bf16 = op[1], op[2], op[3], op[4], op[5], op[6]
    size = 2 if bf16 else 4
    group = heads // kv_heads
    count, splits = params[P_NUM_ATTEND], params[P_MAX_SPLITS]
    rows = carray(_pointer_i64(params[P_ATTEND_ROWS]), (count,))
    positions = carray(_pointer_i64(params[P_POSITIONS]), (params[P_ROWS],))
    sums = np.empty(MAX_HEAD_DIM, dtype=np.float32)
    for unit in range(thread, count * heads, threads):
        place, head = unit // heads, unit % heads
        row = rows[place]
        end = positions[row] + 1
        context = min(end, window) if window else end
        if context <= SPLIT:
            continue
        first = ((place * kv_heads + head // group) * splits * group + head % group) * (dim + 2) * 4
        step = group * (dim + 2) * 4
        used = (context + SPLIT - 1) // SPLIT
        most = _LOWEST
        for split in range(used):
            most = max(most, carray(_pointer_f32(params[P_PARTIALS] + first + split * step), (dim + 2,))[dim])
        total = _ZERO
        for i in range(dim):
            sums[i] = _ZERO
        for split in range(used):
            partial = carray(_pointer_f32(params[P_PARTIALS] + first + split * step), (dim + 2,))
            weight = _exp(partial[dim] - most)
            total += weight * partial[dim + 1]
            for i in range(dim):
                sums[i] += weight * partial[i]
        inverse = _ONE / total
        target = out_ + (row * heads + head) * dim * size
        if bf16:
            out_n = carray(_pointer_u16(target), (dim,))
            for i in range(dim):
                out_n[i] = _narrow(sums[i] * inverse)
        else:
            out = carray(_pointer_f32(target), (dim,))
            for i in range(dim):
                out[i] = sums[i] * inverse


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _largest(line: Any) -> Any:
    most = _LOWEST
    for i in range(line.size):
        most = max(most, line[i])
    return most


@njit(cache=True, nogil=True)
def _argmax(thread: int, threads: int, m: int, params: Any, op: Any) -> None:
    logits_, width, bf16 = op[1], op[2], op[3]
    out = carray(_pointer_i64(params[P_GREEDY]), (m,))
    piece = np.empty(1024, dtype=np.float32)
    for row in range(thread, m, threads):
        best = _LOWEST
        answer = 0
        for begin in range(0, width, 1024):
            count = min(1024, width - begin)
            if bf16:
                narrow = carray(_pointer_u16(logits_ + (row * width + begin) * 2), (count,))
                for i in range(count):
                    piece[i] = _widen(narrow[i])
                line = piece[:count]
            else:
                line = carray(_pointer_f32(logits_ + (row * width + begin) * 4), (count,))
            most = _largest(line)
            if most > best:
                best = most
                for i in range(count):
                    if line[i] == most:
                        answer = begin + i
                        break
        out[row] = answer


# -- the region --------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _barrier(params: Any, threads: int) -> None:
    if threads == 1:
        return
    counter = params[P_BARRIER]
    target = (_atomic_add(counter, 1) // threads + 1) * threads
    spins = 0
    while _atomic_load(counter) < target:
        _pause()
        spins += 1
        # On a busy machine the thread we wait for may not be running: let it.
        if spins > 2000 and params[P_YIELD]:
            _call(params[P_YIELD])


@njit(cache=True, nogil=True)
def _run(params: Any) -> None:
    thread, threads = 0, 1
    if params[P_THREADS]:
        threads = _call(params[P_THREADS])
        thread = _call(params[P_THREAD])
    first, last = params[P_FIRST], params[P_LAST]
    program = carray(_pointer_i64(params[P_PROGRAM]), (last, OP_WIDTH))
    rows, num_kept = params[P_ROWS], params[P_NUM_KEPT]
    ids = carray(_pointer_i64(params[P_IDS]), (rows,))
    kept = carray(_pointer_i64(params[P_KEPT]), (num_kept,))
    for index in range(first, last):
        op = program[index]
        code = op[0]
        if code == OP_LINEAR:
            _linear(thread, threads, num_kept if op[8] else rows, op)
        elif code == OP_PACKED:
            _linear_packed(thread, threads, num_kept if op[8] else rows, op)
        elif code == OP_NORM:
            _norm(thread, threads, num_kept if op[8] else rows, kept, op)
        elif code == OP_ROTARY:
            _rotary(thread, threads, rows, params, op)
        elif code == OP_ATTEND:
            _attend(thread, threads, params, op)
        elif code == OP_COMBINE:
            if params[P_MAX_SPLITS] <= 1:
                continue
            _combine(thread, threads, params, op)
        elif code == OP_SILU:
            _silu(thread, threads, rows, op)
        elif code == OP_EMBED:
            _embed(thread, threads, rows, ids, op)
        elif code == OP_ARGMAX:
            _argmax(thread, threads, num_kept, params, op)
        elif code == OP_CAPTURE:
            if params[P_CAPTURED] == 0:
                continue
            _capture(thread, threads, rows, params[P_CAPTURED], op)
        _barrier(params, threads)


@cfunc("void(voidptr)", cache=True)
def region(data: Any) -> None:
    """Run operations ``P_FIRST`` to ``P_LAST`` of the program; every thread of a team enters this once."""
    _run(carray(data, (NUM_PARAMETERS,), np.int64))
