"""Makes recordings without an engine: events as a server would tell them, through the real journal and file writer.

For tests of what reads recordings. Times, parts and batches hang together as the protocol says: a request's tokens lie
in steps that worked on it, parts add up to latencies, KV blocks to what the requests hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from inference_server.engine.block_pool import BlockPool
from inference_server.features import SPECS, Features
from inference_server.protocol import (
    PARTS,
    Capacity,
    DeviceEvent,
    EngineEvent,
    FeaturesEvent,
    Kind,
    KvEvents,
    ModelInfo,
    RequestEvent,
    SamplingParams,
    StepEvent,
    TelemetryCostEvent,
    TokensEvent,
)
from inference_server.recording.convert import finish
from inference_server.recording.format import Clock, Manifest, Served
from inference_server.recording.journal import JournalServed, JournalWriter, RequestDetail

MS = 1_000_000
BEGIN_NS = 5_000_000_000_000
BLOCK = 16
BLOCKS = 2048
WORDS = (" the", " a", " light", "house", " keeper", ",", " said", "\n", " “sea”", " fog", " é", "")

MODEL = ModelInfo(
    name="synthetic",
    source="synthetic",
    architecture="LlamaForCausalLM",
    path="/nonexistent",
    num_parameters=134_515_008,
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49_152,
    max_model_len=2048,
    dtype="float32",
    device="cpu",
    device_name="test",
    weight_bytes=538_060_032,
    eos_token_ids=(2,),
)


@dataclass
class _Running:
    handle: int
    arrival_ns: int
    prompt: int
    limit: int
    made: int = 0
    last_ns: int = 0
    started_ns: int | None = None
    first_ns: int | None = None
    state: str = "queued"
    blocks: list[int] = field(default_factory=list)


def write_recording(
    path: Path,
    *,
    tokens: int = 400,
    parallel: int = 6,
    tokens_per_request: int = 40,
    seed: int = 1,
    name: str = "synthetic",
    pause_s: float = 0.0,
    step_ms: float | None = None,
    blocks: int = BLOCKS,
    journal_only: bool = False,
) -> Path:
    """Write a recording with at least ``tokens`` tokens and a switch in its middle.

    Parameters
    ----------
    path
        The ``.iwrec`` file to make.
    parallel
        Requests at once.
    tokens_per_request
        Output tokens of each request, give or take a third.
    pause_s
        Silence in the middle, seconds.
    step_ms
        How long each step's forward pass takes; by default as long as its requests need.
    blocks
        Of the KV cache.
    journal_only
        Leave the journal as it is while recording: without an end.

    Returns
    -------
    pathlib.Path
        The file, or the journal.
    """
    draw = random.Random(seed)
    features = Features()
    epoch0 = _features(0, features, (), BEGIN_NS - 10 * MS)
    manifest = Manifest(
        id=path.stem,
        name=name,
        note="made by a test",
        created="2026-01-02T03:04:05+00:00",
        clock=Clock(monotonic_ns=BEGIN_NS, wall_ns=1_767_323_045_000_000_000),
        started_ns=BEGIN_NS,
        flush_interval_s=0.05,
        instance="synthetic",
        versions={"inference-workbench": "0.1.0", "python": "3.11"},
        hardware={"cpu": "a test’s CPU", "cores": 2},
        features=epoch0,
    )
    journal_path = path.with_suffix(".iwjournal")
    journal = JournalWriter(journal_path, manifest, max_bytes=1 << 31)
    capacity = Capacity(
        block_size=BLOCK, num_blocks=blocks, kv_bytes=blocks * BLOCK * 23040, kv_bytes_per_token=23040,
        max_num_seqs=256, max_model_len=2048,
    )  # fmt: skip
    journal.add(JournalServed(served=Served(since_ns=BEGIN_NS, model=MODEL, capacity=capacity, specs=SPECS)))
    journal.add(EngineEvent(state="ready", at_ns=BEGIN_NS + 1, pid=7))
    now = BEGIN_NS + 5 * MS
    running: list[_Running] = []
    handle = produced = step = 0
    epoch = 0
    switched = False
    next_device = now
    pool = BlockPool(blocks, BLOCK)
    pool.listen()
    while produced < tokens or running:
        while len(running) < parallel and produced < tokens:
            handle += 1
            limit = max(1, round(tokens_per_request * draw.uniform(0.67, 1.33)))
            request = _Running(handle, now - draw.randrange(1, 4) * MS, draw.randrange(8, 60), limit)
            running.append(request)
            sampling = SamplingParams(max_tokens=limit, temperature=0.0 if handle % 2 else 0.8, ignore_eos=True)
            prompt = tuple(draw.randrange(10, 40_000) for _ in range(request.prompt))
            journal.add(RequestDetail(request=handle, prompt=prompt, sampling=sampling))
            journal.add(_request(request, request.arrival_ns))
        if not switched and produced >= tokens // 2:
            switched = True
            now += int(pause_s * 1e9)
            epoch = 1
            features = Features(prefix_cache_read=False)
            journal.add(_features(1, features, ("prefix_cache_read",), now))
        begin = now + draw.randrange(100_000, 600_000)
        forward = sum(request.prompt * 30_000 if request.made == 0 else 900_000 for request in running) + 3 * MS
        if step_ms is not None:
            forward = int(step_ms * MS)
        if draw.random() < 0.01:
            forward *= 6  # a stall that has to survive the thinning of plots
        schedule, prepare, sample, update = (draw.randrange(20_000, 200_000) for _ in range(4))
        end = begin + schedule + prepare + forward + sample + update
        for request in running:
            _extend(pool, request)
        for request in running:
            if request.started_ns is None:
                request.started_ns = begin
                request.state = "running"
                journal.add(_request(request, begin))
        journal.add(
            StepEvent(
                step=step,
                epoch=epoch,
                begin_ns=begin,
                schedule_ns=schedule,
                prepare_ns=prepare,
                forward_ns=forward,
                sample_ns=sample,
                update_ns=update,
                end_ns=end,
                path="synthetic",
                request=[request.handle for request in running],
                start=[0 if request.made == 0 else request.prompt + request.made - 1 for request in running],
                scheduled=[request.prompt if request.made == 0 else 1 for request in running],
                kind=[int(Kind.PREFILL if request.made == 0 else Kind.DECODE) for request in running],
                running=len(running),
                waiting=0,
                kv=pool.usage(),
                before_ns=begin - now,
            )
        )
        for request in running:
            if request.made + 1 >= request.limit:
                for block in reversed(request.blocks):
                    pool.release(block, request.handle)
        journal.add(_kv_events(step, pool))
        sent = [end + draw.randrange(60_000, 300_000) for _ in running]
        since = [request.arrival_ns if request.made == 0 else request.last_ns for request in running]
        latency = [at - before for at, before in zip(sent, since, strict=True)]
        parts = [
            _parts(request, running, each, forward, sample, draw)
            for request, each in zip(running, latency, strict=True)
        ]
        journal.add(
            TokensEvent(
                step=step,
                request=[request.handle for request in running],
                index=[request.made for request in running],
                token_id=[draw.randrange(10, 40_000) for _ in running],
                text=[draw.choice(WORDS) for _ in running],
                logprob=[None if request.handle % 3 else -draw.random() for request in running],
                sent_ns=sent,
                latency_ns=latency,
                parts=[[token[at] for token in parts] for at in range(len(PARTS))],
            )
        )
        produced += len(running)
        for request, at in zip(running, sent, strict=True):
            request.made += 1
            request.last_ns = at
            request.first_ns = request.first_ns or at
        for request in [each for each in running if each.made >= each.limit]:
            request.state = "finished"
            journal.add(_request(request, request.last_ns + 1))
            running.remove(request)
        now = end
        step += 1
        if now >= next_device:
            next_device = now + 1000 * MS
            journal.add(_device(now))
            journal.add(
                TelemetryCostEvent(
                    at_ns=now, window_ns=1000 * MS, level="full", steps=80, step_ns=900 * MS, engine_ns=2 * MS,
                    encode_ns=4 * MS, front_ns=30 * MS, journal_ns=MS, events=300, bytes=60_000,
                )
            )  # fmt: skip
    if journal_only:
        journal._flush()  # as the writer's thread does every second; there is no end, as after a crash
        return journal_path
    with patch("inference_server.recording.journal.time.monotonic_ns", return_value=now):  # its end is of our time too
        journal.close("stopped by the test")
    return finish(journal_path, path)


def _extend(pool: BlockPool, request: _Running) -> None:
    """Give a request the blocks of its next position; the first block of every prompt is the same."""
    filled = request.prompt + request.made + 1
    if not request.blocks and (first := pool.lookup(b"first")) is not None:
        pool.share(first, request.handle)
        request.blocks.append(first)
    while len(request.blocks) * BLOCK < filled:
        request.blocks.append(pool.allocate(request.handle))
    for index, block in enumerate(request.blocks):
        pool.fill(block, min(BLOCK, filled - index * BLOCK))
        if (index + 1) * BLOCK <= filled:
            pool.register(block, b"first" if index == 0 else b"%d/%d" % (request.handle, index))


def _kv_events(step: int, pool: BlockPool) -> KvEvents:
    events, pool.events = pool.events or [], []
    return KvEvents(
        step=step,
        op=[int(op) for op, _, _ in events],
        block=[block for _, block, _ in events],
        request=[request for _, _, request in events],
    )


def _parts(
    request: _Running, running: list[_Running], latency: int, forward: int, sample: int, draw: random.Random
) -> list[int]:
    parts = dict.fromkeys(PARTS, 0)
    left = latency

    def take(name: str, wanted: int) -> None:
        nonlocal left
        parts[name] = max(0, min(left, wanted))
        left -= parts[name]

    take("forward", forward // 2)
    take("sampling", sample)
    if request.made == 0:
        take("tokenize", 300_000)
        take("prefill", request.prompt * 30_000)
    elif any(other.made == 0 for other in running):
        take("others_prefill", sum(other.prompt * 30_000 for other in running if other.made == 0))
    take("attention", forward // 4)
    take("host", 400_000)
    take("transport", 40_000)
    take("detokenize", 15_000)
    take("send", 25_000)
    if request.made == 0:
        take("queue", left - left // 50)
    else:
        extra = left - draw.randrange(left // 20 + 1)
        parts["forward"] += extra
        left -= extra
    parts["unexplained"] = latency - sum(value for name, value in parts.items() if name != "unexplained")
    return [parts[name] for name in PARTS]


def _request(request: _Running, at_ns: int) -> RequestEvent:
    ended = request.state == "finished"
    return RequestEvent(
        request=request.handle,
        id=f"cmpl-{request.handle}",
        state=request.state,  # type: ignore[arg-type]
        at_ns=at_ns,
        arrival_ns=request.arrival_ns,
        prompt_tokens=request.prompt,
        output_tokens=request.made,
        max_tokens=request.limit,
        preview=f"Prompt {request.handle}",
        first_token_ns=request.first_ns,
        finish_reason="length" if ended else None,
        submitted_ns=request.arrival_ns + 300_000,
        started_ns=request.started_ns,
        last_token_ns=request.last_ns or None,
        seed=request.handle if request.started_ns else None,
    )


def _features(epoch: int, features: Features, changed: tuple[str, ...], at_ns: int) -> FeaturesEvent:
    return FeaturesEvent(
        epoch=epoch,
        values=features.as_dict(),
        changed=list(changed),
        cost="free",
        requested_ns=at_ns - MS,
        applied_ns=at_ns,
        apply_ns=42_000,
        preempted=0,
        recompute_tokens=0,
        settled_ns=at_ns,
    )


def _device(at_ns: int) -> DeviceEvent:
    return DeviceEvent(
        at_ns=at_ns, cores=2, system_cpu=1.5, system_memory_used=3 << 30, system_memory_total=8 << 30,
        process=["front", "engine"], pid=[10, 11], cpu=[0.2, 1.1], rss=[100 << 20, 900 << 20],
    )  # fmt: skip
