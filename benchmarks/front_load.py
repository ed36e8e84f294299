"""What the front costs per token: many streams at a fixed step rate from a scripted engine, and the CPU time it takes.

Run with ``python benchmarks/front_load.py [streams] [tokens]``. The engine sleeps instead of computing, so whatever the
front's process uses is its own.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("server", "tests", "tests/server/front")]

from bpe_tokenizer import train_tokenizer  # noqa: E402
from running_front import TOKEN, running, scripted_command  # noqa: E402


async def stream(port: int, tokens: int) -> int:
    """Read one stream with as little work as possible; return the number of chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = f'{{"prompt": [70, 71, 72], "max_tokens": {tokens}, "stream": true}}'
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    )
    chunks = 0
    while data := await reader.read(1 << 16):
        chunks += data.count(b"data: {")
    writer.close()
    return chunks


async def load(port: int, streams: int, tokens: int) -> int:
    """Read all streams at once."""
    return sum(await asyncio.gather(*(stream(port, tokens) for _ in range(streams))))


def main() -> None:
    """Print the figures."""
    streams, tokens = (int(sys.argv[1]), int(sys.argv[2])) if len(sys.argv) > 2 else (64, 500)
    with tempfile.TemporaryDirectory() as folder:
        command = scripted_command(train_tokenizer(Path(folder)), "good", step_s=0.01)
        with running(Path(folder), {"INFERENCE_WORKBENCH_ENGINE_COMMAND": command}) as front:
            front.wait_for_engine("ready")
            port = int(front.url.rpartition(":")[2])
            process = psutil.Process(front.process.pid)
            asyncio.run(load(port, 8, 20))
            cpu, begin = sum(process.cpu_times()[:2]), time.perf_counter()
            chunks = asyncio.run(load(port, streams, tokens))
            wall, cpu = time.perf_counter() - begin, sum(process.cpu_times()[:2]) - cpu
            print(f"{streams} streams, {chunks} chunks in {wall:.2f} s: {chunks / wall:,.0f} tokens/s")
            print(f"front: {1e6 * cpu / chunks:.1f} µs CPU per token, {100 * cpu / wall:.0f} % of a core")
            print(f"resident: {process.memory_info().rss >> 20} MiB")


if __name__ == "__main__":
    main()
