"""Tokens chosen on the device are those that the sampler chooses on the host, with the same log-probabilities."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from serving import DEVICE

from inference_server.engine import sampler
from inference_server.engine.gpu.choosing import DeviceSampler, read
from inference_server.engine.request import Request
from inference_server.protocol import SamplingParams

SETTINGS: list[dict[str, float]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 2.0, "min_p": 0.1},
]


def request(row: int, output: int, **settings: float) -> Request:
    made = Request(
        handle=row,
        prompt_len=3,
        tokens=[1, 2, 3] + [4] * output,
        sampling=SamplingParams(max_tokens=100, **settings),  # type: ignore[arg-type]
        seed=1000 + row % 7,
        arrival=row,
    )
    made.pending = row % 2  # a token that the device has and the host does not counts
    return made


@pytest.mark.parametrize("only", [None, *range(len(SETTINGS))])
@pytest.mark.parametrize("logprobs", [None, 0, 4])
def test_tokens_and_logprobs_are_those_of_the_sampler(only: int | None, logprobs: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    chooser = DeviceSampler(DEVICE)
    drew_another = False
    for output in range(12):
        settings = SETTINGS if only is None else [SETTINGS[only]] * 3
        requests = [request(row, output, **each) for row, each in enumerate(settings)]
        if logprobs is not None:
            for row, each in enumerate(requests[1:], 1):
                each.sampling = SamplingParams(**{**_fields(each.sampling), "logprobs": logprobs + row % 2})
        logits = (3 * torch.randn(len(requests), 301, generator=generator)).to(DEVICE)
        tokens = logits.argmax(-1).to(torch.int32)
        likeliest = tokens.tolist()
        seats = torch.arange(len(requests), device=DEVICE, dtype=torch.int32).flip(0)
        last = torch.full((len(requests) + 2,), -1, device=DEVICE, dtype=torch.int32)
        last[seats.long()] = tokens
        chooser.choose(logits, requests, tokens, seats, last)
        alternatives = chooser.alternatives(logits, requests, tokens)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        got, expected = read(tokens.tolist(), alternatives), sampler.sample(logits, requests)
        assert got.tokens == expected.tokens
        assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-6)
        assert [each and [token for token, _ in each] for each in got.top] == [
            each and [token for token, _ in each] for each in expected.top
        ]
        assert last[seats.long()].tolist() == got.tokens, "the next step begins with what was drawn"
        assert last[-2:].tolist() == [-1, -1]
        drew_another |= got.tokens != likeliest
    assert drew_another == (only != 0), "a temperature that changes nothing proves nothing"


def test_penalties_and_constraints_wait_for_the_host() -> None:
    assert sampler.depends_on_its_output(request(0, 1, temperature=1.0, repetition_penalty=1.2))
    assert sampler.depends_on_its_output(request(0, 1, temperature=0.0, presence_penalty=0.5))
    assert not sampler.depends_on_its_output(request(0, 1, temperature=1.0, top_k=3))


def _fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in params.__struct_fields__}
