"""What the teacher thinks of its texts: its hidden states.

They are computed once: on a CPU, where that takes as long as training, into shards in a folder; on a GPU into its
memory. Those of a teacher too large for that are computed again for every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from inference_server.distill.head_training import Batch, Text
from inference_server.distill.teacher_text import Written

TEXTS_PER_SHARD = 64
TEXTS_AT_ONCE = 16
TOKENS_AT_ONCE = 65536
"""On a GPU."""
SHARE_OF_MEMORY = 0.5
"""That hidden states may take of what is free on a GPU."""


def compute(
    model: Any,
    texts: Sequence[Written],
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
    texts : sequence of Written
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
            tensors: dict[str, Tensor] = {}
            shard = range(first, min(first + TEXTS_PER_SHARD, len(texts)))
            by_length = sorted(shard, key=lambda number: len(texts[number].tokens))
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
    texts : sequence of Written
    folder : Path
    device : torch.device
        Where batches are wanted.
    """

    def __init__(self, texts: Sequence[Written], folder: Path, device: torch.device) -> None:
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
        text = self._texts[number]
        features, final = (shard.get_tensor(f"{name}.{number}") for name in ("features", "final"))
        return Text(torch.tensor(text.tokens), features, final, text.answer)


class Recomputed:
    """Texts whose hidden states are computed whenever they are asked for.

    Parameters
    ----------
    model : torch.nn.Module
        The teacher, as transformers has it; batches are where it is.
    texts : sequence of Written
    layers : tuple of int
        The hidden states that enter these layers are features.
    """

    def __init__(self, model: Any, texts: Sequence[Written], layers: tuple[int, ...]) -> None:
        self.model, self.texts, self.layers = model, texts, layers

    @torch.no_grad()
    def batch(self, numbers: Sequence[int]) -> Batch:
        """See :class:`Watched`."""
        device = self.model.device
        texts = [self.texts[number] for number in numbers]
        ids = pad_sequence([torch.tensor(text.tokens) for text in texts], batch_first=True).to(device)
        features, final = _watch(self.model, ids, self.layers)
        lengths = torch.tensor([len(text.tokens) for text in texts], device=device)
        answers = torch.tensor([text.answer for text in texts], device=device)
        return Batch(tokens=ids, features=features.float(), final=final.float(), lengths=lengths, answers=answers)


class Resident:
    """Texts whose hidden states are all in a GPU's memory.

    Parameters
    ----------
    source : Recomputed
    progress : callable
        Told which share is computed.
    stop : callable
        Asked now and then whether to end before they are complete; then no batch must be asked for.
    """

    def __init__(self, source: Recomputed, progress: Callable[[float], None], stop: Callable[[], bool]) -> None:
        lengths = torch.tensor([len(text.tokens) for text in source.texts])
        device, total = source.model.device, int(lengths.sum())
        hidden = source.model.config.hidden_size
        self._lengths, self._begins = lengths.to(device), (lengths.cumsum(0) - lengths).to(device)
        self._answers = torch.tensor([text.answer for text in source.texts], device=device)
        self._tokens = torch.tensor([token for text in source.texts for token in text.tokens], device=device)
        self._features = torch.empty(total, len(source.layers) * hidden, dtype=torch.bfloat16, device=device)
        self._final = torch.empty(total, hidden, dtype=torch.bfloat16, device=device)
        by_length = lengths.argsort().tolist()
        first = 0
        while first < len(by_length) and not stop():
            count = max(TOKENS_AT_ONCE // len(source.texts[by_length[first]].tokens), 1)
            numbers = by_length[first : first + count]
            batch = source.batch(numbers)
            places, inside = self._places(numbers)
            self._features[places[inside]] = batch.features[inside].bfloat16()
            self._final[places[inside]] = batch.final[inside].bfloat16()
            first += count
            progress(min(first / len(by_length), 1.0))

    @staticmethod
    def fits(source: Recomputed) -> bool:
        """Whether the hidden states have room in what is free of the GPU's memory."""
        free, _ = torch.cuda.mem_get_info(source.model.device)
        total = sum(len(text.tokens) for text in source.texts)
        needed: int = 2 * total * (len(source.layers) + 1) * source.model.config.hidden_size
        return needed < SHARE_OF_MEMORY * free

    def batch(self, numbers: Sequence[int]) -> Batch:
        """See :class:`Watched`."""
        places, _ = self._places(numbers)
        index = torch.tensor(numbers, device=places.device)
        return Batch(
            tokens=self._tokens[places],
            features=self._features[places].float(),
            final=self._final[places].float(),
            lengths=self._lengths[index],
            answers=self._answers[index],
        )

    def _places(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where the positions ``[texts, longest]`` of some texts are, and which of these are theirs."""
        index = torch.tensor(numbers, device=self._begins.device)
        lengths = self._lengths[index]
        position = torch.arange(int(lengths.max()), device=lengths.device)[None]
        inside = position < lengths[:, None]
        return self._begins[index][:, None] + torch.where(inside, position, 0), inside


def _shard(folder: Path, first: int) -> Path:
    return folder / f"states-{first:06d}.safetensors"


@torch.no_grad()
def _states(model: Any, texts: Sequence[Written], numbers: Sequence[int], layers: tuple[int, ...]) -> dict[str, Tensor]:
    ids = pad_sequence([torch.tensor(texts[number].tokens) for number in numbers], batch_first=True)
    features, final = (each.bfloat16().cpu() for each in _watch(model, ids.to(model.device), layers))
    tensors = {}
    for row, number in enumerate(numbers):
        length = len(texts[number].tokens)
        tensors[f"features.{number}"] = features[row, :length].clone()
        tensors[f"final.{number}"] = final[row, :length].clone()
    return tensors


def _watch(model: Any, ids: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Features ``[texts, longest, 3 * hidden]`` and last hidden states; texts are padded behind, where nobody looks."""
    out = model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return torch.cat([out.hidden_states[layer] for layer in layers], -1), out.last_hidden_state
