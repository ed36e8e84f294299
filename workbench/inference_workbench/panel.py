"""The live views in a notebook: an ipywidget whose traits are the server's switches.

The views are the TypeScript ones that JupyterLab's panel uses (``static/widget.js``); this half holds the connection.
Messages, beside the traits:

=========== ======================================================================================================
to the view ``telemetry`` with one buffer, the server's MessagePack unchanged; ``connection`` (``state`` is one of
            ``connecting``, ``connected``, ``waiting``, ``failed``, ``closed``; ``reason``); ``clock`` (``client_time``,
            ``now_ns``); ``reply`` (``ok``, ``message``, ``for``)
from it     ``ready`` (a view was opened: send a snapshot); ``credit`` (``frames``); ``features`` (``values``);
            ``generate`` (``body``); ``cancel`` (``id``); ``engine`` (``action``); ``clock`` (``client_time``);
            ``record`` (``action``, ``name``, ``note``, ``id``)
=========== ======================================================================================================
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import msgspec
import traitlets
import websockets.sync.client as websocket_client
from websockets.exceptions import ConnectionClosed, WebSocketException

from inference_server.features import FeatureError, validate
from inference_server.protocol import PROTOCOL_VERSION, Credit, Event, FeaturesEvent, FeatureSpec, Snapshot, Subscribe
from inference_workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from inference_workbench.client import Workbench

_STATIC = Path(__file__).parent / "static"
_INTERVAL_MS = 70
"""From one frame to the next at least. It goes with the next news after that: some ten a second."""
_CREDITS = 16
_UNACKNOWLEDGED = 300
"""Frames that may be on the way to the page. Where a busy kernel cannot read the page's acknowledgements (no
subshells), the views stay live for this many frames: 30 s."""
_SILENCE_S = 60.0
_BACK_OFF_S = (0.1, 5.0)
_PARALLEL_COMMANDS = 64

_encoder = msgspec.msgpack.Encoder()


class Panel(anywidget.AnyWidget):
    """Base of every panel; :func:`make_panel` adds the switches of a server as traits."""

    message = traitlets.Unicode(
        "", help="The last refusal, for a person; empty when the last switch was accepted."
    ).tag(sync=True)

    def __init__(self, workbench: Workbench, specs: dict[str, FeatureSpec], **options: Any) -> None:
        self._workbench = workbench
        self._specs = specs
        self._socket: websocket_client.ClientConnection | None = None
        self._wanted = threading.Event()
        self._closing = False
        self._throwing: set[str] = set()
        self._unacknowledged = 0
        self._owed = 0
        self._flow = threading.Lock()
        self._commands = ThreadPoolExecutor(_PARALLEL_COMMANDS, thread_name_prefix="panel")
        super().__init__(**{**workbench.features.current(), **options})
        self._let_the_page_choose()
        self.on_msg(self._on_message)
        self.observe(self._switch_was_set, names=list(specs))
        self._stop_listening = workbench.telemetry.listen(self._server_said)
        threading.Thread(target=self._relay, name="panel-telemetry", daemon=True).start()

    def close(self) -> None:
        """Remove the widget and its connection; the server is not touched."""
        if not self._closing:
            self._closing = True
            self._stop_listening()
            self._wanted.set()
            self._drop_socket()
            self._commands.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _send(self, msg: Any, buffers: Any = None) -> None:
        super()._send(msg, buffers)
        self._let_the_page_choose()

    def _let_the_page_choose(self) -> None:
        """Have the page's messages handled where the page asks: in a subshell, also while a cell runs.

        ipykernel ≥ 7.4 instead hands them to the loop that sent on this comm last. That is the main one for everything
        that our threads send, so acknowledgements and switches would wait for the end of the running cell (and after a
        reopened page it would be a subshell that is gone).
        """
        comm: Any = self.comm
        if comm is not None:
            vars(comm).pop("_reply_subshell_id", None)

    # -- switches ----------------------------------------------------------------------------------------------------

    def _switch_was_set(self, change: Any) -> None:
        """Throw the switch whose trait was set; a refused value goes back to what is in force."""
        features = self._workbench.features
        name = change["name"]
        try:
            if features[name] == change["new"]:  # it came from the server, or is a revert
                return
            self._throwing.add(name)  # what the server says meanwhile is older than what was asked for
            features[name] = change["new"]
        except WorkbenchError as error:
            self.message = str(error)
            self._reply("features", error=str(error))
        else:
            self.message = ""
        finally:
            self._throwing.discard(name)
        with contextlib.suppress(WorkbenchError, KeyError):
            self.set_trait(name, features[name])

    def _server_said(self, news: Snapshot | list[Event]) -> None:
        """Follow switches that were thrown elsewhere (telemetry thread)."""
        values: dict[str, Any] = {}
        if isinstance(news, Snapshot):
            if news.features is not None:
                values = dict(news.features.values)
        elif any(isinstance(event, FeaturesEvent) for event in news):
            values = self._workbench.features.current()
        for name, value in values.items():
            if name in self._specs and name not in self._throwing and getattr(self, name) != value:
                self.set_trait(name, value)

    # -- messages of the view ----------------------------------------------------------------------------------------

    def _on_message(self, _widget: Any, content: dict[str, Any], _buffers: Any) -> None:
        match content:
            case {"t": "ready"}:
                with self._flow:
                    self._unacknowledged = self._owed = 0
                self._wanted.set()
                self._drop_socket()
            case {"t": "credit", "frames": int(frames)}:
                with self._flow:
                    self._unacknowledged = max(0, self._unacknowledged - frames)
                    owed, self._owed = self._owed, 0
                self._give_credit(owed)
            case {"t": "clock", "client_time": client_time}:
                offset = self._workbench.telemetry.clock_offset_ns
                if offset is not None:
                    now = time.monotonic_ns() + offset
                    self.send({"t": "clock", "client_time": client_time, "now_ns": now})
            case {"t": "features", "values": dict(values)}:
                self._command("features", lambda: self._workbench.features.update(values))
            case {"t": "generate", "body": dict(body)}:
                self._command("generate", lambda: self._workbench._generate(None, body, None))  # noqa: SLF001 -- our own
            case {"t": "cancel", "id": str(request_id)}:
                self._command("cancel", lambda: self._workbench.cancel(request_id))
            case {"t": "engine", "action": "restart" | "stop" | "start" | "sleep" | "wake" as action}:
                self._command("engine", lambda: self._workbench.engine(action))
            case {"t": "traffic", "action": "start" | "change" | "stop" as action, "values": dict(values)}:
                self._command("traffic", lambda: self._workbench.traffic.command(action, values))
            case {"t": "record", "action": "start"}:
                name, note = str(content.get("name") or ""), str(content.get("note") or "")
                self._command("record", lambda: self._workbench.recordings.start(name, note))
            case {"t": "record", "action": "stop"}:
                self._command("record", lambda: self._workbench.recordings.stop(content.get("id"), wait=False))
            case _:
                self._reply(str(content.get("t")), error=f"The kernel does not know what to do with {content!r}.")

    def _command(self, topic: str, action: Any) -> None:
        """Do something that may take long, off the kernel's thread, and reply."""

        def work() -> None:
            try:
                action()
            except (WorkbenchError, OSError, ValueError) as error:
                self._reply(topic, error=str(error))
            else:
                self._reply(topic)

        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._commands.submit(work)

    def _reply(self, topic: str, error: str | None = None) -> None:
        self.send({"t": "reply", "ok": error is None, "message": error or "", "for": topic})

    # -- telemetry ---------------------------------------------------------------------------------------------------

    def _relay(self) -> None:
        """Pass telemetry on, from the first view's ``ready`` until the widget is closed."""
        self._wanted.wait()
        shortest, longest = _BACK_OFF_S
        delay = shortest
        while not self._closing:
            self._wanted.clear()
            reason = ""
            try:
                with self._workbench._server.endpoint.websocket("/telemetry") as socket:  # noqa: SLF001 -- our own
                    self._socket = socket
                    subscribe = Subscribe(protocol=PROTOCOL_VERSION, credits=_CREDITS, min_interval_ms=_INTERVAL_MS)
                    socket.send(_encoder.encode(subscribe))
                    while not self._closing and not self._wanted.is_set():
                        self._forward(socket.recv(timeout=_SILENCE_S))
                        delay = shortest
            except ConnectionClosed as closed:
                reason = (closed.rcvd.reason if closed.rcvd else "") or "The inference server ended."
            except (WebSocketException, OSError, TimeoutError) as error:
                reason = f"The inference server does not answer: {error}"
            finally:
                self._socket = None
            if self._closing or self._wanted.is_set():  # a view asks for a new snapshot
                continue
            self.send({"t": "connection", "state": "waiting", "reason": reason})
            self._wanted.wait(delay)
            delay = min(longest, delay * 2)

    def _forward(self, raw: str | bytes) -> None:
        if isinstance(raw, str):
            return
        self.send({"t": "telemetry"}, buffers=[raw])
        with self._flow:
            self._unacknowledged += 1
            wait = self._unacknowledged >= _UNACKNOWLEDGED
            self._owed += wait
        if not wait:
            self._give_credit(1)

    def _give_credit(self, frames: int) -> None:
        socket = self._socket
        if frames and socket is not None:
            with contextlib.suppress(WebSocketException, OSError):
                socket.send(_encoder.encode(Credit(frames)))

    def _drop_socket(self) -> None:
        socket = self._socket
        if socket is not None:
            with contextlib.suppress(WebSocketException, OSError):
                socket.close()


def make_panel(workbench: Workbench, **options: Any) -> Panel:
    """Return a panel whose traits are the switches that ``workbench``'s server describes."""
    bundle = _STATIC / "widget.js"
    if not bundle.exists():
        raise WorkbenchError(
            f"The views' JavaScript is not built: {bundle} is missing. In a checkout, run: cd extension && jlpm build."
        )
    specs = workbench.features.specs()
    members: dict[str, Any] = {name: _trait(spec) for name, spec in specs.items()}
    clash = sorted(set(members) & set(dir(Panel)))
    if clash:
        raise WorkbenchError(f"These features have names that a widget uses itself: {', '.join(clash)}.")
    members["_esm"] = bundle
    style = _STATIC / "widget.css"
    if style.exists():
        members["_css"] = style
    members["__module__"] = __name__
    members["__doc__"] = "The live views of one server; its switches are traits."
    panel: Panel = type("WorkbenchPanel", (Panel,), members)(workbench, specs, **options)
    return panel


def _trait(spec: FeatureSpec) -> traitlets.TraitType[Any, Any]:
    """Describe one switch as a trait that refuses what the server would refuse."""
    kinds: dict[str, Any] = {"bool": traitlets.Bool, "int": traitlets.Int, "choice": traitlets.Unicode}
    base = kinds[spec.kind]

    class Switch(base):  # type: ignore[misc, valid-type]
        def validate(self, obj: Any, value: Any) -> Any:
            try:
                return validate(spec.name, super().validate(obj, value), {spec.name: spec})
            except FeatureError as error:
                raise traitlets.TraitError(str(error)) from None

    about = f"{spec.title}: {spec.description} (cost: {spec.cost})"
    trait: traitlets.TraitType[Any, Any] = Switch(default_value=spec.default, help=about).tag(sync=True)
    return trait
