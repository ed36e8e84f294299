"""The one interface of all that propose tokens: n-gram, draft model, early exit and EAGLE-style head."""

from __future__ import annotations

from typing import Protocol

from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.features import Features


class Proposer(Protocol):
    """Proposes tokens for requests that decode. It keeps no request from being answered: at worst it proposes nothing.

    For each step :meth:`wish` is asked first, while the step is composed, and :meth:`propose` then, once it is known
    which requests have room for how many.
    """

    def wish(self, request: Request, most: int) -> int:
        """How many tokens it would propose for a request that is about to decode, at most ``most``."""

    def propose(self, plan: StepPlan, items: list[Scheduled], features: Features) -> list[list[int]]:
        """Propose the likeliest next tokens for each of some items of a step.

        Parameters
        ----------
        plan : StepPlan
            The step. Copies between blocks that it needs (``transfers``) may not have been made yet.
        items : list of Scheduled
            Those of them that this proposer is for; an item has room for ``item.count - 1`` tokens.
        features : Features
            In force in this step.

        Returns
        -------
        list of list of int
            For each item at most as many tokens as it has room for.
        """

    def forget(self) -> None:
        """Give up what is remembered of every request's keys and values: they are no longer where they were."""

    def follow_model(self) -> None:
        """Take up that the model that is served reads other weights, or that its cache is laid out otherwise."""
