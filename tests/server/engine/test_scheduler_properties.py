"""Whatever is submitted, cancelled, preempted and switched, every request gets exactly the output it gets alone."""

from __future__ import annotations

import os
from random import Random

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_cache import VOCABULARY, SimulatedCache, isolated_output, next_token

from inference_server.engine.kv_cache import KVCache
from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduler
from inference_server.features import Features
from inference_server.front.kv_state import KvState
from inference_server.protocol import Kind, KvEvents, SamplingParams

EOS = frozenset({7})


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(4, 14), block_size=st.sampled_from([1, 2, 4, 5]))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.num_slots = num_blocks * block_size
        self.cache = KVCache(num_blocks, block_size, host_blocks=num_blocks // 2)
        self.cache.pool.listen()
        self.told = KvState()
        self.scheduler = Scheduler(self.cache, EOS)
        self.memory = SimulatedCache(num_blocks, block_size)
        self.features = Features(max_num_seqs=4, max_num_batched_tokens=16)
        self.live: dict[int, Request] = {}
        self.expected: dict[int, list[int]] = {}
        self.handles = 0
        self.idle_steps = 0
        self.most_drafts = 0
        self.guesses = Random(0)

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        max_tokens=st.integers(1, 12),
        samples=st.integers(1, 3),
        priority=st.integers(0, 2),
        ignore_eos=st.booleans(),
    )
    def submit(self, prompt: list[int], max_tokens: int, samples: int, priority: int, ignore_eos: bool) -> None:
        if len(prompt) + max_tokens > self.cache.capacity_tokens:
            return  # the engine refuses these at submission
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
        requests = [
            Request(
                handle=self.handles + index,
                prompt_len=len(prompt),
                tokens=list(prompt),
                sampling=sampling,
                seed=index,
                arrival=self.handles + index,
                priority=priority,
            )
            for index in range(samples)
        ]
        self.handles += samples
        requests[0].group = tuple(requests[1:])
        for request in requests:
            if request is not requests[0]:
                request.parent = requests[0]
            self.live[request.handle] = request
            self.expected[request.handle] = isolated_output(
                prompt, max_tokens, request.seed, frozenset() if ignore_eos else EOS
            )
        self.scheduler.add(requests[0])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.scheduler.cancel(request)
        assert not request.blocks

    @rule(
        name_value=st.one_of(
            st.tuples(st.just("prefix_cache_read"), st.booleans()),
            st.tuples(st.just("prefix_cache_write"), st.booleans()),
            st.tuples(st.just("chunked_prefill"), st.booleans()),
            st.tuples(st.just("max_num_seqs"), st.integers(1, 6)),
            st.tuples(st.just("max_num_batched_tokens"), st.integers(1, 20)),
            st.tuples(st.just("batching"), st.sampled_from(["continuous", "static", "single"])),
            st.tuples(st.just("preemption"), st.sampled_from(["recompute", "swap"])),
            st.tuples(st.just("scheduling_policy"), st.sampled_from(["fcfs", "priority", "shortest-first"])),
        )
    )
    def switch(self, name_value: tuple[str, object]) -> None:
        self.features = msgspec.structs.replace(self.features, **dict([name_value]))

    @rule(most=st.integers(0, 5), seed=st.integers(0, 99))
    def switch_speculation(self, most: int, seed: int) -> None:
        self.most_drafts = most
        self.guesses = Random(seed)

    @rule()
    def switch_kv_cache(self) -> None:
        self.scheduler.recompute_all()
        self.features = msgspec.structs.replace(self.features, kv_cache=not self.features.kv_cache)

    @rule(block_size=st.sampled_from([1, 2, 4, 5]), contiguous=st.booleans())
    def switch_layout(self, block_size: int, contiguous: bool) -> None:
        num_blocks = self.num_slots // block_size
        longest = max((request.max_total for request in self.live.values()), default=0)
        if longest > num_blocks * block_size:
            return  # a smaller cache would not hold what was accepted; the engine refuses the switch
        self.memory.transfer(self.cache.transfers)
        self.cache.transfers = []
        before = self.cache
        self.cache = KVCache(num_blocks, block_size, host_blocks=num_blocks // 2)
        self.cache.contiguous = contiguous
        self.cache.pool.listen()
        self.scheduler.replace_cache(self.cache)
        self.memory.transfer(before.transfers)
        before.transfers = []
        assert before.usage().used_blocks == 0
        assert before.host_blocks_used == 0
        self.memory.block_size = block_size
        self.features = msgspec.structs.replace(
            self.features, block_size=block_size, kv_layout="contiguous" if contiguous else "paged"
        )

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    def _step(self) -> bool:
        drafts = self.most_drafts if self.features.kv_cache else 0
        wish = (lambda _: self.guesses.randint(0, drafts)) if drafts else None
        plan = self.scheduler.schedule(self.features, wish)
        assert plan.items or not self.live, "requests are waiting, but nothing was scheduled"
        for item in plan.items:
            if item.kind == Kind.VERIFY:
                assert 2 <= item.count <= 1 + drafts
                item.propose(self._guess(item.request, item.count - self.guesses.randint(0, 1)))
        decodes = sum(item.count for item in plan.items if item.count == 1)
        if plan.use_cache and self.features.chunked_prefill:
            assert plan.num_tokens <= self.features.max_num_batched_tokens
        assert decodes <= max(self.features.max_num_batched_tokens, 1) or not plan.use_cache
        seen = [item.request.handle for item in plan.items]
        assert len(seen) == len(set(seen))
        requests = [item.request for item in plan.items if item.sample]
        sampled = self.memory.forward(plan)
        assert all(0 <= token < VOCABULARY for tokens in sampled for token in tokens)
        reasons = self.scheduler.update(plan, sampled, self.features)
        for request, reason in zip(requests, reasons, strict=True):
            output = request.tokens[request.prompt_len :]
            assert output == self.expected[request.handle][: len(output)]
            if reason is not None:
                assert output == self.expected[request.handle]
                del self.live[request.handle]
        return bool(plan.items)

    def _guess(self, request: Request, count: int) -> list[int]:
        """Proposals, of which most are right."""
        text = list(request.tokens)
        for _ in range(count):
            right = self.guesses.random() < 0.7
            text.append(next_token(text, request.seed) if right else self.guesses.randrange(VOCABULARY))
        return text[len(request.tokens) :]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if not hasattr(self, "cache"):
            return
        held = [request.blocks for request in (*self.scheduler.running, *self.scheduler.waiting)]
        self.cache.pool.check_integrity(held)

    @rule()
    def listen_anew(self) -> None:
        self.cache.pool.listen((request.handle, request.blocks) for request in self.live.values())

    @invariant()
    def the_events_tell_who_holds_which_block(self) -> None:
        if not hasattr(self, "cache"):
            return
        pool = self.cache.pool
        events, pool.events = pool.events, []
        assert events is not None
        op, block, request = zip(*events, strict=True) if events else ((), (), ())
        self.told.apply(KvEvents(step=0, op=[*op], block=[*block], request=[*request]))
        described = KvState()
        description = self.told.describe()
        assert description is not None
        described.apply(description)
        for known in (self.told, described):
            assert known.num_blocks == pool.num_blocks
            assert known.tables == {each.handle: each.blocks for each in self.live.values() if each.blocks}
            assert known.references == {each: count for each, count in enumerate(pool.references) if count}
            assert known.hashed == {each for each, digest in enumerate(pool.hashes) if digest is not None}
            assert list(known.cached) == list(pool._cached)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        # Nothing starves: with no new requests, all that are left end within a bounded number of steps.
        budget = sum(request.max_total for request in self.live.values()) * (len(self.live) + 1) + 10
        budget *= -(-16 // self.features.max_num_batched_tokens) * 2
        for _ in range(budget):
            if not self._step():
                break
        assert not self.live, f"{len(self.live)} requests never ended"
        self.every_block_is_accounted_for()
        assert self.cache.usage().used_blocks == 0
        assert self.cache.host_blocks_used == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=int(os.environ.get("PROPERTY_EXAMPLES", "1500")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
