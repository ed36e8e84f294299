"""Decides, step by step, which positions of which requests are computed. Pure Python; imports no torch.

Prefill and decode are one thing here: a request has ``num_computed`` of its ``num_tokens`` positions in the cache, and
a step computes some more of them. When all are computed, the step samples one token. (After vLLM's V1 scheduler and
Yu et al. 2022, *Orca*, §3.1: the batch is composed anew for every iteration.)

Progress is certain: the request that is first by policy is never the victim of a preemption, a request that could
never fit is refused at submission, and one that waited :data:`PROMOTE_AFTER_STEPS` steps goes first from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from inference_server.engine.kv_cache import KVCache, Transfer
from inference_server.engine.request import Request
from inference_server.features import Features
from inference_server.protocol import FinishReason, Kind

PROMOTE_AFTER_STEPS = 512

Wish = Callable[[Request], int]
"""How many tokens somebody would propose for a request that is about to decode."""


@dataclass(slots=True)
class Scheduled:
    """One request's share of a step: positions ``[start, start + count)``."""

    request: Request
    start: int
    count: int
    kind: Kind
    sample: bool
    """The last of these positions is the newest token's, so its logits give the next one."""
    drafts: list[int] = field(default_factory=list)
    """Proposed tokens. They stand in the last positions, after the newest token, and their logits are kept too."""

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + self.count

    @property
    def num_sampled(self) -> int:
        """Positions whose logits are kept: the last ones."""
        return 1 + len(self.drafts) if self.sample else 0

    def tokens(self) -> list[int]:
        """Tokens at the positions to compute, as far as they are known."""
        known = self.request.tokens[self.start : self.end]
        return known + self.drafts if self.drafts else known

    def propose(self, drafts: list[int]) -> None:
        """Take what was proposed for a :attr:`Kind.VERIFY` item, at most as much as it has room for."""
        self.drafts = drafts[: self.count - 1]
        self.count = 1 + len(self.drafts)
        self.kind = Kind.VERIFY if self.drafts else Kind.DECODE


@dataclass(slots=True)
class StepPlan:
    """What the next forward pass computes."""

    step: int
    items: list[Scheduled]
    use_cache: bool
    transfers: list[Transfer] = field(default_factory=list)
    """What to copy between KV blocks and host memory, in this order, before the forward pass."""
    moves_blocks: bool = False
    """There are such copies, or were: they leave the list once they are made."""
    preempted: list[Request] = field(default_factory=list)
    started: list[Request] = field(default_factory=list)
    """Requests that left the queue in this step."""
    idle_slots: int = 0

    @property
    def num_tokens(self) -> int:
        """Positions computed in this step."""
        return sum(item.count for item in self.items)

    @property
    def num_drafts(self) -> int:
        """Proposed tokens that this step verifies."""
        return sum(len(item.drafts) for item in self.items)


class Scheduler:
    """Queue, running set and preemption over one :class:`KVCache`.

    Parameters
    ----------
    cache : KVCache
    eos_token_ids : iterable of int
        Tokens that end a request unless it ignores them.
    """

    def __init__(self, cache: KVCache, eos_token_ids: Iterable[int] = ()) -> None:
        self.cache = cache
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.step = 0
        self._static_seats = 0

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request, and with it the samples that will fork from it."""
        for each in (request, *request.group):
            each.waiting_since = self.step
            self.waiting.append(each)

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it is, and take its blocks back. Does nothing for one that has ended."""
        for place in (self.running, self.waiting):
            if request in place:
                place.remove(request)
                self._release(request)
                request.finish_reason = "cancelled"
                return

    def has_work(self) -> bool:
        """Whether :meth:`schedule` would find something to do."""
        return bool(self.waiting or self.running)

    def recompute_all(self) -> int:
        """Throw away every running request's keys and values, keeping its place; return the positions thrown away."""
        lost = 0
        for request in self.running:
            lost += request.num_computed
            self.cache.free(request)
        for request in self.waiting:
            lost += request.swapped
            self.cache.free(request)
            request.parent = None
        return lost

    def replace_cache(self, cache: KVCache) -> int:
        """Go on with another cache, computing everything again; return the positions thrown away."""
        lost = self.recompute_all()
        self.cache = cache
        for request in (*self.running, *self.waiting):
            request.block_hashes.clear()
        return lost

    def change_weights(self, root: bytes) -> None:
        """Go on with other weights: what was cached with those before is not found until they come back.

        Parameters
        ----------
        root : bytes
            Where the hashes of prefixes that these weights compute begin.
        """
        self.cache.root = root
        for request in (*self.running, *self.waiting):
            request.block_hashes.clear()
            request.mixed = request.mixed or bool(request.num_computed or request.swapped)

    # -- one step ------------------------------------------------------------------------------------------------------

    def schedule(self, features: Features, wish: Wish | None = None) -> StepPlan:
        """Compose the next step under ``features``. Allocates blocks; an empty plan means that there is no work.

        Where ``wish`` says so and there is room, a request that decodes gets more positions, for tokens that will be
        proposed (:meth:`Scheduled.propose`) before the step is computed. They never take a block that another request
        needs in this step, and no more than half of the positions that prompts could have.
        """
        self.step += 1
        plan = StepPlan(step=self.step, items=[], use_cache=features.kv_cache)
        self._promote()
        self.running.sort(key=lambda request: self._rank(request, features))
        budget = features.max_num_batched_tokens
        if features.kv_cache:
            budget = self._schedule_running(features, budget, plan, wish)
        if not plan.preempted:
            self._admit(features, budget, plan)
        if not features.kv_cache:
            self._schedule_uncached(features, plan)
        plan.transfers, self.cache.transfers = self.cache.transfers, []
        plan.moves_blocks = bool(plan.transfers)
        plan.idle_slots = max(self._static_seats - len(self.running), 0) if features.batching == "static" else 0
        return plan

    def update(self, plan: StepPlan, sampled: list[list[int]], features: Features) -> list[FinishReason | None]:
        """Book a computed step.

        Parameters
        ----------
        plan : StepPlan
            As returned by :meth:`schedule`; requests cancelled meanwhile are skipped.
        sampled : list of list of int
            For each item of the plan whose ``sample`` is true, in order, the tokens that were chosen: one, and before
            it the proposed ones that were accepted.
        features : Features
            The same snapshot that :meth:`schedule` was given.

        Returns
        -------
        list
            For each sampled item the reason why its request ended with these tokens, or ``None``. Tokens that follow
            the one which ends a request are dropped.
        """
        self.book(plan, features)
        return self.resolve(plan, sampled, features)

    def book(self, plan: StepPlan, features: Features) -> None:
        """Book the positions of a step that was launched, before its tokens are known; :meth:`resolve` follows.

        The next step can be scheduled in between, unless this one verifies proposals: what it computes of them is
        known only with its tokens. A request that gets its last token leaves at once.
        """
        for item in plan.items:
            request = item.request
            if request.finish_reason is not None:
                continue
            if not item.drafts:
                self._book_computed(request, item.start, item.end, plan, features)
                if plan.use_cache and request.group and item.end >= request.prompt_len:
                    self._fork_group(request)
            if item.sample:
                request.pending += 1
                if request.num_output >= request.sampling.max_tokens:
                    self._leave(request)

    def _book_computed(self, request: Request, start: int, end: int, plan: StepPlan, features: Features) -> None:
        request.computed_high_water = max(request.computed_high_water, end)
        if plan.use_cache:
            self.cache.mark_computed(request, start, end)
            request.num_computed = end
            if _effective(request.prefix_cache_write, features.prefix_cache_write):
                self.cache.register(request)

    def resolve(self, plan: StepPlan, sampled: list[list[int]], features: Features) -> list[FinishReason | None]:
        """Book the tokens of a step after :meth:`book`; arguments and result are those of :meth:`update`."""
        reasons: list[FinishReason | None] = []
        chosen = iter(sampled)
        for item in plan.items:
            if not item.sample:
                continue
            request, tokens = item.request, next(chosen)
            if request.finish_reason is None:
                request.pending -= 1
                taken = 0
                for token in tokens:
                    taken += 1
                    request.tokens.append(token)
                    if request.constraint is not None:
                        request.complete = request.constraint.accept(token)
                    request.finish_reason = self._finish_reason(request, token)
                    if request.finish_reason is not None:
                        break
                if item.drafts:
                    # What stands behind the last accepted token is overwritten by the next step.
                    self._book_computed(request, item.start, item.start + taken, plan, features)
                if request.finish_reason is not None:
                    self._leave(request)
            reasons.append(request.finish_reason)
        return reasons

    # -- private: composing --------------------------------------------------------------------------------------------

    def _rank(self, request: Request, features: Features) -> tuple[int, int, int]:
        """Sort key: smaller runs first and is preempted last."""
        if request.promoted:
            return (0, 0, request.arrival)
        if features.scheduling_policy == "priority":
            return (1, request.priority, request.arrival)
        if features.scheduling_policy == "shortest-first":
            return (1, request.max_total - request.computed_high_water, request.arrival)
        return (1, 0, request.arrival)

    def _promote(self) -> None:
        for request in self.waiting:
            if self.step - request.waiting_since > PROMOTE_AFTER_STEPS:
                request.promoted = True

    def _schedule_running(self, features: Features, budget: int, plan: StepPlan, wish: Wish | None) -> int:
        # Decodes first: a prompt that comes in must not hold up those who are already answering more than it has to.
        decodes = [request for request in self.running if request.num_tokens - request.num_computed == 1]
        prefills = [request for request in self.running if request.num_tokens - request.num_computed > 1]
        spare = budget - len(decodes)
        if prefills or self.waiting:
            spare //= 2  # proposals must not keep prompts out
        for place, request in enumerate((*decodes, *prefills)):
            if request not in self.running:  # preempted a moment ago, for one that ranks higher
                continue
            count = self._chunk(request.num_tokens - request.num_computed, budget, features, plan)
            if count == 0:
                continue
            budget += self._make_room(request, request.num_computed + count, features, plan)
            if request in self.running:
                behind = len(decodes) - place - 1
                if wish is not None and behind >= 0:
                    drafts = self._room_for_drafts(request, wish, spare, behind)
                    spare -= drafts
                    count += drafts
                self._plan_item(request, count, plan)
                budget -= count
        return budget

    def _room_for_drafts(self, request: Request, wish: Wish, budget: int, behind: int) -> int:
        """Provide blocks for proposals of a request that decodes; return how many it may have.

        ``behind`` requests decode after it and need a block each, at worst.
        """
        start = request.num_computed
        if request.pending or start < max(request.prompt_len, request.computed_high_water):
            return 0
        # The last token that it may say needs no proposal, and none behind it.
        most = min(budget, request.sampling.max_tokens - request.num_output - 1)
        count = min(wish(request), most) if most > 0 else 0
        while count > 0:
            needed = self.cache.blocks_needed(request, start + 1 + count)
            if not needed or needed + behind <= self.cache.pool.num_available:
                break
            count -= 1
        if count > 0 and not self.cache.extend(request, start + 1 + count):
            raise AssertionError(f"request {request.handle} was given room for proposals that is not there")
        return max(count, 0)

    def _chunk(self, wanted: int, budget: int, features: Features, plan: StepPlan) -> int:
        """How many of ``wanted`` positions this step may compute."""
        if features.chunked_prefill or wanted == 1:
            return min(wanted, max(budget, 0))
        # Whole prompts only: the first one of a step goes ahead whatever its length, or it might never fit.
        first = all(item.count == 1 or item.kind == Kind.VERIFY for item in plan.items)
        return wanted if wanted <= budget or first else 0

    def _make_room(self, request: Request, end: int, features: Features, plan: StepPlan) -> int:
        """Provide blocks, preempting from the bottom of the ranking; return the token budget that this gave back.

        The request itself goes when nobody ranks below it.
        """
        refund = 0
        while not self.cache.extend(request, end):
            if self._reclaim_from_waiting():
                continue
            victim = self.running[-1]
            for item in plan.items:
                if item.request is victim:
                    plan.items.remove(item)
                    refund += item.count
                    break
            self._preempt(victim, features)
            plan.preempted.append(victim)
            if victim is request:
                break
        return refund

    def _reclaim_from_waiting(self) -> bool:
        """Take back blocks that a waiting fork shares; it will compute its prompt itself."""
        for request in reversed(self.waiting):
            if request.blocks:
                self.cache.free(request)
                return True
        return False

    def _preempt(self, request: Request, features: Features) -> None:
        self.running.remove(request)
        if features.preemption != "swap" or not self.cache.swap_out(request):
            self.cache.free(request)
        request.num_preemptions += 1
        request.waiting_since = self.step
        self.waiting.append(request)

    def _admit(self, features: Features, budget: int, plan: StepPlan) -> None:
        cap = features.max_num_seqs
        if features.batching == "single":
            cap = 1
        elif features.batching == "static":
            if self.running:
                return
            self._static_seats = 0
        static = features.batching == "static"
        self.waiting.sort(key=lambda request: self._rank(request, features))
        for request in list(self.waiting):
            if len(self.running) >= cap or (budget <= 0 and not static and features.kv_cache):
                break
            if request.parent is not None and features.kv_cache:
                continue
            if features.kv_cache:
                count = self._admit_cached(request, budget, features, plan, idle_ok=static)
                while count is None and not self.running and self._reclaim_from_waiting():
                    count = self._admit_cached(request, budget, features, plan, idle_ok=static)
                if count is None:
                    break
                budget -= count
            self.waiting.remove(request)
            self.running.append(request)
            plan.started.append(request)
        if static:
            self._static_seats = len(self.running)

    def _admit_cached(
        self, request: Request, budget: int, features: Features, plan: StepPlan, *, idle_ok: bool
    ) -> int | None:
        """Give a waiting request its first blocks; return the positions planned, or ``None`` if it has to wait."""
        known = request.num_computed or request.swapped
        reads = _effective(request.prefix_cache_read, features.prefix_cache_read)
        prefix = self.cache.cached_prefix(request) if reads and not known else []
        start = known or len(prefix) * self.cache.block_size
        count = self._chunk(request.num_tokens - start, budget, features, plan)
        if count == 0 and not idle_ok:
            return None
        pool = self.cache.pool
        needed = self.cache.blocks_needed(request, start + count, adopted=len(prefix))
        if self.cache.contiguous:
            if needed > pool.longest_run():
                return None
        else:
            # Picking up a cached block takes it out of what is available. Besides, leave a block to everyone who
            # already runs: admitting into the last block only to preempt in the next step would compute in vain.
            picked_up = sum(pool.references[block] == 0 for block in prefix)
            if needed + picked_up + len(self.running) > pool.num_available and self.running:
                return None
            if needed + picked_up > pool.num_available:
                return None
        if prefix:
            self.cache.adopt(request, prefix)
            if request.num_output == 0 and request.num_preemptions == 0:
                request.cached_prompt_tokens = request.num_computed
        if request.swapped and not self.cache.swap_in(request):
            raise AssertionError(f"request {request.handle} was admitted into blocks that are not there")
        if count == 0:
            return 0
        if not self.cache.extend(request, start + count):
            raise AssertionError(f"request {request.handle} was admitted into blocks that are not there")
        self._plan_item(request, count, plan)
        return count

    def _schedule_uncached(self, features: Features, plan: StepPlan) -> None:
        """Without a KV cache every step computes all positions of a request; the budget decides how many requests."""
        budget = features.max_num_batched_tokens
        for request in self.running:
            count = request.num_tokens
            if plan.items and count > budget:
                continue
            budget -= count
            self._plan_item(request, count, plan)

    def _plan_item(self, request: Request, count: int, plan: StepPlan) -> None:
        start = request.num_computed
        if start + count > request.num_tokens:
            kind = Kind.VERIFY
        elif start < request.computed_high_water:
            kind = Kind.RECOMPUTE
        elif start >= request.prompt_len and count == 1:
            kind = Kind.DECODE
        else:
            kind = Kind.PREFILL
        sample = start + count >= request.num_tokens
        plan.items.append(Scheduled(request, start, count, kind, sample))

    # -- private: booking ----------------------------------------------------------------------------------------------

    def _fork_group(self, request: Request) -> None:
        for child in request.group:
            if child.parent is request:
                child.parent = None
                if child in self.waiting and not child.blocks and not self.cache.contiguous:
                    self.cache.fork(request, child)
        request.group = ()

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        sampling = request.sampling
        if (
            request.complete
            or token in sampling.stop_token_ids
            or (token in self.eos_token_ids and not sampling.ignore_eos)
        ):
            return "stop"
        if request.num_output >= sampling.max_tokens:
            return "length"
        return None

    def _leave(self, request: Request) -> None:
        for place in (self.running, self.waiting):
            if request in place:
                place.remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        self.cache.free(request)
        for child in request.group:
            child.parent = None
        request.group = ()


def _effective(override: bool | None, feature: bool) -> bool:
    return feature if override is None else override
