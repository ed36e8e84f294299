"""OpenAI's API: models, completions and chat completions, from the request's arrival to the end of the answer."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inference_server.front.chat_template import ChatTemplateError
from inference_server.front.errors import ApiError
from inference_server.front.json_response import json_response
from inference_server.front.openai_answers import (
    KEEP_ALIVE,
    ChatWriter,
    CompletionWriter,
    Writer,
    error_event,
)
from inference_server.front.openai_requests import ChatBody, CompletionBody, SamplingBody
from inference_server.front.requests import Generation, Output, RequestTable
from inference_server.front.supervisor import EngineSupervisor
from inference_server.front.tokenizer import ModelTokenizer
from inference_server.protocol import Ready

_START_WITHIN_S = 1.0
"""How long a stream waits for its first token, or a refusal by the engine, before it commits to status 200."""
_KEEP_ALIVE_S = 15.0
_RequestId = "X-Request-Id"
_TRACE_HEADERS = ("traceparent", "tracestate")

T = TypeVar("T")
Encoder = Callable[[ModelTokenizer], Awaitable[list[list[int]]]]


class OpenAiApi:
    """The handlers of ``/v1``.

    Parameters
    ----------
    supervisor
        The engine.
    requests
        Where requests are kept.
    tokenizer
        Returns the tokenizer of the model that is loaded.
    loading_wait_s
        How long a request waits for an engine that is loading.
    """

    def __init__(
        self,
        supervisor: EngineSupervisor,
        requests: RequestTable,
        tokenizer: Callable[[], ModelTokenizer],
        *,
        loading_wait_s: float,
    ) -> None:
        self._supervisor = supervisor
        self._requests = requests
        self._tokenizer = tokenizer
        self._loading_wait_s = loading_wait_s
        self._started = int(time.time())
        self.router = APIRouter(prefix="/v1")
        self.router.add_api_route("/models", self.models, methods=["GET"])
        self.router.add_api_route("/models/{name:path}", self.model, methods=["GET"])
        self.router.add_api_route("/completions", self.completions, methods=["POST"], response_model=None)
        self.router.add_api_route("/chat/completions", self.chat_completions, methods=["POST"], response_model=None)

    async def models(self) -> Response:
        """List the model that is served; none while the engine is loading."""
        ready = self._supervisor.ready
        return json_response({"object": "list", "data": [self._describe(ready)] if ready else []})

    async def model(self, name: str) -> Response:
        """Describe one model."""
        ready = self._supervisor.ready
        if ready is None or ready.model.name != name:
            raise _no_such_model(name, ready)
        return json_response(self._describe(ready))

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continue a text."""
        body.refuse_unsupported()
        prompts = body.prompts()

        async def encode(tokenizer: ModelTokenizer) -> list[list[int]]:
            return [
                await tokenizer.encode_async(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        first = prompts[0]
        preview = first if isinstance(first, str) else f"{len(first)} token ids"
        return await self._generate(
            request, body, encode, CompletionWriter, prompts=len(prompts), preview=preview, prefix="cmpl"
        )

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        body.refuse_unsupported()
        messages = [message.for_template() for message in body.messages]

        async def encode(tokenizer: ModelTokenizer) -> list[list[int]]:
            text = rendered(tokenizer, messages, body.add_generation_prompt, body.chat_template_kwargs)
            return [await tokenizer.encode_async(text, add_special_tokens=False)]

        said = [str(message.get("content") or "") for message in messages if message["role"] == "user"]
        preview = said[-1] if said else str(messages[-1].get("content") or "")
        return await self._generate(request, body, encode, ChatWriter, prompts=1, preview=preview, prefix="chatcmpl")

    # -- one request -------------------------------------------------------------------------------------------------

    async def _generate(
        self,
        request: Request,
        body: SamplingBody,
        encode: Encoder,
        writer_class: type[CompletionWriter | ChatWriter],
        *,
        prompts: int,
        preview: str,
        prefix: str,
    ) -> Response:
        """Carry one request from arrival to the moment that its answer can begin."""
        ready = self._supervisor.ready
        if ready is not None:
            _check_model(body, ready)
        identifier = body.request_id or f"{prefix}-{secrets.token_hex(12)}"
        generation = self._requests.open(
            identifier,
            preview,
            prompts=prompts,
            n=body.n,
            streaming=body.stream,
            headers={name: request.headers[name] for name in _TRACE_HEADERS if name in request.headers},
        )
        leaving = asyncio.create_task(self._watch_client(request, generation))
        try:
            ready = await _unless_ended(self._supervisor.wait_ready(self._loading_wait_s), generation)
            _check_model(body, ready)
            tokenizer = self._tokenizer()
            encoded = await _unless_ended(encode(tokenizer), generation)
            sampling = [body.sampling(_token_limit(body, len(prompt), ready)) for prompt in encoded]
            _check_vocabulary(encoded, ready)
            self._requests.submit(
                generation,
                encoded,
                sampling,
                tokenizer=tokenizer,
                stops=body.stops,
                priority=body.priority,
                overrides=body.features,
            )
            writer = writer_class(
                generation,
                ready.model.name,
                tokenizer,
                logprobs=body.number_of_logprobs is not None,
                include_usage=body.include_usage,
                telemetry=body.telemetry,
                token_ids=body.return_token_ids,
                spell_ids=body.return_tokens_as_token_ids,
            )
            if not body.stream:
                answer = await _whole(generation, writer)
                self._close(generation, leaving)
                return answer
            first = await generation.collect(_START_WITHIN_S)
            _raise_failure(first)
        except BaseException as error:
            self._requests.fail(
                generation,
                error if isinstance(error, ApiError) else ApiError(500, "The server failed on this request."),
            )
            self._close(generation, leaving)
            if isinstance(error, ApiError):
                error.headers[_RequestId] = identifier
            raise
        return _Stream(generation, writer, first, lambda: self._close(generation, leaving))

    async def _watch_client(self, request: Request, generation: Generation) -> None:
        """Cancel a request whose client has left."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        generation.closed = True
        self._requests.cancel(generation)

    def _close(self, generation: Generation, leaving: asyncio.Task[None]) -> None:
        """Tidy up after a request, however it ended."""
        leaving.cancel()
        generation.closed = True
        self._requests.cancel(generation)

    def _describe(self, ready: Ready) -> dict[str, object]:
        return {
            "id": ready.model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "inference-workbench",
            "max_model_len": ready.capacity.max_model_len,
        }


class _Stream(Response):
    """A stream of server-sent events whose tokens are stamped the moment the connection has taken them."""

    def __init__(
        self, generation: Generation, writer: Writer, first: Sequence[Output], close: Callable[[], None]
    ) -> None:
        super().__init__(
            status_code=200,
            headers={_RequestId: generation.id, "Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer
        self._first = first
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until its generation has ended or its client has left."""
        del scope, receive  # the client's leaving is watched since the request arrived
        generation, writer = self._generation, self._writer
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            outputs = self._first
            open_choices = len(generation.samples)
            while open_choices:
                body = b"".join(map(writer.chunk, outputs)) if outputs else KEEP_ALIVE
                failure = next((output.sample.failure for output in outputs if output.sample.failure), None)
                if failure is not None:
                    body = error_event(failure.detail)
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                now = time.monotonic_ns()
                for output in outputs:
                    output.sent(now)
                    open_choices -= output.finish is not None
                if failure is not None:
                    break
                if open_choices:
                    outputs = await generation.collect(_KEEP_ALIVE_S)
            else:
                await send({"type": "http.response.body", "body": writer.close(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except OSError:
            pass  # the client left in the middle of a write; closing cancels the request
        finally:
            self._close()


async def _whole(generation: Generation, writer: Writer) -> Response:
    """Wait for every choice of a request and return the answer."""
    outputs: list[Output] = []
    open_choices = len(generation.samples)
    while open_choices:
        new = await generation.collect()
        _raise_failure(new)
        open_choices -= sum(output.finish is not None for output in new)
        outputs += new
    return Response(writer.whole(outputs), media_type="application/json", headers={_RequestId: generation.id})


async def _unless_ended(work: Awaitable[T], generation: Generation) -> T:
    """Do something for a request, but no longer than the request lives."""
    task = asyncio.ensure_future(work)
    ended = asyncio.ensure_future(generation.ended())
    try:
        await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "The request was cancelled.", code="cancelled")
    finally:
        for one in (task, ended):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await one


def rendered(
    tokenizer: ModelTokenizer,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    variables: dict[str, Any] | None,
) -> str:
    """Write a conversation the way the model expects it.

    Raises
    ------
    ApiError
        If the model has no chat template, or it cannot write this conversation.
    """
    if tokenizer.chat_template is None:
        raise ApiError(400, "This model has no chat template: it continues texts. Use /v1/completions.")
    try:
        return tokenizer.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables
        )
    except ChatTemplateError as error:
        raise ApiError(400, str(error), param="messages") from error


def _raise_failure(outputs: Sequence[Output]) -> None:
    for output in outputs:
        if output.sample.failure is not None:
            raise output.sample.failure


def _check_model(body: SamplingBody, ready: Ready) -> None:
    if body.model is not None and body.model != ready.model.name:
        raise _no_such_model(body.model, ready)


def _no_such_model(name: str, ready: Ready | None) -> ApiError:
    served = f"The models are: {ready.model.name}." if ready else "No model is loaded yet."
    return ApiError(404, f"The model {name!r} does not exist here. {served}", param="model", code="model_not_found")


def _token_limit(body: SamplingBody, prompt_tokens: int, ready: Ready) -> int:
    """Return how many tokens may be generated: what was asked for, at most what the context leaves."""
    context = ready.capacity.max_model_len
    if not prompt_tokens:
        raise ApiError(400, "The prompt has no tokens: it must have one at least.", param="prompt")
    room = context - prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"The prompt has {prompt_tokens:,} tokens, and the model's context of {context:,} tokens must hold the "
            "answer too. Shorten the prompt.",
            param="prompt",
            code="context_length_exceeded",
        )
    wanted = body.token_limit
    if wanted is not None and wanted > room:
        raise ApiError(
            400,
            f"The prompt has {prompt_tokens:,} tokens and {wanted:,} more were asked for: together more than the "
            f"model's context of {context:,} tokens. Ask for at most {room:,}.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return wanted if wanted is not None else room


def _check_vocabulary(prompts: Sequence[Sequence[int]], ready: Ready) -> None:
    size = ready.model.vocab_size
    for prompt in prompts:
        if (largest := max(prompt)) >= size:
            raise ApiError(400, f"The prompt has token id {largest}; the model has {size:,} tokens.", param="prompt")
