"""The KV cache as its events tell it: which request holds which block, what is cached, what is free.

Kept so that a client that connects late, and a recording that starts late, can be told the whole state at once.
"""

from __future__ import annotations

from inference_server.kv_operations import as_event, leading_to
from inference_server.protocol import NOBODY, KvEvents, KvOp


class KvState:
    """Follows :class:`~inference_server.protocol.KvEvents`; :meth:`describe` says where they have led."""

    def __init__(self) -> None:
        self.step = 0
        self.num_blocks: int | None = None
        """``None`` until a :attr:`KvOp.RESET`: then nothing is known of any block."""
        self.tables: dict[int, list[int]] = {}
        """Block table of each request that holds blocks."""
        self.references: dict[int, int] = {}
        """How many requests hold each used block."""
        self.hashed: set[int] = set()
        """Blocks that can be found by their prefix."""
        self.cached: dict[int, None] = {}
        """Blocks kept for reuse, the one that is evicted first first."""
        self._copied: int | None = None

    def forget(self) -> None:
        """The engine is gone, and its cache with it."""
        self.num_blocks = None
        for known in (self.tables, self.references, self.hashed, self.cached):
            known.clear()
        self._copied = None

    def apply(self, events: KvEvents) -> None:
        """Take in what happened in a step."""
        self.step = events.step
        for op, block, request in zip(events.op, events.block, events.request, strict=True):
            if op == KvOp.RESET:
                self.forget()
                self.step, self.num_blocks = events.step, block
            elif self.num_blocks is not None:
                self._apply(op, block, request)

    def _apply(self, op: int, block: int, request: int) -> None:
        if op in {KvOp.ALLOCATE, KvOp.SHARE}:
            self.cached.pop(block, None)
            self.references[block] = self.references.get(block, 0) + (request != NOBODY)
            if request != NOBODY:
                self.tables.setdefault(request, []).append(block)
        elif op == KvOp.COPY:
            self._copied = block
        elif op in {KvOp.RELEASE, KvOp.FREE}:
            self._release(block, request)
            if op == KvOp.FREE:
                del self.references[block]
                if block in self.hashed:
                    self.cached[block] = None
            else:
                self.references[block] -= 1
        elif op == KvOp.HASH:
            self.hashed.add(block)
        elif op == KvOp.EVICT:
            self.hashed.discard(block)
            self.cached.pop(block, None)

    def _release(self, block: int, request: int) -> None:
        table = self.tables.get(request)
        if table is None:
            return
        if self._copied is not None:
            # The copy was allocated last; its place is that of the block it was copied from.
            _remove_last(table, self._copied)
            table[_last_index(table, block)] = self._copied
            self._copied = None
            return
        _remove_last(table, block)
        if not table:
            del self.tables[request]

    def describe(self) -> KvEvents | None:
        """Return operations that lead from nothing to this state, or ``None`` while nothing is known."""
        if self.num_blocks is None:
            return None
        rows = leading_to(self.num_blocks, self.tables.items(), self.cached, sorted(self.hashed))
        return as_event(self.step, rows)


def _last_index(table: list[int], block: int) -> int:
    """Where ``block`` stands, looked for from the end: there it is in a table that is given back, however long."""
    for index in range(len(table) - 1, -1, -1):
        if table[index] == block:
            return index
    raise ValueError(f"block {block} is not in the table")


def _remove_last(table: list[int], block: int) -> None:
    del table[_last_index(table, block)]
