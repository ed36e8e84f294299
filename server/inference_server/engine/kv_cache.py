"""Block tables: gives requests the blocks they need, shares prefixes, copies on write. Pure Python; owns no tensor.

Two layouts, switched live (every request is preempted between them):

* ``paged`` (Kwon et al. 2023, *PagedAttention*, §4): blocks on demand, anywhere, shareable;
* ``contiguous``: at admission one run of neighbouring blocks for the longest the request could get, as engines did
  before; what stays unfilled is waste, and gaps too short for anyone are fragmentation. Both are measurable here.
"""

from __future__ import annotations

from dataclasses import dataclass

from inference_server.engine.block_pool import ROOT_HASH, BlockPool, chain_hash
from inference_server.engine.request import Request
from inference_server.protocol import KvOp, KvUsage


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy block ``source`` to ``destination`` on the device."""

    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class SwapOut:
    """Copy the first ``length`` positions held by ``blocks`` to host memory, under the request's handle."""

    handle: int
    blocks: list[int]
    length: int


@dataclass(frozen=True, slots=True)
class SwapIn:
    """Copy ``length`` positions back from host memory into ``blocks``, and forget them there."""

    handle: int
    blocks: list[int]
    length: int


@dataclass(frozen=True, slots=True)
class SwapDiscard:
    """Forget what host memory holds of a request."""

    handle: int


Transfer = Copy | SwapOut | SwapIn | SwapDiscard


class KVCache:
    """Allocation policy over one :class:`BlockPool`.

    Parameters
    ----------
    num_blocks, block_size : int
        Of the device's cache.
    host_blocks : int
        Room in host memory for preempted requests, in blocks of the same size.
    """

    def __init__(self, num_blocks: int, block_size: int, host_blocks: int = 0) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.block_size = block_size
        self.contiguous = False
        self.root = ROOT_HASH
        """Where the hashes of prefixes begin: keys and values of other weights have another."""
        self.host_blocks = host_blocks
        self.host_blocks_used = 0
        self.transfers: list[Transfer] = []
        """What to copy before the next forward pass, in this order; taken by the scheduler."""

    @property
    def capacity_tokens(self) -> int:
        """Positions the whole cache holds."""
        return self.pool.num_blocks * self.block_size

    def usage(self) -> KvUsage:
        """Occupancy, four ways."""
        return self.pool.usage()

    # -- prefix cache --------------------------------------------------------------------------------------------------

    def cached_prefix(self, request: Request) -> list[int]:
        """Blocks that hold the longest cached prefix of the request, at least one token short of all of it.

        The last token is always computed: its logits are what the request is waiting for.
        """
        if self.contiguous:
            return []
        self._extend_hashes(request)
        usable = min(len(request.block_hashes), (request.num_tokens - 1) // self.block_size)
        blocks: list[int] = []
        for digest in request.block_hashes[:usable]:
            block = self.pool.lookup(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def adopt(self, request: Request, blocks: list[int]) -> None:
        """Give ``blocks``, found by :meth:`cached_prefix`, to a request that holds none yet."""
        for block in blocks:
            self.pool.share(block, request.handle)
        request.blocks = list(blocks)
        request.num_computed = len(blocks) * self.block_size
        request.num_registered = len(blocks)

    def register(self, request: Request) -> None:
        """Make the blocks that the request has filled since the last call findable by their prefix."""
        full = request.num_computed // self.block_size
        if full <= request.num_registered or request.mixed:
            return
        self._extend_hashes(request)
        for index in range(request.num_registered, full):
            self.pool.register(request.blocks[index], request.block_hashes[index])
        request.num_registered = full

    def _extend_hashes(self, request: Request) -> None:
        hashes, size, tokens = request.block_hashes, self.block_size, request.tokens
        parent = hashes[-1] if hashes else self.root
        for index in range(len(hashes), len(tokens) // size):
            parent = chain_hash(parent, tokens[index * size : (index + 1) * size])
            hashes.append(parent)

    # -- blocks for a step ---------------------------------------------------------------------------------------------

    def blocks_needed(self, request: Request, end: int, adopted: int = 0) -> int:
        """New blocks that computing up to position ``end`` takes, copies on write included.

        ``adopted`` blocks of a prefix are counted as if the request already held them.
        """
        held = len(request.blocks) or adopted
        if self.contiguous:
            return 0 if request.blocks else -(-request.max_total // self.block_size)
        needed = max(-(-end // self.block_size) - held, 0)
        if request.blocks and request.num_computed % self.block_size:
            tail = request.blocks[request.num_computed // self.block_size]
            needed += self.pool.references[tail] > 1
        return needed

    def can_extend(self, request: Request, end: int) -> bool:
        """Whether :meth:`extend` would succeed now."""
        needed = self.blocks_needed(request, end)
        if self.contiguous and needed:
            return self.pool.longest_run() >= needed
        return needed <= self.pool.num_available

    def extend(self, request: Request, end: int) -> bool:
        """Provide blocks for positions up to ``end``; ``False``, and nothing changed, if there are too few."""
        if request.blocks and end <= len(request.blocks) * self.block_size:
            # Most steps of most requests: the position lies in a block that is there and nobody else's.
            index, offset = divmod(request.num_computed, self.block_size)
            if not offset or self.pool.references[request.blocks[index]] == 1:
                return True
        if not self.can_extend(request, end):
            return False
        if self.contiguous:
            if not request.blocks:
                request.blocks = self.pool.allocate_run(-(-request.max_total // self.block_size), request.handle) or []
            return True
        offset = request.num_computed % self.block_size
        if offset and request.blocks:
            index = request.num_computed // self.block_size
            shared = request.blocks[index]
            if self.pool.references[shared] > 1:
                own = self.pool.allocate(request.handle)
                self.pool.fill(own, offset)
                self.pool.log(KvOp.COPY, own, request.handle)
                self.transfers.append(Copy(shared, own))
                self.pool.release(shared, request.handle)
                request.blocks[index] = own
        for _ in range(-(-end // self.block_size) - len(request.blocks)):
            request.blocks.append(self.pool.allocate(request.handle))
        return True

    def fork(self, parent: Request, child: Request) -> None:
        """Let ``child``, which has the same prompt and no output, share what ``parent`` has computed of the prompt.

        All but the prompt's last position: the child computes that one itself, for the logits of its first token.
        """
        position = child.prompt_len - 1
        count = -(-position // self.block_size)
        for block in parent.blocks[:count]:
            self.pool.share(block, child.handle)
        child.blocks = parent.blocks[:count]
        child.num_computed = child.computed_high_water = position
        full = position // self.block_size
        child.block_hashes = parent.block_hashes[:full]
        child.num_registered = min(parent.num_registered, full)
        child.mixed = parent.mixed

    def mark_computed(self, request: Request, start: int, end: int) -> None:
        """Record that positions ``[start, end)`` now hold keys and values."""
        size = self.block_size
        for index in range(start // size, -(-end // size)):
            self.pool.fill(request.blocks[index], min(size, end - index * size))

    def free(self, request: Request) -> None:
        """Take back all blocks of a request. Its last blocks are evicted before its first, which others may share."""
        for block in reversed(request.blocks):
            self.pool.release(block, request.handle)
        request.blocks = []
        request.num_computed = 0
        request.num_registered = 0
        request.mixed = False
        if request.swapped:
            self.host_blocks_used -= -(-request.swapped // self.block_size)
            self.transfers.append(SwapDiscard(request.handle))
            request.swapped = 0

    # -- host memory ---------------------------------------------------------------------------------------------------

    def swap_out(self, request: Request) -> bool:
        """Move a request's keys and values to host memory; ``False``, and nothing changed, if there is no room."""
        length = request.num_computed
        needed = -(-length // self.block_size)
        if not length or self.host_blocks_used + needed > self.host_blocks:
            return False
        self.transfers.append(SwapOut(request.handle, request.blocks[:needed], length))
        mixed = request.mixed
        self.free(request)
        request.mixed = mixed
        self.host_blocks_used += needed
        request.swapped = length
        return True

    def swap_in(self, request: Request) -> bool:
        """Bring a swapped request's keys and values back; ``False``, and nothing changed, if there is no room."""
        length = request.swapped
        if not self.extend(request, length):
            return False
        self.host_blocks_used -= -(-length // self.block_size)
        self.transfers.append(SwapIn(request.handle, request.blocks[: -(-length // self.block_size)], length))
        request.swapped = 0
        request.num_computed = length
        self.mark_computed(request, 0, length)
        return True
