"""Where the steps that are captured compute: memory at addresses that never move. Owns these tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inference_server.engine.gpu import kernels
from inference_server.engine.llama import Architecture


@dataclass(slots=True)
class Scratch:
    """How much room kernels need besides."""

    qkv: int
    """Numbers of a projection that is still in parts."""
    delta: int
    """The same of what is added to the residual stream."""
    heads: int
    """Rows, of a head's size, that attention leaves for whoever finishes last."""
    counters: int


class Buffers:
    """Everything between the inputs and the chosen tokens of a step of at most ``rows`` rows.

    Parameters
    ----------
    architecture : Architecture
    rows : int
    inputs : int
        Numbers that a step is told.
    scratch : Scratch
    device : torch.device
    """

    def __init__(
        self, architecture: Architecture, rows: int, inputs: int, scratch: Scratch, device: torch.device
    ) -> None:
        a, dtype = architecture, architecture.dtype
        self.rows = rows
        self.inputs = torch.zeros(inputs, dtype=torch.int32, device=device)
        self.residual = torch.empty(rows, a.hidden, device=device)
        self.normed = torch.empty(rows, a.hidden, device=device, dtype=dtype)
        self.qkv = torch.empty(rows, (a.heads + 2 * a.kv_heads) * a.head_dim, device=device, dtype=dtype)
        # Rows of padding that attention leaves out are still multiplied: they have to be numbers.
        self.attended = torch.zeros(rows, a.heads * a.head_dim, device=device, dtype=dtype)
        self.delta = torch.empty(rows, a.hidden, device=device, dtype=dtype)
        self.both = torch.empty(rows, 2 * a.intermediate, device=device, dtype=dtype)
        self.active = torch.empty(rows, a.intermediate, device=device, dtype=dtype)
        self.qkv_parts = torch.empty(scratch.qkv, device=device)
        self.delta_parts = torch.empty(scratch.delta, device=device)
        self.logits = torch.empty(rows, a.vocab, device=device, dtype=dtype)
        self.logits_one = torch.empty(1, a.vocab, device=device)
        """Of a single row: its kernel sums in float32, so they need not be rounded."""
        parts = -(-a.vocab // kernels.ARGMAX_BLOCK)
        self.best = torch.empty(rows, parts, device=device)
        self.index = torch.empty(rows, parts, device=device, dtype=torch.int32)
        self.tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.partial = torch.empty(scratch.heads * a.head_dim, device=device)
        self.state = torch.empty(scratch.heads * 2, device=device)
        self.counters = torch.zeros(scratch.counters, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        return sum(each.nbytes for each in vars(self).values() if isinstance(each, torch.Tensor))
