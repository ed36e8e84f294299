"""A server of OpenAI's API that sends what a test says and remembers when: a witness of the client's clock.

Speaks HTTP by hand, so that nothing between the test and the wire adds a delay or joins two pieces.
"""

import asyncio
import json
import threading
import time


class StreamingServer:
    """``script(number, body)`` yields (seconds to wait, bytes to send) for each request."""

    def __init__(self, script, models=("scripted",), paths=None):
        self.script = script
        self.models = models
        self.paths = paths or {}
        self.received = []
        self.stamps = []
        self.most_at_once = 0
        self._under_way = 0
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait(10)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self):
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        serving = asyncio.all_tasks(self._loop)
        for task in serving:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*serving, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
                length = next(
                    (int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")), 0
                )
                body = json.loads(await reader.readexactly(length)) if length else None
                if path in {"/v1/completions", "/v1/chat/completions"}:
                    await self._stream(writer, path, body)
                else:
                    self._answer(writer, method, path)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, writer, method, path):
        known = {"/v1/models": {"data": [{"id": name} for name in self.models]}, **self.paths}
        status, content = ("200 OK", known[path]) if path in known else ("404 Not Found", {"error": {"message": "no"}})
        payload = json.dumps(content).encode()
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
        )
        writer.write(payload)

    async def _stream(self, writer, path, body):
        number = len(self.received)
        arrived = time.perf_counter()
        self.received.append((arrived, path, body))
        self.stamps.append([])
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            for wait_s, piece in self.script(number, body):
                await asyncio.sleep(wait_s)
                if piece is None:  # hang up in the middle
                    writer.close()
                    return
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.stamps[number].append(time.perf_counter())
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        finally:
            self._under_way -= 1


def event(**content):
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def text(piece, **more):
    return event(choices=[{"index": 0, "text": piece, **more}])


DONE = b"data: [DONE]\n\n"
