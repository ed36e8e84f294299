"""An oracle for the scheduler and the KV cache: every slot remembers which text its key and value would stand for.

A key and a value at position ``i`` depend on the tokens up to ``i`` and on nothing else. So instead of tensors a slot
holds a digest of those tokens, and "attention" checks that the slots a request reads hold exactly its own text. A
block shared with the wrong request, copied too late, freed too early or written by someone else shows at once.
"""

from __future__ import annotations

from inference_server.engine.kv_cache import Copy, SwapDiscard, SwapIn, SwapOut, Transfer
from inference_server.engine.request import Request
from inference_server.engine.scheduler import StepPlan

VOCABULARY = 50


def text_digest(tokens: list[int]) -> int:
    return hash(tuple(tokens))


def next_token(tokens: list[int], seed: int) -> int:
    """The oracle's language model and sampler: any function of the whole text and the request's seed will do."""
    return (hash((tuple(tokens), seed)) >> 7) % VOCABULARY


def isolated_output(prompt: list[int], count: int, seed: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """What a request must produce, whatever else is going on."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class SimulatedCache:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[int | None] = [None] * (num_blocks * block_size)
        self.host: dict[int, list[int | None]] = {}

    def slot(self, request: Request, position: int) -> int:
        return request.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def transfer(self, transfers: list[Transfer]) -> None:
        size = self.block_size
        for each in transfers:
            match each:
                case Copy(source, destination):
                    self.slots[destination * size : (destination + 1) * size] = self.slots[
                        source * size : (source + 1) * size
                    ]
                case SwapOut(handle, blocks, length):
                    assert handle not in self.host
                    self.host[handle] = [self.slots[blocks[i // size] * size + i % size] for i in range(length)]
                case SwapIn(handle, blocks, length):
                    saved = self.host.pop(handle)
                    assert len(saved) == length
                    for i, digest in enumerate(saved):
                        self.slots[blocks[i // size] * size + i % size] = digest
                case SwapDiscard(handle):
                    del self.host[handle]

    def forward(self, plan: StepPlan) -> list[list[int]]:
        """Compute a step, checking everything that is read; return the tokens of each item that samples."""
        self.transfer(plan.transfers)
        if not plan.use_cache:
            for item in plan.items:
                assert (item.start, item.count) == (0, item.request.num_tokens)
            return [[next_token(item.request.tokens, item.request.seed)] for item in plan.items]
        written: dict[int, int] = {}
        for item in plan.items:
            text = item.request.tokens[: item.start] + item.tokens()
            assert len(text) == item.start + item.count
            for position in range(item.start, item.start + item.count):
                slot = self.slot(item.request, position)
                digest = text_digest(text[: position + 1])
                # The layer writes all keys before it reads any: two requests may not write one slot differently.
                assert written.setdefault(slot, digest) == digest, "two requests wrote different text to one slot"
                self.slots[slot] = digest
        sampled = []
        for item in plan.items:
            end = item.start + item.count
            assert end <= item.request.num_tokens + len(item.drafts)
            text = item.request.tokens[: item.start] + item.tokens()
            for position in range(end):
                assert self.slots[self.slot(item.request, position)] == text_digest(text[: position + 1]), (
                    f"request {item.request.handle} reads someone else's key at position {position}"
                )
            if item.sample:
                sampled.append(verified(item.request.tokens, item.request.seed, item.drafts))
        return sampled


def verified(tokens: list[int], seed: int, drafts: list[int]) -> list[int]:
    """What the model says after ``tokens`` where it is asked about ``drafts`` too: those it agrees with, and one."""
    text = list(tokens)
    for draft in [*drafts, -1]:
        text.append(next_token(text, seed))
        if text[-1] != draft:
            break
    return text[len(tokens) :]
