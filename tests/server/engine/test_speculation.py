"""Speculation changes when tokens come, never which: for every proposer, number of tokens, and switch in the middle."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build
from serving import DEVICE, GREEDY, generate, run, submit, switch
from serving import engine_for as build_engine
from test_sampling import DRAWS, PARAMETERS, VOCABULARY, expected_distribution
from test_structured import SCHEMA

from inference_server.distill import head_training
from inference_server.engine import rejection
from inference_server.engine.core import Engine, RequestError
from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduled
from inference_server.engine.speculation.eagle_head import EagleHead, HeadShape
from inference_server.engine.speculation.ngram import NgramProposer
from inference_server.features import FeatureError, Features
from inference_server.models.errors import ModelError
from inference_server.protocol import EngineConfig, Kind, Notice, Origin, SamplingParams


def engine_for(model: Any, features: dict[str, Any] | None = None, **config: Any) -> Engine:
    """An engine that proposes as many tokens as it is told to."""
    return build_engine(model, features={"adaptive_speculation": False, **(features or {})}, **config)


@pytest.fixture(scope="module")
def model() -> Any:
    """A model that repeats itself, with exceptions: few words, of which the last one matters most."""
    model = build("llama")
    model.lm_head.weight.data[10:] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.4
        layer.mlp.down_proj.weight.data *= 0.4
    return model


def repetitive(length: int, seed: int) -> list[int]:
    """A prompt of few phrases, so that there is something to look up."""
    random = Random(seed)
    phrases = [[random.randrange(3, 256) for _ in range(random.randrange(2, 6))] for _ in range(3)]
    text: list[int] = []
    while len(text) < length:
        text += random.choice(phrases)
    return text[:length]


# -- which tokens ------------------------------------------------------------------------------------------------------


METHODS = ["ngram", "early_exit", "draft", *(["eagle"] if DEVICE.type == "cpu" else [])]


def head_for(model: Any, **changes: Any) -> EagleHead:
    """An EAGLE-style head as training begins: the model's last layer, without a view of the token to continue."""
    config = model.config
    shape = HeadShape(
        **{
            "hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 256,
            "draft_vocab": 48, "eps": config.rms_norm_eps, "rope_theta": 10_000.0, "feature_layers": (0, 1, 2),
            **changes,
        }
    )  # fmt: skip
    torch.manual_seed(3)
    proposed = torch.cat([torch.arange(10), torch.randperm(246)[:38] + 10]).sort().values
    return head_training.start(shape, proposed, model).eval().requires_grad_(requires_grad=False)


def engine_with_draft(model: Any, **config: Any) -> Engine:
    """An engine whose draft model is the model's first two layers: right often, and wrong often; and with a head."""
    draft = build("llama")
    draft.load_state_dict(model.state_dict())
    draft.model.layers = draft.model.layers[:2]
    draft.config.num_hidden_layers = 2
    return engine_for(model, draft=draft, head=head_for(model), **config)


@pytest.fixture(scope="module")
def expected(model: Any) -> dict[int, list[int]]:
    return {handle: generate(model, repetitive(5 + 3 * handle, handle), 40) for handle in range(7)}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_greedy_output_is_the_same_as_without(
    model: Any, expected: dict[int, list[int]], method: str, fast: bool
) -> None:
    engine = engine_with_draft(model, features={"speculation": method, "fast_path": fast})
    for k in (*range(1, 9), 16):
        engine.set_features(0, {"num_speculative_tokens": k})
        for handle in expected:
            submit(engine, handle, repetitive(5 + 3 * handle, handle), max_tokens=40, **GREEDY)
        assert run(engine) == expected, f"k = {k}"


def with_idle_last_layer(model: Any) -> Any:
    """A copy of the model whose last layer changes nothing."""
    idle = build("llama")
    idle.load_state_dict(model.state_dict())
    idle.model.layers[2].self_attn.o_proj.weight.data.zero_()
    idle.model.layers[2].mlp.down_proj.weight.data.zero_()
    return idle


@pytest.mark.parametrize("method", ["early_exit", "draft"])
def test_a_model_that_says_the_same_is_always_right(model: Any, method: str) -> None:
    # All but the last layer, which does nothing here; and as a draft model, the model itself.
    idle = with_idle_last_layer(model)
    features = {"speculation": method, "num_speculative_tokens": 4, "early_exit_layers": 2}
    engine = engine_for(idle, draft=idle, features=features)
    prompts = {handle: repetitive(9, handle) for handle in range(3)}
    for handle, prompt in prompts.items():
        submit(engine, handle, prompt, max_tokens=26, **GREEDY)
    steps = []
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        steps.append((report.drafted, report.accepted))
    assert steps == [([], [])] + [([4] * 3, [4] * 3)] * 5, "after the prompt, five tokens a step"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("precision", [{"kv_cache_dtype": "int8"}, {"weight_precision": "int3"}])
def test_the_first_layers_read_what_the_model_reads_after_a_switch_of_precision(
    model: Any, precision: dict[str, Any], fast: bool
) -> None:
    features = {"speculation": "early_exit", "early_exit_layers": 2, "fast_path": fast}
    prompts = {handle: repetitive(9 + 5 * handle, handle) for handle in range(8)}

    def answers(engine: Engine) -> dict[int, list[int]]:
        for handle, prompt in prompts.items():
            submit(engine, handle, prompt, max_tokens=26, **GREEDY)
        return run(engine)

    engine = engine_for(with_idle_last_layer(model), features=features)
    before = answers(engine)
    switch(engine, precision)
    accepted, drafted = [], []
    for handle, prompt in prompts.items():
        submit(engine, handle, prompt, max_tokens=26, **GREEDY)
    said: dict[int, list[int]] = {handle: [] for handle in prompts}
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        accepted += report.accepted
        drafted += report.drafted
        for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
            said[handle].append(token)
    assert said == answers(engine_for(with_idle_last_layer(model), features={"fast_path": fast, **precision}))
    # With other weights the layers before the last, which does nothing here, would propose other tokens. (In 8 bits
    # keys and values are rounded, and a pass of one position may round one otherwise than a pass of five.)
    assert sum(accepted) >= (1.0 if "weight_precision" in precision else 0.9) * sum(drafted)
    switch(engine, dict.fromkeys(precision, "master"))
    assert answers(engine) == before


def test_a_draft_model_switched_on_in_the_middle_catches_up_in_pieces(model: Any) -> None:
    prompt = repetitive(100, 1)
    engine = engine_for(model, draft=model, features={"num_speculative_tokens": 4})
    if engine.gpu is not None:  # a step that was launched before the switch would come first
        engine.set_features(0, {"overlap": False})
    submit(engine, 0, prompt, max_tokens=40, **GREEDY)
    for _ in range(5):
        engine.step()
    engine.set_features(0, {"speculation": "draft", "max_num_batched_tokens": 40})
    drafted, output = [], 5
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        drafted.append(sum(report.drafted))
        output += len(report.tokens.request)
        assert sum(report.accepted) == sum(report.drafted)
    assert drafted[:4] == [0, 0, 4, 4], "104 positions in pieces of 40"
    assert output == 40


def test_a_draft_model_with_another_vocabulary_is_refused(model: Any, tiny_model: Any) -> None:
    other = build("llama")
    other.resize_token_embeddings(300)
    with pytest.raises(ModelError, match="its vocabulary is another one"):
        engine_for(model, draft=other)


def test_a_draft_model_that_is_short_of_memory_proposes_for_some(model: Any) -> None:
    engine = engine_for(model, draft=model, kv_bytes=1 << 17, max_num_seqs=4, features={"speculation": "draft"})
    shared = repetitive(48, 5)
    # Shared in the model's cache, not in the draft model's: together more than that one holds.
    prompts = {handle: [*shared, 3 + handle] for handle in range(12)}
    for handle, prompt in prompts.items():
        submit(engine, handle, prompt, max_tokens=8, **GREEDY)
    assert run(engine) == {handle: generate(model, prompt, 8) for handle, prompt in prompts.items()}


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0, "frequency_penalty": 0.6, "presence_penalty": 0.4},
    {"temperature": 0.3, "seed": 1},
    {"temperature": 0.6, "top_k": 4, "seed": 2},
    {"temperature": 0.5, "top_p": 0.7, "min_p": 0.05, "seed": 3},
    {"temperature": 0.4, "repetition_penalty": 1.3, "seed": 4},
]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_seeded_output_is_the_same_as_without(model: Any, sampling: dict[str, Any]) -> None:
    engine, outputs = engine_with_draft(model, features={"num_speculative_tokens": 5}), []
    for method in ("off", *METHODS):
        engine.set_features(0, {"speculation": method})
        for handle in range(6):
            submit(engine, handle, repetitive(30, handle), max_tokens=30, ignore_eos=True, **sampling)
        outputs.append(run(engine))
    assert outputs[1:] == outputs[:1] * len(METHODS)


def test_it_ends_at_the_same_token_as_without(model: Any) -> None:
    # A stop token in the middle of what was accepted: nothing after it is said.
    prompt = repetitive(40, 3)
    free = generate(model, prompt, 60)
    stop = max(set(free), key=free.index)
    for features in ({}, {"speculation": "ngram", "num_speculative_tokens": 8}):
        engine = engine_for(model, features=features)
        submit(engine, 0, prompt, max_tokens=60, temperature=0, ignore_eos=True, stop_token_ids=(stop,))
        request = engine.requests[0]
        assert run(engine)[0] == free[: free.index(stop) + 1]
        assert request.finish_reason == "stop"


def test_no_more_than_max_tokens_are_said_or_computed(model: Any) -> None:
    prompt = [5, 6, 7, 8] * 10
    for count in range(1, 12):
        engine = engine_for(model, max_model_len=len(prompt) + count, features={"speculation": "ngram"})
        submit(engine, 0, prompt, max_tokens=count, **GREEDY)
        farthest = 0
        while engine.has_work():
            report, _ = engine.step()
            assert report is not None
            farthest = max(farthest, report.step.start[0] + report.step.scheduled[0])
        assert farthest <= len(prompt) + count - 1, "the last token's key is nobody's"


def test_structured_output_is_the_same_and_valid(tiny_model: Any) -> None:
    outputs = []
    for features in ({}, {"speculation": "ngram", "num_speculative_tokens": 6}):
        engine = Engine.load(EngineConfig(model=str(tiny_model), kv_bytes=1 << 20, features=features), lambda *_: None)
        for handle in range(4):
            sampling = {"temperature": 0.9 if handle % 2 else 0.0, "seed": handle}
            submit(engine, handle, [10 + handle, 11], max_tokens=200, json_schema=json.dumps(SCHEMA), **sampling)
        requests = list(engine.requests.values())
        outputs.append(run(engine))
        assert [request.finish_reason for request in requests] == ["stop"] * 4
    assert outputs[0] == outputs[1]


def test_a_hundred_prompts_with_switches_in_the_middle(model: Any) -> None:
    random = Random(8)
    engine = engine_with_draft(model, kv_bytes=1 << 17, max_num_seqs=16)
    prompts = {handle: repetitive(random.randrange(1, 40), handle) for handle in range(100)}
    expected = {handle: generate(model, tokens, 30) for handle, tokens in prompts.items()}
    choices: dict[str, list[Any]] = {
        "speculation": ["off", *METHODS],
        "early_exit_layers": [1, 2],
        "num_speculative_tokens": list(range(1, 9)),
        "fast_path": [True, False],
        "max_num_batched_tokens": [3, 8, 64, 2048],
        "preemption": ["recompute", "swap"],
        "block_size": [4, 16],
    }
    outputs: dict[int, list[int]] = {handle: [] for handle in prompts}
    waiting, accepted = list(prompts), 0
    while waiting or engine.has_work():
        if waiting and len(engine.requests) < 12:
            handle = waiting.pop()
            submit(engine, handle, prompts[handle], max_tokens=30, **GREEDY)
        if random.random() < 0.3:
            name = random.choice(list(choices))
            with contextlib.suppress(FeatureError):  # a cache too small for what runs
                engine.set_features(0, {name: random.choice(choices[name])})
        report, _ = engine.step()
        if report is not None:
            accepted += sum(report.accepted)
            for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
                outputs[handle].append(token)
    engine.check_integrity()
    assert outputs == expected
    assert accepted > 100, "there was something to roll back and something to keep"


@pytest.mark.parametrize("name", ["plain", "top-p"])
def test_what_is_said_follows_the_exact_distribution_whatever_was_proposed(name: str) -> None:
    """Two tokens at once, against the product of the model's own distributions, over the draws of many seeds."""
    sampling = PARAMETERS[name]
    generator = np.random.default_rng(5)
    first, second = generator.normal(0, 1.2, VOCABULARY), generator.normal(0, 1.2, (VOCABULARY, VOCABULARY))
    text, prompt_len = [3, 3, 7, 11, 11, 11, 5], 2
    p = expected_distribution(first, text, prompt_len, sampling)
    draft = int(p.argmax())
    want = expected_distribution(second[draft], [*text, draft], prompt_len, sampling)
    firsts, seconds = np.zeros(VOCABULARY), np.zeros(VOCABULARY)
    batch = 1000
    # Rows: after the text; after the text and what was proposed; in one case another proposal stands behind.
    drafts = [draft, 1] if name == "plain" else [draft]
    rows = torch.tensor(np.stack([first, second[draft], second[1]]), dtype=torch.float32)
    rows = rows[: 1 + len(drafts)].repeat(batch, 1)
    for start in range(0, DRAWS, batch):
        items = []
        for seed in range(start, start + batch):
            params = SamplingParams(max_tokens=100, **sampling)
            request = Request(0, prompt_len, list(text), params, seed, 0)
            item = Scheduled(request, len(text) - 1, 1 + len(drafts), Kind.VERIFY, sample=True)
            item.propose(drafts)
            items.append(item)
        for tokens in rejection.verify(rows, items).tokens:
            firsts[tokens[0]] += 1
            assert (len(tokens) > 1) == (tokens[0] == draft), "the first was accepted exactly where it was proposed"
            if len(tokens) > 1:
                seconds[tokens[1]] += 1
    for counts, distribution in ((firsts, p), (seconds, want)):
        assert counts[distribution == 0].sum() == 0
        allowed = distribution > 0
        expected = counts.sum() * distribution[allowed]
        chi_square = ((counts[allowed] - expected) ** 2 / expected).sum()
        freedom = allowed.sum() - 1
        limit = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
        assert chi_square < limit, f"chi-square {chi_square:.1f} with {freedom} degrees of freedom"


# -- what is proposed --------------------------------------------------------------------------------------------------


def lookup(tokens: list[int], most: int) -> list[int]:
    """The definition: the longest run of 4 to 2 tokens at the end that came before; what followed it there last."""
    for size in (4, 3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                period = len(tokens) - end
                return [tokens[end + place % period] for place in range(most)]
    return []


def test_prompt_lookup_finds_what_a_search_through_the_text_finds() -> None:
    random = Random(4)
    for seed in range(30):
        request = Request(seed, 5, repetitive(5, seed), SamplingParams(max_tokens=500), 0, 0)
        proposer = NgramProposer()
        for _ in range(60):
            most = random.randrange(1, 9)
            count = proposer.wish(request, most)
            item = Scheduled(request, len(request.tokens) - 1, 1 + count, Kind.VERIFY, sample=True)
            assert proposer.propose(None, [item], Features())[0] == lookup(request.tokens, most)  # type: ignore[arg-type]
            request.tokens += [random.randrange(4) for _ in range(random.randrange(1, 4))]


# -- what is told ------------------------------------------------------------------------------------------------------


def test_reports_say_what_was_proposed_and_what_became_of_it(model: Any) -> None:
    engine = engine_for(model, features={"speculation": "ngram", "num_speculative_tokens": 3})
    submit(engine, 0, repetitive(40, 3), max_tokens=60, **GREEDY)
    submit(engine, 1, repetitive(40, 3), max_tokens=60, overrides={"speculation": "off"}, **GREEDY)
    origins = []
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        step, tokens = report.step, report.tokens
        assert sum(step.drafted) == sum(report.drafted)
        told = tokens.origin or [Origin.PLAIN] * len(tokens.request)
        for place, handle in enumerate(step.request):
            own = [origin for request, origin in zip(tokens.request, told, strict=True) if request == handle]
            drafted, accepted = (step.drafted[place], step.accepted[place]) if step.drafted else (0, 0)
            assert (step.kind[place] == Kind.VERIFY) == (drafted > 0)
            assert step.scheduled[place] == 1 + drafted or step.kind[place] == Kind.PREFILL
            assert step.speculation == "ngram" or not drafted
            assert step.draft_ns > 0 or not drafted
            if drafted:
                assert handle == 0, "the other asked for none"
                last = Origin.BONUS if accepted == drafted else Origin.CORRECTED
                assert own == ([Origin.ACCEPTED] * accepted + [last])[: len(own)]
                origins += own
            else:
                assert own in ([Origin.PLAIN], [])
    assert {Origin.ACCEPTED, Origin.CORRECTED, Origin.BONUS} <= set(origins)
    assert len(engine.requests) == 0


def test_a_request_may_choose_for_itself(model: Any) -> None:
    prompt = repetitive(40, 3)
    engine = engine_for(model)
    submit(engine, 0, prompt, max_tokens=30, overrides={"speculation": "ngram", "num_speculative_tokens": 2}, **GREEDY)
    most = 0
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        most = max([most, *report.drafted])
    assert most == 2
    with pytest.raises(RequestError, match="'speculation' is one of off, ngram"):
        submit(engine, 1, prompt, max_tokens=3, overrides={"speculation": "guess"}, **GREEDY)
    with pytest.raises(RequestError, match="must be between 1 and 16, not 17"):
        submit(engine, 1, prompt, max_tokens=3, overrides={"num_speculative_tokens": 17}, **GREEDY)


def test_what_excludes_speculation_is_named(model: Any) -> None:
    engine = engine_for(model, features={"speculation": "ngram"})
    with pytest.raises(FeatureError, match="kv_cache=false and speculation=ngram exclude each other"):
        engine.set_features(0, {"kv_cache": False})
    engine.set_features(0, {"kv_cache": False, "speculation": "off"})
    with pytest.raises(FeatureError, match="exclude each other"):
        engine.set_features(0, {"speculation": "ngram"})
    submit(engine, 0, repetitive(30, 0), max_tokens=5, overrides={"speculation": "ngram"}, **GREEDY)
    assert run(engine)[0] == generate(model, repetitive(30, 0), 5), "runs plainly"


def test_proposals_leave_room_for_prompts_and_for_other_requests(model: Any) -> None:
    # Few positions a step: every decoding request gets its own first, and a prompt that waits at least half the rest.
    features = {"speculation": "ngram", "num_speculative_tokens": 16, "max_num_batched_tokens": 12}
    engine = engine_for(model, features=features)
    for handle in range(3):
        submit(engine, handle, [5, 6, 7, 8] * 6, max_tokens=80, **GREEDY)
    for _ in range(12):
        engine.step()
    submit(engine, 9, repetitive(60, 1), max_tokens=3, **GREEDY)
    shares = []
    for _ in range(6):
        report, _ = engine.step()
        assert report is not None
        by_request = dict(zip(report.step.request, report.step.scheduled, strict=True))
        assert sum(by_request.values()) <= 12
        assert all(by_request.get(handle, 0) for handle in range(3) if handle in engine.requests)
        shares.append(by_request.get(9, 0))
    assert min(itertools.takewhile(bool, shares)) >= 4


def test_switches_that_another_model_had_do_not_keep_this_one_from_starting(model: Any) -> None:
    engine = build_engine(
        model,
        features={"speculation": "eagle", "early_exit_layers": 20, "num_speculative_tokens": 7, "max_num_seqs": 5},
    )
    assert engine.features.speculation == "off"
    assert engine.features.early_exit_layers == 2
    assert (engine.features.num_speculative_tokens, engine.features.max_num_seqs) == (7, 5)
    told = [news.text for news in engine.take_news() if isinstance(news, Notice)]
    assert len(told) == 2
    assert "speculation=off, not eagle" in told[0]
    assert "between 1 and 2, not 20" in told[1]
