"""Fixtures of the notebook side's tests: a real server with the tiny model, and a workbench connected to it."""

import sys
from pathlib import Path

import pytest

import inference_workbench as iw

sys.path.insert(0, str(Path(__file__).parent))

from servers_under_test import InferenceServer, wait_for_socket


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    server = InferenceServer(tmp_path_factory.mktemp("w"), tiny_model)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def module_workbench(server):
    wait_for_socket(server, 60)
    with iw.connect(uds=server.uds, token=server.token, timeout=120) as workbench:
        yield workbench


@pytest.fixture
def wb(module_workbench):
    """The module's workbench, with every switch at its default before and after."""
    defaults = {name: spec.default for name, spec in module_workbench.features.specs().items() if spec.available}
    module_workbench.features.update(defaults)
    yield module_workbench
    module_workbench.features.update(defaults)
