"""Proposes with an EAGLE-3 head: owns what it remembers of each request, and the plain way to compute the head.

The head reads hidden states that the model computes anyway. They are taken from each step as it is computed
(:meth:`EagleProposer.observe`), and the head catches up with them when it is next asked: after a prompt, after steps in
which nothing was proposed. Where a request's features are missing, because the head was switched on in the middle or
its text was found in the prefix cache, the head begins where they do: it proposes from less context then, no worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from inference_server.engine.attention import slots_of
from inference_server.engine.kv_cache import KVCache
from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.engine.speculation.eagle_head import EagleHead
from inference_server.engine.speculation.own_cache import Follower, OwnCache
from inference_server.features import Features

ROWS_AT_ONCE = 512
"""Rows of the head's forward pass when it catches up."""


@dataclass(slots=True)
class HeadRows:
    """Inputs of one forward pass of a head."""

    ids: list[int]
    positions: list[int]
    requests: list[tuple[Request, int, int]]
    """The request whose blocks to use, where its rows begin, and how many they are."""
    kept: list[int]
    """Rows whose proposal and last state are wanted."""


class HeadRunner(Protocol):
    """One way to compute a head."""

    def fuse(self, features: Tensor) -> Tensor:
        """Make ``[rows, hidden]`` of captured hidden states; float32, not to be overwritten later."""

    def run(self, rows: HeadRows, hidden: Tensor) -> tuple[list[int], Tensor]:
        """Compute some rows; return the model's ids of the kept ones' likeliest tokens, and their last states."""


class TorchHeadRunner:
    """Computes a head with torch, on any device.

    Parameters
    ----------
    head : EagleHead
    embed : Tensor
        ``[vocab, hidden]`` the model's embedding.
    num_slots, block_size : int
        Of the head's cache.
    """

    def __init__(self, head: EagleHead, embed: Tensor, num_slots: int, block_size: int) -> None:
        shape = head.shape
        self._head, self._embed, self._block_size = head, embed, block_size
        self.keys = torch.zeros(num_slots, shape.kv_heads, shape.head_dim, device=embed.device)
        self.values = torch.zeros_like(self.keys)

    @torch.inference_mode()
    def fuse(self, features: Tensor) -> Tensor:
        """See :class:`HeadRunner`."""
        return self._head.fuse(features)

    @torch.inference_mode()
    def run(self, rows: HeadRows, hidden: Tensor) -> tuple[list[int], Tensor]:
        """See :class:`HeadRunner`."""
        device = self._embed.device
        embedded = embedding(torch.tensor(rows.ids, device=device), self._embed).float()
        positions = torch.tensor(rows.positions, device=device)
        q, k, v = (each[0] for each in self._head.qkv(embedded[None], hidden[None], positions[None]))
        attended = torch.empty_like(q)
        for request, first, count in rows.requests:
            part = slice(first, first + count)
            end = rows.positions[first + count - 1] + 1
            slots = torch.from_numpy(slots_of(request.blocks, end, self._block_size)).to(device)
            self.keys[slots[end - count :]] = k[:, part].transpose(0, 1)
            self.values[slots[end - count :]] = v[:, part].transpose(0, 1)
            mask = torch.ones(count, end, dtype=torch.bool, device=device).tril(end - count)
            keys, values = (each[slots].transpose(0, 1)[None] for each in (self.keys, self.values))
            query = q[None, :, part]
            attended[:, part] = scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)[0]
        out = self._head.after_attention(hidden[None], attended[None])[0][rows.kept]
        best = self._head.logits(out).argmax(-1)
        tokens: list[int] = self._head.proposed[best].tolist()
        return tokens, out


class _Followed(Follower):
    """What the head knows of a request. Its positions count from the first one that it has features of."""

    __slots__ = ("first", "pending")

    def __init__(self, of: Request) -> None:
        super().__init__(of, prompt_len=0)
        self.first = 0
        """The request's position that the head's position 0 stands for."""
        self.pending: list[tuple[int, Tensor]] = []
        """Fused features that the head has not read, without gaps: the request's position of the first row, and
        rows."""

    def lose_blocks(self) -> None:
        """See :class:`Follower`. Whatever features come next, it begins there."""
        self.first = 1 << 62

    @property
    def pending_end(self) -> int:
        start, rows = self.pending[-1]
        return start + len(rows)


class EagleProposer:
    """See the module.

    Parameters
    ----------
    runner : HeadRunner
    cache : KVCache
        Of the head.
    max_len : int
        The longest text.
    """

    def __init__(self, runner: HeadRunner, cache: KVCache, max_len: int) -> None:
        self._runner = runner
        self._followed: OwnCache[_Followed] = OwnCache(cache)
        self._max_len = max_len

    def observe(self, items: Sequence[tuple[Scheduled, int]], features: Tensor) -> None:
        """Take in the hidden states of a step.

        Parameters
        ----------
        items : sequence of (Scheduled, int)
            Those of the step's items that it may be asked about, and where their rows begin.
        features : Tensor
            Of all rows of the step.
        """
        self._followed.forget_ended()
        if len(items) == 1 or sum(item.count for item, _ in items) == len(features):
            first = items[0][1]
            last = items[-1][1] + items[-1][0].count
            fused = self._runner.fuse(features[first:last])
        else:
            first, fused = 0, self._runner.fuse(features)
        for item, offset in items:
            followed = self._followed.of(item.request) or self._followed.add(_Followed(item.request))
            self._add(followed, item.start, fused[offset - first : offset - first + item.count])

    def wish(self, request: Request, most: int) -> int:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        followed = self._followed.of(request)
        if followed is None or not followed.pending:
            return 0
        known = len(request.tokens)
        return max(min(most, self._max_len - known), 0) if followed.pending_end >= known - 1 else 0

    def propose(self, plan: StepPlan, items: list[Scheduled], features: Features) -> list[list[int]]:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        del plan, features
        used = {item.request.handle for item in items}
        proposed: list[list[int]] = [[] for _ in items]
        rows = HeadRows([], [], [], [])
        parts: list[Tensor] = []
        going: list[int] = []
        heads = [self._known(item.request) for item in items]
        for place, (item, followed) in enumerate(zip(items, heads, strict=True)):
            known = len(item.request.tokens)
            self._begin_where_features_do(followed)
            if not self._followed.extend(followed, known - 1 - followed.first + item.count, used):
                continue
            self._catch_up(followed, known, rows, parts)
            going.append(place)
        if not going:
            return proposed
        tokens, states = self._runner.run(rows, torch.cat(parts) if len(parts) > 1 else parts[0])
        number = 1
        while True:
            for place, token in zip(going, tokens, strict=True):
                proposed[place].append(token)
            kept = [index for index, place in enumerate(going) if number < items[place].count - 1]
            if not kept:
                return proposed
            if len(kept) < len(going):
                states = states[kept]
                going = [going[index] for index in kept]
            position = [heads[place].own.num_computed - 1 + number for place in going]
            requests = [(heads[place].own, row, 1) for row, place in enumerate(going)]
            ids = [proposed[place][-1] for place in going]
            tokens, states = self._runner.run(HeadRows(ids, position, requests, list(range(len(going)))), states)
            number += 1

    def forget(self) -> None:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        self._followed.clear()

    def follow_model(self) -> None:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`. Hidden states come with each step."""

    # -- private -------------------------------------------------------------------------------------------------------

    def _known(self, request: Request) -> _Followed:
        followed = self._followed.of(request)
        assert followed is not None, "the head wished to propose for it, so it has features of it"
        return followed

    def _add(self, followed: _Followed, start: int, rows: Tensor) -> None:
        """Append features of positions from ``start`` on; they replace those of positions that turned out otherwise."""
        pending = followed.pending
        while pending and pending[-1][0] >= start:
            pending.pop()
        if pending:
            first, before = pending[-1]
            if first + len(before) < start:
                pending.clear()
            elif first + len(before) > start:
                pending[-1] = (first, before[: start - first])
        pending.append((start, rows))

    def _begin_where_features_do(self, followed: _Followed) -> None:
        """Start afresh after a gap, or where the text was computed anew from further back."""
        start = followed.pending[0][0]
        if start > followed.first + followed.own.num_computed or start < followed.first:
            followed.first, followed.own.num_computed = start, 0

    def _catch_up(self, followed: _Followed, known: int, rows: HeadRows, parts: list[Tensor]) -> None:
        """Plan the rows that the head has not read, the last of which proposes what follows the last known token."""
        own, pending = followed.own, followed.pending
        expected = followed.first + own.num_computed
        features = torch.cat([part for _, part in pending]) if len(pending) > 1 else pending[0][1]
        features = features[expected - pending[0][0] : known - 1 - pending[0][0]]
        pending.clear()
        tokens = followed.of.tokens[expected + 1 : known]
        start = own.num_computed
        while len(tokens) > ROWS_AT_ONCE:
            part = HeadRows(tokens[:ROWS_AT_ONCE], list(range(start, start + ROWS_AT_ONCE)), [], [])
            part.requests.append((own, 0, ROWS_AT_ONCE))
            self._runner.run(part, features[:ROWS_AT_ONCE])
            tokens, features, start = tokens[ROWS_AT_ONCE:], features[ROWS_AT_ONCE:], start + ROWS_AT_ONCE
        rows.requests.append((own, len(rows.ids), len(tokens)))
        rows.ids += tokens
        rows.positions += range(start, start + len(tokens))
        rows.kept.append(len(rows.ids) - 1)
        parts.append(features)
        own.num_computed = known - 1 - followed.first
