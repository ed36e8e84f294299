"""A client that costs next to nothing: many streams read in one event loop, with prompts that come over time."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Server:
    """Where to send to."""

    port: int
    token: str
    #: Of the path, where the server is behind a proxy.
    prefix: str = ""


async def stream(server: Server, prompt: list[int], tokens: int, **extra: object) -> int:
    """Read one stream with as little work as possible; return the number of tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = json.dumps(
        {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True, "telemetry": True} | extra
    )
    writer.write(
        f"POST {server.prefix}/v1/completions HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    )
    chunks = 0
    while data := await reader.read(1 << 16):
        chunks += data.count(b"data: {")
    writer.close()
    return chunks


def random_prompt(rng: random.Random, low: int, high: int) -> list[int]:
    """Token ids that share no prefix with another prompt's."""
    return [rng.randrange(100, 40_000) for _ in range(rng.randint(low, high))]


async def steady_load(server: Server, *, streams: int, total_tokens: int, seed: int = 0) -> int:
    """Keep ``streams`` requests of mixed lengths going until ``total_tokens`` were asked for; return the tokens got.

    Prompts of 16 to 400 tokens arrive all the time, each as soon as another request has ended; answers are of 16 to 128
    tokens, half of them greedy.
    """
    rng = random.Random(seed)
    left = total_tokens

    async def client() -> int:
        nonlocal left
        got = 0
        await asyncio.sleep(rng.random())
        while left > 0:
            tokens = rng.randint(16, 128)
            left -= tokens
            got += await stream(
                server,
                random_prompt(rng, 16, 400),
                tokens,
                temperature=rng.choice((0.0, 0.8)),
                seed=rng.randrange(1 << 30),
            )
        return got

    return sum(await asyncio.gather(*(client() for _ in range(streams))))
