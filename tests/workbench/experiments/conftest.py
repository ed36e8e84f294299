"""One server for all tests of experiments: every run begins by putting it into a known state anyway."""

import pytest
from servers_under_test import connected, serving


@pytest.fixture(scope="session")
def server(tiny_model, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("x"), tiny_model) as running:
        yield running


@pytest.fixture(scope="session")
def module_workbench(server):
    with connected(server) as workbench:
        yield workbench


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder, and the user's data below it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path
