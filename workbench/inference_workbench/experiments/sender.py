"""Sends requests to a server when they are due and stamps every piece of the answers, on the client's own clock.

Runs an event loop in a thread of its own, so that it works inside a notebook's, and nothing else of the client waits in
between. A time is taken when bytes arrive, before anything is decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import msgspec

from inference_workbench.endpoint import refusal
from inference_workbench.experiments.target import Target

_WATCH_EVERY_S = 0.02


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request, ready to be sent: one of ``ids``, ``text`` and ``messages``."""

    index: int
    ids: list[int] | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int
    at_s: float = 0.0
    """When it is due, seconds after the start."""
    temperature: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    extra: dict[str, Any] = {}
    """Further fields of the body."""

    def body(self, target: Target) -> tuple[str, dict[str, Any]]:
        """Return the path and the body to post."""
        body: dict[str, Any] = {
            "model": target.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        if self.temperature > 0 and self.seed is not None:
            body["seed"] = self.seed
        if self.ignore_eos:
            body["ignore_eos"] = True
        if target.token_ids:
            body["return_token_ids"] = True
        if self.messages is not None:
            return "/v1/chat/completions", body | {"messages": self.messages}
        return "/v1/completions", body | {"prompt": self.text if self.ids is None else self.ids}


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What came back, and when: seconds after the start of the run, on the client's clock."""

    index: int
    id: str = ""
    due_s: float = 0.0
    sent_s: float | None = None
    """``None`` if it was cancelled before it was due."""
    times_s: list[float] = []
    """When each piece that brought tokens arrived."""
    counts: list[int] = []
    """How many tokens each piece brought; where the server does not tell, 1."""
    token_ids: list[int] = []
    text: str = ""
    """Only where the token ids are not known."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """By the server's usage, or else counted."""
    cached_tokens: int | None = None
    finish: str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the whole answer came."""
        return self.error is None and self.sent_s is not None and bool(self.times_s)


class Sending(msgspec.Struct, kw_only=True):
    """All answers of one run, and how well the client kept up."""

    answers: list[Answer]
    lag_ms: float
    """Longest time that the client's event loop was late: a figure smaller than this is none."""
    cancelled: bool = False


def send(
    target: Target,
    requests: Sequence[Request],
    *,
    limit: int | None = None,
    cancel: threading.Event | None = None,
    on_end: Callable[[int, int], object] | None = None,
    label: str = "",
) -> Sending:
    """Send requests when they are due, and return when the last answer has come.

    Parameters
    ----------
    target : Target
    requests : sequence of Request
        In the order of ``at_s``.
    limit : int, optional
        Most requests under way; with every ``at_s`` at 0 this is a closed loop.
    cancel : threading.Event, optional
        When set, what runs is ended and nothing more is sent.
    on_end : callable, optional
        Called, in the sending thread, with how many requests have ended and how many there are.
    label : str
        Begin of the requests' ids, where the server takes them.
    """
    stop = cancel or threading.Event()
    session = _Session(target, requests, limit, stop, on_end, label)
    result: list[Sending] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(asyncio.run(session.run()))
        except BaseException as error:  # noqa: BLE001 -- handed to the thread that waits
            failure.append(error)

    thread = threading.Thread(target=run, name="sender", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)  # so that an interrupt of the notebook gets through
    except BaseException:
        stop.set()
        thread.join(10)
        raise
    if failure:
        raise failure[0]
    return result[0]


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | str | None = None


_chunk = msgspec.json.Decoder(_Chunk)


class _Session:
    """One run of :func:`send`."""

    def __init__(
        self,
        target: Target,
        requests: Sequence[Request],
        limit: int | None,
        cancel: threading.Event,
        on_end: Callable[[int, int], object] | None,
        label: str,
    ) -> None:
        self._target = target
        self._requests = requests
        self._limit = limit
        self._cancel = cancel
        self._on_end = on_end
        self._label = label
        self._ended = 0
        self._begin = 0.0
        self._lag_s = 0.0

    async def run(self) -> Sending:
        answers = [Answer(index=each.index, due_s=each.at_s) for each in self._requests]
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()  # a collection would look like a stall of the server
        try:
            async with self._target.async_client() as client:
                self._begin = time.perf_counter()
                sending = asyncio.create_task(self._send_all(client, answers))
                await self._watch(sending)
                if not sending.cancelled():
                    sending.result()  # a mistake in here is not to be lost
        finally:
            if collecting:
                gc.enable()
        return Sending(answers=answers, lag_ms=self._lag_s * 1e3, cancelled=self._cancel.is_set())

    async def _watch(self, sending: asyncio.Task[None]) -> None:
        """Pass a cancellation on, and see how late the loop is."""
        while not sending.done():
            asleep = time.perf_counter()
            await asyncio.wait({sending}, timeout=_WATCH_EVERY_S)
            if not sending.done():
                self._lag_s = max(self._lag_s, time.perf_counter() - asleep - _WATCH_EVERY_S)
            if self._cancel.is_set():
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sending
                return

    async def _send_all(self, client: httpx.AsyncClient, answers: list[Answer]) -> None:
        places = asyncio.Semaphore(self._limit) if self._limit else None
        async with asyncio.TaskGroup() as group:
            for request, answer in zip(self._requests, answers, strict=True):
                due = self._begin + request.at_s
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if places is not None:
                    await places.acquire()
                group.create_task(self._send(client, request, answer, places))

    async def _send(
        self, client: httpx.AsyncClient, request: Request, answer: Answer, places: asyncio.Semaphore | None
    ) -> None:
        path, body = request.body(self._target)
        if self._label:
            body["request_id"] = f"{self._label}-{request.index}"
        try:
            encoded = msgspec.json.encode(body)
            answer.sent_s = time.perf_counter() - self._begin
            async with client.stream(
                "POST",
                path,
                content=encoded,
                headers={
                    "Content-Type": "application/json",
                    "Accept": "text/event-stream",
                    "Accept-Encoding": "identity",
                },
            ) as response:
                answer.id = response.headers.get("X-Request-Id", "")
                if response.is_error:
                    await response.aread()
                    answer.error = str(refusal(response))
                else:
                    await self._read(response, answer)
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            answer.error = f"The connection broke off: {type(error).__name__} {error}".strip()
        except asyncio.CancelledError:
            answer.error = "cancelled"
            raise
        finally:
            if places is not None:
                places.release()
            self._ended += 1
            if self._on_end is not None:
                self._on_end(self._ended, len(self._requests))

    async def _read(self, response: httpx.Response, answer: Answer) -> None:
        rest = b""
        done = False
        counted = 0
        texts: list[str] = []
        async for piece in response.aiter_raw():
            now = time.perf_counter() - self._begin
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    done = True
                    continue
                chunk = _chunk.decode(data)
                if chunk.error is not None:
                    answer.error = chunk.error if isinstance(chunk.error, str) else str(chunk.error.get("message"))
                    return
                for choice in chunk.choices:
                    count = _take(choice, answer, texts)
                    if count:
                        counted += count
                        answer.times_s.append(now)
                        answer.counts.append(count)
                if chunk.usage is not None:
                    _take_usage(chunk.usage, answer)
        if answer.output_tokens is None:
            answer.output_tokens = counted
        if not answer.token_ids:
            answer.text = "".join(texts)
        if not done and answer.finish is None:
            answer.error = "The server ended in the middle of the answer."
        elif not answer.times_s:
            answer.error = "The answer had no tokens."


def _take(choice: _Choice, answer: Answer, texts: list[str]) -> int:
    """Note what a piece of a choice brings; return how many tokens."""
    if choice.finish_reason is not None:
        answer.finish = choice.finish_reason
    delta = choice.delta
    text = choice.text or ""
    if delta is not None:
        text = delta.content or delta.reasoning_content or delta.reasoning or ""
    if text:
        texts.append(text)
    if choice.token_ids is not None:
        answer.token_ids += choice.token_ids
        return len(choice.token_ids)
    return 1 if text else 0


def _take_usage(usage: _Usage, answer: Answer) -> None:
    answer.prompt_tokens = usage.prompt_tokens
    answer.output_tokens = usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        answer.cached_tokens = usage.prompt_tokens_details.cached_tokens
