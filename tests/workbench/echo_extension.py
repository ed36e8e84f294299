"""The real Jupyter server extension in front of ``echo_front.py`` instead of the real front."""

import os
import sys
from pathlib import Path

from inference_workbench.jupyter import add_handlers
from inference_workbench.jupyter.front_process import FrontProcess


def _jupyter_server_extension_points():
    return [{"module": "echo_extension"}]


def _load_jupyter_server_extension(server_app):
    command = (sys.executable, str(Path(__file__).with_name("echo_front.py")))
    if os.environ.get("ECHO_FRONT_MISSING"):
        command = (sys.executable, "-m", "no_such_package_at_all")
    add_handlers(server_app.web_app, FrontProcess(log=server_app.log, command=command))
