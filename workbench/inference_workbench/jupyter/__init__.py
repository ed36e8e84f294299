"""The Jupyter server extension: ``<base_url>/inference-workbench/…``, one inference server per Jupyter server.

``<base_url>/inference-workbench-servers`` lists all servers of this user, and has each of them below its instance.
``<base_url>/inference-workbench-teach`` opens JupyterLab with the teaching layout.

Enabled by ``jupyter-config/inference_workbench.json``. Importing it costs a Jupyter server almost nothing: the front
process is started by the first request that needs it, and neither torch nor the client is imported here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference_workbench.jupyter.front_process import FrontProcess

RECORDINGS = "recordings"
"""Folder of the server's recordings, in the Jupyter server's root: a double click there opens them."""
PROXY_NAME = "inference-workbench"
"""Path segment under the Jupyter server's base URL."""
SERVERS_NAME = "inference-workbench-servers"
"""Path segment of the list of servers, and above each of them."""
TEACH_NAME = "inference-workbench-teach"
"""Path segment that leads to the teaching layout."""


def add_handlers(web_app: Any, front: FrontProcess) -> None:
    """Serve ``front`` and the user's other servers from a Jupyter server's tornado application."""
    from jupyter_server.utils import url_path_join  # noqa: PLC0415 -- only there when Jupyter Server loads this
    from jupyter_server_proxy.handlers import AddSlashHandler  # noqa: PLC0415

    from inference_workbench.jupyter.handler import OtherServerProxyHandler, WorkbenchProxyHandler  # noqa: PLC0415
    from inference_workbench.jupyter.listing import ServersHandler  # noqa: PLC0415
    from inference_workbench.jupyter.teach import TeachHandler  # noqa: PLC0415
    from inference_workbench.jupyter.upstream import OwnServer  # noqa: PLC0415

    root, servers, teach = (
        url_path_join(web_app.settings["base_url"], name) for name in (PROXY_NAME, SERVERS_NAME, TEACH_NAME)
    )
    web_app.add_handlers(
        ".*",
        [
            (root + r"(/.*)", WorkbenchProxyHandler, {"upstream": OwnServer(front)}),
            (root, AddSlashHandler),
            (servers, ServersHandler, {"front": front}),
            (servers + r"/[0-9A-Za-z_-]+(/.*)", OtherServerProxyHandler),
            (teach, TeachHandler),
        ],
    )


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    return [{"module": "inference_workbench.jupyter"}]


def _load_jupyter_server_extension(server_app: Any) -> None:
    from inference_workbench.jupyter.front_process import FrontProcess  # noqa: PLC0415

    front = FrontProcess(log=server_app.log, recording_folder=_recording_folder(server_app))
    add_handlers(server_app.web_app, front)


def _recording_folder(server_app: Any) -> Path | None:
    """Return the folder whose files JupyterLab's file browser shows as ``recordings``; none if it has no such files."""
    root = getattr(server_app.contents_manager, "root_dir", None)
    folder = Path(root) / RECORDINGS if root else None
    return folder if folder is not None and os.access(folder if folder.exists() else folder.parent, os.W_OK) else None
