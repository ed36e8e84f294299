"""Whom requests are sent to: any server that speaks OpenAI's API, over TCP or a Unix socket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import httpx
import msgspec

from inference_server.workloads.workload import Compose, Encode
from inference_workbench.endpoint import Endpoint, checked
from inference_workbench.errors import RequestError, WorkbenchError

_CHARACTERS_PER_TOKEN = 4.0
"""Of English text in the tokenizers of today, about; used only where a server cannot tokenize."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server, its model, and what it can do beyond OpenAI's API.

    Attributes
    ----------
    endpoint
        Where it is.
    model
        Name to ask for.
    tokenizes
        How it turns text into ids: ``"vllm"`` (ours does, too), ``"llama.cpp"``, or ``None`` where it does not.
    token_ids
        Whether it tells the ids of what it generates (``return_token_ids``), so that every token has its own time.
    vocabulary
        Number of its tokens, where known.
    """

    endpoint: Endpoint
    model: str
    tokenizes: str | None = None
    token_ids: bool = False
    vocabulary: int | None = None

    @classmethod
    def probe(cls, endpoint: Endpoint, model: str | None = None) -> Target:
        """Ask a server for its models and for what it can do.

        Raises
        ------
        WorkbenchError
            If nobody answers, or what answers is no such server.
        """
        with endpoint.http() as http:
            try:
                names = [each["id"] for each in checked(http.get("/v1/models"))["data"]]
            except httpx.TransportError as error:
                raise WorkbenchError(f"Nobody answers at {endpoint.place} ({error}). Is the server running?") from error
            except (RequestError, msgspec.DecodeError, KeyError, TypeError) as error:
                raise WorkbenchError(
                    f"{endpoint.place} does not list its models at /v1/models as OpenAI's API does: {error}"
                ) from error
            if model is None:
                if not names:
                    raise WorkbenchError(f"{endpoint.place} serves no model yet. Wait until it has loaded one.")
                model = names[0]
            info = _answer(http, "GET", "/info") or {}
            ours = isinstance(info, dict) and "server" in info
            vocabulary = (info.get("model") or {}).get("vocab_size") if ours else None
            target = cls(endpoint, model, vocabulary=vocabulary)
            spoken = _answer(http, "POST", "/tokenize", {"model": model, "prompt": "a", "content": "a"})
            if not isinstance(spoken, dict) or not isinstance(spoken.get("tokens"), list):
                return target
            if "count" in spoken:
                return replace(target, tokenizes="vllm", token_ids=True)
            return replace(target, tokenizes="llama.cpp")

    def async_client(self) -> httpx.AsyncClient:
        """Return a client for many requests at once; the caller closes it."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=30.0)
        endpoint = self.endpoint
        base = endpoint.url or "http://localhost"
        # Certificates take a tenth of a second to load: only where they are needed.
        transport = httpx.AsyncHTTPTransport(uds=endpoint.uds, limits=limits, verify=base.startswith("https:"))
        return httpx.AsyncClient(transport=transport, base_url=base, headers=endpoint.headers, timeout=timeout)

    def encoder(self) -> Encoder:
        """Return what turns text into this model's tokens."""
        return Encoder(self)


def target(url: str, *, token: str | None = None, model: str | None = None) -> Target:
    """Find any server of OpenAI's API, such as ours, vLLM, llama.cpp or Ollama.

    Parameters
    ----------
    url
        Its address, with or without ``/v1``.
    token
        Its key, where it wants one.
    model
        The model to ask for; without it, the first that the server lists.

    Raises
    ------
    WorkbenchError
        If nobody answers, or what answers is no such server.

    Examples
    --------
    >>> iw.bench(iw.target("http://127.0.0.1:8000"), "chat", requests=50)
    >>> iw.capacity({"ttft_ms": 500}, wb=iw.target("http://127.0.0.1:8000"))
    """
    if not url.startswith(("http://", "https://")):
        raise WorkbenchError(f"{url!r} is no address. Write for example http://127.0.0.1:8000.")
    base = url.rstrip("/").removesuffix("/v1")
    return Target.probe(Endpoint(token=token or "", url=base, authorization=True), model)


class Encoder:
    """Asks a server for token ids, and remembers them; counts characters where it cannot be asked.

    Attributes
    ----------
    exact
        Whether ids are the model's own. If not, their number is an estimate and they must not be sent.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._http = target.endpoint.http()
        self.exact = target.tokenizes is not None
        self._has_template = target.tokenizes == "vllm"
        self.encode: Encode = lru_cache(maxsize=4096)(self._encode)
        """Ids of a text, without special tokens."""
        self.compose: Compose = lru_cache(maxsize=4096)(self._compose)
        """Ids of a prompt that says a user's words, in the chat template where the server can apply it."""

    def conversation(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of a conversation in the chat template."""
        ids: list[int] = self._ask({"messages": list(messages)})["tokens"]
        return ids

    def prompt(self, text: str) -> list[int]:
        """Ids of a plain prompt, with what the model expects around it."""
        ids: list[int] = self._ask({"prompt": text, "add_special_tokens": True})["tokens"]
        return ids

    def close(self) -> None:
        """Let go of the connection."""
        self._http.close()

    def _encode(self, text: str) -> list[int]:
        if not self.exact:
            return [0] * max(1, round(len(text) / _CHARACTERS_PER_TOKEN)) if text else []
        body = {"prompt": text} if self._target.tokenizes == "vllm" else {"content": text}
        ids: list[int] = self._ask(body | {"add_special_tokens": False, "add_special": False})["tokens"]
        return ids

    def _compose(self, text: str) -> list[int]:
        if self._has_template:
            try:
                return self.conversation([{"role": "user", "content": text}])
            except RequestError:
                self._has_template = False  # a base model: it goes on with a text
        return self.encode(text)

    def _ask(self, body: dict[str, Any]) -> Any:
        return checked(self._http.post("/tokenize", json={"model": self._target.model, **body}))


def _answer(http: httpx.Client, method: str, path: str, json: Any = None) -> Any:
    """Return what a server says, or ``None`` where it does not know the path."""
    try:
        return checked(http.request(method, path, json=json))
    except (RequestError, msgspec.DecodeError, httpx.HTTPError):
        return None
