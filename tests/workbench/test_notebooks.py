"""Every notebook runs from top to bottom with the real default model, as a reader would run it."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from servers_under_test import ROOT, python_path

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_top_to_bottom(path: Path, default_model, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "r"))
    monkeypatch.setenv("INFERENCE_WORKBENCH_RECORDING_FOLDER", str(tmp_path / "recordings"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([python_path(), os.environ.get("PYTHONPATH", "")]))
    for name in ("INFERENCE_WORKBENCH_URL", "INFERENCE_WORKBENCH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.write(notebook, tmp_path / path.name)  # for a person to look at


def test_there_are_notebooks():
    assert NOTEBOOKS
