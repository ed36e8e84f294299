"""What the teacher thinks of its texts: its hidden states.

On a CPU, where computing them takes as long as training, they are computed once and kept in shards that are mapped,
not read. On a GPU they are computed again for every batch: that is quicker than a disk, and they are five kilobytes a
token of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from inference_server.distill.head_training import Batch, Text

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


class Watched(Protocol):
    """Texts with the teacher's hidden states."""

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return some of the texts, by number."""


class Kept:
    """Texts whose hidden states are in a folder, where :func:`compute` has put them.

    Parameters
    ----------
    texts : sequence of sequence of int
    folder : Path
    device : torch.device
        Where batches are wanted.
    """

    def __init__(self, texts: Sequence[Sequence[int]], folder: Path, device: torch.device) -> None:
        self._texts, self._folder, self._device = texts, folder, device
        self._open: dict[int, Any] = {}

    def batch(self, numbers: Sequence[int]) -> Batch:
        """See :class:`Watched`."""
        return Batch.of([self._text(number) for number in numbers], self._device)

    def _text(self, number: int) -> Text:
        first = number // TEXTS_PER_SHARD * TEXTS_PER_SHARD
        shard = self._open.get(first)
        if shard is None:
            shard = self._open[first] = safe_open(_shard(self._folder, first), "pt")
        tokens = torch.tensor(self._texts[number])
        return Text(tokens, shard.get_tensor(f"features.{number}"), shard.get_tensor(f"final.{number}"))


class Recomputed:
    """Texts whose hidden states are computed whenever they are asked for.

    Parameters
    ----------
    model : torch.nn.Module
        The teacher, as transformers has it; batches are where it is.
    texts : sequence of sequence of int
    layers : tuple of int
        The hidden states that enter these layers are features.
    """

    def __init__(self, model: Any, texts: Sequence[Sequence[int]], layers: tuple[int, ...]) -> None:
        self._model, self._layers = model, layers
        self._texts = [torch.tensor(text) for text in texts]

    @torch.no_grad()
    def batch(self, numbers: Sequence[int]) -> Batch:
        """See :class:`Watched`."""
        texts = [self._texts[number] for number in numbers]
        device = self._model.device
        ids = pad_sequence(texts, batch_first=True).to(device, non_blocking=True)
        features, final = _watch(self._model, ids, self._layers)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        return Batch(tokens=ids, features=features.float(), final=final.float(), lengths=lengths)


def _shard(folder: Path, first: int) -> Path:
    return folder / f"states-{first:06d}.safetensors"


@torch.no_grad()
def _states(
    model: Any, texts: Sequence[Sequence[int]], numbers: Sequence[int], layers: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    ids = pad_sequence([torch.tensor(texts[number]) for number in numbers], batch_first=True)
    features, final = (each.bfloat16().cpu() for each in _watch(model, ids.to(model.device), layers))
    tensors = {}
    for row, number in enumerate(numbers):
        length = len(texts[number])
        tensors[f"features.{number}"] = features[row, :length].clone()
        tensors[f"final.{number}"] = final[row, :length].clone()
    return tensors


def _watch(model: Any, ids: torch.Tensor, layers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[texts, longest, 3 * hidden]`` and last hidden states; texts are padded behind, where nobody looks."""
    out = model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return torch.cat([out.hidden_states[layer] for layer in layers], -1), out.last_hidden_state
