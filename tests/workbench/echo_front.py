"""A front that says what reached it: lets the proxy's tests see the other side.

Run as ``echo_front.py serve --uds PATH``. ``POST /v1/completions`` with ``"stream": true`` sends ``max_tokens`` events,
one every 100 ms; ``GET /left`` says how many streams ended because their client left; ``/echo`` returns what arrived;
``POST /exit`` ends the process with a given status; ``/telemetry`` is a WebSocket that sends its headers, then echoes.
"""

import asyncio
import json
import os
import sys

import uvicorn
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse

app = FastAPI()
left = []


@app.get("/")
@app.get("/health")
async def health():
    return {"status": "ok", "pid": os.getpid()}


@app.api_route("/echo", methods=["GET", "POST", "PATCH"])
async def echo(request: Request):
    return {
        "headers": dict(request.headers),
        "query": str(request.url.query),
        "method": request.method,
        "token_matches": request.headers.get("x-inference-workbench-token") == os.environ["INFERENCE_WORKBENCH_TOKEN"],
        "body": (await request.body()).decode(),
    }


@app.get("/left")
async def how_many_left():
    return {"left": len(left)}


@app.post("/exit")
async def leave(request: Request):
    os._exit((await request.json())["status"])


@app.post("/v1/completions")
@app.post("/v1/chat/completions")
async def complete(request: Request):
    body = await request.json()
    if body.get("max_tokens", 8) < 1:
        return JSONResponse({"error": {"message": "max_tokens must be at least 1", "type": "x"}}, status_code=422)
    chunk = {"id": "r", "object": "chat.completion.chunk", "created": 0, "model": "echo"}

    async def events():
        try:
            for index in range(body.get("max_tokens", 8)):
                choice = {"index": 0, "delta": {"content": f"{index} "}, "finish_reason": None}
                yield f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n"
                await asyncio.sleep(0.1)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            left.append(True)
            raise

    return StreamingResponse(events(), media_type="text/event-stream", headers={"X-Request-Id": "r"})


@app.websocket("/telemetry")
async def telemetry(socket: WebSocket):
    await socket.accept()
    await socket.send_text(json.dumps({**socket.headers, "query": socket.url.query}))
    while True:
        await socket.send_bytes(await socket.receive_bytes())


if __name__ == "__main__":
    if os.environ.get("ECHO_FRONT_FAILS"):
        sys.exit("ModuleNotFoundError: No module named 'fastapi'")
    uvicorn.run(app, uds=sys.argv[sys.argv.index("--uds") + 1], log_level="warning", ws_per_message_deflate=False)
