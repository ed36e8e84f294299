"""Events as a server logs them, made for tests of the journal and the file."""

from __future__ import annotations

import time

from inference_server.protocol import (
    PARTS,
    Capacity,
    DeviceEvent,
    EngineEvent,
    Event,
    FeaturesEvent,
    KvEvents,
    KvUsage,
    ModelInfo,
    RequestEvent,
    SamplingParams,
    StepEvent,
    TelemetryCostEvent,
    TokensEvent,
)
from inference_server.recording.format import Clock, Manifest, Served
from inference_server.recording.journal import Record, RequestDetail

BEGIN = 1_000_000_000


def manifest(**changes: object) -> Manifest:
    fields: dict = {
        "id": "a-recording",
        "name": "A recording",
        "note": "",
        "created": "2026-11-24T12:00:00+00:00",
        "clock": Clock(monotonic_ns=time.monotonic_ns(), wall_ns=time.time_ns()),
        "started_ns": BEGIN,
        "flush_interval_s": 0.05,
        "instance": "abc",
        "versions": {},
        "hardware": {},
    }
    return Manifest(**(fields | changes))


def served(path: str = "/nowhere") -> Served:
    model = ModelInfo(
        name="tiny", source="test", architecture="Llama", path=path, num_parameters=1, num_layers=1, num_kv_heads=1,
        head_dim=1, vocab_size=10, max_model_len=100, dtype="float32", device="cpu", device_name="CPU",
        weight_bytes=4, eos_token_ids=(2,),
    )  # fmt: skip
    capacity = Capacity(
        block_size=16, num_blocks=4, kv_bytes=64, kv_bytes_per_token=1, max_num_seqs=4, max_model_len=100
    )
    return Served(since_ns=BEGIN, model=model, capacity=capacity, specs=())


def request_event(request: int, state: str, at_ns: int, **changes: object) -> RequestEvent:
    fields: dict = {
        "request": request, "id": f"r{request}", "state": state, "at_ns": at_ns, "arrival_ns": BEGIN,
        "prompt_tokens": 3, "output_tokens": 0, "max_tokens": 8, "preview": "why",
    }  # fmt: skip
    return RequestEvent(**(fields | changes))


def step_event(step: int, requests: list[int], begin_ns: int, **changes: object) -> StepEvent:
    fields: dict = {
        "step": step, "epoch": 0, "begin_ns": begin_ns, "schedule_ns": 10, "prepare_ns": 20, "forward_ns": 500,
        "sample_ns": 30, "update_ns": 40, "end_ns": begin_ns + 600, "path": "eager", "request": requests,
        "start": [step] * len(requests), "scheduled": [1] * len(requests), "kind": [1] * len(requests),
        "running": len(requests), "waiting": 0,
        "kv": KvUsage(total_blocks=4, used_blocks=1, cached_blocks=0, filled_slots=3, block_size=16),
    }  # fmt: skip
    return StepEvent(**(fields | changes))


def tokens_event(step: int, requests: list[int], index: int, sent_ns: int) -> TokensEvent:
    count = len(requests)
    parts = [[0] * count for _ in PARTS]
    parts[PARTS.index("forward")] = [500 + request for request in requests]
    return TokensEvent(
        step=step, request=requests, index=[index] * count, token_id=[7] * count, text=["é"] * count,
        logprob=[None] * count, sent_ns=[sent_ns] * count, latency_ns=[500 + request for request in requests],
        parts=parts,
    )  # fmt: skip


def some_events(steps: int = 5) -> list[Record]:
    """Two requests of ``steps`` tokens each, and one event of every other kind."""
    features = FeaturesEvent(
        epoch=1, values={"kv_cache": True, "block_size": 16}, changed=["kv_cache"], cost="recompute",
        requested_ns=BEGIN, applied_ns=BEGIN + 1, apply_ns=1, preempted=0, recompute_tokens=0,
    )  # fmt: skip
    device = DeviceEvent(
        at_ns=BEGIN + 5, cores=2, system_cpu=0.5, system_memory_used=1, system_memory_total=2,
        process=["front", "engine"], pid=[1, 2], cpu=[0.1, 1.5], rss=[10, 20],
    )  # fmt: skip
    cost = TelemetryCostEvent(
        at_ns=BEGIN + 6, window_ns=10**9, level="full", steps=5, step_ns=10, engine_ns=1, encode_ns=1, front_ns=1,
        journal_ns=1, events=9, bytes=999,
    )  # fmt: skip
    events: list[Record] = [EngineEvent(state="ready", at_ns=BEGIN), features, device, cost]
    for request in (1, 2):
        events.append(request_event(request, "queued", BEGIN))
        events.append(
            RequestDetail(request=request, prompt=(5, 6, 7), sampling=SamplingParams(max_tokens=8, seed=request))
        )
    for step in range(steps):
        begin = BEGIN + 1000 * step
        events.append(step_event(step, [1, 2], begin))
        events.append(KvEvents(step=step, op=[0, 1], block=[step, step], request=[1, -1]))
        events.append(tokens_event(step, [1, 2], step, begin + 700))
    end = BEGIN + 10_000
    events += [request_event(r, "finished", end, output_tokens=steps, seed=2**64 - r) for r in (1, 2)]
    return events


def only_events(records: list[Record]) -> list[Event]:
    return [record for record in records if not isinstance(record, RequestDetail)]  # type: ignore[misc]
