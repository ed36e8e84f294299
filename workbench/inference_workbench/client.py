"""The way into the workbench from Python: ``connect()`` and the :class:`Workbench` it returns."""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import httpx
import msgspec
import pandas as pd

from inference_server.protocol import (
    PROTOCOL_VERSION,
    Capacity,
    EngineEvent,
    ModelInfo,
    NoticeEvent,
    RequestEvent,
    ServerInfo,
)
from inference_workbench.endpoint import checked, gone, refusal
from inference_workbench.errors import (
    RequestError,
    ServerGoneError,
    ServerStartError,
    VersionMismatchError,
    WorkbenchError,
)
from inference_workbench.progress import ProgressLine
from inference_workbench.quantization import Quantization
from inference_workbench.recordings import Recorded, Recordings
from inference_workbench.run import Run
from inference_workbench.servers import Server, find_or_start
from inference_workbench.store import ENDED, EventStore
from inference_workbench.switches import Switches
from inference_workbench.telemetry import Telemetry
from inference_workbench.traffic import Traffic

if TYPE_CHECKING:
    from inference_workbench.panel import Panel
    from inference_workbench.recording import Recording
    from inference_workbench.replaying import WorkloadRun

Prompt = str | Sequence[Mapping[str, str]]
"""Text to go on from, or chat messages ``{"role": …, "content": …}``."""

OnToken = Callable[[int, str], object]
"""Called with the output position and the text of each piece as it comes."""

_MAX_PARALLEL = 256


EngineAction = Literal["restart", "stop", "start", "sleep", "wake"]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A server at one moment."""

    server: ServerInfo
    engine: EngineEvent
    model: ModelInfo | None
    capacity: Capacity | None
    features: dict[str, bool | int | str]
    active_requests: int
    telemetry: str
    """State of our own telemetry connection."""

    def __str__(self) -> str:
        lines = [f"engine     {self.engine.state}" + (f": {self.engine.message}" if self.engine.message else "")]
        if self.model is not None:
            model = self.model
            lines.append(f"model      {model.name} ({model.num_parameters / 1e6:,.0f} M parameters, {model.dtype})")
            lines.append(f"device     {model.device} ({model.device_name})")
        if self.capacity is not None:
            kv = self.capacity
            lines.append(
                f"KV cache   {kv.num_blocks:,} blocks of {kv.block_size} tokens, {kv.kv_bytes / 2**20:,.0f} MiB"
            )
        lines.append("features   " + ", ".join(f"{name}={value}" for name, value in self.features.items()))
        lines.append(f"requests   {self.active_requests} active")
        lines.append(f"telemetry  {self.telemetry}")
        lines.append(f"server     version {self.server.version}, process {self.server.pid}")
        return "\n".join(lines)


def connect(
    url: str | None = None,
    *,
    token: str | None = None,
    uds: str | Path | None = None,
    instance: str | None = None,
    model: str | None = None,
    start: bool = True,
    timeout: float = 900.0,
) -> Workbench:
    """Connect to an inference server, starting one if none runs, and wait until its model is loaded.

    Without arguments: inside JupyterLab, the server that the panel shows; elsewhere, the newest server of this user;
    and where there is none, a new one that ends with this process.

    Parameters
    ----------
    url
        Address of a server, as ``inference-workbench serve`` prints it (with ``?token=…``, or pass ``token``).
    token
        The server's token. Found by itself for servers of this user on this machine.
    uds
        Path of a server's Unix socket, instead of ``url``.
    instance
        One of several servers of this user on this machine, by what ``wb.status().server.instance`` says: the cell that
        the panel inserts names the server it shows.
    model
        Start a server of one's own with this model: ``"default"``, a hub id, a folder, or a ``.gguf`` file.
    start
        Whether to start a server where none runs.
    timeout
        Seconds to wait for the model to be loaded.

    Raises
    ------
    ServerNotFoundError, ServerStartError, ServerGoneError, VersionMismatchError
        With a message that says what to do.
    """
    arguments = () if model is None else ("--model", model)
    server = find_or_start(url, token, uds, instance=instance, start=start, arguments=arguments)
    workbench = Workbench(server)
    try:
        workbench.wait_ready(timeout)
    except BaseException:
        workbench.close()
        raise
    return workbench


class Workbench:
    """A connection to one server. Use :func:`connect` to get one; use it as a context manager to close it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._http = server.endpoint.http()
        self._endpoint = server.endpoint
        self._closed = False
        self._revival = threading.Lock()
        try:
            info = self._call("GET", "/info")
            self._check_version(msgspec.convert(info["server"], ServerInfo))
        except BaseException:
            self._http.close()
            server.close()
            raise
        self.store = EventStore()
        """Everything the server has told so far, as tables."""
        self.telemetry = Telemetry(lambda: self._server.endpoint, self.store)
        """The background connection that feeds the store."""
        self._features = Switches(self._call, self.store)
        self.quantization = Quantization(self._call)
        """What a precision costs in quality and memory: ``wb.quantization.measure(weight_precision="int8")``."""
        self.traffic = Traffic(self._call)
        """Requests that the server sends to itself: ``wb.traffic.start("chat", concurrency=8)``."""
        self.recordings = Recordings(self._call, lambda: self._http)
        """What was recorded on the server, and the way to record."""
        self.last_run: Run | None = None
        """The newest run, also of a generation that was interrupted."""

    # -- life --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the server. One that this process started ends."""
        if not self._closed:
            self._closed = True
            self.telemetry.close()
            self._http.close()
            self._server.close()

    def __repr__(self) -> str:
        return f"<Workbench at {self._endpoint.place}{', closed' if self._closed else ''}>"

    def wait_ready(self, timeout: float = 900.0) -> None:
        """Wait until the engine serves, showing what it is doing.

        Raises
        ------
        ServerStartError
            If the model could not be loaded; the message is the engine's own.
        """
        line = ProgressLine("Inference server")
        deadline = time.monotonic() + timeout
        while True:
            info = self._call("GET", "/info")
            engine = msgspec.convert({"t": "engine", **info["engine"]}, EngineEvent)
            if engine.state == "ready":
                break
            if engine.state == "failed":
                raise ServerStartError(f"The engine could not load the model: {engine.message}")
            if engine.state == "stopped":
                raise ServerStartError(
                    "The server's engine was stopped. Start it in the panel, or with wb.engine('start')."
                )
            if time.monotonic() > deadline:
                raise ServerStartError(f"The engine was still {engine.state} ({engine.stage}) after {timeout:.0f} s.")
            line.update(engine.stage or engine.state, engine.fraction)
            time.sleep(0.1)
        self.telemetry.wait_open(10)
        line.done(f"Inference server ready: {msgspec.convert(info['model'], ModelInfo).name}")

    @staticmethod
    def _check_version(server: ServerInfo) -> None:
        if server.protocol != PROTOCOL_VERSION:
            older = "server" if server.protocol < PROTOCOL_VERSION else "client"
            raise VersionMismatchError(
                f"The server (version {server.version}) speaks protocol {server.protocol}, this client "
                f"{PROTOCOL_VERSION}: the {older} is the older one. Install the same version of inference-workbench "
                "on both sides and restart them."
            )

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def features(self) -> Switches:
        """The switches: read like a mapping or by attribute, throw by assigning."""
        return self._features

    @features.setter
    def features(self, values: Mapping[str, bool | int | str]) -> None:
        self._features.update(values)

    def status(self) -> Status:
        """Return what the server says about itself now."""
        info = self._call("GET", "/info")
        requests = self._call("GET", "/requests")["requests"]
        connection = self.telemetry.state
        return Status(
            server=msgspec.convert(info["server"], ServerInfo),
            engine=msgspec.convert({"t": "engine", **info["engine"]}, EngineEvent),
            model=msgspec.convert(info["model"], ModelInfo | None),
            capacity=msgspec.convert(info["capacity"], Capacity | None),
            features=self._features.current(),
            active_requests=sum(each["state"] not in ENDED for each in requests),
            telemetry=connection if connection == "open" else f"{connection}: {self.telemetry.reason}",
        )

    def requests(self) -> list[RequestEvent]:
        """Return the active and recent requests of everybody on this server."""
        answer = self._call("GET", "/requests")["requests"]
        return [msgspec.convert({"t": "request", **each}, RequestEvent) for each in answer]

    def tokens(self) -> pd.DataFrame:
        """Return every token seen since connecting, of all requests: times in nanoseconds of the server's clock."""
        return self.store.tokens()

    def steps(self) -> pd.DataFrame:
        """Return every engine step seen since connecting: times in nanoseconds of the server's clock."""
        return self.store.steps()

    def cancel(self, request_id: str) -> None:
        """End a request; the others go on."""
        self._call("POST", f"/requests/{request_id}/cancel", json={})

    def engine(self, action: EngineAction, **options: Any) -> dict[str, Any]:
        """Restart the engine, stop it (frees the device's memory), or start it, e.g. with ``model="…"``.

        ``"sleep"`` gives the memory back too but keeps the engine and its requests; ``"wake"`` goes on with them.

        Returns
        -------
        dict
            The server's answer: the engine's new state, or, for sleep and wake, ``device_bytes`` given back (negative:
            taken), ``host_bytes`` of weights that wait on the host, ``duration_ns``, and the ``requests`` that wait.
        """
        answer: dict[str, Any] = self._call("POST", f"/engine/{action}", json=options)
        return answer

    @property
    def notices(self) -> list[NoticeEvent]:
        """What the engine had to say to a person since connecting: memory that ran out, a check that failed."""
        return list(self.store.notices)

    def record(
        self, path: str | Path | None = None, *, name: str = "", note: str = ""
    ) -> contextlib.AbstractContextManager[Recorded]:
        """Record everything that happens on the server while a ``with`` block runs.

        >>> with wb.record("switching.iwrec") as recorded:
        ...     wb.generate("Once upon a time")
        >>> recorded.open().summary()

        Parameters
        ----------
        path
            Where to put the file after the block. Without one it stays in the server's folder (:attr:`recordings`).
        name, note
            Kept in the recording, for people.
        """
        return self.recordings.record(path, name=name, note=note)

    def replay(self, recording: Recording | str | Path, **options: Any) -> WorkloadRun:
        """Send a recording's requests to this server at the times they came; see :func:`replay`."""
        from inference_workbench.replaying import replay  # noqa: PLC0415 -- only for who replays

        return replay(recording, self, **options)

    # -- generating --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        stream: bool = True,
        on_token: OnToken | None = None,
        **options: Any,
    ) -> Run:
        """Generate, printing the text as it comes, and return it with all that was measured.

        Parameters
        ----------
        prompt
            Text to go on from, or chat messages.
        max_tokens
            Most tokens to generate.
        temperature
            0 takes the most likely token; higher values sample more freely.
        stream
            Whether to print the text as it comes.
        on_token
            Called with the output position and text of each piece; may throw a switch in mid-generation.
        **options
            Any other field of the completion API: ``top_p``, ``top_k``, ``min_p``, ``seed``, ``stop``, ``logprobs``,
            ``ignore_eos``, ``repetition_penalty``, ``priority`` …

        Raises
        ------
        RequestError
            If the server refuses it, or the engine fails meanwhile.
        """
        body = {"max_tokens": max_tokens, "temperature": temperature, **options}
        printed = False

        def show(index: int, text: str) -> None:
            nonlocal printed
            if stream:
                printed = True
                print(text, end="", flush=True)
            if on_token is not None:
                on_token(index, text)

        try:
            return self._generate(prompt, body, show)
        finally:
            if printed:
                print(flush=True)

    def generate_many(
        self, prompts: Iterable[Prompt], *, max_tokens: int = 128, temperature: float = 0.0, **options: Any
    ) -> list[Run]:
        """Generate for several prompts at the same time and return the runs in the order of the prompts.

        The server batches them as its switches say. The first error ends the others and is raised.
        """
        body = {"max_tokens": max_tokens, "temperature": temperature, **options}
        work = list(prompts)
        if not work:
            return []
        ids = [_new_request_id() for _ in work]
        with ThreadPoolExecutor(min(len(work), _MAX_PARALLEL), thread_name_prefix="generate") as pool:
            futures = [
                pool.submit(self._generate, prompt, body, None, request_id=id_)
                for prompt, id_ in zip(work, ids, strict=True)
            ]
            try:
                pending = set(futures)
                while pending:
                    ended, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in ended:
                        future.result()
            except BaseException:
                for future, id_ in zip(futures, ids, strict=True):
                    if not future.cancel() and not future.done():
                        self._cancel_quietly(id_)
                raise
            return [future.result() for future in futures]

    def _generate(
        self,
        prompt: Prompt | None,
        body: Mapping[str, Any],
        on_token: OnToken | None,
        *,
        request_id: str | None = None,
    ) -> Run:
        """Send one request (``body`` may hold the prompt already), follow its stream, and collect its run."""
        id_ = request_id or body.get("request_id") or _new_request_id()
        request = {**body, "request_id": id_, "stream": True, "telemetry": True}
        if prompt is not None:
            request |= {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        text: list[str] = []
        server_id = id_
        try:
            with self._stream(
                "/v1/chat/completions" if "messages" in request else "/v1/completions", request
            ) as answer:
                server_id = answer.headers.get("X-Request-Id", id_)
                for index, piece in _pieces(answer):
                    text.append(piece)
                    if on_token is not None:
                        on_token(index, piece)
        except BaseException as error:
            self._cancel_quietly(server_id)
            if not isinstance(error, RequestError):  # interrupted: what there is may still be of interest
                self.last_run = Run.collect(self.store, server_id, "".join(text))
            raise
        self.last_run = Run.collect(self.store, server_id, "".join(text))
        return self.last_run

    @contextlib.contextmanager
    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[httpx.Response]:
        """Open a streamed answer, once more on a revived server if nobody answers at all."""
        with contextlib.ExitStack() as stack:
            for attempt in (1, 2):
                client = self._http
                try:
                    answer = stack.enter_context(
                        client.stream("POST", path, json=body, timeout=httpx.Timeout(None, connect=10.0))
                    )
                    break
                except httpx.TransportError as error:
                    # No answer had begun, so nothing is lost by asking the revived server.
                    if attempt == 2 or isinstance(error, httpx.TimeoutException):
                        raise gone(self._endpoint, error) from error
                    self._revive(client)
            if answer.is_error:
                answer.read()
                raise refusal(answer)
            try:
                yield answer
            except httpx.TransportError as error:
                raise RequestError(f"The server ended in the middle of the answer ({error}).") from error

    def _cancel_quietly(self, request_id: str) -> None:
        with contextlib.suppress(WorkbenchError, httpx.HTTPError):
            self.cancel(request_id)

    # -- views -------------------------------------------------------------------------------------------------------

    def panel(self, **options: Any) -> Panel:
        """Return a widget with the live views. Every switch is a trait of it, e.g. ``panel.kv_cache``."""
        from inference_workbench.panel import make_panel  # noqa: PLC0415 -- ipywidgets only where it is used

        return make_panel(self, **options)

    # -- HTTP --------------------------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, json: Any = None, *, timeout: float = 30.0) -> Any:
        """One exchange, decoded; a server that is gone is brought back once where that is possible."""
        client = self._http
        try:
            return checked(client.request(method, path, json=json, timeout=timeout))
        except httpx.TimeoutException as error:
            raise gone(self._endpoint, error) from error
        except httpx.TransportError:  # refused, or a kept connection turns out to be dead
            self._revive(client)
        try:
            return checked(self._http.request(method, path, json=json, timeout=timeout))
        except httpx.TransportError as error:
            raise gone(self._endpoint, error) from error

    def _revive(self, failed: httpx.Client) -> None:
        """Have the server brought back, once for all threads that found it gone."""
        with self._revival:
            if self._closed:
                raise ServerGoneError("This workbench is closed: call inference_workbench.connect() again.")
            if self._http is not failed:
                return
            print("The inference server is gone; bringing it back.", file=sys.stderr)
            self._server.revive()
            self._endpoint = self._server.endpoint
            self._http = self._endpoint.http()
            failed.close()


def _new_request_id() -> str:
    return f"nb-{secrets.token_hex(6)}"


def _pieces(answer: httpx.Response) -> Iterator[tuple[int, str]]:
    """Read a completion stream: yields (output position, text) for each chunk that carries any."""
    index = -1
    for line in answer.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = msgspec.json.decode(line.removeprefix("data: "))
        if "error" in chunk:
            error = chunk["error"]
            raise RequestError(error.get("message", "the server reported an error"), code=error.get("code"))
        positions = (chunk.get("telemetry") or {}).get("index") or []
        index = max(positions, default=index)
        for choice in chunk.get("choices", ()):
            piece = choice.get("text") or (choice.get("delta") or {}).get("content")
            if piece:
                yield index, piece
