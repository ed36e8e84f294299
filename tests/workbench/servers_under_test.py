"""Starts real servers for the tests of this folder, each in a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

import inference_workbench as iw
from processes import end, free_port

ROOT = Path(__file__).parents[2]
TOKEN = "jupyter-token-of-the-test"


def python_path():
    return os.pathsep.join([str(ROOT / "server"), str(ROOT / "workbench"), str(Path(__file__).parent)])


class JupyterServer:
    """A real Jupyter server in a process of its own."""

    def __init__(self, process, url, log):
        self.process = process
        self.url = url
        self.log = log

    @property
    def workbench(self):
        return f"{self.url}inference-workbench/"

    @property
    def headers(self):
        return {"Authorization": f"Bearer {TOKEN}"}


@contextlib.contextmanager
def running_jupyter(folder, extension, base_url="/", **environment):
    port = free_port()
    log = folder / "jupyter.log"
    runtime = folder / "r"
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.base_url={base_url}"]
    command += [f"--ServerApp.root_dir={folder}"]
    enabled = folder / "config" / "jupyter_server_config.d" / "workbench.json"
    enabled.parent.mkdir(parents=True)
    enabled.write_text(json.dumps({"ServerApp": {"jpserver_extensions": {extension: True}}}))
    env = {**os.environ, "PYTHONPATH": python_path(), "JUPYTER_RUNTIME_DIR": str(runtime), **environment}
    env["JUPYTER_CONFIG_DIR"] = str(folder / "config")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env, cwd=folder)
    url = f"http://127.0.0.1:{port}{base_url}"
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}api", timeout=5).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield JupyterServer(process, url, log)
    finally:
        end(process, 10)


class InferenceServer:
    """``inference-workbench serve`` on a Unix socket, or on a port if one is given, with the tiny model."""

    def __init__(self, folder, model, *, port=None, runtime=None, options=()):
        self.uds = None if port else folder / "s"
        self.port = port
        self.log = folder / "server.log"
        self.token = "token-of-the-test"
        self.runtime = runtime or folder / "runtime"
        self._model = model
        self._options = options
        self._process = None

    @property
    def pid(self):
        return self._process.pid

    def http(self):
        if self.port:
            return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False)
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self.uds)), base_url="http://localhost")

    def start(self):
        where = ["--port", str(self.port)] if self.port else ["--uds", str(self.uds)]
        command = [sys.executable, "-m", "inference_server.cli", "serve", *where]
        command += ["--model", str(self._model), *self._options]
        env = {**os.environ, "PYTHONPATH": python_path(), "INFERENCE_WORKBENCH_TOKEN": self.token}
        env["JUPYTER_RUNTIME_DIR"] = str(self.runtime)
        env["INFERENCE_WORKBENCH_RECORDING_FOLDER"] = str(self.log.parent / "recordings")
        with self.log.open("a") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=env)

    def kill(self):
        self._process.kill()
        self._process.wait()

    def stop(self):
        self._process.terminate()
        self._process.wait(20)


def wait_for_socket(server, seconds):
    deadline = time.monotonic() + seconds
    while True:
        try:
            with server.http() as client:
                client.get("/")
                return
        except httpx.TransportError:
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.05)


@contextlib.contextmanager
def serving(folder, model):
    """An inference server until the block ends."""
    server = InferenceServer(folder, model)
    server.start()
    yield server
    server.stop()


@contextlib.contextmanager
def connected(server):
    """A workbench connected to a server, once that answers."""
    wait_for_socket(server, 60)
    with iw.connect(uds=server.uds, token=server.token, timeout=120) as workbench:
        yield workbench
