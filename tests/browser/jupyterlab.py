"""Starts a real JupyterLab with the built extension, its own folders and a free port. Owns its process and files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx

from processes import end, free_port

ROOT = Path(__file__).parents[2]
TOKEN = "token-of-the-browser-test"
_PREFIX_EXTENSION = Path(sys.prefix) / "share/jupyter/labextensions/inference-workbench"


@dataclass(frozen=True)
class JupyterLab:
    """A running JupyterLab."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    log: Path

    @property
    def workbench(self) -> str:
        """URL of the inference server behind the proxy."""
        return f"{self.url}inference-workbench/"

    @property
    def servers(self) -> str:
        """URL of the list of inference servers, and above each of them."""
        return f"{self.url}inference-workbench-servers"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {TOKEN}"}

    def page(self, path: str = "lab", **parameters: str) -> str:
        """Address of a page, logged in."""
        query = "&".join([f"token={TOKEN}", *(f"{name}={value}" for name, value in parameters.items())])
        return f"{self.url}{path}?{query}"

    def engine_pid(self) -> int:
        """Process id of the engine, asked of the server itself."""
        answer = httpx.get(f"{self.workbench}info", headers=self.headers, timeout=30)
        answer.raise_for_status()
        return int(answer.json()["engine"]["pid"])


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _environment(folder: Path) -> dict[str, str]:
    """Folders of its own, and the checkout's code and extension unless the project is installed."""
    env = {**os.environ, "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "JUPYTER_DATA_DIR": str(folder / "data")}
    env |= {"JUPYTER_CONFIG_DIR": str(folder / "config"), "IPYTHONDIR": str(folder / "ipython")}
    env |= {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    code = find_spec("inference_workbench")
    if code and code.origin and ROOT / "workbench" not in Path(code.origin).parents and _PREFIX_EXTENSION.exists():
        return env
    built = ROOT / "workbench/inference_workbench/labextension"
    assert (built / "package.json").exists(), "The extension is not built: cd extension && jlpm build"
    extensions = folder / "data" / "labextensions"
    extensions.mkdir(parents=True)
    (extensions / "inference-workbench").symlink_to(built)
    shutil.copytree(ROOT / "jupyter-config", folder / "config" / "jupyter_server_config.d")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "server"), str(ROOT / "workbench")])
    return env


@contextlib.contextmanager
def running_server(lab: JupyterLab, folder: Path, code: Path = ROOT / "server") -> Iterator[subprocess.Popen[bytes]]:
    """Run one more inference server, started on a command line where JupyterLab finds it, until the block ends.

    ``code`` is the folder that its package lies in.
    """
    env = {**os.environ, "JUPYTER_RUNTIME_DIR": str(lab.folder / "runtime")}
    env |= {"INFERENCE_WORKBENCH_RECORDING_FOLDER": str(folder), "PYTHONPATH": str(code)}
    command = [sys.executable, "-m", "inference_server.cli", "serve", "--port", str(free_port())]
    command += ["--kv-memory", "256M", "--packed-memory", "64M"]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env, cwd=folder)
    try:
        yield process
    finally:
        end(process, 20)


@contextlib.contextmanager
def running_jupyterlab(folder: Path, base_url: str = "/") -> Iterator[JupyterLab]:
    """Run JupyterLab on a copy of the lessons until the block ends."""
    port = free_port()
    root = folder / "root"
    lessons = ROOT / "notebooks"
    if lessons.exists():
        shutil.copytree(lessons, root / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    else:
        root.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    _write_json(folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings", quiet)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.base_url={base_url}"]
    command += [f"--ServerApp.root_dir={root}", "--LabApp.news_url=", "--ServerApp.log_level=INFO"]
    log = folder / "jupyterlab.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(folder), cwd=folder)
    lab = JupyterLab(process, f"http://127.0.0.1:{port}{base_url}", folder, log)
    try:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{lab.url}api", timeout=5).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield lab
    finally:
        end(process, 15)
