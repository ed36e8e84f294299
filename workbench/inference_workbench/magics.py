"""``%load_ext inference_workbench`` and ``%%infer``: generate in a cell and see what it took."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, needs_local_scope
from IPython.display import display

from inference_server.features import FeatureValue
from inference_workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from inference_workbench.client import Workbench
    from inference_workbench.run import Run

_WORDS = {"on": True, "true": True, "off": False, "false": False}


class _Options(argparse.ArgumentParser):
    """Says what is wrong in the cell, rather than ending the kernel."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}. {self.format_usage().strip()}")


def _options() -> argparse.ArgumentParser:
    parser = _Options(prog="%%infer", add_help=False)
    parser.add_argument("-n", "--max-tokens", type=int, default=128)
    parser.add_argument("-t", "--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--raw", action="store_true", help="go on with the text, without the chat template")
    parser.add_argument("--set", action="append", default=[], metavar="SWITCH=VALUE", help="only for this cell")
    parser.add_argument("--plot", action="store_true", help="latency over position, too")
    parser.add_argument("--as", dest="name", help="keep the run in a variable")
    return parser


@magics_class
class InferMagics(Magics):
    """The magics. They use the notebook's ``wb`` where there is one, and connect otherwise."""

    _own: Workbench | None = None

    @needs_local_scope
    @cell_magic
    def infer(self, line: str, cell: str, local_ns: dict[str, Any] | None = None) -> None:
        """Generate from the cell's text: ``%%infer [-n TOKENS] [-t TEMPERATURE] [--set SWITCH=VALUE] [--as NAME] …``.

        ``--raw`` goes on with the text instead of answering it, ``--seed``, ``--plot``. Switches are put back.
        """
        given = _options().parse_args(shlex.split(line))
        text = cell.strip()
        if not text:
            raise UsageError("The cell is empty: write a prompt below the line with %%infer.")
        workbench = self._workbench(local_ns or {})
        switches = dict(_switch(each) for each in given.set)
        options: dict[str, Any] = {"max_tokens": given.max_tokens, "temperature": given.temperature}
        if given.seed is not None:
            options["seed"] = given.seed
        prompt: Any = text if given.raw else [{"role": "user", "content": text}]
        try:
            with workbench.features.temporarily(**switches) if switches else contextlib.nullcontext():
                run: Run = workbench.generate(prompt, **options)
        except WorkbenchError as error:
            raise UsageError(str(error)) from error
        display(run.summary())  # type: ignore[no-untyped-call]
        if given.plot:
            _show(run)
        if given.name:
            self._names()[given.name] = run

    @line_magic
    def infer_switches(self, line: str) -> Any:
        """Show the switches that ``--set`` can throw."""
        del line
        return self._workbench({}).features.describe()

    def _names(self) -> dict[str, Any]:
        """The notebook's variables."""
        assert self.shell is not None
        names: dict[str, Any] = self.shell.user_ns
        return names

    def _workbench(self, local: dict[str, Any]) -> Workbench:
        from inference_workbench.client import Workbench, connect  # noqa: PLC0415 -- loading the magics stays quick

        known = local.get("wb", self._names().get("wb"))
        if isinstance(known, Workbench):
            return known
        if self._own is None:
            self._own = connect()
        return self._own


def _switch(text: str) -> tuple[str, FeatureValue]:
    name, sign, value = text.partition("=")
    if not sign:
        raise UsageError(f"{text!r} sets nothing: write for example --set kv_cache=off.")
    if value.lower() in _WORDS:
        return name, _WORDS[value.lower()]
    return name, int(value) if value.lstrip("-").isdigit() else value


def _show(run: Run) -> None:
    from bokeh.embed import file_html  # noqa: PLC0415 -- only where a plot is wanted
    from bokeh.resources import INLINE  # noqa: PLC0415
    from IPython.display import HTML  # noqa: PLC0415

    # In a frame of its own the figure brings what it needs, whether or not the notebook has loaded Bokeh.
    page = file_html(run.plot(), INLINE).replace("&", "&amp;").replace('"', "&quot;")
    display(HTML(f'<iframe srcdoc="{page}" style="width:100%;height:350px;border:0"></iframe>'))  # type: ignore[no-untyped-call]
