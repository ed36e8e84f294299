"""Tiny models gain nothing from several threads, and pools of spinning threads fight over few cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    if "default_model" not in request.module.__name__:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
