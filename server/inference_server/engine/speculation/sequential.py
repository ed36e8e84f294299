"""Proposes tokens one after another with a model: the first layers of the one that is served, or a smaller one.

Both give the same runners the same kind of plans that the engine gives; what differs is whose keys and values they use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from torch import nn

from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.kv_cache import KVCache
from inference_server.engine.llama import UnsupportedError
from inference_server.engine.request import Request
from inference_server.engine.runner import Replaying, Runner
from inference_server.engine.sampler import Tokens
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.engine.speculation.own_cache import Follower, OwnCache
from inference_server.features import Features
from inference_server.protocol import Kind


class Said:
    """Tokens that a pass chose, perhaps still on their way.

    Parameters
    ----------
    tokens : Tokens
    """

    __slots__ = ("_known", "_tokens")

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._known: list[int] | None = None

    def tolist(self) -> list[int]:
        """Wait for them and return them."""
        if self._known is None:
            self._known = self._tokens.tolist()
        return self._known


class Passes:
    """Runs forward passes of a proposing model, which number themselves apart from the engine's steps.

    Parameters
    ----------
    runner : Runner
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._replaying = runner if isinstance(runner, Replaying) else None
        self.ahead = self._replaying is not None
        """A pass may be run before the tokens of the one before, that it begins with, are known."""
        self._number = 0
        self._last: Said | None = None
        self._under_way: Said | None = None
        """The pass before the last one."""

    def start_afresh(self) -> None:
        """Block tables may have changed in the middle since the last pass."""
        self._number += 1  # a gap in the numbers is what tells a runner so

    def follow(self, features: Features) -> None:
        """Take up switches that say how passes are run."""
        if self._replaying is not None:
            self._replaying.use_graphs = features.cuda_graphs

    def forget_graphs(self) -> None:
        """Addresses that recorded passes hold are about to change."""
        if self._replaying is not None:
            self._replaying.forget_graphs()

    def run(self, items: list[Scheduled]) -> Said:
        """Compute some items; return the likeliest token of each that samples."""
        if self._under_way is not None:
            self._under_way.tolist()  # at most two passes are under way: a runner has room for a few
        self._number += 1
        plan = StepPlan(self._number, items, use_cache=True)
        logits = self._runner.forward(plan, self._runner.prepare(plan))
        greedy = self._runner.greedy
        self._under_way = self._last if self.ahead else None
        self._last = Said(logits.argmax(-1) if greedy is None else greedy)
        if not self.ahead:
            self._last.tolist()
        return self._last


class EarlyExitProposer:
    """The first layers of the model, its final norm and its head (Elhoushi et al. 2024, *LayerSkip*, without training).

    They write their part of the keys and values of proposed positions into the model's own cache, where verifying
    writes the same again. So nothing is to be caught up with when it is switched on.

    Parameters
    ----------
    tensors : PagedKVTensors
        The model's cache.
    runner_of : callable
        Makes a runner of so many first layers.
    """

    def __init__(self, tensors: PagedKVTensors, runner_of: Callable[[int], Runner]) -> None:
        self._tensors = tensors
        self._runner_of = runner_of
        self._passes: Passes | None = None
        self._layers = 0
        self._last_step = 0

    def wish(self, request: Request, most: int) -> int:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        del request
        return most

    def propose(self, plan: StepPlan, items: list[Scheduled], features: Features) -> list[list[int]]:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        if self._passes is None or self._layers != features.early_exit_layers:
            self._layers = features.early_exit_layers
            self._passes = Passes(self._runner_of(self._layers))
        passes = self._passes
        passes.follow(features)
        self._tensors.transfer(plan.transfers)
        if plan.moves_blocks or plan.step != self._last_step + 1:
            passes.start_afresh()
        self._last_step = plan.step
        known = [len(item.request.tokens) for item in items]
        said: list[tuple[list[int], Said]] = []
        proposed: list[list[int]] = [[] for _ in items]
        try:
            for depth in range(max(item.count for item in items) - 1):
                going = [place for place, item in enumerate(items) if depth < item.count - 1]
                shares = [
                    Scheduled(items[place].request, items[place].start + depth, 1, Kind.DRAFT, sample=True)
                    for place in going
                ]
                said.append((going, passes.run(shares)))
                if not passes.ahead:
                    _take([share.request for share in shares], said[-1][1])
        finally:
            for item, length in zip(items, known, strict=True):
                del item.request.tokens[length:]
        for going, tokens in said:
            for place, token in zip(going, tokens.tolist(), strict=True):
                proposed[place].append(token)
        return proposed

    def forget(self) -> None:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        if self._passes is not None:
            self._passes.start_afresh()
            self._passes.forget_graphs()

    def follow_model(self) -> None:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`. The next runner knows both."""
        self._passes = None


def first_layers(model: nn.Module, count: int) -> nn.Module:
    """A model of the first ``count`` layers of another and its final norm and head; it shares their weights.

    Raises
    ------
    UnsupportedError
        If the layers are not where transformers' decoders have them.
    """
    outer: Any = model
    inner: Any = getattr(outer, outer.base_model_prefix, None)
    if not isinstance(getattr(inner, "layers", None), nn.ModuleList):
        raise UnsupportedError(f"the layers of {type(model).__name__} are not where they could be cut off")
    body = _with(inner, "layers", inner.layers[:count])
    body.config = copy.copy(inner.config)
    body.config.num_hidden_layers = count
    short: nn.Module = _with(outer, outer.base_model_prefix, body)
    return short


def _with(module: nn.Module, name: str, child: nn.Module) -> Any:
    """A module like another, of the same weights, but for one child."""
    other = copy.copy(module)
    other._modules = {**module._modules, name: child}  # noqa: SLF001 - torch copies modules with their weights only
    return other


class _Shadow(Follower):
    """A request as the draft model knows it: the same text, but for what it proposed itself last time."""

    __slots__ = ("agreed",)

    def __init__(self, of: Request) -> None:
        super().__init__(of, of.prompt_len)
        self.agreed = 0
        """Tokens taken over from the request."""

    def follow(self) -> None:
        """Take over what the request has said since, keeping keys and values of proposals that it said too."""
        own, tokens = self.own, self.of.tokens
        place = self.agreed
        while place < len(tokens) and place < len(own.tokens) and own.tokens[place] == tokens[place]:
            place += 1
        own.num_computed = min(own.num_computed, place)
        own.tokens[place:] = tokens[place:]
        self.agreed = len(tokens)


class DraftModelProposer:
    """A smaller model with the same vocabulary and a KV cache of its own.

    A request that it has not followed, because it was switched on in the middle or memory was short, is caught up with
    first: its whole text is computed, in pieces of at most the token budget, and until then nothing is proposed.

    Parameters
    ----------
    runner : Runner
    cache : KVCache
        Of the draft model.
    max_model_len : int
        The longest text that it can read.
    vocab_size : int
        Of the model that is served; no token beyond it is proposed.
    """

    def __init__(self, runner: Runner, cache: KVCache, max_model_len: int, vocab_size: int) -> None:
        self._passes = Passes(runner)
        self._shadows: OwnCache[_Shadow] = OwnCache(cache)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size

    def wish(self, request: Request, most: int) -> int:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        return max(min(most, self._max_model_len - len(request.tokens)), 0)

    def propose(self, plan: StepPlan, items: list[Scheduled], features: Features) -> list[list[int]]:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        del plan
        self._passes.follow(features)
        self._shadows.forget_ended()
        budget = features.max_num_batched_tokens
        shares: list[Scheduled] = []
        going: list[tuple[Request, Scheduled]] = []
        used = {item.request.handle for item in items}
        for item in items:
            shadow = self._shadow(item.request)
            own = shadow.own
            count = min(len(own.tokens) - own.num_computed, budget)
            if count <= 0 or not self._shadows.extend(shadow, len(own.tokens) + item.count - 1, used):
                continue
            budget -= count
            done = own.num_computed + count == len(own.tokens)
            shares.append(Scheduled(own, own.num_computed, count, Kind.DRAFT, sample=done))
            if done:
                going.append((own, item))
        said: list[tuple[list[Request], Said]] = []
        while shares:
            said.append(([own for own, _ in going], self._passes.run(shares)))
            for share in shares:
                share.request.num_computed = share.end
            if not self._passes.ahead:
                _take(*said[-1])
            going = [(own, item) for own, item in going if len(said) < item.count - 1]
            shares = [Scheduled(own, own.num_computed, 1, Kind.DRAFT, sample=True) for own, _ in going]
        if self._passes.ahead:
            for each in said:
                _take(*each)
        return [self._proposed(item) for item in items]

    def forget(self) -> None:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        self._shadows.clear()
        self._passes.start_afresh()
        self._passes.forget_graphs()

    def follow_model(self) -> None:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`. It has nothing of the model's."""

    def _proposed(self, item: Scheduled) -> list[int]:
        shadow = self._shadows.of(item.request)
        assert shadow is not None, "it was made or found when the step's passes began"
        proposed = shadow.own.tokens[shadow.agreed :]
        return list(takewhile(lambda token: token < self._vocab_size, proposed))

    def _shadow(self, request: Request) -> _Shadow:
        shadow = self._shadows.of(request) or self._shadows.add(_Shadow(request))
        shadow.follow()
        return shadow


def _take(requests: Sequence[Request], said: Said) -> None:
    for request, token in zip(requests, said.tolist(), strict=True):
        request.tokens.append(token)
