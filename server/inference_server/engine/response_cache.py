"""Remembers whole answers of requests whose output is determined by their input: greedy ones, and seeded ones.

Exact match only: the same prompt tokens, the same sampling parameters, the same sample of ``n``.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from inference_server.protocol import FinishReason, SamplingParams

Key = tuple[tuple[int, ...], SamplingParams, int]
DEFAULT_CAPACITY = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """An output as it was first produced."""

    tokens: list[int]
    logprobs: list[float | None]
    top: list[list[tuple[int, float]] | None]
    finish: FinishReason


class ResponseCache:
    """The most recently used answers.

    Parameters
    ----------
    capacity : int
        How many answers to keep.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self.capacity = capacity
        self._answers: OrderedDict[Key, Answer] = OrderedDict()

    @staticmethod
    def key(prompt: tuple[int, ...], sampling: SamplingParams, sample: int) -> Key | None:
        """Key of a request's sample, or ``None`` if its output is a matter of chance."""
        if sampling.temperature > 0 and sampling.seed is None:
            return None
        return prompt, sampling, sample

    def get(self, key: Key) -> Answer | None:
        """Return the answer, if it is known, and keep it longer."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: Key, answer: Answer) -> None:
        """Remember an answer; the one unused for longest makes room."""
        self._answers[key] = answer
        self._answers.move_to_end(key)
        while len(self._answers) > self.capacity:
            self._answers.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._answers.clear()

    def __len__(self) -> int:
        return len(self._answers)
