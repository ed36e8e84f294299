"""What the engine promises: switches lose nothing, refusals say why, sharing saves work, memory adds up."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from architectures import build
from serving import GREEDY, engine_for, generate, run, submit

from inference_server.engine.core import Engine, RequestError
from inference_server.features import FeatureError
from inference_server.models.errors import ModelError
from inference_server.protocol import FeaturesApplied, FeaturesSettled, Kind


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


@pytest.fixture
def engine(model: Any) -> Engine:
    return engine_for(model)


def prompt(length: int, seed: int = 0) -> list[int]:
    random = Random(seed)
    return [random.randrange(3, 256) for _ in range(length)]


def test_a_thousand_random_switches_under_load_change_no_output(model: Any) -> None:
    random = Random(5)
    engine = engine_for(model, kv_bytes=1 << 17, max_num_seqs=16)
    prompts = {handle: prompt(random.randrange(1, 30), handle) for handle in range(160)}
    expected = {handle: generate(model, tokens, 40) for handle, tokens in prompts.items()}
    waiting = list(prompts)
    outputs: dict[int, list[int]] = {handle: [] for handle in prompts}
    choices: dict[str, list[Any]] = {
        "kv_cache": [True, False],
        "kv_layout": ["paged", "contiguous"],
        "block_size": [4, 8, 16],
        "prefix_cache_read": [True, False],
        "prefix_cache_write": [True, False],
        "batching": ["continuous", "static", "single"],
        "scheduling_policy": ["fcfs", "priority", "shortest-first"],
        "chunked_prefill": [True, False],
        "preemption": ["recompute", "swap"],
        "max_num_seqs": [1, 3, 8, 16],
        "max_num_batched_tokens": [8, 64, 2048],
    }
    switched = refused = steps = 0
    while waiting or engine.has_work():
        if waiting and len(engine.requests) < 12:
            handle = waiting.pop()
            submit(engine, handle, prompts[handle], max_tokens=40, **GREEDY)
        if switched < 1000 or random.random() < 0.1:
            name = random.choice(list(choices))
            try:
                engine.set_features(switched, {name: random.choice(choices[name])})
                switched += 1
            except FeatureError:
                refused += 1
        report, _ = engine.step()
        steps += 1
        if report is not None:
            for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
                outputs[handle].append(token)
    engine.check_integrity()
    assert switched >= 1000
    assert refused < switched / 2
    assert outputs == expected


def test_switching_the_kv_cache_reports_what_it_cost_and_when_it_was_over(engine: Engine) -> None:
    engine.set_features(6, {"overlap": False})  # where steps are launched ahead, one more is under way
    before = engine.epoch
    submit(engine, 0, prompt(20), max_tokens=12, **GREEDY)
    for _ in range(4):
        engine.step()
    off = engine.set_features(7, {"kv_cache": False})
    applied = off[0]
    assert isinstance(applied, FeaturesApplied)
    assert (applied.correlation, applied.epoch, applied.changed) == (7, before + 1, ["kv_cache"])
    assert (applied.cost, applied.preempted, applied.recompute_tokens) == ("recompute", 1, 23)
    assert len(off) == 1, "it is not over before the interrupted request has said its next token"
    report, settled = engine.step()
    assert report is not None
    assert report.step.epoch == before + 1
    assert report.step.kind == [Kind.RECOMPUTE]
    assert report.step.scheduled == [24]
    assert [each.epoch for each in settled] == [before + 1]
    on = engine.set_features(8, {"kv_cache": True})
    assert isinstance(on[0], FeaturesApplied)
    assert on[0].recompute_tokens == 25
    report, settled = engine.step()
    assert report is not None
    assert report.step.scheduled == [25]
    assert [each.epoch for each in settled] == [before + 2]
    report, _ = engine.step()
    assert report is not None
    assert (report.step.scheduled, report.step.kind) == ([1], [Kind.DECODE])


def test_a_switch_with_nobody_running_is_over_at_once(engine: Engine) -> None:
    messages = engine.set_features(1, {"kv_cache": False})
    assert [type(message) for message in messages] == [FeaturesApplied, FeaturesSettled]


def test_a_refused_switch_names_the_conflict_and_changes_nothing(engine: Engine) -> None:
    before = engine.features
    with pytest.raises(FeatureError, match="kv_layout=contiguous and prefix_cache_read=true exclude each other"):
        engine.set_features(1, {"kv_layout": "contiguous", "max_num_seqs": 3})
    assert engine.features == before
    assert engine.epoch == 0
    engine.set_features(2, {"kv_layout": "contiguous", "prefix_cache_read": False})
    assert engine.epoch == 1
    with pytest.raises(FeatureError, match="There is no feature 'warp'"):
        engine.set_features(3, {"warp": 9})
    with pytest.raises(FeatureError, match="between 1 and 256, not 0"):
        engine.set_features(3, {"block_size": 0})


def test_a_shared_prefix_is_computed_once(model: Any) -> None:
    engine = engine_for(model, kv_bytes=1 << 22)
    shared = prompt(400)
    submit(engine, 0, [*shared, 5, 6], max_tokens=3, **GREEDY)
    cold = sum_scheduled(engine)
    submit(engine, 1, [*shared, 7, 8], max_tokens=3, **GREEDY)
    second = engine.requests[1]
    warm = sum_scheduled(engine)
    assert cold == 402 + 2
    assert second.cached_prompt_tokens == 400
    assert warm == 2 + 2
    submit(engine, 2, [*shared, 7, 8], max_tokens=3, overrides={"prefix_cache_read": False}, **GREEDY)
    assert sum_scheduled(engine) == 402 + 2


def test_samples_share_the_prompts_blocks_and_copy_on_write(model: Any) -> None:
    engine = engine_for(model)
    tokens = prompt(40)  # two and a half blocks
    submit(engine, 0, tokens, samples=4, max_tokens=4, temperature=1.0, seed=1, ignore_eos=True)
    engine.step()
    report, _ = engine.step()
    assert report is not None
    assert len(report.tokens.request) == 4
    # Three full-or-partial prompt blocks, shared, and three copies of the partial one.
    assert engine.cache.usage().used_blocks == 3 + 3
    assert report.step.scheduled == [1, 1, 1, 1]


def test_contiguous_reservation_wastes_what_paging_does_not(model: Any) -> None:
    used = {}
    for layout in ("paged", "contiguous"):
        engine = engine_for(model, features={"kv_layout": layout, "prefix_cache_read": False})
        submit(engine, 0, prompt(10), max_tokens=200, **GREEDY)
        engine.step()
        usage = engine.cache.usage()
        used[layout] = (usage.used_blocks, usage.filled_slots)
    assert used == {"paged": (1, 10), "contiguous": (14, 10)}


def test_static_batching_shows_the_seats_that_wait_for_the_longest(model: Any) -> None:
    engine = engine_for(model, features={"batching": "static", "max_num_seqs": 3})
    for handle, length in enumerate((2, 5, 9, 1)):
        submit(engine, handle, prompt(4, handle), max_tokens=length, **GREEDY)
    idle = []
    waiting = []
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        idle.append(report.step.idle_slots)
        waiting.append(report.step.waiting)
    assert idle == [0, 0, 1, 1, 1, 2, 2, 2, 2, 0]
    assert waiting == [1] * 9 + [0]


def test_priorities_decide_who_runs_first(model: Any) -> None:
    from inference_server.protocol import SamplingParams, Submit

    engine = engine_for(model, features={"scheduling_policy": "priority", "batching": "single"})
    for handle, priority in enumerate((5, 1, 3)):
        sampling = SamplingParams(max_tokens=1, temperature=0)
        engine.submit(Submit(requests=(handle,), prompt=(4, 5), sampling=sampling, arrival_ns=0, priority=priority))
    order = []
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        order += report.tokens.request
    assert order == [1, 2, 0]


def test_the_response_cache_answers_exact_repeats_without_computing(model: Any) -> None:
    engine = engine_for(model, features={"response_cache": True})
    sampling = {"max_tokens": 9, "temperature": 0.8, "seed": 4, "logprobs": 2, "ignore_eos": True}
    submit(engine, 0, prompt(6), samples=2, **sampling)
    first = run(engine)
    submit(engine, 2, prompt(6), samples=2, **sampling)
    report, _ = engine.step()
    assert report is not None
    assert report.step.path == "response cache"
    assert report.step.scheduled == []
    assert report.tokens.token_id == first[0] + first[1]
    assert report.tokens.finish == ([None] * 8 + ["length"]) * 2
    assert all(value is not None for value in report.tokens.logprob)
    assert not engine.has_work()
    submit(engine, 4, prompt(6), samples=2, **{**sampling, "seed": 5})
    report, _ = engine.step()
    assert report is not None
    assert report.step.scheduled == [6]


def test_chance_is_never_answered_from_the_response_cache(model: Any) -> None:
    engine = engine_for(model, features={"response_cache": True})
    for handle in (0, 1):
        submit(engine, handle, prompt(6), max_tokens=3, temperature=1.0, ignore_eos=True)
        report, _ = engine.step()
        assert report is not None
        assert report.step.path != "response cache"
        while engine.has_work():
            engine.step()


@pytest.mark.parametrize(
    ("tokens", "sampling", "message"),
    [
        ([], {"max_tokens": 5}, "prompt is empty"),
        ([4, 999], {"max_tokens": 5}, "outside of the vocabulary, 0 to 255"),
        ([4], {"max_tokens": 0}, "at least 1, not 0"),
        ([4] * 100, {"max_tokens": 500}, "100 tokens and max_tokens is 500: together more than the 512"),
        ([4], {"max_tokens": 5, "overrides": {"kv_cache": False}}, "cannot set the feature 'kv_cache' for itself"),
        ([4], {"max_tokens": 5, "overrides": {"prefix_cache_read": 3}}, "true or false, not 3"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_reason(
    engine: Engine, tokens: list[int], sampling: dict[str, Any], message: str
) -> None:
    submit(engine, 50, [5, 6], max_tokens=4, **GREEDY)
    with pytest.raises(RequestError, match=message):
        submit(engine, 0, tokens, **sampling)
    assert len(run(engine)[50]) == 4, "the others go on"


def test_too_little_kv_memory_is_refused_with_both_numbers(model: Any) -> None:
    with pytest.raises(ModelError, match=r"100 bytes of KV memory hold no block of 16 positions \(\d"):
        engine_for(model, kv_bytes=100)


def test_cancelling_frees_everything_at_once(engine: Engine) -> None:
    submit(engine, 0, prompt(30), samples=3, max_tokens=50, temperature=1.0)
    engine.step()
    engine.step()
    assert engine.cache.usage().used_blocks > 0
    for handle in (1, 0, 2):
        assert engine.cancel(handle) is not None
        engine.check_integrity()
    assert engine.cancel(0) is None
    assert engine.cache.usage().used_blocks == 0
    if engine.gpu is not None:  # a step was under way
        report, _ = engine.step()
        assert report is not None
        assert not report.tokens.token_id
    assert not engine.has_work()


def test_block_events_tell_the_whole_story_of_a_block(model: Any) -> None:
    from inference_server.protocol import KvOp

    engine = engine_for(model)
    tokens = prompt(20)
    submit(engine, 0, tokens, max_tokens=2, **GREEDY)
    events: list[tuple[int, int, int]] = []
    for handle in (0, 1):
        while engine.has_work():
            report, _ = engine.step()
            assert report is not None
            if report.kv_events is not None:
                events += zip(report.kv_events.op, report.kv_events.block, report.kv_events.request, strict=True)
        if handle == 0:
            submit(engine, 1, tokens, max_tokens=2, **GREEDY)
    assert [(KvOp(op).name, request) for op, _, request in events] == [
        ("RESET", -1), ("ALLOCATE", 0), ("ALLOCATE", 0), ("HASH", -1), ("FREE", 0), ("FREE", 0),
        ("SHARE", 1), ("ALLOCATE", 1), ("FREE", 1), ("FREE", 1),
    ]  # fmt: skip
    submit(engine, 2, tokens, max_tokens=30, **GREEDY)
    engine.step()
    engine.cancel(2)
    if engine.gpu is None:
        (told,) = engine.take_news()  # no step follows that could report it
    else:  # a step was under way
        report, _ = engine.step()
        told = report.kv_events
    assert [KvOp(op).name for op in told.op] == ["FREE", "FREE"]
    engine.set_features(0, {"block_size": 8})
    (told,) = engine.take_news()
    assert (told.op, told.block) == ([KvOp.RESET], [engine.cache.pool.num_blocks])


def sum_scheduled(engine: Engine) -> int:
    total = 0
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        total += sum(report.step.scheduled)
    return total
