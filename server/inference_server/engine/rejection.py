"""Verifies proposed tokens so that the output keeps exactly the distribution, and the seed, that it has without them.

Rejection sampling (Leviathan et al. 2022, *Fast Inference from Transformers via Speculative Decoding*, §2.3; Chen et
al. 2023, *Accelerating Large Language Model Decoding with Speculative Sampling*, Algorithm 2) accepts a token ``d``
that was drawn from ``q`` with probability ``min(1, p(d) / q(d))`` and otherwise draws from ``max(p - q, 0)``,
renormalized.

Every proposer here proposes its likeliest token, so ``q`` is all on ``d``: accept with probability ``p(d)``, otherwise
draw from ``p`` without ``d``. Drawing ``x`` from ``p`` and accepting where ``x == d`` is the same thing: ``x`` equals
``d`` with probability ``p(d)``, and where it does not, it is distributed as ``p`` without ``d``. And it needs one
random number per output token, the one that plain decoding uses for that token. So a seeded request says the same
whether or not, by whom, and how many tokens are proposed for it.

``p`` is what the sampler makes of the logits, with temperature, filters, penalties and grammar, each as it stands after
the proposed tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inference_server.engine import sampler
from inference_server.engine.sampler import Tokens
from inference_server.engine.scheduler import Scheduled


@dataclass(slots=True)
class Verified:
    """What the sampled items of a step say; each list has one entry per item, with one entry per token."""

    tokens: list[list[int]]
    """The accepted tokens, and one that the model chose after them."""
    logprobs: list[list[float | None]]
    top: list[list[list[tuple[int, float]] | None]]


def verify(logits: Tensor, items: list[Scheduled], greedy: Tokens | None = None) -> Verified:
    """Choose the tokens of a step.

    Parameters
    ----------
    logits : Tensor
        ``[S, vocab]``: for each item the row of its newest token, and one for each token proposed after it.
    items : list of Scheduled
        Those of the step that sample.
    greedy : Tokens, optional
        The most likely token of each row, if the forward pass finds it.
    """
    if not any(item.drafts for item in items):
        plain = sampler.sample(logits, [item.request for item in items], greedy)
        return Verified(
            tokens=[[token] for token in plain.tokens],
            logprobs=[[logprob] for logprob in plain.logprobs],
            top=[[top] for top in plain.top],
        )
    requests = [item.request for item in items for _ in range(item.num_sampled)]
    ahead = [item.drafts[:place] for item in items for place in range(item.num_sampled)]
    sampled = sampler.sample(logits, requests, greedy, ahead)
    result = Verified([], [], [])
    row = 0
    for item in items:
        accepted = 0
        while accepted < len(item.drafts) and sampled.tokens[row + accepted] == item.drafts[accepted]:
            accepted += 1
        end = row + accepted + 1
        result.tokens.append(sampled.tokens[row:end])
        result.logprobs.append(sampled.logprobs[row:end])
        result.top.append(sampled.top[row:end])
        row += item.num_sampled
    return result
