"""The parts of a latency add up to it, and each nanosecond goes where the definitions say it goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_events import step_event

from inference_server.protocol import PARTS, Kind, StepEvent
from inference_server.recording.attribution import Attribution

LEVELS = ("host", "forward", "sampling")


@dataclass
class Timeline:
    """What the engine and the front did, one nanosecond after another: the oracle looks up each of them."""

    what: list[tuple[str, StepEvent | None]] = field(default_factory=list)
    steps: list[StepEvent] = field(default_factory=list)

    def idle(self, length: int) -> None:
        self.what += [("nothing", None)] * length

    def step(self, requests: list[int], kinds: list[Kind], counts: list[int], phases: list[int]) -> None:
        before, schedule, prepare, forward, sample, update = phases
        begin = len(self.what) + before
        event = step_event(
            len(self.steps) + 1,
            requests,
            begin,
            before_ns=before,
            schedule_ns=schedule,
            prepare_ns=prepare,
            forward_ns=forward,
            sample_ns=sample,
            update_ns=update,
            end_ns=begin + schedule + prepare + forward + sample + update,
            kind=[int(kind) for kind in kinds],
            scheduled=counts,
            start=[0] * len(requests),
        )
        for name, length in zip(("host", "host", "host", "forward", "sampling", "host"), phases, strict=True):
            self.what += [(name, event)] * length
        self.steps.append(event)


def part(parts: list[int], name: str) -> int:
    return parts[PARTS.index(name)]


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    timeline = Timeline()
    length = st.integers(0, 12)
    for _ in range(draw(st.integers(1, 8))):
        timeline.idle(draw(length))
        requests = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True))
        kinds = [draw(st.sampled_from([Kind.DECODE, Kind.PREFILL, Kind.RECOMPUTE])) for _ in requests]
        counts = [1 if kind == Kind.DECODE else draw(st.integers(1, 9)) for kind in kinds]
        timeline.step(requests, kinds, counts, [draw(length) for _ in range(6)])
    return timeline


@settings(max_examples=400, deadline=None)
@given(timelines(), st.data())
def test_every_nanosecond_of_a_later_token_goes_where_looking_it_up_says(
    timeline: Timeline, data: st.DataObject
) -> None:
    attribution = Attribution()
    for step in timeline.steps:
        attribution.add_step(step)
    own = data.draw(st.sampled_from(timeline.steps))
    request = data.draw(st.sampled_from(own.request))
    low = data.draw(st.integers(0, own.end_ns + 10))
    received = own.end_ns + data.draw(st.integers(0, 9))
    turns, moment = [], received - 20
    for _ in range(data.draw(st.integers(0, 4))):
        begin = moment + data.draw(st.integers(0, 12))
        moment = begin + data.draw(st.integers(0, 12))
        turns.append((begin, moment))
        attribution.add_front_turn(begin, moment)
    sent = max(received, low) + data.draw(st.integers(0, 20))
    parts = attribution.split(
        step=own.step, request=request, leader=request, low_ns=low, sent_ns=sent, submitted_ns=None, started_ns=None,
        received_ns=received,
    )  # fmt: skip
    assert sum(parts) == sent - low
    assert min(parts) >= 0

    expected = dict.fromkeys((*LEVELS, "stall", "transport", "detokenize", "send", "unexplained"), 0)
    for moment in range(low, sent):
        if moment >= own.end_ns and any(begin <= moment < end for begin, end in turns):
            expected["detokenize"] += 1
        elif moment >= max(received, own.end_ns):
            expected["send"] += 1
        elif moment >= own.end_ns:
            expected["transport"] += 1
        else:
            phase, step = timeline.what[moment]
            if step is None:
                expected["unexplained"] += 1
            elif request in step.request:
                expected[phase] += 1
            else:
                expected["stall"] += 1
    forward = sum(
        part(parts, name) for name in ("prefill", "recompute", "others_prefill", "forward", "draft", "attention")
    )
    assert forward == expected.pop("forward")
    assert {name: part(parts, name) for name in expected} == expected


def _with_steps(*events: StepEvent) -> Attribution:
    attribution = Attribution()
    for event in events:
        attribution.add_step(event)
    return attribution


def _split(attribution: Attribution, step: StepEvent, request: int, **changes: object) -> dict[str, int]:
    given_: dict = {
        "step": step.step, "request": request, "leader": request, "low_ns": step.begin_ns, "sent_ns": step.end_ns,
        "submitted_ns": None, "started_ns": None, "received_ns": step.end_ns,
    }  # fmt: skip
    parts = attribution.split(**(given_ | changes))
    return {name: value for name, value in zip(PARTS, parts, strict=True) if value}


def test_a_first_token_waits_for_its_text_to_be_tokenized_then_in_the_queue_then_for_its_prompt() -> None:
    step = step_event(1, [1], 1000, kind=[0], scheduled=[5])
    found = _split(_with_steps(step), step, 1, low_ns=100, submitted_ns=300, started_ns=1000, sent_ns=step.end_ns + 50)
    assert found == {
        "tokenize": 200, "queue": 700, "prefill": 500, "sampling": 30, "host": 70, "send": 50,
    }  # fmt: skip


def test_a_prompt_beside_decodes_costs_them_what_goes_beyond_their_own_usual_step() -> None:
    alone = [
        step_event(number, [1, 2], 1000 * number, forward_ns=100, end_ns=1000 * number + 200) for number in (1, 2, 3)
    ]
    mixed = step_event(4, [1, 2, 3], 5000, forward_ns=400, end_ns=5500, kind=[1, 1, 0], scheduled=[1, 1, 8])
    attribution = _with_steps(*alone, mixed)
    decoding, prompt = _split(attribution, mixed, 1), _split(attribution, mixed, 3)
    assert decoding["forward"] == 100
    assert decoding["others_prefill"] == 300
    assert prompt["forward"] == 100
    assert prompt["prefill"] == 300


def test_before_any_decode_only_step_was_seen_a_mixed_step_is_divided_by_positions() -> None:
    mixed = step_event(1, [1, 2], 1000, forward_ns=500, kind=[1, 0], scheduled=[1, 9])
    found = _split(_with_steps(mixed), mixed, 1)
    assert found["forward"] == 50
    assert found["others_prefill"] == 450


def test_two_prompts_in_a_step_share_it_by_their_positions() -> None:
    step = step_event(1, [1, 2], 1000, forward_ns=500, kind=[0, 2], scheduled=[1, 4])
    attribution = _with_steps(step)
    assert _split(attribution, step, 1)["prefill"] == 100
    assert _split(attribution, step, 1)["others_prefill"] == 400
    assert _split(attribution, step, 2)["recompute"] == 400


def test_the_cost_of_decoding_is_interpolated_between_the_batch_sizes_that_are_known() -> None:
    two = step_event(1, [1, 2], 1000, forward_ns=100, end_ns=1700)
    six = step_event(2, [1, 2, 3, 4, 5, 6], 2000, forward_ns=300, end_ns=2700)
    mixed = step_event(3, [1, 2, 3, 9], 3000, forward_ns=500, kind=[1, 1, 1, 0], scheduled=[1, 1, 1, 5])
    assert _split(_with_steps(two, six, mixed), mixed, 1)["forward"] == 150


def test_what_was_learned_under_other_switches_does_not_count() -> None:
    before = step_event(1, [1], 1000, forward_ns=490)
    mixed = step_event(2, [1, 2], 2000, forward_ns=500, kind=[1, 0], scheduled=[1, 9], epoch=1)
    assert _split(_with_steps(before, mixed), mixed, 1)["forward"] == 50


def test_a_preempted_request_stalls_while_others_run_and_recomputes_when_it_is_back() -> None:
    first = step_event(1, [1, 2], 1000)
    without = [step_event(number, [2], 1000 * number) for number in (2, 3)]
    back = step_event(4, [1, 2], 4000, forward_ns=900, end_ns=5000, kind=[2, 1], scheduled=[9, 1])
    found = _split(_with_steps(first, *without, back), back, 1, low_ns=1600)
    assert found["stall"] == 1200
    assert found["recompute"] == 400, "what goes beyond the usual step of one decode"
    assert found["unexplained"] == 3 * 400, "gaps between steps that nobody measured"


def test_while_the_engine_sleeps_its_requests_stall() -> None:
    before, after = step_event(1, [1], 1000), step_event(2, [1], 9000)
    attribution = _with_steps(before, after)
    attribution.add_pause(1700, 8900)
    found = _split(attribution, after, 1, low_ns=1650)
    assert found["stall"] == 7200
    assert found["unexplained"] == 50 + 100


def test_samples_of_one_prompt_count_the_steps_that_computed_it_as_their_own() -> None:
    prompt = step_event(1, [1], 1000, kind=[0], scheduled=[8])
    forked = step_event(2, [1, 2], 2000)
    found = _split(_with_steps(prompt, forked), forked, 2, leader=1, low_ns=900, submitted_ns=950, started_ns=1000)
    assert found["prefill"] == 500
    assert "stall" not in found


def test_on_a_gpu_that_works_ahead_the_hosts_work_counts_only_where_it_sticks_out() -> None:
    step = step_event(
        1, [1], 1000, schedule_ns=100, prepare_ns=100, forward_ns=300, sample_ns=50, update_ns=50, device_ns=540
    )
    found = _split(_with_steps(step), step, 1)
    assert found["forward"] == 540
    assert found["host"] + found["sampling"] == 60


def test_attention_is_told_apart_where_the_device_can() -> None:
    step = step_event(1, [1], 1000, attention_ns=200, draft_ns=50)
    found = _split(_with_steps(step), step, 1)
    assert found["draft"] == 50
    assert found["attention"] == 200
    assert found["forward"] == 250


def test_a_token_sent_together_with_the_one_before_it_has_no_latency_and_no_parts() -> None:
    step = step_event(1, [1], 1000)
    assert _split(_with_steps(step), step, 1, low_ns=2000, sent_ns=2000) == {}


def test_a_token_whose_step_is_not_known_is_unexplained_but_for_its_way_out() -> None:
    step = step_event(1, [1], 1000)
    attribution = Attribution()
    attribution.add_front_turn(step.end_ns - 100, step.end_ns - 90)
    found = _split(attribution, step, 1, received_ns=step.end_ns - 100)
    assert found == {"unexplained": 500, "detokenize": 10, "send": 90}


def test_memory_stays_bounded_over_many_steps() -> None:
    attribution = Attribution()
    for number in range(1, 40_000):
        attribution.add_step(step_event(number, [1], 1000 * number))
    assert len(attribution._steps) == len(attribution._by_number) == 16_384
    last = step_event(39_999, [1], 39_999_000)
    assert _split(attribution, last, 1)["forward"] == 500
