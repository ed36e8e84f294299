"""The engine: scheduler, cache, model and sampler put together, one step at a time. Knows no process and no socket."""

from __future__ import annotations

import queue
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec
import torch
from torch import Tensor

from inference_server import features as feature_rules
from inference_server.engine import compiled, loader, sampler
from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.cpu import path as fast_path
from inference_server.engine.gpu import path as gpu_path
from inference_server.engine.kv_cache import KVCache
from inference_server.engine.llama import UnsupportedError
from inference_server.engine.loader import LoadedModel, Progress
from inference_server.engine.memory import available_host_bytes, is_out_of_memory
from inference_server.engine.request import Request
from inference_server.engine.response_cache import Answer, ResponseCache
from inference_server.engine.runner import ModelRunner, Runner
from inference_server.engine.sampler import Tokens
from inference_server.engine.scheduler import Scheduler, StepPlan
from inference_server.engine.sleeping import Freed, Sleeper, SleepError, Stopwatch
from inference_server.engine.structured import Grammars, StructureError
from inference_server.engine.work import step_work
from inference_server.features import SPECS, FeatureError, Features
from inference_server.models import locate
from inference_server.models.errors import ModelError
from inference_server.protocol import (
    Capacity,
    EngineConfig,
    FeaturesApplied,
    FeatureSpec,
    FeaturesSettled,
    KvEvents,
    KvOp,
    KvUsage,
    ModelInfo,
    Notice,
    RequestCancelled,
    RequestFailed,
    SampledTokens,
    StepEvent,
    StepReport,
    Submit,
    TaskProgress,
)

if TYPE_CHECKING:  # importing it compiles the kernels
    from inference_server.engine.cpu.runner import FastRunner
    from inference_server.engine.gpu.runner import GpuRunner

MAX_HOST_BYTES = 8 << 30
"""Host memory that preempted requests may be swapped to, at most."""
REQUEST_OVERRIDES = frozenset({"prefix_cache_read", "prefix_cache_write", "response_cache"})
"""Features that a request may set for itself."""
STEPS_UNTIL_LARGER = 64
"""After memory ran out, steps of half the size are tried again after so many without trouble."""
CPU_KV_BYTES = 1 << 30
"""KV memory on a CPU unless told otherwise: 23,000 positions of the default model in float32."""


class RequestError(ValueError):
    """A request that cannot be served as asked; the message says why and what to change."""


@dataclass(slots=True)
class _Settling:
    """Requests that a switch interrupted and that have not emitted a token since."""

    epoch: int
    requests: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Flight:
    """A step that was launched and whose tokens are not known yet."""

    plan: StepPlan
    features: Features
    epoch: int
    fast: bool
    """It takes the fast path."""
    path: str
    logits: Tensor
    greedy: Tokens | None
    sampling: list[Request]
    """One for each token to choose."""
    kv_events: list[tuple[KvOp, int]]
    booked: bool = False
    """The scheduler knows what the step computes; only its tokens are missing."""
    after: tuple[int, int, KvUsage] | None = None
    """Running and waiting requests and the KV cache after the step, where the next one was scheduled since."""


class _MemoryLimit:
    """How many positions a step may have, where memory ran out not long ago."""

    __slots__ = ("_calm", "most")

    def __init__(self) -> None:
        self.most: int | None = None
        self._calm = 0

    def apply(self, features: Features) -> Features:
        """The features with a budget that fits into memory."""
        if self.most is None:
            return features
        if self.most >= features.max_num_batched_tokens:
            self.most = None
            return features
        return msgspec.structs.replace(features, max_num_batched_tokens=self.most)

    def shrink(self, tokens: int) -> None:
        """A step of ``tokens`` positions was too much."""
        self.most, self._calm = max(tokens // 2, 1), 0

    def succeeded(self) -> None:
        """A step fitted; after some of these a larger one is tried."""
        if self.most is not None:
            self._calm += 1
            if self._calm >= STEPS_UNTIL_LARGER:
                self.most, self._calm = 2 * self.most, 0


class _Phases:
    """Where the engine's time between the ends of two steps went, in nanoseconds."""

    __slots__ = ("before", "forward", "last", "prepare", "sample", "schedule", "update")

    def __init__(self, busy_since_ns: int) -> None:
        self.schedule = self.prepare = self.forward = self.sample = self.update = 0
        self.last = time.monotonic_ns()
        self.before = max(self.last - busy_since_ns, 0)
        """What the engine was busy with between the step before and this one."""

    def end(self, phase: str) -> int:
        """Add the time since the last call to a phase, and return now."""
        now = time.monotonic_ns()
        setattr(self, phase, getattr(self, phase) + now - self.last)
        self.last = now
        return now


@runtime_checkable
class Waitable(Protocol):
    """Tokens of a GPU's step."""

    def wait(self) -> None:
        """Wait until the device is done with the step."""

    @property
    def device_ns(self) -> int | None:
        """How long it took the device."""


class Engine:
    """Serves one model. Call :meth:`step` while :meth:`has_work`.

    Parameters
    ----------
    config : EngineConfig
    loaded : LoadedModel
    compilation : Compilation, optional
        Of the CPU kernels, where it was started beforehand.
    """

    def __init__(
        self, config: EngineConfig, loaded: LoadedModel, compilation: fast_path.Compilation | None = None
    ) -> None:
        self.config = config
        self.loaded = loaded
        self.epoch = 0
        self.capacity = self._capacity()
        tensors = PagedKVTensors(self.capacity.num_blocks, config.block_size, loaded.device, loaded.dtype)
        tensors.reserve(loaded.kv_shapes)
        self.runner = ModelRunner(loaded.model, tensors)
        self.fast: FastRunner | GpuRunner | None = None
        self.gpu: GpuRunner | None = None
        """The fast path, where it is one on a GPU."""
        unavailable = {}
        longest = self.capacity.max_model_len
        try:
            if loaded.device.type == "cuda":
                self.fast = self.gpu = gpu_path.start(loaded.model, self.runner, longest, config.max_num_seqs)
            else:
                self.fast = fast_path.start(loaded.model, self.runner, longest, compilation=compilation)
        except UnsupportedError as error:
            unavailable["fast_path"] = f"The fast path cannot run this model: {error}."
        no_compiler = compiled.unavailable_reason(loaded.device)
        if no_compiler is not None:
            unavailable["compiled"] = no_compiler
        if self.gpu is None:
            reason = unavailable.get("fast_path") or "It is for models on a GPU; this one is on the CPU."
            unavailable["cuda_graphs"] = unavailable["overlap"] = reason
        defaults = Features(
            block_size=config.block_size,
            max_num_seqs=min(Features().max_num_seqs, config.max_num_seqs),
            fast_path=self.fast is not None,
            cuda_graphs=self.gpu is not None,
            overlap=self.gpu is not None,
        )
        self.specs = _specs_here(defaults, config, unavailable)
        self._specs = {spec.name: spec for spec in self.specs}
        self._recompute_features = {spec.name for spec in self.specs if spec.cost == "recompute"}
        self.features = feature_rules.apply(defaults, config.features, self._specs)
        self._host_bytes = min(MAX_HOST_BYTES, available_host_bytes() // 8)
        self.scheduler = Scheduler(self._new_cache(self.features), loaded.eos_token_ids)
        tensors.block_size = self.features.block_size
        self.requests: dict[int, Request] = {}
        self._arrivals = 0
        self._settling: list[_Settling] = []
        self._responses = ResponseCache()
        self._grammars = Grammars(loaded.located.path, loaded.config.vocab_size, loaded.eos_token_ids)
        self._replays: list[tuple[Request, Answer]] = []
        self.work = step_work(loaded)
        """What a step has to read and compute with the weights in use."""
        self.telemetry_ns = 0
        """What building telemetry has cost the engine's thread."""
        self.busy_ns = 0
        """What steps have cost it, all in all."""
        self._busy_since_ns = time.monotonic_ns()
        self._flight: _Flight | None = None
        self._landed: deque[tuple[StepReport, list[FeaturesSettled]]] = deque()
        self._sleeper = Sleeper(loaded.device)
        self.asleep = False
        """Its memory was given back; requests wait."""
        self._memory = _MemoryLimit()
        self._news: list[Notice | RequestFailed] = []
        self._progress: queue.SimpleQueue[TaskProgress | Notice] = queue.SimpleQueue()
        self._compilation: compiled.Compilation | None = None
        self._compile_where_asked()

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress) -> Engine:
        """Locate, fetch where necessary, load and verify the model that ``config`` names.

        Raises
        ------
        ModelError
            Saying what is wrong with the model or the device, and what to do.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = loader.resolve_device(config.device)
        dtype = loader.resolve_dtype(config.dtype, device)
        compilation = fast_path.Compilation() if device.type == "cpu" else None
        located = locate.locate(config.model, progress)
        loaded = loader.load(located, device, dtype, progress)
        progress("reserving the KV cache", 0.95, "")
        if compilation is not None and compilation.running:
            progress("compiling the CPU kernels", 0.96, "once on this machine")
        return cls(config, loaded, compilation)

    @property
    def cache(self) -> KVCache:
        """The block tables in use."""
        return self.scheduler.cache

    def _new_cache(self, features: Features) -> KVCache:
        slots = self.capacity.num_blocks * self.capacity.block_size
        host_blocks = self._host_bytes // (self.capacity.kv_bytes_per_token * features.block_size)
        cache = KVCache(slots // features.block_size, features.block_size, host_blocks)
        cache.contiguous = features.kv_layout == "contiguous"
        cache.pool.events = [] if features.instrumentation == "full" else None
        return cache

    # -- what is served ------------------------------------------------------------------------------------------------

    def model_info(self) -> ModelInfo:
        """Describe the model for the front and the views."""
        loaded = self.loaded
        heads, head_dim, _ = loaded.kv_shapes[0]
        device = loaded.device
        threads = torch.get_num_threads()
        cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        return ModelInfo(
            name=self.config.served_name or loaded.located.name,
            source=loaded.located.source,
            architecture=type(loaded.model).__name__,
            path=str(loaded.located.path),
            num_parameters=loaded.num_parameters,
            num_layers=loaded.num_layers,
            num_kv_heads=heads,
            head_dim=head_dim,
            vocab_size=loaded.config.vocab_size,
            max_model_len=self.capacity.max_model_len,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(device),
            device_name=name,
            weight_bytes=loaded.weight_bytes,
            eos_token_ids=loaded.eos_token_ids,
            num_heads=int(getattr(loaded.config, "num_attention_heads", 0) or 0),
            hidden_size=int(getattr(loaded.config, "hidden_size", 0) or 0),
            quantized_source=loaded.located.quantized_source,
            revision=loaded.located.revision,
            notes=loaded.located.notes,
        )

    def _capacity(self) -> Capacity:
        loaded, config = self.loaded, self.config
        per_token = loaded.kv_bytes_per_token
        wanted = config.kv_bytes
        if wanted is None:
            if loaded.device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(loaded.device)
                wanted = int(free * 0.85)
            else:
                wanted = min(CPU_KV_BYTES, available_host_bytes() // 4)
        max_model_len = min(config.max_model_len or loaded.max_model_len, loaded.max_model_len)
        # More blocks than every request at its longest could fill would only take memory from others.
        useful = config.max_num_seqs * -(-max_model_len // config.block_size)
        num_blocks = min(wanted // (per_token * config.block_size), useful)
        if num_blocks < 1:
            raise ModelError(
                f"{wanted:,} bytes of KV memory hold no block of {config.block_size} positions "
                f"({per_token * config.block_size:,} bytes each); give the server more with --kv-memory"
            )
        return Capacity(
            block_size=config.block_size,
            num_blocks=num_blocks,
            kv_bytes=num_blocks * config.block_size * per_token,
            kv_bytes_per_token=per_token,
            max_num_seqs=config.max_num_seqs,
            max_model_len=min(max_model_len, num_blocks * config.block_size),
        )

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        """Queue the samples of a request.

        Raises
        ------
        RequestError
            If it could never be served as asked.
        """
        sampling, limit = message.sampling, self.capacity.max_model_len
        if not message.prompt:
            raise RequestError("the prompt is empty; it needs at least one token")
        if min(message.prompt) < 0 or max(message.prompt) >= self.loaded.config.vocab_size:
            raise RequestError(
                f"the prompt has token ids outside of the vocabulary, 0 to {self.loaded.config.vocab_size - 1}"
            )
        if sampling.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, not {sampling.max_tokens}")
        if len(message.prompt) + sampling.max_tokens > limit:
            raise RequestError(
                f"the prompt has {len(message.prompt)} tokens and max_tokens is {sampling.max_tokens}: together more "
                f"than the {limit} positions this server can hold; shorten one of them"
            )
        try:
            constraints = [
                self._grammars.constraint(sampling.json_schema) if sampling.json_schema is not None else None
                for _ in message.requests
            ]
        except StructureError as error:
            raise RequestError(str(error)) from error
        overrides = self._overrides(message)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        samples = []
        for index, handle in enumerate(message.requests):
            samples.append(
                Request(
                    handle=handle,
                    prompt_len=len(message.prompt),
                    tokens=list(message.prompt),
                    sampling=sampling,
                    # Golden-ratio steps: the samples of one request draw independent numbers, each reproducible.
                    seed=(seed + index * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF,
                    arrival=self._arrivals + index,
                    priority=message.priority,
                    constraint=constraints[index],
                    prefix_cache_read=overrides.get("prefix_cache_read"),
                    prefix_cache_write=overrides.get("prefix_cache_write"),
                )
            )
        self._arrivals += len(samples)
        self.requests.update((request.handle, request) for request in samples)
        if overrides.get("response_cache", self.features.response_cache):
            samples = [request for index, request in enumerate(samples) if not self._replay(request, index)]
            if not samples:
                return
        first, rest = samples[0], tuple(samples[1:])
        first.group = rest
        for request in rest:
            request.parent = first
        self.scheduler.add(first)

    def _overrides(self, message: Submit) -> dict[str, bool]:
        """Check the feature values that a request sets for itself."""
        checked: dict[str, bool] = {}
        for name, value in message.overrides.items():
            if name not in REQUEST_OVERRIDES:
                allowed = ", ".join(sorted(REQUEST_OVERRIDES))
                raise RequestError(f"a request cannot set the feature {name!r} for itself; it can set {allowed}")
            try:
                checked[name] = bool(feature_rules.validate(name, value, self._specs))
            except FeatureError as error:
                raise RequestError(str(error)) from error
        return checked

    def _replay(self, request: Request, sample: int) -> bool:
        """Answer from the response cache if the answer is known; else see that it will be remembered."""
        key = ResponseCache.key(tuple(request.tokens), request.sampling, sample)
        if key is None:
            return False
        answer = self._responses.get(key)
        if answer is None:
            request.response_key = key
            return False
        self._replays.append((request, answer))
        return True

    def cancel(self, handle: int) -> RequestCancelled | None:
        """End a request; ``None`` if it had ended already."""
        request = self.requests.pop(handle, None)
        if request is None:
            return None
        self.scheduler.cancel(request)
        self._replays = [replay for replay in self._replays if replay[0] is not request]
        return RequestCancelled(handle)

    def fail_all(self, error: str) -> list[RequestFailed]:
        """End every request after an internal error, leaving the engine clean."""
        failed = [RequestFailed(handle, error) for handle in self.requests]
        for request in self.requests.values():
            self.scheduler.cancel(request)
        self.requests.clear()
        self._replays.clear()
        self._settling.clear()
        self._flight = None
        self._landed.clear()
        return failed

    def woke(self) -> None:
        """Say that the engine had nothing to do until now."""
        self._busy_since_ns = time.monotonic_ns()

    def has_work(self) -> bool:
        """Whether a step has something to compute."""
        if self.asleep:
            return bool(self._landed)
        return bool(self._replays or self._landed) or self._flight is not None or self.scheduler.has_work()

    def take_news(self) -> list[Notice | RequestFailed | TaskProgress]:
        """Return what happened since the last call beside tokens: memory that ran out, requests ended by it."""
        news: list[Notice | RequestFailed | TaskProgress] = [*self._news]
        self._news.clear()
        while not self._progress.empty():
            news.append(self._progress.get())
        return news

    # -- sleep ---------------------------------------------------------------------------------------------------------

    def sleep(self) -> Freed:
        """Give the device's memory back between two steps: weights go to the host, keys and values are dropped.

        Running requests keep their place and what they have said; they are computed again after :meth:`wake`.

        Raises
        ------
        SleepError
            If it sleeps already, or the host cannot hold the weights.
        """
        if self.asleep:
            raise SleepError("The engine is asleep already; wake it to use it.")
        if self._compilation is not None and self._compilation.running:
            raise SleepError("The model is being compiled, which needs its weights; let the engine sleep after that.")
        stopwatch = Stopwatch(self._sleeper)
        self._land()
        tensors = self.runner.tensors
        weights = [*self.loaded.model.parameters(), *self.loaded.model.buffers()]
        host_bytes = self._sleeper.release(weights, [*tensors.keys, *tensors.values])
        self._restart_cache(self.features)
        if self.gpu is not None:
            self.gpu.forget_graphs()
        self.asleep = True
        return stopwatch.result(host_bytes, len(self.requests))

    def wake(self) -> Freed:
        """Take the memory again and go on.

        Raises
        ------
        SleepError
            If it is not asleep, or the device's memory was taken meanwhile; then it stays asleep.
        """
        if not self.asleep:
            raise SleepError("The engine is not asleep.")
        stopwatch = Stopwatch(self._sleeper)
        self._sleeper.restore()
        self.asleep = False
        return stopwatch.result(0, len(self.requests))

    # -- switches ------------------------------------------------------------------------------------------------------

    def set_features(
        self, correlation: int, values: dict[str, bool | int | str]
    ) -> list[FeaturesApplied | FeaturesSettled]:
        """Apply a switch between two steps.

        Raises
        ------
        FeatureError
            If a value is refused; then nothing was changed.
        """
        begin = time.monotonic_ns()
        after = feature_rules.apply(self.features, values, self._specs)
        names = feature_rules.changed(self.features, after)
        interrupted: set[int] = set()
        lost = 0
        if not self._recompute_features.isdisjoint(names):
            self._land()
            interrupted = {request.handle for request in self.scheduler.running}
            lost = self._restart_cache(after)
        self.features = after
        self._compile_where_asked()
        if "instrumentation" in names:
            self.cache.pool.events = [] if after.instrumentation == "full" else None
        self.epoch += bool(names)
        applied = FeaturesApplied(
            correlation=correlation,
            epoch=self.epoch,
            values=after.as_dict(),
            changed=names,
            cost=feature_rules.cost_of(names, self._specs),
            apply_ns=time.monotonic_ns() - begin,
            applied_at_ns=time.monotonic_ns(),
            preempted=len(interrupted),
            recompute_tokens=lost,
        )
        if applied.cost != "free":  # other weights, or another cache, may be in use now
            self.work = step_work(self.loaded)
            applied = msgspec.structs.replace(applied, work=self.work)
        if interrupted:
            self._settling.append(_Settling(self.epoch, interrupted))
            return [applied]
        return [applied, FeaturesSettled(self.epoch, applied.applied_at_ns)]

    def forget_caches(self) -> dict[str, int]:
        """Empty the prefix cache and the response cache, so that what comes next is computed afresh."""
        answers = len(self._responses)
        self._responses.clear()
        return {"blocks": self.cache.pool.forget_cached(), "answers": answers}

    def _restart_cache(self, after: Features) -> int:
        """Go on with an empty cache laid out for ``after``; return how many positions have to be computed again."""
        before = self.cache
        cache = self._new_cache(after)
        longest = max((request.max_total for request in self.requests.values()), default=0)
        if longest > cache.capacity_tokens:
            raise FeatureError(
                f"with blocks of {after.block_size} positions the cache holds {cache.capacity_tokens}, fewer than the "
                f"{longest} that a running request may need; wait for it to end, or choose a smaller block size"
            )
        lost = self.scheduler.replace_cache(cache)
        self.runner.tensors.block_size = after.block_size
        self.runner.tensors.transfer(before.transfers)  # nothing but giving up what was swapped out
        before.transfers = []
        # Coming from "off" nothing was cached, but now everything that runs is computed once more.
        uncached = not self.features.kv_cache and after.kv_cache
        return sum(request.num_tokens for request in self.scheduler.running) if uncached else lost

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> tuple[StepReport | None, list[FeaturesSettled]]:
        """Compute one step. Returns its report (``None`` when nothing could be scheduled) and switches that settled."""
        if self._landed:
            return self._landed.popleft()
        if self._replays and self._flight is None:
            return self._replay_step(), []
        phases = _Phases(self._busy_since_ns)
        begin = phases.last
        flight = self._flight or self._launch(phases)
        self._flight = None
        if flight is None:
            return None, []
        ahead = None
        if self._may_look_ahead(flight):
            self.scheduler.book(flight.plan, flight.features)
            flight.booked = True
            flight.after = self._occupancy()
            flight.kv_events += self._take_kv_events()
            phases.end("update")
            ahead = self._launch(phases)
        report, settled = self._complete(flight, begin, phases)
        self._flight = ahead
        return report, settled

    def _runner(self, features: Features) -> Runner:
        if self.fast is not None and features.fast_path:
            return self.fast
        if features.compiled and self._compilation is not None and self._compilation.runner is not None:
            return self._compilation.runner
        return self.runner

    def _compile_where_asked(self) -> None:
        """Begin to compile the model when that is first asked for, or again after it failed."""
        if self.features.compiled and (self._compilation is None or self._compilation.failed):
            self._compilation = compiled.Compilation(self.runner, self.loaded.kv_shapes, self._progress.put)
            self._compilation.start()

    def _may_look_ahead(self, flight: _Flight) -> bool:
        """Whether the step after ``flight`` can be launched before the tokens of ``flight`` are known."""
        features = self.features
        return (
            features.overlap
            and self.gpu is not None
            and flight.fast
            and features.fast_path
            and flight.plan.use_cache
            and features.kv_cache
            and not self._replays
            and not any(map(sampler.depends_on_its_output, flight.sampling))
        )

    def _launch(self, phases: _Phases) -> _Flight | None:
        """Schedule a step and start its forward pass; ``None`` if there is nothing to compute."""
        features = self.features
        events: list[tuple[KvOp, int]] = []
        started: list[Request] = []
        preempted: list[Request] = []
        while True:
            if not self.scheduler.has_work():
                return None
            plan = self.scheduler.schedule(self._memory.apply(features))
            if not plan.items:
                self.cache.transfers[:0] = plan.transfers
                return None
            events += self._take_kv_events()
            phases.end("schedule")
            plan.started[:0], plan.preempted[:0] = started, preempted
            runner = self._runner(features)
            if self.gpu is not None:
                self.gpu.use_graphs = features.cuda_graphs
            try:
                packed = runner.prepare(plan)
                phases.end("prepare")
                logits = runner.forward(plan, packed)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(plan, features, error)
            else:
                break
            finally:
                phases.end("forward")
            started, preempted = plan.started, plan.preempted
        self._memory.succeeded()
        return _Flight(
            plan=plan,
            features=features,
            epoch=self.epoch,
            fast=runner is self.fast,
            path=runner.label if plan.use_cache else f"{runner.label}, no KV cache",
            logits=logits,
            greedy=runner.greedy,
            sampling=[item.request for item in plan.items if item.sample],
            kv_events=events,
        )

    def _shrink(self, plan: StepPlan, features: Features, error: Exception) -> None:
        """Memory ran out while a step was launched: see that the next attempt needs less.

        Nothing of the step was booked, so its positions are simply planned again, fewer at once. A request that
        needs too much all by itself is ended.
        """
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        self.cache.transfers[:0] = plan.transfers  # those not done yet
        self.scheduler.step -= 1  # a step number met twice tells the runners to forget what they noted for it
        tokens, first = plan.num_tokens, plan.items[0]
        divisible = len(plan.items) > 1 or (first.count > 1 and plan.use_cache and features.chunked_prefill)
        if divisible:
            self._memory.shrink(tokens)
            self._news.append(
                Notice(
                    "warning",
                    f"Memory ran out in a step of {tokens} positions; no request is lost. Steps have at most "
                    f"{self._memory.most} positions for now. Smaller max_num_batched_tokens or max_num_seqs avoid it.",
                )
            )
            return
        handle = first.request.handle
        cure = (
            "switch chunked_prefill on, or shorten the prompt"
            if first.count > 1 and plan.use_cache
            else "switch kv_cache on, or shorten the prompt"
            if first.count > 1
            else "give the engine less KV memory (--kv-memory), which leaves more for computing"
        )
        self.cancel(handle)
        self._news.append(
            RequestFailed(
                handle,
                f"memory ran out computing {first.count} positions of this request at once, which cannot be divided: "
                f"{cure} ({str(error).splitlines()[0]})",
                "capacity",
            )
        )

    def _complete(self, flight: _Flight, begin: int, phases: _Phases) -> tuple[StepReport, list[FeaturesSettled]]:
        """Choose the tokens of a launched step, book them, and report it."""
        plan, pending = flight.plan, flight.greedy
        device_ns = None
        if isinstance(pending, Waitable):
            pending.wait()
            device_ns = pending.device_ns
            phases.end("forward")
        # A request may have ended since the step was launched: by a stop token of the step before, or cancelled.
        alive = [row for row, request in enumerate(flight.sampling) if request.finish_reason is None]
        sampled = _sample(flight.logits, flight.sampling, pending)
        phases.end("sample")
        if not flight.booked:
            self.scheduler.book(plan, flight.features)
        self.scheduler.resolve(plan, sampled.tokens)
        requests = [flight.sampling[row] for row in alive]
        tokens = SampledTokens(
            request=_handles(requests),
            index=[request.num_output - 1 for request in requests],
            token_id=[sampled.tokens[row] for row in alive],
            logprob=[sampled.logprobs[row] for row in alive],
            top=[sampled.top[row] for row in alive],
            finish=[request.finish_reason for request in requests],
        )
        for row, request in zip(alive, requests, strict=True):
            if request.response_key is not None:
                request.logprobs.append(sampled.logprobs[row])
                request.top.append(sampled.top[row])
            if request.finish_reason is not None:
                self._remember(request)
                self.requests.pop(request.handle, None)
        settled = self._settle(tokens.request)
        end = phases.end("update")
        self.busy_ns += end - begin + phases.before
        self._busy_since_ns = end
        event = self._step_event(flight, begin, end, phases, device_ns)
        report = StepReport(
            step=event,
            tokens=tokens,
            preempted=_handles(plan.preempted),
            started=_handles(plan.started),
            cached=[request.cached_prompt_tokens for request in plan.started],
            seeds=[request.seed for request in plan.started],
            begin_ns=begin,
            kv_events=self._kv_events(flight),
        )
        self.telemetry_ns += time.monotonic_ns() - end
        return report, settled

    def _step_event(
        self, flight: _Flight, begin: int, end: int, phases: _Phases, device_ns: int | None
    ) -> StepEvent | None:
        if self.features.instrumentation == "off":
            return None
        plan = flight.plan
        running, waiting, usage = flight.after or self._occupancy()
        slow = self._runner(flight.features)
        attention_ns = slow.attention_ns if isinstance(slow, ModelRunner) and not flight.fast else None
        return StepEvent(
            step=plan.step,
            epoch=flight.epoch,
            begin_ns=begin,
            schedule_ns=phases.schedule,
            prepare_ns=phases.prepare,
            forward_ns=phases.forward,
            sample_ns=phases.sample,
            update_ns=phases.update,
            end_ns=end,
            path=flight.path,
            request=[item.request.handle for item in plan.items],
            start=[item.start for item in plan.items],
            scheduled=[item.count for item in plan.items],
            kind=[int(item.kind) for item in plan.items],
            running=running,
            waiting=waiting,
            kv=usage,
            idle_slots=plan.idle_slots,
            device_ns=device_ns,
            before_ns=phases.before,
            attention_ns=attention_ns,
        )

    def _kv_events(self, flight: _Flight) -> KvEvents | None:
        events = flight.kv_events + self._take_kv_events()
        if not events or self.features.instrumentation != "full":
            return None
        return KvEvents(step=flight.plan.step, op=[int(op) for op, _ in events], block=[block for _, block in events])

    def _occupancy(self) -> tuple[int, int, KvUsage]:
        return len(self.scheduler.running), len(self.scheduler.waiting), self.cache.usage()

    def _land(self) -> None:
        """Complete a step that was launched ahead; :meth:`step` returns its report next."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            phases = _Phases(self._busy_since_ns)
            self._landed.append(self._complete(flight, phases.last, phases))

    def _take_kv_events(self) -> list[tuple[KvOp, int]]:
        pool = self.cache.pool
        if not pool.events:
            return []
        events, pool.events = pool.events, []
        return events

    def _remember(self, request: Request) -> None:
        if request.response_key is not None and request.finish_reason in {"stop", "length"}:
            output = request.tokens[request.prompt_len :]
            answer = Answer(output, request.logprobs, request.top, request.finish_reason)
            self._responses.put(request.response_key, answer)

    def _replay_step(self) -> StepReport:
        """Answer everything the response cache knows, in a step that computes nothing."""
        phases = _Phases(self._busy_since_ns)
        begin = phases.last
        replays, self._replays = self._replays, []
        self.scheduler.step += 1
        tokens = SampledTokens(request=[], index=[], token_id=[], logprob=[], top=[], finish=[])
        for request, answer in replays:
            count = len(answer.tokens)
            tokens.request.extend([request.handle] * count)
            tokens.index.extend(range(count))
            tokens.token_id.extend(answer.tokens)
            tokens.logprob.extend(answer.logprobs)
            tokens.top.extend(answer.top)
            tokens.finish.extend([None] * (count - 1) + [answer.finish])
            self.requests.pop(request.handle, None)
        end = phases.end("update")
        self.busy_ns += end - begin + phases.before
        self._busy_since_ns = end
        event = StepEvent(
            step=self.scheduler.step,
            epoch=self.epoch,
            begin_ns=begin,
            schedule_ns=0,
            prepare_ns=0,
            forward_ns=0,
            sample_ns=0,
            update_ns=phases.update,
            end_ns=end,
            before_ns=phases.before,
            path="response cache",
            request=[],
            start=[],
            scheduled=[],
            kind=[],
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv=self.cache.usage(),
        )
        return StepReport(
            step=event if self.features.instrumentation != "off" else None,
            tokens=tokens,
            started=[request.handle for request, _ in replays],
            cached=[0] * len(replays),
            seeds=[request.seed for request, _ in replays],
            begin_ns=begin,
        )

    def check_integrity(self) -> dict[str, int]:
        """Verify that every KV block is accounted for.

        Raises
        ------
        AssertionError
            Saying what does not add up.
        """
        held = [request.blocks for request in (*self.scheduler.running, *self.scheduler.waiting)]
        self.cache.pool.check_integrity(held)
        known = {request.handle for request in (*self.scheduler.running, *self.scheduler.waiting)}
        known |= {request.handle for request, _ in self._replays}
        if known != set(self.requests):
            raise AssertionError(f"requests {sorted(known ^ set(self.requests))} are known in one place only")
        return {"blocks": self.capacity.num_blocks, "requests": len(known)}

    def _settle(self, emitted: list[int]) -> list[FeaturesSettled]:
        if not self._settling:
            return []
        settled = []
        now = time.monotonic_ns()
        for each in list(self._settling):
            each.requests.difference_update(emitted)
            each.requests.intersection_update(self.requests)
            if not each.requests:
                settled.append(FeaturesSettled(each.epoch, now))
                self._settling.remove(each)
        return settled


def _specs_here(defaults: Features, config: EngineConfig, unavailable: dict[str, str]) -> tuple[FeatureSpec, ...]:
    """Describe the switches with this server's own defaults and limits, and the reasons why some cannot be used."""
    specs = []
    for spec in SPECS:
        maximum = config.max_num_seqs if spec.name == "max_num_seqs" else spec.maximum
        specs.append(
            msgspec.structs.replace(
                spec,
                default=getattr(defaults, spec.name),
                maximum=maximum,
                available=spec.name not in unavailable,
                unavailable_reason=unavailable.get(spec.name),
            )
        )
    return tuple(specs)


def _sample(logits: Tensor, requests: list[Request], greedy: Tokens | None) -> sampler.Sampled:
    """Choose a token for each row; where memory runs out, for half of the rows at a time."""
    try:
        return sampler.sample(logits, requests, greedy=greedy)
    except Exception as error:
        if len(requests) < 2 or not is_out_of_memory(error):
            raise
        if logits.device.type == "cuda":
            torch.cuda.empty_cache()
    half = len(requests) // 2
    parts = (_sample(logits[:half], requests[:half], None), _sample(logits[half:], requests[half:], None))
    return sampler.Sampled(
        tokens=parts[0].tokens + parts[1].tokens,
        logprobs=parts[0].logprobs + parts[1].logprobs,
        top=parts[0].top + parts[1].top,
    )


def _handles(requests: list[Request]) -> list[int]:
    return [request.handle for request in requests]
