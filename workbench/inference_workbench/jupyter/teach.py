"""The address that ``inference-workbench lab`` opens, and that Jupyter prints for whoever has to copy it."""

from __future__ import annotations

from urllib.parse import urlencode

from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.utils import url_path_join
from tornado import web


class TeachHandler(JupyterHandler):
    """Sends a browser on to JupyterLab with the teaching layout.

    Jupyter appends ``?token=…`` to the address it prints, which only works for one without a query of its own.
    """

    @web.authenticated
    def get(self) -> None:
        """Redirect; whoever came with a token has a cookie now, and needs it no more."""
        query = {name: self.get_query_argument(name) for name in self.request.query_arguments if name != "token"}
        target = url_path_join(self.base_url, "lab")
        self.redirect(f"{target}?{urlencode({**query, 'inference-workbench': 'teach'})}")
