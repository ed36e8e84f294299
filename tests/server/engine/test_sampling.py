"""Sampled tokens follow the exact distribution that the parameters define; seeds decide alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build
from serving import engine_for, run, submit

from inference_server.engine.request import Request
from inference_server.engine.sampler import filtered_probabilities, invert_cdf, sample, uniform
from inference_server.protocol import SamplingParams

VOCABULARY = 24
DRAWS = 100_000


def request(tokens: list[int] | None = None, prompt_len: int = 1, seed: int = 0, **sampling: Any) -> Request:
    return Request(
        handle=0,
        prompt_len=prompt_len,
        tokens=tokens or [0],
        sampling=SamplingParams(max_tokens=100, **sampling),
        seed=seed,
        arrival=0,
    )


def logits() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1.2, VOCABULARY)


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def expected_distribution(
    values: np.ndarray, tokens: list[int], prompt_len: int, sampling: dict[str, Any]
) -> np.ndarray:
    """The definition, token by token, in float64: an implementation that shares nothing with the sampler's."""
    values = values.copy()
    repetition = sampling.get("repetition_penalty", 1.0)
    for token in set(tokens):
        values[token] = values[token] / repetition if values[token] > 0 else values[token] * repetition
    for token in set(tokens[prompt_len:]):
        count = tokens[prompt_len:].count(token)
        values[token] -= sampling.get("frequency_penalty", 0.0) * count + sampling.get("presence_penalty", 0.0)
    probabilities = softmax(values / sampling.get("temperature", 1.0))
    order = sorted(range(VOCABULARY), key=lambda token: -probabilities[token])
    kept = set(order[: sampling.get("top_k") or VOCABULARY])
    total = sum(probabilities[token] for token in kept)
    if sampling.get("top_p", 1.0) < 1:
        mass, nucleus = 0.0, set()
        for token in order:
            if token in kept and mass < sampling["top_p"]:
                nucleus.add(token)
                mass += probabilities[token] / total
        kept = nucleus
    peak = max(probabilities[token] for token in kept)
    kept = {token for token in kept if probabilities[token] >= sampling.get("min_p", 0.0) * peak}
    result = np.zeros(VOCABULARY)
    for token in kept:
        result[token] = probabilities[token]
    return result / result.sum()


PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.6},
    "presence": {"presence_penalty": 0.9},
    "frequency": {"frequency_penalty": 0.7},
    "all": {
        "temperature": 1.3,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    },
}
TOKENS = [3, 3, 7, 11, 11, 11, 5]


@pytest.mark.parametrize("name", PARAMETERS)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    sampling = PARAMETERS[name]
    want = expected_distribution(logits(), TOKENS, 2, sampling)
    counts = np.zeros(VOCABULARY)
    batch = 2000
    rows = torch.tensor(logits(), dtype=torch.float32).expand(batch, -1)
    for start in range(0, DRAWS, batch):
        requests = [request(TOKENS, 2, seed=start + row, **sampling) for row in range(batch)]
        np.add.at(counts, sample(rows, requests).tokens, 1)
    assert counts[want == 0].sum() == 0, "a token was drawn that the filters exclude"
    allowed = want > 0
    chi_square = ((counts[allowed] - DRAWS * want[allowed]) ** 2 / (DRAWS * want[allowed])).sum()
    freedom = allowed.sum() - 1
    # Wilson-Hilferty: a chi-square variable is nearly a cubed normal one. 4 sigma: a false alarm in 30,000 runs; and
    # the seeds are fixed, so a run that passes always passes.
    limit = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit, f"chi-square {chi_square:.1f} with {freedom} degrees of freedom"


def test_the_filtered_distribution_is_exact_to_rounding() -> None:
    values = torch.tensor(logits())
    for sampling in ({"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7, "min_p": 0.05}):
        got = filtered_probabilities(values[None], [request(**sampling)])[0].numpy()
        want = expected_distribution(logits(), [], 0, sampling)
        assert np.abs(got - want).max() < 1e-12


def test_uniform_numbers_are_uniform_and_independent_of_each_other() -> None:
    numbers = np.array([uniform(seed, index) for seed in range(300) for index in range(100)]).reshape(300, 100)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram, _ = np.histogram(numbers, bins=50, range=(0, 1))
    expected = numbers.size / 50
    assert ((histogram - expected) ** 2 / expected).sum() < 49 + 4 * math.sqrt(2 * 49)
    for first, second in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.size)


def test_a_number_next_to_one_still_finds_a_possible_token() -> None:
    probabilities = torch.tensor([[0.0, 0.3, 0.7, 0.0]], dtype=torch.float64)
    for number, token in ((0.0, 1), (0.299, 1), (0.301, 2), (1 - 2**-53, 2)):
        assert invert_cdf(probabilities, torch.tensor([number], dtype=torch.float64)).item() == token


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert sample(torch.tensor(logits())[None], [request(temperature=0.0)]).tokens == [int(logits().argmax())]


def test_logprobs_are_the_models_own_and_alternatives_are_sorted() -> None:
    result = sample(torch.tensor(logits())[None], [request(temperature=0.0, logprobs=3, repetition_penalty=1.5)])
    reference = np.log(softmax(logits()))
    assert result.logprobs[0] == pytest.approx(reference[result.tokens[0]], abs=1e-5)
    assert result.top[0] is not None
    assert [token for token, _ in result.top[0]] == np.argsort(-reference)[:3].tolist()
    assert [value for _, value in result.top[0]] == pytest.approx(sorted(reference, reverse=True)[:3], abs=1e-5)


def test_a_seeded_request_draws_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    model = build("llama")
    sampling = {"max_tokens": 20, "temperature": 0.9, "seed": 11, "ignore_eos": True}
    alone = engine_for(model)
    submit(alone, 0, [5, 6, 7], **sampling)
    expected = run(alone)[0]
    crowd = engine_for(model, kv_bytes=1 << 17)
    for handle in range(1, 6):
        submit(crowd, handle, list(range(3, 3 + 9 * handle)), max_tokens=25, temperature=1.0, ignore_eos=True)
    submit(crowd, 99, [5, 6, 7], **sampling)
    for handle in range(10, 14):
        submit(crowd, handle, [9] * handle, max_tokens=30, temperature=1.2, ignore_eos=True)
    assert run(crowd, {4: {"kv_cache": False}, 9: {"kv_cache": True}})[99] == expected
    unseeded = engine_for(model)
    submit(unseeded, 0, [5, 6, 7], max_tokens=20, temperature=0.9, ignore_eos=True)
    assert run(unseeded)[0] != expected


def test_the_samples_of_one_request_differ_and_each_is_reproducible() -> None:
    model = build("llama")
    runs = []
    for _ in range(2):
        engine = engine_for(model)
        submit(engine, 0, [5, 6, 7, 8, 9, 10], samples=4, max_tokens=16, temperature=1.0, seed=3, ignore_eos=True)
        runs.append(run(engine))
    assert runs[0] == runs[1]
    assert len({tuple(output) for output in runs[0].values()}) == 4
