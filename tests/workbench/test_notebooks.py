"""Every notebook runs from top to bottom with the real default model, as a reader would run it.

Lessons start a server of their own, as they do for a reader who opens them first; the short ones on experiments find
the one that runs, as they do for whoever has JupyterLab open.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from servers_under_test import ROOT, InferenceServer, python_path, wait_for_socket

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem[0].isdigit()]
SHORT = [path for path in NOTEBOOKS if path not in LESSONS]


@pytest.fixture(scope="module")
def running_server(default_model, tmp_path_factory):
    server = InferenceServer(tmp_path_factory.mktemp("n"), default_model)
    server.start()
    wait_for_socket(server, 60)
    yield server
    server.stop()


@pytest.mark.model
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_top_to_bottom(path: Path, default_model, tmp_path, monkeypatch):
    run(path, tmp_path, monkeypatch, tmp_path / "r")


@pytest.mark.model
@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_a_short_notebook_runs_top_to_bottom(path: Path, running_server, tmp_path, monkeypatch):
    run(path, tmp_path, monkeypatch, running_server.runtime)


def run(path, tmp_path, monkeypatch, runtime):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("INFERENCE_WORKBENCH_RECORDING_FOLDER", str(tmp_path / "recordings"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([python_path(), os.environ.get("PYTHONPATH", "")]))
    for name in ("INFERENCE_WORKBENCH_URL", "INFERENCE_WORKBENCH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.write(notebook, tmp_path / path.name)  # for a person to look at


def test_there_are_notebooks():
    assert LESSONS
    assert SHORT
