"""Runs an EAGLE-3 head through the compiled kernels of the fast path. Owns its weights, buffers and keys and values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from inference_server.engine.cpu import kernels
from inference_server.engine.cpu.machine import INT, Machine, float_bits
from inference_server.engine.cpu.team import Team
from inference_server.engine.speculation.eagle import HeadRows
from inference_server.engine.speculation.eagle_head import EagleHead, rope_frequencies


class CpuHeadRunner:
    """The head's forward pass as one program, as the model's is.

    The gains of the two input norms are multiplied into the columns of the projections, so that one norm without gains
    does for embedding and hidden state, which lie side by side.

    Parameters
    ----------
    head : EagleHead
    embed : Tensor
        ``[vocab, hidden]`` the model's embedding.
    dtype : torch.dtype
        To compute in: float32 or bfloat16.
    num_slots, block_size : int
        Of the head's cache.
    max_len : int
        The longest text.
    threads : int
    """

    def __init__(
        self,
        head: EagleHead,
        embed: Tensor,
        dtype: torch.dtype,
        num_slots: int,
        block_size: int,
        max_len: int,
        threads: int,
    ) -> None:
        shape = head.shape
        self._shape, self._embed, self._dtype, self._block_size = shape, embed, dtype, block_size
        self._hidden_norm = head.hidden_norm.detach() if shape.norm_before_residual else None
        gains = torch.cat([head.input_norm, head.hidden_norm]).detach()
        projections = torch.cat([head.q.weight, head.k.weight, head.v.weight]).detach()
        self._qkv_weight = (projections * gains).to(dtype).contiguous()
        self._fc, self._output, self._down, self._lm_head = (
            layer.weight.detach().to(dtype).contiguous() for layer in (head.fc, head.o, head.down, head.lm_head)
        )
        self._gate_up = torch.cat([head.gate.weight, head.up.weight]).detach().to(dtype).contiguous()
        self._post_norm, self._norm = head.post_norm.detach().float(), head.norm.detach().float()
        self._ones = torch.ones(shape.hidden)
        self._proposed: list[int] = head.proposed.tolist()
        angles = torch.arange(max_len)[:, None].float() * rope_frequencies(shape, torch.device("cpu"))
        self._cos, self._sin = angles.cos().contiguous(), angles.sin().contiguous()
        self._keys = torch.zeros(num_slots, shape.kv_heads, shape.head_dim, dtype=dtype)
        self._values = torch.zeros_like(self._keys)
        self._machine = Machine(Team(threads))
        self._parameters = self._machine.parameters
        self._partials = torch.zeros(0)
        p = self._parameters
        p[kernels.P_COS], p[kernels.P_SIN] = self._cos.data_ptr(), self._sin.data_ptr()
        p[kernels.P_BLOCK_SIZE] = block_size
        self._rows = 0
        self._reserve(32)

    def fuse(self, features: Tensor) -> Tensor:
        """See :class:`~inference_server.engine.speculation.eagle.HeadRunner`."""
        rows, shape = len(features), self._shape
        source = features.to(self._dtype).contiguous()
        fused = torch.empty(rows, shape.hidden)
        op = [kernels.OP_LINEAR, source.data_ptr(), self._fc.data_ptr(), fused.data_ptr()]
        op += [3 * shape.hidden, shape.hidden, int(self._dtype == torch.bfloat16), 0, 0]
        program = self._machine.program
        program[-1, : len(op)] = op
        self._parameters[kernels.P_ROWS] = rows
        self._machine.run(len(program) - 1, len(program))
        return fused

    @torch.inference_mode()
    def run(self, rows: HeadRows, hidden: Tensor) -> tuple[list[int], Tensor]:
        """See :class:`~inference_server.engine.speculation.eagle.HeadRunner`."""
        count, size = len(rows.ids), self._block_size
        self._reserve(count)
        both, residual = self._both_inputs[:count], self._residual[:count]
        both[:, 0] = embedding(torch.tensor(rows.ids), self._embed)
        both[:, 1] = hidden
        residual.copy_(hidden)
        if self._hidden_norm is not None:
            scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self._shape.eps)
            residual.copy_(hidden * scale * self._hidden_norm)
        tables = [np.array(request.blocks, dtype=np.int32) for request, _, _ in rows.requests]
        addresses, slots = [0] * count, [0] * count
        longest = 0
        for (request, first, number), table in zip(rows.requests, tables, strict=True):
            addresses[first : first + number] = [table.ctypes.data] * number
            blocks = request.blocks
            for row in range(first, first + number):
                position = rows.positions[row]
                slots[row] = blocks[position // size] * size + position % size
            longest = max(longest, rows.positions[first + number - 1] + 1)
        columns = {
            kernels.P_POSITIONS: rows.positions,
            kernels.P_SLOTS: slots,
            kernels.P_KEPT: rows.kept,
            kernels.P_ATTEND_ROWS: list(range(count)),
            kernels.P_TABLES: addresses,
        }
        packed = np.array([number for column in columns.values() for number in column], dtype=INT)
        p, base = self._parameters, packed.ctypes.data
        for name, column in columns.items():
            p[name] = base
            base += 8 * len(column)
        kept = len(rows.kept)
        p[kernels.P_NUM_KEPT], p[kernels.P_NUM_ATTEND] = kept, count
        splits = p[kernels.P_MAX_SPLITS] = -(-longest // kernels.SPLIT)
        if splits > 1:
            needed = count * self._shape.heads * int(splits) * (self._shape.head_dim + 2)
            if self._partials.numel() < needed:
                self._partials = torch.empty(2 * needed)
                p[kernels.P_PARTIALS] = self._partials.data_ptr()
        p[kernels.P_ROWS] = 2 * count
        self._machine.run(0, 1)
        p[kernels.P_ROWS] = count
        self._machine.run(1, len(self._machine.program) - (1 if kept else 4))
        states = residual[rows.kept]
        return [self._proposed[index] for index in self._greedy[:kept].tolist()], states

    def _reserve(self, rows: int) -> None:
        """Provide buffers for so many rows, and the program over them."""
        if rows <= self._rows:
            return
        rows = self._rows = max(rows, 2 * self._rows)
        shape, dtype = self._shape, self._dtype
        hidden, bf16 = shape.hidden, int(dtype == torch.bfloat16)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        eps, scaling = float_bits(shape.eps), float_bits(shape.head_dim**-0.5)
        self._both_inputs = torch.empty(rows, 2, hidden)
        self._residual = torch.empty(rows, hidden)
        self._normed = torch.empty(2 * rows, hidden, dtype=dtype)
        self._qkv = torch.empty(rows, width, dtype=dtype)
        self._attended = torch.empty(rows, shape.heads * shape.head_dim, dtype=dtype)
        self._delta = torch.empty(rows, hidden, dtype=dtype)
        self._gated = torch.empty(rows, 2 * shape.intermediate, dtype=dtype)
        self._active = torch.empty(rows, shape.intermediate, dtype=dtype)
        self._logits = torch.empty(rows, shape.draft_vocab)
        self._greedy = np.zeros(rows, dtype=INT)
        self._parameters[kernels.P_GREEDY] = self._greedy.ctypes.data
        heads = [shape.heads, shape.kv_heads, shape.head_dim]
        cache = [self._keys.data_ptr(), self._values.data_ptr()]

        def linear(source: Tensor, weight: Tensor, target: Tensor, *, kept: bool = False) -> list[int]:
            narrow = int(target.dtype == torch.bfloat16)
            shape_ = [weight.shape[1], weight.shape[0]]
            addresses = [source.data_ptr(), weight.data_ptr(), target.data_ptr()]
            return [kernels.OP_LINEAR, *addresses, *shape_, bf16, narrow, int(kept)]

        def norm(x: Tensor, delta: Tensor | None, gain: Tensor, *, kept: bool = False) -> list[int]:
            change = 0 if delta is None else delta.data_ptr()
            addresses = [x.data_ptr(), change, gain.data_ptr(), self._normed.data_ptr()]
            return [kernels.OP_NORM, *addresses, hidden, eps, bf16, int(kept)]

        qkv, attended = self._qkv.data_ptr(), self._attended.data_ptr()
        program = [
            norm(self._both_inputs, None, self._ones),
            linear(self._normed, self._qkv_weight, self._qkv),
            [kernels.OP_ROTARY, qkv, 0, 0, 0, eps, *cache, *heads, 1, bf16],
            [kernels.OP_ATTEND, qkv, attended, *cache, *heads, 0, scaling, bf16],
            [kernels.OP_COMBINE, attended, *heads, 0, bf16],
            linear(self._attended, self._output, self._delta),
            norm(self._residual, self._delta, self._post_norm),
            linear(self._normed, self._gate_up, self._gated),
            [kernels.OP_SILU, self._gated.data_ptr(), self._active.data_ptr(), shape.intermediate, bf16],
            linear(self._active, self._down, self._delta),
            norm(self._residual, self._delta, self._norm, kept=True),
            linear(self._normed, self._lm_head, self._logits, kept=True),
            [kernels.OP_ARGMAX, self._logits.data_ptr(), shape.draft_vocab, 0],
            [],  # fusing features, which lie elsewhere each time
        ]
        self._machine.load(program)
