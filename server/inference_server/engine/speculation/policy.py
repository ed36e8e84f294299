"""Decides who proposes tokens for which request, and how many. Verifying them is ``engine.rejection``."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping

from inference_server.engine.request import Request
from inference_server.engine.runner import Capturing, Runner
from inference_server.engine.scheduler import Scheduled, StepPlan, Wish
from inference_server.engine.speculation.adaptive import Adaptive
from inference_server.engine.speculation.eagle import EagleProposer
from inference_server.engine.speculation.proposer import Proposer
from inference_server.features import WEIGHT_FEATURES, Features
from inference_server.protocol import Kind

SPECULATION_FEATURES = frozenset(
    {"speculation", "num_speculative_tokens", "adaptive_speculation", "early_exit_layers", "instrumentation"}
)
"""Switching these changes nothing about how long a step of so many positions takes."""


MODEL_FEATURES = frozenset({"kv_cache_dtype", *WEIGHT_FEATURES})
"""Switching these changes what the model reads: its weights, or how keys and values lie in its cache."""


class Speculation:
    """All proposers of an engine.

    Parameters
    ----------
    proposers : mapping of str to Proposer
        By the names that the feature ``speculation`` takes.
    """

    def __init__(self, proposers: Mapping[str, Proposer]) -> None:
        self._proposers = dict(proposers)
        self._adaptive = Adaptive()
        self.spent_ns = 0
        """What proposing for the step that is being composed has cost so far."""
        self.wishing_ns = 0
        """The part of it that was spent while the step was scheduled."""

    def wishes(self, features: Features, requests: list[Request]) -> Wish | None:
        """What the scheduler asks to leave room for proposals; ``None`` where nobody wants any."""
        self.spent_ns = self.wishing_ns = 0
        if not features.kv_cache:
            return None
        if features.speculation == "off" and all(request.speculation in {None, "off"} for request in requests):
            return None

        if any(request.pending for request in requests):
            return None  # the step is launched ahead, before it is known what there is to go on from
        if features.adaptive_speculation:
            counts = self._decide(features, requests)
            return lambda request: counts.get(request.handle, 0)

        def wish(request: Request) -> int:
            begin = time.monotonic_ns()
            count = self._wish(request, features)
            self.wishing_ns += time.monotonic_ns() - begin
            return count

        return wish

    def _wish(self, request: Request, features: Features) -> int:
        proposer = self._proposers.get(method_of(request, features))
        most = request.num_speculative_tokens or features.num_speculative_tokens
        most = min(most, request.sampling.max_tokens - request.num_output - 1)
        return proposer.wish(request, most) if proposer is not None and most > 0 else 0

    def _decide(self, features: Features, requests: list[Request]) -> dict[int, int]:
        begin = time.monotonic_ns()
        wanted: list[tuple[Request, str, int]] = []
        plain = 0
        for request in requests:
            if request.num_tokens - request.num_computed != 1:
                continue
            count = self._wish(request, features)
            if count > 0:
                wanted.append((request, method_of(request, features), count))
            else:
                plain += 1
        counts = self._adaptive.decide(wanted, plain)
        self.wishing_ns += time.monotonic_ns() - begin
        return counts

    def waits_for_tokens(self, requests: Iterable[Request], features: Features) -> bool:
        """Whether the next step's proposals depend on tokens of some requests that are not known yet."""
        if features.adaptive_speculation and self._adaptive.resting:
            return False
        return any(method_of(request, features) != "off" for request in requests)

    def before_forward(self, runner: Runner, plan: StepPlan, features: Features) -> None:
        """Have hidden states kept where somebody will need them."""
        if isinstance(runner, Capturing):
            runner.capture = plan.use_cache and any(
                isinstance(self._proposers.get(method_of(item.request, features)), EagleProposer) for item in plan.items
            )

    def after_forward(self, runner: Runner, plan: StepPlan, features: Features) -> None:
        """Hand the hidden states that were kept to whoever needs them."""
        hidden = runner.features if isinstance(runner, Capturing) and runner.capture else None
        if hidden is None:
            return
        begin = time.monotonic_ns()
        by_method: dict[str, list[tuple[Scheduled, int]]] = {}
        offset = 0
        for item in plan.items:
            by_method.setdefault(method_of(item.request, features), []).append((item, offset))
            offset += item.count
        for method, items in by_method.items():
            proposer = self._proposers.get(method)
            if isinstance(proposer, EagleProposer):
                proposer.observe(items, hidden)
        self.spent_ns += time.monotonic_ns() - begin

    def propose(self, plan: StepPlan, features: Features) -> str:
        """Fill in the proposals that the step has room for; return who made them, ``""`` for nobody."""
        by_method: dict[str, list[int]] = {}
        for place, item in enumerate(plan.items):
            if item.kind == Kind.VERIFY:
                by_method.setdefault(method_of(item.request, features), []).append(place)
        if not by_method:
            self.spent_ns = self.wishing_ns
            return ""
        begin = time.monotonic_ns()
        for method, places in by_method.items():
            items = [plan.items[place] for place in places]
            for item, drafts in zip(items, self._proposers[method].propose(plan, items, features), strict=True):
                constraint = item.request.constraint
                item.propose(drafts if constraint is None else drafts[: constraint.possible(drafts)])
        self.spent_ns = self.wishing_ns + time.monotonic_ns() - begin
        return "+".join(sorted(by_method)) if plan.num_drafts else ""

    def learn(
        self,
        plan: StepPlan,
        features: Features,
        accepted: Mapping[int, int],
        step_ns: int | None,
        draft_ns: int,
        *,
        ahead: bool,
    ) -> None:
        """Take in what became of a step.

        Parameters
        ----------
        plan : StepPlan
        features : Features
            It was computed under.
        accepted : mapping of int to int
            By handle: how many proposed tokens were accepted.
        step_ns : int or None
            How long the step took without proposing; ``None`` where that says nothing about other steps.
        draft_ns : int
            How long proposing took.
        ahead : bool
            Whether the step was launched before the tokens of the one before it were known.
        """
        verified = [
            (item, method_of(item.request, features), accepted.get(item.request.handle, 0))
            for item in plan.items
            if item.drafts
        ]
        self._adaptive.observe(plan.items, verified, step_ns, draft_ns, ahead=ahead)

    def switched(self, names: Collection[str]) -> None:
        """Some features have other values from now on."""
        if not MODEL_FEATURES.isdisjoint(names):
            for proposer in self._proposers.values():
                proposer.follow_model()
        if "early_exit_layers" in names:
            self._adaptive.forget_method("early_exit")
        if not SPECULATION_FEATURES.issuperset(names):
            self._adaptive.forget_costs()

    def forget(self) -> None:
        """Every request's keys and values are gone."""
        for proposer in self._proposers.values():
            proposer.forget()


def method_of(request: Request, features: Features) -> str:
    """Who proposes for a request: what it asked for itself, or else the feature."""
    return request.speculation or features.speculation
