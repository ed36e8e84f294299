"""Turns a step plan into one forward pass. Owns the model and the packing of a step; knows no policy."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inference_server.engine import attention
from inference_server.engine.attention import PagedKVTensors, Segment, StepContext, slots_of
from inference_server.engine.quantization.variants import Variant
from inference_server.engine.sampler import Tokens
from inference_server.engine.scheduler import StepPlan


class Runner(Protocol):
    """One way to compute a step. All ways share the cache's tensors, so that each step may take another."""

    @property
    def label(self) -> str:
        """What a step record calls this path."""

    @property
    def greedy(self) -> Tokens | None:
        """Most likely token of each row of the last logits, where the path finds them; perhaps still on the device."""

    def prepare(self, plan: StepPlan) -> Any:
        """Pack a plan, for :meth:`forward`."""

    def forward(self, plan: StepPlan, packed: Any) -> Tensor:
        """Compute the step; return the logits of its sampled positions, ``[S, vocab]``."""


@runtime_checkable
class WeightReader(Runner, Protocol):
    """A fast path that can read packed weights."""

    @property
    def buffer_bytes(self) -> int:
        """Memory of activations and logits."""

    def use(self, variant: Variant | None) -> None:
        """Read a variant from the next step on, or with ``None`` the master."""

    def sibling(self, tensors: PagedKVTensors) -> WeightReader:
        """Another runner of the same model over another cache."""


class Capturing:
    """A runner that can keep hidden states of the last step. A class and no protocol: it is asked for in every step."""

    capture: bool = False
    """Keep the hidden states that enter :attr:`capture_layers`."""
    capture_layers: tuple[int, ...] = ()
    features: Tensor | None = None
    """The hidden states of the last step, ``[positions, layers * hidden]`` in float32, valid until the next one;
    ``None`` where none were kept."""


@runtime_checkable
class Replaying(Runner, Protocol):
    """A fast path that records steps and replays them, and computes tokens that only the device knows so far.

    Such a token is one that the step before chose: its position is planned, and the request does not have it yet.
    """

    use_graphs: bool
    """Replay them (the feature ``cuda_graphs``)."""

    def forget_graphs(self) -> None:
        """Give up what was recorded: it holds addresses that are about to change, and memory."""


class ModelRunner(Capturing):
    """Runs plans through a transformers causal language model.

    Parameters
    ----------
    model : torch.nn.Module
        Built with the attention implementation :data:`inference_server.engine.attention.NAME`.
    tensors : PagedKVTensors
    """

    label: str = "eager"
    greedy: Tokens | None = None

    def __init__(self, model: nn.Module, tensors: PagedKVTensors) -> None:
        self.model = model
        self.tensors = tensors
        self.device = tensors.device
        self.last_attention_calls = 0
        self.attention_ns: int | None = None
        """What attention took of the last step, where calling it is doing it: on a CPU."""

    def prepare(self, plan: StepPlan) -> tuple[Tensor, Tensor, Tensor, StepContext]:
        """Pack a plan: token ids and positions ``[1, T]``, rows to keep logits of ``[S]``, and the step's context."""
        size = self.tensors.block_size
        ids: list[int] = []
        positions: list[np.ndarray] = []
        keep: list[int] = []
        write: list[np.ndarray] = []
        segments: list[Segment] = []
        decodes: list[tuple[int, np.ndarray]] = []
        for item in plan.items:
            offset, end = len(ids), item.end
            ids.extend(item.tokens())
            positions.append(np.arange(item.start, end))
            keep += range(len(ids) - item.num_sampled, len(ids))
            if not plan.use_cache:
                segments.append(Segment(offset, item.count, item.start, None))
                continue
            slots = slots_of(item.request.blocks, end, size)
            write.append(slots[item.start :])
            if item.count == 1:
                decodes.append((offset, slots))
            else:
                segments.append(Segment(offset, item.count, item.start, self._tensor(slots)))
        context = StepContext(
            tensors=self.tensors if plan.use_cache else None,
            write_slots=self._tensor(np.concatenate(write)) if write else None,
            segments=segments,
        )
        if decodes:
            lengths = np.array([len(slots) for _, slots in decodes])
            padded = np.zeros((len(decodes), int(lengths.max())), dtype=np.int64)
            for row, (_, slots) in enumerate(decodes):
                padded[row, : len(slots)] = slots
            context.decode_rows = self._tensor(np.array([offset for offset, _ in decodes]))
            context.decode_slots = self._tensor(padded)
            context.decode_lengths = self._tensor(lengths)
        return (
            self._tensor(np.array(ids))[None],
            self._tensor(np.concatenate(positions))[None],
            self._tensor(np.array(keep, dtype=np.int64)),
            context,
        )

    @torch.inference_mode()
    def forward(self, plan: StepPlan, packed: tuple[Tensor, Tensor, Tensor, StepContext]) -> Tensor:
        """Compute the step; return the logits of its sampled positions, ``[S, vocab]``."""
        ids, positions, keep, context = packed
        if plan.transfers:
            self.tensors.transfer(plan.transfers)
        attention.set_context(context)
        captured: list[Tensor] = []
        hooks = self._hooks(captured) if self.capture else []
        try:
            # With nothing to sample (a chunk in the middle of a prompt) one row is computed and thrown away.
            rows = keep if len(keep) else keep.new_zeros(1)
            out = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows)
        finally:
            attention.set_context(None)
            for hook in hooks:
                hook.remove()
        self.features = torch.cat(captured, -1) if captured else None
        self.last_attention_calls = context.calls
        self.attention_ns = context.spent_ns if self.device.type == "cpu" else None
        logits: Tensor = out.logits[0]
        return logits[: len(keep)]

    def capture_at(self, layers: tuple[int, ...]) -> None:
        """Be able to keep the hidden states that enter some layers."""
        self.capture_layers = layers

    def _hooks(self, captured: list[Tensor]) -> list[RemovableHandle]:
        model: Any = self.model

        def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            captured.append(inputs[0][0].float())

        return [model.model.layers[index].register_forward_pre_hook(keep) for index in self.capture_layers]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
