"""Fixtures of the notebook side's tests: a real server with the tiny model, and a workbench connected to it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from servers_under_test import connected, serving


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("w"), tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def module_workbench(server):
    with connected(server) as workbench:
        yield workbench


@pytest.fixture
def wb(module_workbench):
    """The module's workbench, with every switch at its default before and after."""
    defaults = {name: spec.default for name, spec in module_workbench.features.specs().items() if spec.available}
    module_workbench.features.update(defaults)
    yield module_workbench
    module_workbench.features.update(defaults)
