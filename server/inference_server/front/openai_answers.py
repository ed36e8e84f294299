"""Answers in OpenAI's shape, streamed and whole, for completions and for chat.

This is the hot path, so msgspec encodes.

A *writer* knows one request's shape; it is given the outputs of the engine and returns bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from inference_server.front.errors import ErrorBody, ErrorDetail
from inference_server.front.requests import Generation, Output, Sample
from inference_server.front.tokenizer import ModelTokenizer
from inference_server.protocol import FinishReason

_encoder = msgspec.json.Encoder()

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How many of the prompt's tokens the prefix cache supplied."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChunkTelemetry(msgspec.Struct, frozen=True):
    """Which tokens a chunk brings: ties a stream to the telemetry."""

    request: int
    index: list[int]


class CompletionLogprobs(msgspec.Struct):
    """Logprobs in the shape of ``/v1/completions``."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []


class TopLogprob(msgspec.Struct, frozen=True):
    """One alternative in the shape of chat completions."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token in the shape of chat completions."""

    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Logprobs in the shape of chat completions."""

    content: list[TokenLogprob] = []


class CompletionChoice(msgspec.Struct, frozen=True):
    """One choice, whole or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chat chunk adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of a chat choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """A whole chat message."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """A whole chat choice."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer or a chunk of one."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[CompletionChoice | ChatChunkChoice | ChatChoice]
    usage: Usage | UnsetType | None = UNSET
    telemetry: ChunkTelemetry | UnsetType = UNSET


class Writer(Protocol):
    """Writes one request's answer."""

    def chunk(self, output: Output) -> bytes:
        """Return the server-sent events for one output; empty where there is nothing to say yet."""

    def close(self) -> bytes:
        """Return the end of a stream that went well."""

    def whole(self, outputs: Sequence[Output]) -> bytes:
        """Return the answer to a request that does not stream."""


class _Writer:
    """What both shapes share.

    Parameters
    ----------
    generation
        The request.
    model
        Name to answer with.
    tokenizer
        Spells tokens in logprobs.
    logprobs
        Whether they were asked for.
    include_usage
        Whether a stream ends with the usage.
    telemetry
        Whether chunks say which tokens they bring.
    token_ids
        Whether choices say the ids of the tokens they bring.
    spell_ids
        Whether logprobs spell a token as ``token_id:NUMBER``, which tells apart what looks alike as text.
    """

    _object: str
    _chunk_object: str

    def __init__(
        self,
        generation: Generation,
        model: str,
        tokenizer: ModelTokenizer,
        *,
        logprobs: bool,
        include_usage: bool,
        telemetry: bool,
        token_ids: bool = False,
        spell_ids: bool = False,
    ) -> None:
        self._generation = generation
        self._model = model
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._telemetry = telemetry
        self._token_ids = token_ids
        self._spell_ids = spell_ids
        self._created = int(time.time())
        # Tokens that came since the last chunk of a choice and had no text of their own.
        self._unsaid: dict[int, list[Output]] = {sample.choice: [] for sample in generation.samples}
        self._offsets: dict[int, int] = dict.fromkeys(self._unsaid, 0)

    def chunk(self, output: Output) -> bytes:
        """Return the server-sent events for one output."""
        unsaid = self._unsaid[output.sample.choice]
        unsaid.append(output)
        if not (output.text or output.finish or self._logprobs or self._telemetry or self._token_ids):
            return b""
        tokens = [one for one in unsaid if one.token_id is not None]
        self._unsaid[output.sample.choice] = []
        telemetry: ChunkTelemetry | UnsetType = UNSET
        if self._telemetry:
            telemetry = ChunkTelemetry(output.sample.handle, [one.index for one in tokens])
        return self._event(self._pieces(output, tokens), telemetry)

    def close(self) -> bytes:
        """Return the end of a stream that went well."""
        if not self._include_usage:
            return DONE
        return self._event([], UNSET, usage=self._usage()) + DONE

    def whole(self, outputs: Sequence[Output]) -> bytes:
        """Return the answer to a request that does not stream."""
        choices = []
        for sample in self._generation.samples:
            mine = [output for output in outputs if output.sample is sample]
            tokens = [output for output in mine if output.token_id is not None]
            text = "".join(output.text for output in mine)
            choices.append(self._choice(sample, text, tokens))
        return _encoder.encode(self._answer(self._object, choices, usage=self._usage()))

    def _pieces(self, output: Output, tokens: list[Output]) -> Sequence[CompletionChoice | ChatChunkChoice]:
        raise NotImplementedError

    def _choice(self, sample: Sample, text: str, tokens: list[Output]) -> CompletionChoice | ChatChoice:
        raise NotImplementedError

    def _event(
        self,
        choices: Sequence[CompletionChoice | ChatChunkChoice],
        telemetry: ChunkTelemetry | UnsetType,
        usage: Usage | UnsetType | None = UNSET,
    ) -> bytes:
        if self._include_usage and usage is UNSET:
            usage = None
        answer = self._answer(self._chunk_object, choices, usage=usage, telemetry=telemetry)
        return b"data: " + _encoder.encode(answer) + b"\n\n"

    def _answer(
        self,
        kind: str,
        choices: Sequence[CompletionChoice | ChatChunkChoice | ChatChoice],
        *,
        usage: Usage | UnsetType | None = UNSET,
        telemetry: ChunkTelemetry | UnsetType = UNSET,
    ) -> Answer:
        return Answer(
            id=self._generation.id,
            object=kind,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            telemetry=telemetry,
        )

    def _usage(self) -> Usage:
        samples = self._generation.samples
        prompts: dict[int, int] = {}
        each = self._generation.samples_per_prompt
        for sample in samples:
            prompts[sample.choice // each] = sample.prompt_tokens  # samples of one prompt share it
        read, written = sum(prompts.values()), sum(sample.output_tokens for sample in samples)
        details = PromptTokensDetails(max((sample.cached_tokens for sample in samples), default=0))
        return Usage(read, written, read + written, details)

    def _ids(self, tokens: Sequence[Output]) -> list[int] | UnsetType:
        return [one.token_id for one in tokens if one.token_id is not None] if self._token_ids else UNSET

    def _spell(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._spell_ids else self._tokenizer.token_text(token_id)

    def _completion_logprobs(self, choice: int, tokens: Sequence[Output]) -> CompletionLogprobs | None:
        if not self._logprobs:
            return None
        spell = self._spell
        logprobs = CompletionLogprobs()
        for output in tokens:
            assert output.token_id is not None
            logprobs.tokens.append(spell(output.token_id))
            logprobs.token_logprobs.append(output.logprob)
            logprobs.top_logprobs.append({spell(number): value for number, value in output.top or ()})
            logprobs.text_offset.append(self._offsets[choice])
            self._offsets[choice] += len(output.token_text)
        return logprobs

    def _chat_logprobs(self, tokens: Sequence[Output]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        text, raw = self._spell, self._tokenizer.token_bytes
        logprobs = ChatLogprobs()
        for output in tokens:
            assert output.token_id is not None
            top = [TopLogprob(text(number), value, list(raw(number))) for number, value in output.top or ()]
            number = output.token_id
            logprobs.content.append(TokenLogprob(text(number), output.logprob, list(raw(number)), top))
        return logprobs


class CompletionWriter(_Writer):
    """Writes ``text_completion`` answers."""

    _object = _chunk_object = "text_completion"

    def _pieces(self, output: Output, tokens: list[Output]) -> Sequence[CompletionChoice]:
        choice = output.sample.choice
        logprobs = self._completion_logprobs(choice, tokens)
        return [CompletionChoice(choice, output.text, logprobs, output.finish, self._ids(tokens))]

    def _choice(self, sample: Sample, text: str, tokens: list[Output]) -> CompletionChoice:
        logprobs = self._completion_logprobs(sample.choice, tokens)
        return CompletionChoice(sample.choice, text, logprobs, sample.finish_reason, self._ids(tokens))


class ChatWriter(_Writer):
    """Writes ``chat.completion`` answers."""

    _object = "chat.completion"
    _chunk_object = "chat.completion.chunk"

    def chunk(self, output: Output) -> bytes:
        """Return the server-sent events for one output, after the one that opens its choice."""
        opening = b""
        choice = output.sample.choice
        if self._offsets[choice] == 0:
            self._offsets[choice] = 1
            opening = self._event([ChatChunkChoice(choice, Delta(role="assistant", content=""))], UNSET)
        return opening + super().chunk(output)

    def _pieces(self, output: Output, tokens: list[Output]) -> Sequence[ChatChunkChoice]:
        delta = Delta(content=output.text) if output.text else Delta()
        logprobs = self._chat_logprobs(tokens)
        return [ChatChunkChoice(output.sample.choice, delta, logprobs, output.finish, self._ids(tokens))]

    def _choice(self, sample: Sample, text: str, tokens: list[Output]) -> ChatChoice:
        logprobs = self._chat_logprobs(tokens)
        return ChatChoice(sample.choice, AssistantMessage(text), logprobs, sample.finish_reason, self._ids(tokens))


def error_event(detail: ErrorDetail) -> bytes:
    """Return the server-sent event that ends a stream which failed; no ``[DONE]`` follows."""
    return b"data: " + _encoder.encode(ErrorBody(detail)) + b"\n\n"
