"""Texts to token ids and back, under vLLM's paths and fields, so that a client can make prompts of an exact length."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from starlette.responses import Response

from inference_server.front.errors import ApiError
from inference_server.front.json_response import json_response
from inference_server.front.openai_api import rendered
from inference_server.front.openai_requests import DetokenizeBody, TokenizeBody
from inference_server.front.supervisor import EngineSupervisor
from inference_server.front.tokenizer import ModelTokenizer


class TokenizeApi:
    """The handlers.

    Parameters
    ----------
    supervisor
        Knows the model.
    tokenizer
        Returns the tokenizer of the model that is loaded.
    """

    def __init__(self, supervisor: EngineSupervisor, tokenizer: Callable[[], ModelTokenizer]) -> None:
        self._supervisor = supervisor
        self._tokenizer = tokenizer
        self.router = APIRouter()
        self.router.add_api_route("/tokenize", self.tokenize, methods=["POST"], response_model=None)
        self.router.add_api_route("/detokenize", self.detokenize, methods=["POST"], response_model=None)

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Return the ids of a text, or of a conversation as the model would get it."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(422, "Send one of 'prompt' (a text) and 'messages' (a conversation).", param="prompt")
        tokenizer = self._tokenizer()
        if body.messages is not None:
            messages = [message.for_template() for message in body.messages]
            text = rendered(tokenizer, messages, body.add_generation_prompt, body.chat_template_kwargs)
            special = body.add_special_tokens or False
        else:
            text = body.prompt or ""
            special = True if body.add_special_tokens is None else body.add_special_tokens
        ids = await tokenizer.encode_async(text, add_special_tokens=special)
        ready = self._supervisor.ready
        longest = ready.capacity.max_model_len if ready else None
        return json_response({"count": len(ids), "max_model_len": longest, "tokens": ids})

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """Return the text of some ids."""
        return json_response({"prompt": self._tokenizer().decode(body.tokens)})
