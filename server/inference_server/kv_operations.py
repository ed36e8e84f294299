"""Operations on KV blocks as rows: the ones that lead to a state, and the event that carries some. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from inference_server.protocol import NOBODY, KvEvents, KvOp

Operation = tuple[KvOp, int, int]
"""What happened, to which block, for which request."""


def leading_to(
    num_blocks: int, tables: Iterable[tuple[int, Sequence[int]]], cached: Collection[int], hashed: Iterable[int]
) -> list[Operation]:
    """Return operations that lead from nothing to a state.

    Parameters
    ----------
    num_blocks : int
    tables : iterable of tuple
        Handle and block table of each request that holds blocks.
    cached : collection of int
        Blocks that are kept for reuse, the one that is evicted first first.
    hashed : iterable of int
        Blocks that can be found by their prefix.
    """
    rows: list[Operation] = [(KvOp.RESET, num_blocks, NOBODY)]
    taken: set[int] = set()
    for request, table in tables:
        for block in table:
            rows.append((KvOp.SHARE if block in taken else KvOp.ALLOCATE, block, request))
            taken.add(block)
    rows += [(KvOp.ALLOCATE, block, NOBODY) for block in cached]
    rows += [(KvOp.HASH, block, NOBODY) for block in hashed]
    rows += [(KvOp.FREE, block, NOBODY) for block in cached]
    return rows


def as_event(step: int, operations: Sequence[Operation]) -> KvEvents:
    """Put operations of a step into columns."""
    return KvEvents(
        step=step,
        op=[int(op) for op, _, _ in operations],
        block=[block for _, block, _ in operations],
        request=[request for _, _, request in operations],
    )
