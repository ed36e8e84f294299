"""What a client may ask for in OpenAI's API: the two request bodies, their limits, and what is refused with a reason.

Fields that only inform (``user``, ``metadata``, ``store`` …) are ignored; a field that would change the answer and is
not supported is an error, because a silent difference is worse.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from inference_server.front.errors import ApiError
from inference_server.protocol import SamplingParams

MAX_TOP_LOGPROBS = 20
_MAX_STOPS = 16
_MAX_CHOICES = 128

StopString = Annotated[str, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """Options of a streamed answer."""

    include_usage: bool = False


class JsonSchema(_Body):
    """The ``json_schema`` of a response format."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(_Body):
    """What the output must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingBody(_Body):
    """What completions and chat completions have in common."""

    model: str | None = None
    n: int = Field(default=1, ge=1, le=_MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=_MAX_STOPS)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    priority: int = 0
    features: dict[str, bool | int | str] | None = None
    request_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    telemetry: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings, as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def number_of_logprobs(self) -> int | None:
        """Alternatives to report per token; ``None`` for no logprobs at all."""
        raise NotImplementedError

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, if the request says."""
        return self.max_tokens

    def refuse_unsupported(self) -> None:
        """Raise :class:`ApiError` for what this server does not do."""
        if self.logit_bias:
            raise unsupported("logit_bias")

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Return the engine's parameters, with the defaults filled in."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": self.ignore_eos,
            "logprobs": self.number_of_logprobs,
            "json_schema": self._json_schema(),
        }
        return SamplingParams(max_tokens=max_tokens, **{k: v for k, v in given.items() if v is not None})

    def _json_schema(self) -> str | None:
        if self.response_format is None or self.response_format.type == "text":
            return None
        if self.response_format.type == "json_object":
            return '{"type":"object"}'
        wanted = self.response_format.json_schema
        if wanted is None or wanted.schema_ is None:
            raise ApiError(
                422, "response_format of type 'json_schema' needs json_schema.schema.", param="response_format"
            )
        return json.dumps(wanted.schema_)


TokenId = Annotated[int, Field(ge=0)]


class CompletionBody(SamplingBody):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    @property
    def number_of_logprobs(self) -> int | None:
        """Alternatives to report per token."""
        return self.logprobs

    def refuse_unsupported(self) -> None:
        """Raise for what this server does not do."""
        super().refuse_unsupported()
        if self.echo:
            raise unsupported("echo")
        if self.suffix:
            raise unsupported("suffix")
        if self.best_of is not None and self.best_of != self.n:
            raise unsupported("best_of", "leave it out, or make it equal to n")

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one, as text or as token ids.

        Raises
        ------
        ApiError
            If there is none, or one of them is empty.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(422, "'prompt' is empty: give a text, or a list of token ids.", param="prompt")
        if isinstance(self.prompt[0], int):
            return [[number for number in self.prompt if isinstance(number, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class ContentPart(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message; further fields are handed to the model's template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[ContentPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates read it, its text parts joined.

        Raises
        ------
        ApiError
            If it holds something else than text.
        """
        message = self.model_dump()
        if isinstance(self.content, list):
            for part in self.content:
                if part.type != "text" or part.text is None:
                    raise ApiError(
                        400, f"Content of type {part.type!r} is not supported: the model reads text.", param="messages"
                    )
            message["content"] = "\n".join(part.text or "" for part in self.content)
        return message


class TokenizeBody(_Body):
    """Body of ``POST /tokenize``: a text or a conversation, as vLLM has it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(_Body):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId]


class ChatBody(SamplingBody):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None

    @property
    def number_of_logprobs(self) -> int | None:
        """Alternatives to report per token."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, if the request says."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def refuse_unsupported(self) -> None:
        """Raise for what this server does not do."""
        super().refuse_unsupported()
        if self.tools:
            raise unsupported("tools")
        if self.functions:
            raise unsupported("functions")
        if self.tool_choice not in {None, "none", "auto"} if isinstance(self.tool_choice, str | None) else True:
            raise unsupported("tool_choice")
        if self.modalities and self.modalities != ["text"]:
            raise unsupported("modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(422, "'top_logprobs' needs 'logprobs': true.", param="top_logprobs")


def unsupported(field: str, instead: str = "leave it out") -> ApiError:
    """Return the error for a field that would change the answer and is not supported."""
    return ApiError(
        400, f"{field!r} is not supported by this server: {instead}.", param=field, code="unsupported_parameter"
    )
