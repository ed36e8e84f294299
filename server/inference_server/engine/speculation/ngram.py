"""Proposes what followed the same words earlier in the text: prompt lookup (Saxena 2023). Needs no model."""

from __future__ import annotations

from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.features import Features

LONGEST = 4
SHORTEST = 2
"""Tokens that have to agree. One alone agrees nearly everywhere, and what followed it there is rarely right."""


class _Index:
    """Where each run of tokens of one text was last seen, but for the run at the text's end."""

    __slots__ = ("_ends", "_tokens", "length")

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self.length = 0
        """Tokens taken in: runs that end before the last one are known."""
        self._ends: dict[tuple[int, ...], int] = {}

    def lookup(self, most: int) -> list[int]:
        """Up to ``most`` tokens that followed the longest run which the text ends with, where it was seen last."""
        tokens, length = self._tokens, len(self._tokens)
        for end in range(self.length, length):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self.length = length
        for size in range(min(LONGEST, length), SHORTEST - 1, -1):
            seen = self._ends.get(tuple(tokens[length - size :]))
            if seen is not None:
                return self._continue(seen, most)
        return []

    def _continue(self, start: int, most: int) -> list[int]:
        """``most`` tokens from ``start`` on; a text that repeats itself goes on so beyond its end."""
        tokens, length = self._tokens, len(self._tokens)
        period = length - start
        return [tokens[start + place % period] for place in range(most)]


class NgramProposer:
    """Looks up the last tokens of a request in its own text, prompt and output."""

    def __init__(self) -> None:
        self._indices: dict[int, tuple[Request, _Index]] = {}
        self._found: dict[int, list[int]] = {}

    def wish(self, request: Request, most: int) -> int:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        known = self._indices.get(request.handle)
        if known is None or known[0] is not request:
            self._forget_ended()
            known = self._indices[request.handle] = (request, _Index(request.tokens))
        found = self._found[request.handle] = known[1].lookup(most)
        return len(found)

    def propose(self, plan: StepPlan, items: list[Scheduled], features: Features) -> list[list[int]]:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`."""
        del plan, features
        return [self._found[item.request.handle][: item.count - 1] for item in items]

    def forget(self) -> None:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`. It remembers texts alone."""

    def follow_model(self) -> None:
        """See :class:`~inference_server.engine.speculation.proposer.Proposer`. It has nothing of the model's."""

    def _forget_ended(self) -> None:
        for handle in [handle for handle, (request, _) in self._indices.items() if request.finish_reason is not None]:
            del self._indices[handle]
            self._found.pop(handle, None)
