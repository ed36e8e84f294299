"""The model's tokenizer as the front uses it: encode, chat template, detokenizers, and the spelling of single tokens.

Reads the files beside the model with the ``tokenizers`` library; imports no transformers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as FastTokenizer

from inference_server.front.chat_template import ChatTemplate
from inference_server.front.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer

_LONG_TEXT = 4_000
"""Characters from which encoding takes long enough to be kept off the event loop (about a millisecond)."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """The model's tokenizer files are missing or cannot be used. The message says which and why."""


class ModelTokenizer:
    """Tokenizer of one loaded model.

    Parameters
    ----------
    folder
        Holds ``tokenizer.json`` and, where the model has them, ``tokenizer_config.json`` and ``chat_template.jinja``.

    Raises
    ------
    TokenizerError
        If ``tokenizer.json`` is missing or cannot be read.
    ChatTemplateError
        If the chat template cannot be compiled.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"{folder} has no tokenizer.json, which the server needs to read and write text.")
        try:
            self._fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} cannot be read: {error}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        self._special_ids = frozenset(
            number for number, token in self._fast.get_added_tokens_decoder().items() if token.special
        )
        self._token_bytes = _byte_level_vocabulary(self._fast)
        self._spoken_bytes = {
            number: piece for number, piece in (self._token_bytes or {}).items() if number not in self._special_ids
        }
        source = _chat_template_source(folder, config)
        self.chat_template = ChatTemplate(source, _special_tokens(folder, config)) if source is not None else None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text; ``add_special_tokens`` adds what the model expects around a plain prompt."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Like :meth:`encode`, off the event loop where the text is long."""
        if len(text) < _LONG_TEXT:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, special tokens left out."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def detokenizer(self) -> Detokenizer:
        """Return a fresh incremental decoder for one request."""
        if self._token_bytes is not None:
            return ByteDetokenizer(self._spoken_bytes)
        return WindowDetokenizer(self.decode, self._special_ids)

    def token_text(self, token_id: int) -> str:
        """Return one token by itself, special tokens spelled out, as logprobs show it."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token by itself; of an id that the vocabulary lacks, none."""
        if self._token_bytes is not None:
            return self._token_bytes.get(token_id, b"")
        text: str = self._fast.decode([token_id], skip_special_tokens=False)
        return text.encode()


def _byte_level_vocabulary(fast: FastTokenizer) -> dict[int, bytes] | None:
    """Return the bytes of each token, or ``None`` where tokens are not plain strings of bytes."""
    decoder = json.loads(fast.to_str()).get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return None
    alphabet = _byte_alphabet()
    pieces: dict[int, bytes] = {}
    for token, number in fast.get_vocab(with_added_tokens=True).items():
        try:
            pieces[number] = bytes(alphabet[character] for character in token)
        except KeyError:  # an added token in plain spelling
            pieces[number] = token.encode()
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _chat_template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template: str | list[dict[str, str]] | None = config.get("chat_template")
    if isinstance(template, list):  # several named ones; plain chat uses the default
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    merged = {**_read_json(folder / "special_tokens_map.json"), **config}
    tokens: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value: str | dict[Literal["content"], str] | None = merged.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None:
            tokens[name] = value
    return tokens
