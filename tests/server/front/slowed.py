"""Runs the real engine or the real front with one function slowed down by 50 ms, chosen at any time through a file.

``slowed.py engine …`` is ``python -m inference_server.engine …``, ``slowed.py front …`` is ``inference-workbench …``.
The environment variable SLOWED names a file with the name of what is slow now.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DELAY_S = 0.05


def _is_slow(name: str) -> bool:
    return Path(os.environ["SLOWED"]).read_text(encoding="utf-8") == name


def slow(owner: Any, attribute: str, name: str) -> None:
    """Let ``owner.attribute`` take longer while ``name`` is what is slow."""
    original: Callable[..., Any] = getattr(owner, attribute)

    @functools.wraps(original)
    def slowed(*args: Any, **kwargs: Any) -> Any:
        if _is_slow(name):
            time.sleep(DELAY_S)
        return original(*args, **kwargs)

    @functools.wraps(original)
    async def slowed_async(*args: Any, **kwargs: Any) -> Any:
        if _is_slow(name):
            await asyncio.sleep(DELAY_S)
        return await original(*args, **kwargs)

    setattr(owner, attribute, slowed_async if asyncio.iscoroutinefunction(original) else slowed)


def main() -> None:
    what = sys.argv.pop(1)
    if what == "engine":
        from inference_server.engine import process, sampler
        from inference_server.engine.scheduler import Scheduler

        slow(sampler, "sample", "sampling")
        slow(Scheduler, "schedule", "scheduler")
        sys.exit(process.main())
    from inference_server import cli
    from inference_server.front.detokenizer import ByteDetokenizer
    from inference_server.front.tokenizer import ModelTokenizer

    slow(ModelTokenizer, "encode_async", "tokenizer")
    slow(ByteDetokenizer, "add", "detokenizer")
    cli.main()


if __name__ == "__main__":
    main()
