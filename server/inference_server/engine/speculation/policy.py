"""Decides who proposes tokens for which request, and how many. Verifying them is ``engine.rejection``."""

from __future__ import annotations

import time
from collections.abc import Mapping

from inference_server.engine.request import Request
from inference_server.engine.scheduler import StepPlan, Wish
from inference_server.engine.speculation.proposer import Proposer
from inference_server.features import Features
from inference_server.protocol import Kind


class Speculation:
    """All proposers of an engine.

    Parameters
    ----------
    proposers : mapping of str to Proposer
        By the names that the feature ``speculation`` takes.
    """

    def __init__(self, proposers: Mapping[str, Proposer]) -> None:
        self._proposers = dict(proposers)
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

        def wish(request: Request) -> int:
            proposer = self._proposers.get(method_of(request, features))
            if proposer is None:
                return 0
            begin = time.monotonic_ns()
            most = request.num_speculative_tokens or features.num_speculative_tokens
            count = proposer.wish(request, min(most, request.sampling.max_tokens - request.num_output - 1))
            self.wishing_ns += time.monotonic_ns() - begin
            return count

        return wish

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

    def forget(self) -> None:
        """Every request's keys and values are gone."""
        for proposer in self._proposers.values():
            proposer.forget()


def method_of(request: Request, features: Features) -> str:
    """Who proposes for a request: what it asked for itself, or else the feature."""
    return request.speculation or features.speculation
