"""A student: the teacher with fewer layers, trained on its distribution. Owns its start, its loss and its folder.

It is a model of its own, to be served like any other, and a draft model for its teacher, whose tokenizer it has.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax, softmax

from inference_server.distill.head_training import Batch

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "generation_config.json", "LICENSE",
)  # fmt: skip
ROWS_AT_ONCE = 512
"""Positions whose distributions over the whole vocabulary are in memory at once."""


@dataclass(slots=True)
class StudentJudged:
    """What a batch says of a student."""

    loss: Tensor
    """Kullback-Leibler divergence from the teacher, nats per position."""
    agreeing: Tensor
    """Positions where its likeliest token is the teacher's."""
    count: Tensor
    """Positions."""


def start(teacher: Any, layers: int) -> Any:
    """A model of ``layers`` of the teacher's layers, evenly spread, the first and the last among them."""
    total = len(teacher.model.layers)
    chosen = [round(place * (total - 1) / max(layers - 1, 1)) for place in range(layers)]
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[place] for place in chosen]
    student = type(teacher)(config).float()
    weights = {}
    for name, value in teacher.state_dict().items():
        prefix, _, rest = name.partition("layers.")
        if not rest:
            weights[name] = value.float()
            continue
        number, _, part = rest.partition(".")
        for own, source in enumerate(chosen):
            if int(number) == source:
                weights[f"{prefix}layers.{own}.{part}"] = value.float()
    student.load_state_dict(weights)
    student.tie_weights()
    return student.train()


def judge(student: Any, output: Tensor, batch: Batch) -> StudentJudged:
    """Compare a student with what is known of its teacher.

    Parameters
    ----------
    student : torch.nn.Module
    output : Tensor
        ``[vocab, hidden]`` the teacher's output layer.
    batch : Batch
    """
    length = batch.tokens.shape[1]
    valid = torch.arange(length, device=batch.tokens.device)[None] < batch.lengths[:, None]
    hidden = student.model(input_ids=batch.tokens, attention_mask=valid.long(), use_cache=False).last_hidden_state[
        valid
    ]
    final = batch.final[valid]
    total = torch.zeros((), device=final.device)
    agreeing = torch.zeros((), dtype=torch.long, device=final.device)
    for first in range(0, len(hidden), ROWS_AT_ONCE):
        own = student.lm_head(hidden[first : first + ROWS_AT_ONCE]).float()
        teacher = linear(final[first : first + ROWS_AT_ONCE], output).float()
        p = softmax(teacher, -1)
        total = total + (p * (log_softmax(teacher, -1) - log_softmax(own, -1))).sum()
        agreeing = agreeing + (own.argmax(-1) == teacher.argmax(-1)).sum()
    count = valid.sum()
    return StudentJudged(total / count, agreeing, count)


def save(student: Any, teacher: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a student as a model folder, with its teacher's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(student).to(dtype).save_pretrained(folder, safe_serialization=True)
    for name in TOKENIZER_FILES:
        if (teacher / name).exists():
            shutil.copyfile(teacher / name, folder / name)
