"""Output that satisfies a JSON schema: which tokens may come next. llguidance does the grammar; this owns its lifetime.

A constraint only masks logits, so it composes with every sampling parameter, and since it advances by emitted tokens
alone, preemption and switches do not touch it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

GRAMMAR_DEFAULTS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,12}"}
"""Room for indentation, yet no way to fill max_tokens with white space, which small models otherwise do."""


class StructureError(ValueError):
    """A schema cannot be used; the message says why."""


class Constraint:
    """Where one request is in its grammar.

    Parameters
    ----------
    matcher : llguidance.LLMatcher
    vocab_size : int
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
        self._bits = torch.zeros(1, self._words, dtype=torch.int32)
        self._shifts = torch.arange(32, dtype=torch.int32)

    def mask(self, row: Tensor, ahead: Sequence[int] = ()) -> None:
        """Rule out, in a row of logits ``[vocab]``, every token that the grammar does not allow next.

        After the tokens ``ahead``, where they are given. Where these cannot come or complete the output, the row is
        left alone: nothing will be chosen from it.
        """
        if ahead:
            taken = self._matcher.try_consume_tokens(list(ahead))
            try:
                if taken == len(ahead) and not self._matcher.is_stopped():
                    self._mask(row)
            finally:
                self._matcher.rollback(taken)
        else:
            self._mask(row)

    def possible(self, tokens: list[int]) -> int:
        """How many of some tokens could come next, one after another."""
        return int(self._matcher.validate_tokens(tokens))

    def _mask(self, row: Tensor) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.numel() * 4)
        allowed = ((self._bits[0][:, None] >> self._shifts) & 1).reshape(-1)[: row.shape[0]].bool()
        if allowed.shape[0] < row.shape[0]:  # the model's vocabulary is padded beyond the tokenizer's
            allowed = torch.nn.functional.pad(allowed, (0, row.shape[0] - allowed.shape[0]))
        row.masked_fill_(~allowed.to(row.device), float("-inf"))

    def accept(self, token: int) -> bool:
        """Advance by an emitted token; true when the output is complete."""
        if not self._matcher.consume_token(token):
            raise StructureError(f"the grammar did not expect token {token}: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())


class Grammars:
    """Builds constraints for one model's tokenizer, which is prepared by the first request that needs it.

    Parameters
    ----------
    folder : Path
        The model's, with its tokenizer.
    vocab_size : int
        Of the model's logits.
    eos_token_ids : tuple of int
        Tokens that end the output.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: Any = None

    def constraint(self, schema: str) -> Constraint:
        """Return a fresh constraint for a JSON schema, given as text.

        Raises
        ------
        StructureError
            If the schema cannot be used, or llguidance is not installed.
        """
        try:
            from llguidance import LLMatcher  # noqa: PLC0415 - optional, and only some requests need it
        except ModuleNotFoundError as error:
            raise StructureError("structured output needs the package llguidance: pip install llguidance") from error
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.loads(schema), defaults=cast("Any", GRAMMAR_DEFAULTS))
        except (ValueError, TypeError) as error:
            raise StructureError(f"the JSON schema cannot be used: {error}") from error
        matcher = LLMatcher(self._prepare(), grammar, log_level=0)
        if matcher.is_error():
            raise StructureError(f"the JSON schema cannot be used: {matcher.get_error()}")
        return Constraint(matcher, self._vocab_size)

    def _prepare(self) -> Any:
        if self._tokenizer is None:
            from llguidance.hf import from_tokenizer  # noqa: PLC0415
            from transformers import AutoTokenizer  # noqa: PLC0415

            tokenizer: Any = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=None, eos_token=list(self._eos_token_ids) or None)
        return self._tokenizer
