"""Trains an EAGLE-3 head on hidden states of its model. Owns the loss, the start values and the optimizer's loop.

The head is unrolled as it will be used (Li et al. 2025, *EAGLE-3*, "training-time test"): its own last hidden state
takes the place of the model's features from the second proposed token on. In every step of that the loss is the
Kullback-Leibler divergence of its distribution from the model's, both over the tokens that the head can propose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, log_softmax

from inference_server.engine.speculation.eagle_head import EagleHead, HeadShape

LATER_STEPS_COUNT = 0.8
"""Weight of each unrolled step's loss, relative to the step before."""


@dataclass(slots=True)
class Text:
    """One text and what the model thinks of it."""

    tokens: Tensor
    """``[T]``"""
    features: Tensor
    """``[T, 3 * hidden]``: the hidden states that enter the head's feature layers."""
    final: Tensor
    """``[T, hidden]``: after the model's last norm, what its output layer reads."""
    answer: int = 0
    """Where what the model says begins."""


@dataclass(slots=True)
class Batch:
    """Some texts, padded to one length."""

    tokens: Tensor
    features: Tensor
    final: Tensor
    lengths: Tensor
    answers: Tensor
    """``[texts]``, where the answer of each begins: only there is a head asked what comes next."""

    @classmethod
    def of(cls, texts: Sequence[Text], device: torch.device | None = None) -> Batch:
        """Pad some texts, and put them on a device."""
        pad = nn.utils.rnn.pad_sequence
        return cls(
            tokens=pad([text.tokens for text in texts], batch_first=True).to(device),
            features=pad([text.features for text in texts], batch_first=True).to(device).float(),
            final=pad([text.final for text in texts], batch_first=True).to(device).float(),
            lengths=torch.tensor([len(text.tokens) for text in texts], device=device),
            answers=torch.tensor([text.answer for text in texts], device=device),
        )


@dataclass(slots=True)
class Judged:
    """What a batch says of a head."""

    right: Tensor
    """``[steps]`` how often the head's likeliest token was the model's, in each unrolled step."""
    accepted: Tensor
    """``[steps]`` how often it was so in this step and in all before it."""
    count: Tensor
    """Positions judged."""

    @property
    def acceptance_length(self) -> float:
        """Tokens per verifying step with greedy decoding, the bonus included, if proposals are made everywhere."""
        return 1.0 + float(self.accepted.sum() / self.count)


def loss(head: EagleHead, embed: Tensor, output: Tensor, batch: Batch, steps: int) -> Tensor:
    """How far an unrolled head is from its model: nats per token, a mean over the steps.

    Parameters
    ----------
    head : EagleHead
    embed : Tensor
        ``[vocab, hidden]`` the model's embedding.
    output : Tensor
        ``[draft_vocab, hidden]`` rows of the model's output layer for the tokens that the head can propose.
    batch : Batch
    steps : int
        How many tokens the head proposes one after another.
    """
    teacher = log_softmax(linear(batch.final, output).float(), -1)
    length = teacher.shape[1]
    total, weights = torch.zeros((), device=teacher.device), 0.0
    for step, logits in enumerate(_unroll(head, embed, batch, steps)):
        # Row t proposes what comes after token t + 1 + step.
        shift = 1 + step
        log_p = teacher[:, shift:]
        log_q = log_softmax(logits[:, : length - shift].float(), -1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        valid = _asked(batch, shift)[:, : length - shift]
        weight = LATER_STEPS_COUNT**step
        total = total + weight * (divergence * valid).sum() / valid.sum().clamp_min(1)
        weights += weight
    return total / weights


def judge(head: EagleHead, embed: Tensor, output: Tensor, batch: Batch, steps: int) -> Judged:
    """Count how often an unrolled head is right.

    Parameters
    ----------
    head : EagleHead
    embed, output : Tensor
        ``[vocab, hidden]`` the model's embedding and its output layer.
    batch : Batch
    steps : int
        How many tokens the head proposes one after another.
    """
    likeliest = linear(batch.final, output).argmax(-1)
    # Judged where every step can be.
    whole = _asked(batch, steps)
    alive, counts = whole, []
    for step, logits in enumerate(_unroll(head, embed, batch, steps)):
        right = (head.proposed[logits.argmax(-1)] == likeliest.roll(-1 - step, 1)) & whole
        alive = alive & right
        counts.append(torch.stack([right.sum(), alive.sum()]))
    right, accepted = torch.stack(counts).unbind(1)
    return Judged(right, accepted, whole.sum())


def _asked(batch: Batch, ahead: int) -> Tensor:
    """Positions ``[texts, longest]`` of which a head is asked in answers, so many tokens before the texts' ends."""
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
    # The first token of the answer is the model's own; the head proposes from there on.
    return (position + 1 >= batch.answers[:, None]) & (position < (batch.lengths - ahead - 1)[:, None])


def _unroll(head: EagleHead, embed: Tensor, batch: Batch, steps: int) -> Iterator[Tensor]:
    """What a head says at every position, ``[texts, longest, draft_vocab]``, in each of ``steps``."""
    length = batch.tokens.shape[1]
    positions = torch.arange(length, device=batch.tokens.device)[None]
    causal = torch.ones(length, length, dtype=torch.bool, device=batch.tokens.device).tril()
    hidden = head.fuse(batch.features)
    known: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        # From the row's own last state, and the token that the step before should have proposed.
        tokens = batch.tokens.roll(-1 - step, 1)
        q, k, v = head.qkv(embedding(tokens, embed), hidden, positions + step)
        known.append((k, v))
        hidden = head.after_attention(hidden, _attend(q, known, causal))
        yield head.logits(hidden)


def _attend(q: Tensor, known: list[tuple[Tensor, Tensor]], causal: Tensor) -> Tensor:
    """Attention of the newest unrolled step: causally on the first step's keys, and on its own row's since then."""
    groups = q.shape[1] // known[0][0].shape[1]
    keys = [k.repeat_interleave(groups, 1) for k, _ in known]
    values = [v.repeat_interleave(groups, 1) for _, v in known]
    scale = q.shape[-1] ** -0.5
    scores = (q @ keys[0].transpose(2, 3) * scale).float().masked_fill(~causal, float("-inf"))
    own = [((q * k).sum(-1, keepdim=True) * scale).float() for k in keys[1:]]
    weights = torch.cat([scores, *own], -1).softmax(-1).to(q.dtype)
    length = causal.shape[0]
    result = weights[..., :length] @ values[0]
    for place, value in enumerate(values[1:]):
        result = result + weights[..., length + place : length + place + 1] * value
    return result


def start(shape: HeadShape, proposed: Tensor, model: Any, seed: int = 0) -> EagleHead:
    """A head that begins with what the model knows.

    The last of its features passes unchanged; embeddings are averaged over the text by attention, where a head has
    as many heads for values as for queries; the feed-forward part is that of the model's last layer, and the output
    layer the model's rows of the tokens that can be proposed.
    """
    head, chance = EagleHead(shape, proposed), torch.Generator().manual_seed(seed)
    last, hidden = model.model.layers[-1], shape.hidden
    with torch.no_grad():
        head.fc.weight.zero_()
        head.fc.weight[:, 2 * hidden :] = torch.eye(hidden)
        for layer in (head.q, head.k, head.v):
            layer.weight.normal_(0, 0.02, generator=chance)
        if shape.kv_heads == shape.heads and shape.heads * shape.head_dim == hidden:
            head.v.weight[:, :hidden] += 0.5 * torch.eye(hidden)
            head.o.weight.copy_(0.5 * torch.eye(hidden))
        else:
            head.o.weight.normal_(0, 0.02, generator=chance)
        head.post_norm.copy_(last.post_attention_layernorm.weight)
        head.gate.weight.copy_(last.mlp.gate_proj.weight)
        head.up.weight.copy_(last.mlp.up_proj.weight)
        head.down.weight.copy_(last.mlp.down_proj.weight)
        head.norm.copy_(model.model.norm.weight)
        head.lm_head.weight.copy_(model.lm_head.weight[proposed])
    return head
