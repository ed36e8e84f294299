"""What the teacher thinks of its texts: hidden states, computed once and kept in shards that are mapped, not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from inference_server.distill.head_training import Text

TEXTS_PER_SHARD = 64
TEXTS_AT_ONCE = 16


def compute(
    model: Any,
    texts: Sequence[Sequence[int]],
    layers: tuple[int, ...],
    folder: Path,
    progress: Callable[[float], None],
    stop: Callable[[], bool],
) -> bool:
    """Compute the shards that a folder lacks; return whether all are there.

    Parameters
    ----------
    model : torch.nn.Module
        The teacher, as transformers has it.
    texts : sequence of sequence of int
    layers : tuple of int
        The hidden states that enter these layers are kept, and what the output layer reads.
    folder : Path
    progress : callable
        Told which share is done.
    stop : callable
        Asked after each shard whether to end now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(texts), TEXTS_PER_SHARD):
        path = _shard(folder, first)
        if not path.exists():
            if stop():
                return False
            tensors: dict[str, torch.Tensor] = {}
            shard = range(first, min(first + TEXTS_PER_SHARD, len(texts)))
            by_length = sorted(shard, key=lambda number: len(texts[number]))
            for begin in range(0, len(by_length), TEXTS_AT_ONCE):
                tensors |= _states(model, texts, by_length[begin : begin + TEXTS_AT_ONCE], layers)
            partial = path.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(path)
        progress(min(first + TEXTS_PER_SHARD, len(texts)) / len(texts))
    return True


class Texts:
    """Texts with their hidden states, read where they are needed."""

    def __init__(self, texts: Sequence[Sequence[int]], folder: Path) -> None:
        self._texts, self._folder = texts, folder
        self._open: dict[int, Any] = {}

    def __getitem__(self, number: int) -> Text:
        """Return one text."""
        first = number // TEXTS_PER_SHARD * TEXTS_PER_SHARD
        shard = self._open.get(first)
        if shard is None:
            shard = self._open[first] = safe_open(_shard(self._folder, first), "pt")
        tokens = torch.tensor(self._texts[number])
        return Text(tokens, shard.get_tensor(f"features.{number}"), shard.get_tensor(f"final.{number}"))


def _shard(folder: Path, first: int) -> Path:
    return folder / f"states-{first:06d}.safetensors"


@torch.inference_mode()
def _states(
    model: Any, texts: Sequence[Sequence[int]], numbers: Sequence[int], layers: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    longest = max(len(texts[number]) for number in numbers)
    ids = torch.zeros(len(numbers), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, number in enumerate(numbers):
        ids[row, : len(texts[number])] = torch.tensor(texts[number])
        mask[row, : len(texts[number])] = 1
    device = model.device
    out = model.model(
        input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False
    )
    features = torch.cat([out.hidden_states[layer] for layer in layers], -1).bfloat16().cpu()
    final = out.last_hidden_state.bfloat16().cpu()
    tensors = {}
    for row, number in enumerate(numbers):
        length = len(texts[number])
        tensors[f"features.{number}"] = features[row, :length].clone()
        tensors[f"final.{number}"] = final[row, :length].clone()
    return tensors
