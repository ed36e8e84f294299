"""The keys and values that a proposer keeps of the requests it follows, in a cache of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, TypeVar

from inference_server.engine.kv_cache import KVCache
from inference_server.engine.request import Request
from inference_server.protocol import SamplingParams

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


class Follower:
    """What a proposer knows of one request.

    Parameters
    ----------
    of : Request
        The request that is served.
    prompt_len : int
        Of the proposer's own text.
    """

    __slots__ = ("of", "own")

    def __init__(self, of: Request, prompt_len: int) -> None:
        self.of = of
        self.own = Request(
            handle=of.handle, prompt_len=prompt_len, tokens=[], sampling=GREEDY, seed=0, arrival=of.arrival
        )
        """Holds the blocks of the proposer's cache."""

    def lose_blocks(self) -> None:
        """Its blocks were given to another request; nothing of it is computed any more."""


F = TypeVar("F", bound=Follower)


class OwnCache(Generic[F]):
    """Followers by their requests' handles, and the blocks that they share out among them.

    Parameters
    ----------
    blocks : KVCache
    """

    def __init__(self, blocks: KVCache) -> None:
        self._blocks = blocks
        self._followers: dict[int, F] = {}

    def of(self, request: Request) -> F | None:
        """The follower of a request; ``None`` where there is none, or its handle was another request's."""
        follower = self._followers.get(request.handle)
        return follower if follower is not None and follower.of is request else None

    def add(self, follower: F) -> F:
        """Follow a request from now on."""
        self._followers[follower.of.handle] = follower
        return follower

    def extend(self, follower: F, end: int, used: Collection[int]) -> bool:
        """Provide blocks up to a position, taking them from others; ``False`` where that is not enough.

        Parameters
        ----------
        follower : Follower
        end : int
            The position after the last one.
        used : collection of int
            Handles of the requests of this step, from which none are taken.
        """
        while not self._blocks.extend(follower.own, end):
            victim = next(
                (each for handle, each in self._followers.items() if handle not in used and each.own.blocks), None
            )
            if victim is None:
                return False
            self._blocks.free(victim.own)
            victim.lose_blocks()
        return True

    def forget_ended(self) -> None:
        """Give back what belongs to requests that have ended."""
        for handle in [handle for handle, each in self._followers.items() if each.of.finish_reason is not None]:
            self._blocks.free(self._followers.pop(handle).own)

    def clear(self) -> None:
        """Follow nobody any more."""
        for each in self._followers.values():
            self._blocks.free(each.own)
        self._followers.clear()
