"""One server for all tests of experiments: every run begins by putting it into a known state anyway."""

import pytest
from servers_under_test import InferenceServer, wait_for_socket

import inference_workbench as iw


@pytest.fixture(scope="session")
def server(tiny_model, tmp_path_factory):
    server = InferenceServer(tmp_path_factory.mktemp("x"), tiny_model)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def module_workbench(server):
    wait_for_socket(server, 60)
    with iw.connect(uds=server.uds, token=server.token, timeout=120) as workbench:
        yield workbench


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder, and the user's data below it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path
