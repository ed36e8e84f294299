"""One sample of one request, as the scheduler sees it. Owns its tokens and its place in the KV cache; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inference_server.engine.response_cache import Key
from inference_server.protocol import FinishReason, SamplingParams

if TYPE_CHECKING:
    from inference_server.engine.structured import Constraint


@dataclass(slots=True, eq=False)
class Request:
    """A sequence of tokens that grows by what the model says.

    ``tokens`` is the prompt followed by the output. Positions ``[0, num_computed)`` have their key and value in the KV
    cache; ``blocks`` is the block table that says where.
    """

    handle: int
    prompt_len: int
    tokens: list[int]
    sampling: SamplingParams
    seed: int
    arrival: int
    """Order of arrival, the tie-breaker of every policy."""
    priority: int = 0
    num_computed: int = 0
    pending: int = 0
    """Output tokens that are chosen, or being chosen, on the device but not known here yet. They count as tokens."""
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chain hashes of the full blocks of ``tokens`` known so far; may be longer than what is computed."""
    num_registered: int = 0
    """How many leading blocks are registered in the prefix cache (or were found there)."""
    mixed: bool = False
    """Its keys and values were computed with weights of several precisions, so no other request may start from them."""
    computed_high_water: int = 0
    """Most positions ever computed: positions below it that are computed again are recomputation."""
    waiting_since: int = 0
    """Step since which it has been waiting to run."""
    promoted: bool = False
    """It waited so long that it now goes before everything that did not."""
    cached_prompt_tokens: int = 0
    """Prompt positions that the prefix cache supplied when the request was first admitted."""
    num_preemptions: int = 0
    swapped: int = 0
    """Positions whose keys and values wait in host memory."""
    group: tuple[Request, ...] = ()
    """Samples that fork from this one when its prompt has been computed (``n > 1``); only on the first sample."""
    parent: Request | None = None
    """The sample this one forks from, until it has."""
    finish_reason: FinishReason | None = None
    prefix_cache_read: bool | None = None
    """Overrides the feature of the same name, for this request; ``None`` follows it."""
    prefix_cache_write: bool | None = None
    speculation: str | None = None
    """Overrides the feature of the same name, for this request; ``None`` follows it."""
    num_speculative_tokens: int | None = None
    """Overrides the feature of the same name, for this request; ``None`` follows it."""
    response_key: Key | None = None
    """Where to remember the answer; ``None`` if it is not to be remembered."""
    constraint: Constraint | None = None
    """What the output has to satisfy; ``None`` leaves it free."""
    complete: bool = False
    """The constraint allows nothing more."""
    logprobs: list[float | None] = field(default_factory=list)
    top: list[list[tuple[int, float]] | None] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.tokens) + self.pending

    @property
    def num_output(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) + self.pending - self.prompt_len

    @property
    def max_total(self) -> int:
        """Length of the sequence when ``max_tokens`` have been produced."""
        return self.prompt_len + self.sampling.max_tokens
