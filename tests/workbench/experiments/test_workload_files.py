"""Workloads by name, from files and from other tools' options, and what is sent for them."""

import json

import msgspec
import pytest
from streaming_server import StreamingServer

import inference_workbench as iw
from inference_server.workloads.workload import ClosedLoop, Length, Poisson, Trace, Workload, WorkloadError
from inference_workbench.endpoint import Endpoint
from inference_workbench.experiments.target import Target
from inference_workbench.experiments.workloads import load_workload, plan


@pytest.fixture
def other_server():
    """One that knows nothing but OpenAI's API."""
    server = StreamingServer(lambda *_: iter(()))
    yield Target.probe(Endpoint(token="", url=server.url))
    server.close()


@pytest.fixture(scope="module")
def own(module_workbench):
    return Target.probe(module_workbench._server.endpoint)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_short_forms_spell_the_same_workload_as_long_ones():
    assert iw.workload("chat", concurrency=8) == iw.workload("chat", arrivals={"kind": "closed", "concurrency": 8})
    assert iw.workload("chat", rate=2.0).arrivals == Poisson(rate=2.0)
    assert iw.workload("code", prompt_tokens=100, output_tokens=(5, 9)).output_tokens == Length(low=5, high=9)
    with pytest.raises(WorkloadError, match=r"no workload 'chatter'. There are: chat"):
        iw.workload("chatter")
    with pytest.raises(WorkloadError, match="unknown field `lenght`"):
        iw.workload("chat", lenght=4)


@pytest.mark.parametrize(
    "workload",
    [
        iw.workload("bursty", rate=3.0),
        iw.workload("chat", arrivals={"kind": "trace", "times_s": [0.0, 0.5, 0.5, 2.0]}),
        iw.RequestSet(name="mine", requests=[]),
    ],
    ids=lambda workload: type(workload).__name__,
)
def test_a_saved_workload_is_the_same_when_it_is_read(workload, tmp_path):
    assert load_workload(iw.save_workload(workload, tmp_path / "w.json")) == workload
    assert iw.workload(tmp_path / "w.json") == workload


def test_a_trace_says_when_requests_come_and_how_many(own):
    workload = iw.workload("chat", arrivals={"kind": "trace", "times_s": [0.0, 0.5, 0.75]})
    assert isinstance(workload.arrivals, Trace)
    assert workload.count == 3
    assert [request.at_s for request in plan(workload, own).requests] == [0.0, 0.5, 0.75]
    assert len(plan(workload, own, requests=2).requests) == 2
    with pytest.raises(WorkloadError, match="ascend"):
        iw.workload("chat", arrivals={"kind": "trace", "times_s": [1.0, 0.5]})


def test_the_requests_are_those_that_the_server_sends_itself(wb, own):
    workload = iw.workload("summarize", output_tokens=2, requests=3, seed=11, concurrency=1)
    planned = plan(workload, own)
    assert planned.limit == 1
    wb.traffic.start(workload)
    while wb.traffic.status.state == "running":
        pass
    by_traffic = [event for event in wb.requests() if event.id.startswith("traffic-")][-3:]
    assert [event.prompt_tokens for event in by_traffic] == [len(request.ids) for request in planned.requests]
    assert all(200 <= len(request.ids) <= 600 for request in planned.requests)
    assert plan(workload, own) == planned


def test_a_server_that_cannot_tokenize_gets_words_of_about_the_length(other_server):
    load = plan(iw.workload("summarize", prompt_tokens=200, requests=3), other_server)
    assert load.estimated_lengths
    for request in load.requests:
        assert request.ids is None
        assert 120 <= len(request.messages[0]["content"].split()) <= 200
    assert not plan(iw.workload("chat", requests=3), other_server).estimated_lengths, "chat takes texts as they are"
    with pytest.raises(WorkloadError, match="has no end"):
        plan(iw.workload("chat"), other_server)


def test_files_of_other_tools_are_read_as_they_are(tmp_path, own):
    rows = [
        {"prompt": "Hello", "output_tokens": 5},
        {"prompt": "Hi", "output_tokens_count": 6},
        {"messages": [{"role": "user", "content": "Hey"}], "max_tokens": 7},
        {"conversations": [{"from": "human", "value": "Ho"}, {"from": "gpt", "value": "x" * 40}]},
        {"conversations": [{"from": "system", "value": "no human begins"}]},
    ]
    made = iw.from_jsonl(write(tmp_path / "data.jsonl", rows), concurrency=2)
    assert [request.max_tokens for request in made.requests] == [5, 6, 7, 10]
    assert [request.index for request in made.requests] == [0, 1, 2, 3]
    assert made.limit == 2
    assert made.requests[3].messages == [{"role": "user", "content": "Ho"}]
    as_ids = plan(made, own).requests
    assert all(request.ids and request.text is None and request.messages is None for request in as_ids)
    assert plan(made, own, as_text=True).requests == made.requests
    listed = tmp_path / "sharegpt.json"
    listed.write_text(json.dumps(rows))
    assert iw.workload(listed, concurrency=2).requests == made.requests


def test_a_trace_file_brings_its_arrivals_and_a_rate_replaces_them(tmp_path):
    rows = [{"timestamp": 3000, "input_length": 20, "output_length": 4}, {"timestamp": 1000, "input_length": 10}]
    path = write(tmp_path / "mooncake.jsonl", rows)
    made = iw.from_jsonl(path)
    assert [request.at_s for request in made.requests] == [0.0, 2.0]
    assert [len(request.ids) for request in made.requests] == [10, 20]
    at_rate = iw.from_jsonl(path, rate=5.0, seed=2)
    gap = Workload(arrivals=Poisson(rate=5.0), seed=2).gap_s(1)
    assert [request.at_s for request in at_rate.requests] == [0.0, pytest.approx(gap)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}', r"entry 2: Expected"),
        ('{"question": "a"}', "entry 1: it has none of 'prompt'"),
        ('{"prompt": "a"', "line 1 is not valid JSON"),
        ("[1]", "entry 1: it is no JSON object"),
        ("", "has no request"),
    ],
)
def test_a_file_that_cannot_be_used_names_the_place(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(WorkloadError, match=message):
        iw.workload(path)


def test_a_recordings_requests_come_again(wb, tmp_path, own):
    with wb.record(tmp_path / "r.iwrec"):
        first = wb.generate("one two three", max_tokens=5, ignore_eos=True, stream=False)
        wb.generate("four", max_tokens=6, ignore_eos=True, stream=False, temperature=0.8, seed=5)
    made = iw.workload(tmp_path / "r.iwrec")
    assert [request.max_tokens for request in made.requests] == [5, 6]
    assert [request.seed for request in made.requests] == [None, 5]
    assert made.requests[0].at_s == 0 < made.requests[1].at_s
    assert len(made.requests[0].ids) == first.request.prompt_tokens
    faster = iw.from_recording(tmp_path / "r.iwrec", speed=2.0)
    assert faster.requests[1].at_s == pytest.approx(made.requests[1].at_s / 2)


VLLM = (
    "--dataset-name random --random-input-len 100 --random-output-len 20 --random-range-ratio 0.2 --num-prompts 7 "
    "--request-rate 4 --burstiness 0.5 --seed 3 --ignore-eos --model x --base-url http://localhost:8000"
)


def test_vllm_benchs_options_mean_the_same_here_and_back():
    made = iw.from_vllm_bench(VLLM)
    assert made.arrivals == Poisson(rate=4.0, burstiness=0.5)
    assert (made.prompt_tokens, made.output_tokens) == (Length(low=80, high=120), Length(low=16, high=24))
    assert (made.requests, made.seed, made.ignore_eos, made.source) == (7, 3, True, "random")
    back = iw.from_vllm_bench(iw.to_vllm_bench(made))
    assert back == made
    closed = iw.from_vllm_bench("--random-input-len 10 --max-concurrency 5 --num-prompts 9")
    assert closed.arrivals == ClosedLoop(concurrency=5)
    with pytest.raises(WorkloadError, match="no counterpart here: --lora-modules"):
        iw.from_vllm_bench("--random-input-len 10 --lora-modules a")
    with pytest.raises(WorkloadError, match="choose one"):
        iw.from_vllm_bench("--request-rate 3 --max-concurrency 4")
    with pytest.raises(WorkloadError, match="--dataset-name random is made here"):
        iw.from_vllm_bench("--dataset-name sharegpt")
    with pytest.raises(WorkloadError, match="source='random'"):
        iw.to_vllm_bench(iw.workload("chat"))


def test_guidellms_options_mean_the_same_here():
    made = iw.from_guidellm(
        "--target http://localhost:8000 --profile concurrent --rate 4 --max-requests 20 --random-seed 9 "
        "--data prompt_tokens=64,prompt_tokens_min=32,prompt_tokens_max=96,output_tokens=16"
    )
    assert made.arrivals == ClosedLoop(concurrency=4)
    assert (made.prompt_tokens, made.output_tokens) == (Length(low=32, high=96), Length(low=16, high=16))
    assert (made.requests, made.seed, made.ignore_eos) == (20, 9, True)
    assert iw.from_guidellm(["--rate-type", "poisson", "--rate", "2.5"]).arrivals == Poisson(rate=2.5)
    new = iw.from_guidellm(
        "--backend kind=openai_http,target=http://localhost:8000 --profile kind=concurrent,streams=4 "
        "--constraint kind=max_requests,count=20 --seed kind=static,value=9 "
        "--data kind=synthetic_text,prompt_tokens=64,prompt_tokens_min=32,prompt_tokens_max=96,output_tokens=16"
    )
    assert new == made, "guidellm 0.8 spells the same otherwise"
    with pytest.raises(WorkloadError, match=r"capacity"):
        iw.from_guidellm("--profile sweep")
    with pytest.raises(WorkloadError, match="not by max_duration"):
        iw.from_guidellm("--constraint kind=max_duration,seconds=3")


def test_workloads_are_plain_data():
    for workload in (iw.workload("chat"), iw.from_vllm_bench(VLLM)):
        assert msgspec.convert(msgspec.to_builtins(workload), Workload) == workload
