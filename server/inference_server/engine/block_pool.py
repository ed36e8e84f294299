"""The pool of KV blocks: who holds which, what may be reused, what is evicted first. Pure Python; owns no tensor.

A block is in one of three states:

* **used**: at least one request references it;
* **cached**: nobody references it, but it holds a full block of a known token prefix and can be picked up again;
* **free**: nothing in it is worth keeping.

Allocation takes free blocks first and evicts the least recently used cached block only when none is left.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from inference_server.kv_operations import Operation, leading_to
from inference_server.protocol import NOBODY, KvOp, KvUsage

ROOT_HASH = b""


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block of ``tokens`` that follows the prefix whose hash is ``parent``.

    The digest covers the whole prefix through its parent, so that equal digests mean equal prefixes. 128 bits of
    BLAKE2b: finding a colliding prompt, which would read another prompt's cache, is out of reach.
    """
    return blake2b(array("q", tokens).tobytes(), digest_size=16, key=parent).digest()


class BlockPool:
    """Reference-counted blocks with a prefix index.

    Parameters
    ----------
    num_blocks : int
        Blocks of the whole cache.
    block_size : int
        Token positions per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.references = [0] * num_blocks
        self.filled = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.events: list[Operation] | None = None
        """Log of what happened, drained by the engine each step; ``None`` while nobody listens. See :meth:`listen`."""
        self._free: dict[int, None] = dict.fromkeys(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[bytes, int] = {}
        self._filled_used = 0

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Blocks that an allocation could have right now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks kept for reuse that nobody references."""
        return len(self._cached)

    def usage(self) -> KvUsage:
        """Occupancy, four ways (total, used, cached, filled slots of the used blocks)."""
        return KvUsage(
            total_blocks=self.num_blocks,
            used_blocks=self.num_blocks - self.num_available,
            cached_blocks=len(self._cached),
            filled_slots=self._filled_used,
            block_size=self.block_size,
        )

    def longest_run(self) -> int:
        """Length of the longest run of neighbouring available blocks: what contiguous reservation could still hold."""
        longest = run = 0
        for count in self.references:
            run = 0 if count else run + 1
            longest = max(longest, run)
        return longest

    # -- changing ------------------------------------------------------------------------------------------------------

    def listen(self, tables: Iterable[tuple[int, Sequence[int]]] = ()) -> None:
        """Begin the log of events, with those that lead from an empty cache to what is held now.

        Parameters
        ----------
        tables
            Handle and block table of each request that holds blocks.
        """
        hashed = (block for block, digest in enumerate(self.hashes) if digest is not None)
        self.events = leading_to(self.num_blocks, tables, self._cached, hashed)

    def allocate(self, holder: int = NOBODY) -> int:
        """Take one block for the request ``holder``, evicting the least recently used cached one if no block is free.

        Raises
        ------
        MemoryError
            If every block is used. Callers check :attr:`num_available` first.
        """
        if self._free:
            block, _ = self._free.popitem()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget_hash(block, evicted=True)
        else:
            raise MemoryError("every KV block is in use")
        self._take(block, holder)
        return block

    def allocate_run(self, length: int, holder: int = NOBODY) -> list[int] | None:
        """Take ``length`` neighbouring blocks (first fit), or return ``None`` where there is no such gap."""
        run = 0
        for block, count in enumerate(self.references):
            run = 0 if count else run + 1
            if run == length:
                blocks = list(range(block - length + 1, block + 1))
                for each in blocks:
                    if each in self._cached:
                        del self._cached[each]
                        self._forget_hash(each, evicted=True)
                    else:
                        del self._free[each]
                    self._take(each, holder)
                return blocks
        return None

    def lookup(self, digest: bytes) -> int | None:
        """Block that holds the prefix ``digest``, used or cached, or ``None``."""
        return self._by_hash.get(digest)

    def share(self, block: int, holder: int = NOBODY) -> None:
        """Add a reference of the request ``holder`` to a used or cached block."""
        if self.references[block] == 0:
            del self._cached[block]
            self._filled_used += self.filled[block]
        self.references[block] += 1
        self._log(KvOp.SHARE, block, holder)

    def release(self, block: int, holder: int = NOBODY) -> None:
        """Drop the reference of ``holder``; the block becomes cached (if findable) or free when it was the last."""
        if self.references[block] <= 0:
            raise AssertionError(f"KV block {block} was released more often than it was taken")
        self.references[block] -= 1
        if self.references[block]:
            self._log(KvOp.RELEASE, block, holder)
            return
        self._filled_used -= self.filled[block]
        if self.hashes[block] is None:
            self.filled[block] = 0
            self._free[block] = None
        else:
            self._cached[block] = None
        self._log(KvOp.FREE, block, holder)

    def fill(self, block: int, slots: int) -> None:
        """Record that the first ``slots`` positions of a used block hold keys and values (never fewer than before)."""
        if slots > self.filled[block]:
            self._filled_used += slots - self.filled[block]
            self.filled[block] = slots

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block findable. If its prefix is already held by another block, that one stays the answer."""
        if self.hashes[block] is None and digest not in self._by_hash:
            self.hashes[block] = digest
            self._by_hash[digest] = block
            self._log(KvOp.HASH, block, NOBODY)

    def log(self, op: KvOp, block: int, holder: int) -> None:
        """Record an operation that a caller performed on a block."""
        self._log(op, block, holder)

    def forget_cached(self) -> int:
        """Give up every cached block and the findability of the used ones; return how many blocks were freed."""
        count = len(self._cached)
        for block in self._cached:
            self._log(KvOp.EVICT, block, NOBODY)
            self.filled[block] = 0
            self._free[block] = None
        self._cached.clear()
        self._by_hash.clear()
        self.hashes = [None] * self.num_blocks
        return count

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Compare the books with the block tables of all requests.

        Raises
        ------
        AssertionError
            Saying which block is wrong, and how.
        """
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        filled = 0
        for block, (want, have) in enumerate(zip(expected, self.references, strict=True)):
            if want != have:
                raise AssertionError(f"KV block {block}: {want} requests hold it, its reference count says {have}")
            places = (have > 0) + (block in self._free) + (block in self._cached)
            if places != 1:
                raise AssertionError(f"KV block {block} is in {places} of the states used, cached and free")
            if have:
                filled += self.filled[block]
            if not 0 <= self.filled[block] <= self.block_size:
                raise AssertionError(f"KV block {block} claims {self.filled[block]} filled slots of {self.block_size}")
        if filled != self._filled_used:
            raise AssertionError(f"{filled} slots of used blocks are filled, the counter says {self._filled_used}")
        for block in self._cached:
            if self.hashes[block] is None:
                raise AssertionError(f"KV block {block} is cached but cannot be found by any prefix")
        for digest, block in self._by_hash.items():
            if self.hashes[block] != digest:
                raise AssertionError(f"KV block {block} is indexed under a prefix that it does not hold")

    # -- private -------------------------------------------------------------------------------------------------------

    def _take(self, block: int, holder: int) -> None:
        self.references[block] = 1
        self.filled[block] = 0
        self._log(KvOp.ALLOCATE, block, holder)

    def _forget_hash(self, block: int, *, evicted: bool) -> None:
        digest = self.hashes[block]
        if digest is not None:
            del self._by_hash[digest]
            self.hashes[block] = None
        if evicted:
            self._log(KvOp.EVICT, block, NOBODY)

    def _log(self, op: KvOp, block: int, holder: int) -> None:
        if self.events is not None:
            self.events.append((op, block, holder))
