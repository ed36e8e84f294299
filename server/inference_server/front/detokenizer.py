"""Token ids to text, one token at a time: the pieces of a request add up to the text of decoding it whole.

Never emits the replacement character for bytes that the next token may complete, and does constant work per token.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """Turns one request's tokens into text as they come."""

    def add(self, token_id: int) -> str:
        """Return the text that this token added; empty while the bytes of a character are incomplete."""

    def finish(self) -> str:
        """Return what is still held back, with the replacement character for bytes that were never completed."""


class ByteDetokenizer:
    """For byte-level vocabularies, where a token *is* a string of bytes: no decoding twice, no window.

    Parameters
    ----------
    token_bytes
        Bytes of each token id; an id that is absent adds nothing (special tokens).
    """

    __slots__ = ("_decode", "_token_bytes")

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._token_bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def add(self, token_id: int) -> str:
        """Return the text that this token added."""
        piece = self._token_bytes.get(token_id)
        return self._decode(piece) if piece else ""

    def finish(self) -> str:
        """Return what is still held back."""
        return self._decode(b"", True)


class WindowDetokenizer:
    """For every other vocabulary: decodes a short window of recent tokens and emits what is new and settled.

    The window keeps a few tokens of context, because a decoder may look at neighbours (a word's leading space, runs of
    byte tokens). It moves on only to a start from which the same text follows.

    Parameters
    ----------
    decode
        Decodes a list of ids to text.
    skip
        Ids that add no text (special tokens).
    """

    __slots__ = ("_decode", "_emitted", "_skip", "_window")

    _LONGEST = 16
    _CONTEXT = 6

    def __init__(self, decode: Callable[[Sequence[int]], str], skip: frozenset[int]) -> None:
        self._decode = decode
        self._skip = skip
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that are already out

    def add(self, token_id: int) -> str:
        """Return the text that this token added."""
        if token_id in self._skip:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        settled = len(text.rstrip(_REPLACEMENT))  # bytes that are invalid so far may become a character
        new = text[self._emitted : settled]
        self._emitted = max(self._emitted, settled)
        if len(self._window) >= self._LONGEST and settled == len(text):
            self._move_on(text)
        return new

    def finish(self) -> str:
        """Return what is still held back."""
        text = self._decode(self._window) if self._window else ""
        new = text[self._emitted :]
        self._emitted = len(text)
        return new

    def _move_on(self, text: str) -> None:
        for keep in range(self._CONTEXT, self._LONGEST):
            tail = self._decode(self._window[-keep:])
            # A start in the middle of a character would show as a replacement character.
            if tail and _REPLACEMENT not in tail and text.endswith(tail):
                self._window = self._window[-keep:]
                self._emitted = len(tail)
                return


class StopStrings:
    """Ends a text at the first of several strings, and holds back whatever may become one.

    Parameters
    ----------
    stops
        Non-empty strings. The text ends before the one that is complete first.
    """

    __slots__ = ("_held", "_longest", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Take more text; return what may be shown, and whether a stop string was met (then nothing follows)."""
        if not self._stops:
            return text, False
        if not text:
            return "", False
        known = self._held + text
        ends = [(position + len(stop), position) for stop in self._stops if (position := known.find(stop)) >= 0]
        if ends:
            self._held = ""
            return known[: min(ends)[1]], True
        keep = self._longest_promise(known)
        self._held = known[len(known) - keep :]
        return known[: len(known) - keep], False

    def finish(self) -> str:
        """Return the text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _longest_promise(self, known: str) -> int:
        for length in range(min(self._longest - 1, len(known)), 0, -1):
            tail = known[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
