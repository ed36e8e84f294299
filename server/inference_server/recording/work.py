"""How much a step had to read and compute at least: bytes and operations (formulas in ``docs/attribution.md``)."""

from __future__ import annotations

from operator import mul

import msgspec

from inference_server.protocol import StepEvent, StepWork


def with_work(event: StepEvent, work: StepWork, sampled: int) -> StepEvent:
    """Return the step with ``read_bytes`` and ``flops``.

    Parameters
    ----------
    event
        As the engine reported it.
    work
        Of the model.
    sampled
        How many positions' logits were needed.
    """
    positions = sum(event.scheduled)
    if not positions:
        return event
    contexts = sum(event.start) + positions
    # A query at position p of a request attends p + 1 keys: count·start, and 1 + 2 + … + count.
    pairs = (
        sum(map(mul, event.start, event.scheduled)) + (sum(map(mul, event.scheduled, event.scheduled)) + positions) // 2
    )
    cached = 0 if "no KV cache" in event.path else contexts + positions
    return msgspec.structs.replace(
        event,
        read_bytes=work.body_bytes
        + (work.head_bytes if sampled else 0)
        + positions * work.embedding_row_bytes
        + cached * work.kv_bytes_per_token,
        flops=2 * work.body_weights * positions
        + 2 * work.head_weights * sampled
        + work.attention_flops_per_pair * pairs,
    )
