"""The engine: scheduler, cache, model and sampler put together, one step at a time. Knows no process and no socket."""

from __future__ import annotations

import queue
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
from torch import Tensor

from inference_server import features as feature_rules
from inference_server.engine import compiled, loader, rejection, sampler
from inference_server.engine.attention import PagedKVTensors, no_fp8, slots_in_8_bits
from inference_server.engine.block_pool import ROOT_HASH
from inference_server.engine.cpu import path as fast_path
from inference_server.engine.gpu import path as gpu_path
from inference_server.engine.kv_cache import KVCache
from inference_server.engine.llama import UnsupportedError
from inference_server.engine.loader import LoadedModel, Progress
from inference_server.engine.memory import available_bytes, available_host_bytes, is_out_of_memory
from inference_server.engine.quantization import packing, planes
from inference_server.engine.quantization.precision import Precision
from inference_server.engine.quantization.variants import Layout, WeightFormat, WeightVariants, format_of
from inference_server.engine.rejection import Verified
from inference_server.engine.request import Request
from inference_server.engine.response_cache import Answer, ResponseCache
from inference_server.engine.runner import ModelRunner, Runner, WeightReader
from inference_server.engine.sampler import DeviceTokens, Tokens
from inference_server.engine.scheduler import Scheduled, Scheduler, StepPlan
from inference_server.engine.sleeping import Freed, Sleeper, SleepError, Stopwatch
from inference_server.engine.speculation import available, eagle_head
from inference_server.engine.speculation.eagle_head import EagleHead
from inference_server.engine.speculation.policy import Speculation
from inference_server.engine.structured import Grammars, StructureError
from inference_server.engine.work import step_work
from inference_server.features import SPECS, WEIGHT_FEATURES, FeatureError, Features, FeatureValue
from inference_server.kv_operations import Operation, as_event
from inference_server.models import heads, locate
from inference_server.models.errors import ModelError
from inference_server.protocol import (
    Capacity,
    CommandFailed,
    EngineConfig,
    FeaturesApplied,
    FeatureSpec,
    FeaturesSettled,
    KvEvents,
    KvUsage,
    ModelInfo,
    Notice,
    Origin,
    RequestCancelled,
    RequestFailed,
    SampledTokens,
    StepEvent,
    StepReport,
    StepWork,
    Submit,
    TaskProgress,
)

if TYPE_CHECKING:  # importing it compiles the kernels
    from inference_server.engine.cpu.runner import FastRunner
    from inference_server.engine.gpu.runner import GpuRunner

MAX_HOST_BYTES = 8 << 30
"""Host memory that preempted requests may be swapped to, at most."""
REQUEST_OVERRIDES = frozenset(
    {"prefix_cache_read", "prefix_cache_write", "response_cache", "speculation", "num_speculative_tokens"}
)
"""Features that a request may set for itself."""
STEPS_UNTIL_LARGER = 64
"""After memory ran out, steps of half the size are tried again after so many without trouble."""
CPU_KV_BYTES = 1 << 30
"""KV memory on a CPU unless told otherwise: 23,000 positions of the default model in float32."""


PACKED_SHARE = 4
"""Packed weights may take one part in so many of the host's memory that is free at the start, unless told otherwise."""
SPARE_DEVICE_BYTES = 1 << 30
"""What packed weights leave free on a GPU, for steps and what they record."""


Wait = Literal["weights", "kernels"]
"""What a switch may wait for."""
News = Notice | RequestFailed | TaskProgress | KvEvents | FeaturesApplied | FeaturesSettled | CommandFailed


class RequestError(ValueError):
    """A request that cannot be served as asked; the message says why and what to change."""


@dataclass(slots=True)
class _Settling:
    """Requests that a switch interrupted and that have not emitted a token since."""

    epoch: int
    requests: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Deferred:
    """A switch that waits for weights to be packed, or for kernels to be compiled."""

    correlation: int
    values: dict[str, bool | int | str]


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
    sampling: list[Scheduled]
    """The items of the plan that tokens are chosen for."""
    proposers: str
    """Who proposed tokens that the step verifies."""
    draft_ns: int
    kv_events: list[Operation]
    ahead: bool = False
    """It was launched before the tokens of the step before it were known."""
    novel: bool = False
    """Something was compiled or captured for it, so its time says nothing about other steps."""
    booked: bool = False
    """The scheduler knows what the step computes; only its tokens are missing."""
    after: tuple[int, int, KvUsage] | None = None
    """Running and waiting requests and the KV cache after the step, where the next one was scheduled since."""


@dataclass(slots=True)
class _Unreported:
    """What attempts to launch a step did that found no room in memory; the next step's report tells."""

    started: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    events: list[Operation] = field(default_factory=list)


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

    def move(self, phase: str, to: str, time_ns: int) -> None:
        """Count some of the time of a phase as another's."""
        setattr(self, phase, getattr(self, phase) - time_ns)
        setattr(self, to, getattr(self, to) + time_ns)

    def end(self, phase: str) -> int:
        """Add the time since the last call to a phase, and return now."""
        now = time.monotonic_ns()
        setattr(self, phase, getattr(self, phase) + now - self.last)
        self.last = now
        return now


class Engine:
    """Serves one model. Call :meth:`step` while :meth:`has_work`.

    Parameters
    ----------
    config : EngineConfig
    loaded : LoadedModel
    compilation : Compilation, optional
        Of the CPU kernels, where it was started beforehand.
    draft : LoadedModel, optional
        A smaller model that can propose tokens.
    head : EagleHead, optional
        Made for the model, to propose tokens.
    progress : callable, optional
        Told how far weights are packed that the first settings ask for.
    """

    def __init__(
        self,
        config: EngineConfig,
        loaded: LoadedModel,
        compilation: fast_path.Compilation | None = None,
        draft: LoadedModel | None = None,
        head: EagleHead | None = None,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.config = config
        self.loaded = loaded
        self.epoch = 0
        self.draft = draft
        self._longest = min(config.max_model_len or loaded.max_model_len, loaded.max_model_len)
        """What the model, or whoever started the engine, allows; the KV memory may hold less."""
        self.capacity = self._capacity()
        tensors = PagedKVTensors(self.capacity.num_blocks, config.block_size, loaded.device, loaded.dtype)
        tensors.reserve(loaded.kv_shapes)
        self.runner = ModelRunner(loaded.model, tensors)
        self.fast: FastRunner | GpuRunner | None = None
        self.gpu: GpuRunner | None = None
        """The fast path, where it is one on a GPU."""
        unavailable = {}
        # In 8 bits the same memory holds longer texts.
        longest = min(self._longest, self._slots(Features(kv_cache_dtype="int8")))
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
        self._proposers = available.proposers(loaded, draft, head, self.runner, self.fast, self.capacity)
        self.speculation = Speculation(self._proposers.by_name)
        if "early_exit" in self._proposers.unavailable:
            unavailable["early_exit_layers"] = self._proposers.unavailable["early_exit"]
        defaults = Features(
            block_size=config.block_size,
            max_num_seqs=min(Features().max_num_seqs, config.max_num_seqs),
            early_exit_layers=max(2 * loaded.num_layers // 3, 1),
            fast_path=self.fast is not None,
            cuda_graphs=self.gpu is not None,
            overlap=self.gpu is not None,
        )
        self._news: list[Notice | RequestFailed | FeaturesApplied | FeaturesSettled | CommandFailed] = []
        self._progress: queue.SimpleQueue[TaskProgress | Notice] = queue.SimpleQueue()
        no_choices = {"speculation": self._proposers.unavailable}
        if (refusal := no_fp8(loaded.device)) is not None:
            no_choices |= {"kv_cache_dtype": {"fp8": refusal}, "weight_precision": {"fp8": refusal}}
        self.specs = _specs_here(defaults, config, loaded.num_layers, unavailable, no_choices)
        self.specs_by_name = {spec.name: spec for spec in self.specs}
        self._recompute_features = {spec.name for spec in self.specs if spec.cost == "recompute"}
        self.features = self._first_features(defaults)
        layout: Layout = planes if loaded.device.type == "cuda" else packing
        self.weights = WeightVariants(
            loaded.model,
            None if self.fast is None else self.fast.architecture,
            self._packed_budget(),
            self._progress.put,
            loaded.rounded,
            loaded.located.path,
            layout,
            *(() if self.gpu is None else (self.gpu.compile_for,)),
        )
        """Copies of the weights in other precisions."""
        self._host_bytes = min(MAX_HOST_BYTES, available_host_bytes() // 8)
        self.scheduler = Scheduler(self._new_cache(self.features), loaded.eos_token_ids)
        self._lay_out(self.features)
        self.requests: dict[int, Request] = {}
        self._arrivals = 0
        self._settling: list[_Settling] = []
        self._responses = ResponseCache()
        self._grammars = Grammars(loaded.located.path, loaded.config.vocab_size, loaded.eos_token_ids)
        self._replays: list[tuple[Request, Answer]] = []
        self.work: StepWork | None = None
        """What a step has to read and compute with the weights in use."""
        self.telemetry_ns = 0
        """What building telemetry has cost the engine's thread."""
        self.busy_ns = 0
        """What steps have cost it, all in all."""
        self._busy_since_ns = time.monotonic_ns()
        self._flight: _Flight | None = None
        self._landed: deque[tuple[StepReport, list[FeaturesSettled]]] = deque()
        self._unreported = _Unreported()
        self._sleeper = Sleeper(loaded.device)
        self.asleep = False
        """Its memory was given back; requests wait."""
        self._memory = _MemoryLimit()
        self.precision = Precision(self)
        """Measures what a precision costs."""
        self._deferred: dict[Wait, _Deferred] = {}
        """Switches by what they wait for."""
        self._start_weights(progress)
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
        draft = None
        if config.draft_model is not None:
            draft = loader.load(locate.locate(config.draft_model, progress), device, dtype, progress)
        progress("reserving the KV cache", 0.95, "")
        if compilation is not None and compilation.running:
            progress("compiling the CPU kernels", 0.96, "once on this machine")
        folder = Path(config.eagle_head) if config.eagle_head is not None else heads.packaged(located)
        head = eagle_head.load(folder) if folder is not None else None
        return cls(config, loaded, compilation, draft, head, progress)

    def _first_features(self, defaults: Features) -> Features:
        """The features to start with: what was asked for, but for what this model cannot do.

        A model may be loaded while switches stand as they did for another one.
        """
        try:
            return feature_rules.apply(defaults, self.config.features, self.specs_by_name)
        except FeatureError:
            features = defaults
        refused = dict(self.config.features)
        for last in (False, True):  # what one excludes another may allow, later in the list
            for name, value in list(refused.items()):
                try:
                    features = feature_rules.apply(features, {name: value}, self.specs_by_name)
                    del refused[name]
                except FeatureError as error:
                    if last:
                        spelled = str(value).lower() if isinstance(value, bool) else value
                        kept = getattr(features, name, None)
                        text = f"The engine starts with {name}={kept}, not {spelled}: {error}"
                        self._news.append(Notice("warning", text))
        return features

    @property
    def cache(self) -> KVCache:
        """The block tables in use."""
        return self.scheduler.cache

    def _new_cache(self, features: Features) -> KVCache:
        slots = self._slots(features)
        host_blocks = self._host_bytes // (self._kv_bytes_per_token(features) * features.block_size)
        cache = KVCache(slots // features.block_size, features.block_size, host_blocks)
        cache.contiguous = features.kv_layout == "contiguous"
        if self.weights.in_use is not None:
            cache.root = self.weights.in_use.label.encode()
        if features.instrumentation == "full":
            cache.pool.listen()
        return cache

    def _slots(self, features: Features) -> int:
        """Positions that the KV memory holds."""
        slots = self.capacity.num_blocks * self.capacity.block_size
        if features.kv_cache_dtype == "master":
            return slots
        shapes = [(heads, size) for heads, key, value in self.loaded.kv_shapes for size in (key, value)]
        return slots_in_8_bits(slots, self.loaded.dtype, shapes)

    def _kv_bytes_per_token(self, features: Features) -> int:
        """Memory of one position in all layers."""
        if features.kv_cache_dtype == "master":
            return self.loaded.kv_bytes_per_token
        return sum(heads * (key + value + 8) for heads, key, value in self.loaded.kv_shapes)

    @property
    def max_model_len(self) -> int:
        """Longest text that can be served as things are: of prompt and answer together."""
        return min(self._longest, self._slots(self.features) // self.features.block_size * self.features.block_size)

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

    def _packed_budget(self) -> int:
        """What packed weights may take: what was asked for, or of a GPU's memory what the keys and values left."""
        if self.config.packed_bytes is not None:
            return self.config.packed_bytes
        if self.loaded.device.type == "cuda":
            return max(available_bytes(self.loaded.device) - SPARE_DEVICE_BYTES, 0)
        return available_host_bytes() // PACKED_SHARE

    def _capacity(self) -> Capacity:
        loaded, config = self.loaded, self.config
        per_token = loaded.kv_bytes_per_token
        draft_per_token = self.draft.kv_bytes_per_token if self.draft is not None else 0
        wanted = config.kv_bytes
        if wanted is None:
            if loaded.device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(loaded.device)
                wanted = int((free - (config.packed_bytes or 0)) * 0.85)
            else:
                wanted = min(CPU_KV_BYTES, available_host_bytes() // 4)
        # More blocks than every request at its longest could fill would only take memory from others.
        useful = config.max_num_seqs * -(-self._longest // config.block_size)
        num_blocks = min(wanted // ((per_token + draft_per_token) * config.block_size), useful)
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
            max_model_len=min(self._longest, num_blocks * config.block_size),
        )

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        """Queue the samples of a request.

        Raises
        ------
        RequestError
            If it could never be served as asked.
        """
        sampling, limit = message.sampling, self.max_model_len
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
        uses_response_cache = overrides.pop("response_cache", self.features.response_cache)
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
                    **overrides,
                )
            )
        self._arrivals += len(samples)
        self.requests.update((request.handle, request) for request in samples)
        if uses_response_cache:
            samples = [request for index, request in enumerate(samples) if not self._replay(request, index)]
            if not samples:
                return
        first, rest = samples[0], tuple(samples[1:])
        first.group = rest
        for request in rest:
            request.parent = first
        self.scheduler.add(first)

    def _overrides(self, message: Submit) -> dict[str, Any]:
        """Check the feature values that a request sets for itself."""
        checked: dict[str, FeatureValue] = {}
        for name, value in message.overrides.items():
            if name not in REQUEST_OVERRIDES:
                allowed = ", ".join(sorted(REQUEST_OVERRIDES))
                raise RequestError(f"a request cannot set the feature {name!r} for itself; it can set {allowed}")
            try:
                checked[name] = feature_rules.validate(name, value, self.specs_by_name)
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
        self._unreported = _Unreported()
        return failed

    def woke(self) -> None:
        """Say that the engine had nothing to do until now."""
        self._busy_since_ns = time.monotonic_ns()

    def has_work(self) -> bool:
        """Whether a step has something to compute."""
        if self.asleep:
            return bool(self._landed)
        return bool(self._replays or self._landed) or self._flight is not None or self.scheduler.has_work()

    def take_news(self) -> list[News]:
        """Return what happened since the last call beside tokens.

        That is memory that ran out, requests ended by it, how far tasks are, and switches that waited for weights.
        """
        self._take_up_deferred()
        news: list[News] = [*self._news]
        self._news.clear()
        if not self.has_work() and (operations := self._unreported.events + self._take_kv_events()):
            self._unreported.events = []
            news.append(
                as_event(self.scheduler.step, operations)
            )  # no step will come to report them: after a cancellation, or a switch of the layout
        while not self._progress.empty():
            news.append(self._progress.get())
        return news

    @property
    def waits_for_weights(self) -> bool:
        """Whether a switch or a measurement waits for weights or kernels; :meth:`take_news` then completes it."""
        return bool(self._deferred) or self.precision.waits

    def tell(self, news: TaskProgress | Notice) -> None:
        """Add to what :meth:`take_news` returns; from any thread."""
        self._progress.put(news)

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
        if self.weights.packing:
            raise SleepError("Weights are being packed; let the engine sleep after that.")
        stopwatch = Stopwatch(self._sleeper)
        self._land()
        tensors = self.runner.tensors
        if self.loaded.device.type == "cuda":
            self.weights.drop()
        weights = [*self.loaded.model.parameters(), *self.loaded.model.buffers(), *self._proposers.weights]
        weights += self.weights.tensors
        if self.gpu is not None:
            self.gpu.forget_graphs()
        self.speculation.forget()
        host_bytes = self._sleeper.release(weights, [*tensors.whole, *self._proposers.caches])
        self._restart_cache(self.features)
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

        A switch to weights that are not packed yet, or to keys and values whose kernels are not compiled yet, waits for
        them: nothing is returned, the engine serves on as it is, and :meth:`take_news` has the answer once they are
        ready. A later switch of the same takes its place.

        Raises
        ------
        FeatureError
            If a value is refused; then nothing was changed.
        """
        begin = time.monotonic_ns()
        after = feature_rules.apply(self.features, values, self.specs_by_name)
        names = feature_rules.changed(self.features, after)
        for wait, deferred in list(self._deferred.items()):
            for what, group in (("weights", WEIGHT_FEATURES), ("keys and values", ("kv_cache_dtype",))):
                if not values.keys().isdisjoint(group) and not deferred.values.keys().isdisjoint(group):
                    self._refuse_deferred(wait, f"A later switch of the {what} took its place.")
        if not self.weights.ready(format_of(after)):
            self.precision.prepare(after)
            self._deferred["weights"] = _Deferred(correlation, values)
            return []
        if self.gpu is not None and not self.gpu.ready_for(after.kv_cache_dtype):
            self._deferred["kernels"] = _Deferred(correlation, values)
            return []
        interrupted: set[int] = set()
        lost = 0
        if not self._recompute_features.isdisjoint(names):
            self._land()
            interrupted = {request.handle for request in self.scheduler.running}
            lost = self._restart_cache(after)
        self._change_weights(after)
        self.features = after
        self.speculation.switched(names)
        self._compile_where_asked()
        if "instrumentation" in names:
            if after.instrumentation == "full":
                self.cache.pool.listen((request.handle, request.blocks) for request in self.requests.values())
            else:
                self.cache.pool.events = None
        self.epoch += bool(names)
        applied = FeaturesApplied(
            correlation=correlation,
            epoch=self.epoch,
            values=after.as_dict(),
            changed=names,
            cost=feature_rules.cost_of(names, self.specs_by_name),
            apply_ns=time.monotonic_ns() - begin,
            applied_at_ns=time.monotonic_ns(),
            preempted=len(interrupted),
            recompute_tokens=lost,
        )
        if applied.cost != "free":  # other weights, or another cache, may be in use now
            self.work = self._step_work()
            applied = msgspec.structs.replace(applied, work=self.work, max_model_len=self.max_model_len)
        if interrupted:
            self._settling.append(_Settling(self.epoch, interrupted))
            return [applied]
        return [applied, FeaturesSettled(self.epoch, applied.applied_at_ns)]

    def _start_weights(self, progress: Progress) -> None:
        """Read the weights that the first settings ask for."""
        wanted = format_of(self.features)
        if wanted is not None:
            self.precision.calibrate_where_needed(wanted)
            self.weights.build(wanted, lambda fraction, what: progress("packing weights", fraction, what))
            self._read(wanted)
        if self.gpu is not None:
            self.gpu.compile_with(self.features.kv_cache_dtype)
        self.work = self._step_work()

    def _step_work(self) -> StepWork | None:
        work = step_work(self.loaded, self.weights.in_use)
        if work is None:
            return None
        return msgspec.structs.replace(work, kv_bytes_per_token=self._kv_bytes_per_token(self.features))

    def _change_weights(self, after: Features) -> None:
        before, wanted = format_of(self.features), format_of(after)
        if before == wanted:
            return
        self._land()
        self._read(wanted)
        # What was answered, or is being answered, came from other weights.
        self._responses.clear()
        for request in self.requests.values():
            request.response_key = None

    def _read(self, wanted: WeightFormat | None) -> None:
        variant = self.weights.use(wanted)
        if isinstance(self.fast, WeightReader):
            self.fast.use(variant)
        self.scheduler.change_weights(ROOT_HASH if variant is None else variant.label.encode())

    def _refuse_deferred(self, wait: Wait, why: str) -> None:
        """Refuse the switch that waits for something, if there is one; weights are packed no further."""
        deferred = self._deferred.pop(wait, None)
        if deferred is not None:
            if wait == "weights":
                self.weights.cancel()
            self._news.append(CommandFailed(deferred.correlation, why))

    def give_up_packing(self) -> None:
        """Stop packing weights; a switch that waits for them is refused."""
        self._refuse_deferred("weights", "Packing the weights was cancelled.")
        self.weights.cancel()

    def _take_up_deferred(self) -> None:
        """Complete the switches that waited for something that is ready by now."""
        for wait, deferred in list(self._deferred.items()):
            if wait == "weights":
                busy, take_error = self.weights.packing, self.weights.take_error
            else:
                assert self.gpu is not None, "kernels of the CPU are not waited for"
                busy = self.gpu.compiling
                take_error = partial(self.gpu.take_error, str(deferred.values["kv_cache_dtype"]))
            if busy:
                continue
            del self._deferred[wait]
            error = take_error()
            if error is not None:
                self._news.append(CommandFailed(deferred.correlation, error))
                continue
            try:
                self._news += self.set_features(deferred.correlation, deferred.values)
            except FeatureError as refusal:
                self._news.append(CommandFailed(deferred.correlation, str(refusal)))

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
                f"{longest} that a running request may need; wait for it to end, or choose a smaller block size or "
                "kv_cache_dtype int8"
            )
        lost = self.scheduler.replace_cache(cache)
        self.runner.tensors.transfer(before.transfers)  # nothing but giving up what was swapped out
        before.transfers = []
        self._lay_out(after)
        # Coming from "off" nothing was cached, but now everything that runs is computed once more.
        uncached = not self.features.kv_cache and after.kv_cache
        return sum(request.num_tokens for request in self.scheduler.running) if uncached else lost

    def _lay_out(self, features: Features) -> None:
        """Use the KV memory as ``features`` say; what it held is lost."""
        tensors = self.runner.tensors
        tensors.block_size = features.block_size
        if tensors.precision != features.kv_cache_dtype:
            tensors.store_as(features.kv_cache_dtype)

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
            ahead = self._launch(phases, ahead=True)
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
            # What is proposed next, and what of it is computed, depends on the tokens.
            and not flight.proposers
            and not self.speculation.waits_for_tokens((item.request for item in flight.sampling), features)
            and not any(sampler.depends_on_its_output(item.request) for item in flight.sampling)
        )

    def _launch(self, phases: _Phases, *, ahead: bool = False) -> _Flight | None:
        """Schedule a step and start its forward pass; ``None`` if there is nothing to compute.

        Of a step that is launched ``ahead`` of another's completion only one attempt is made: where memory runs out
        late, it has left tokens on the device in place of those that the next attempt would begin with.
        """
        features, earlier = self.features, self._unreported
        while True:
            if not self.scheduler.has_work():
                return None
            plan = self.scheduler.schedule(
                self._memory.apply(features), self.speculation.wishes(features, self.scheduler.running)
            )
            if not plan.items:
                self.cache.transfers[:0] = plan.transfers
                return None
            earlier.events += self._take_kv_events()
            phases.end("schedule")
            phases.move("schedule", "forward", self.speculation.wishing_ns)
            plan.started[:0], plan.preempted[:0] = earlier.started, earlier.preempted
            runner = self._runner(features)
            if self.gpu is not None:
                self.gpu.use_graphs = features.cuda_graphs
            try:
                proposers = self.speculation.propose(plan, features)
                phases.end("forward")
                self.speculation.before_forward(runner, plan, features)
                packed = runner.prepare(plan)
                phases.end("prepare")
                logits = runner.forward(plan, packed)
                self.speculation.after_forward(runner, plan, features)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(plan, features, error)
                earlier.started, earlier.preempted = plan.started, plan.preempted
                if ahead:
                    return None
            else:
                break
            finally:
                phases.end("forward")
        self._memory.succeeded()
        self._unreported = _Unreported()
        return _Flight(
            plan=plan,
            features=features,
            epoch=self.epoch,
            fast=runner is self.fast,
            path=self._path(runner, plan),
            logits=logits,
            greedy=runner.greedy,
            sampling=[item for item in plan.items if item.sample],
            proposers=proposers,
            draft_ns=self.speculation.spent_ns,
            kv_events=earlier.events,
            ahead=ahead,
            novel=runner is self.gpu and self.gpu is not None and self.gpu.novel,
        )

    def _path(self, runner: Runner, plan: StepPlan) -> str:
        """What step records call the code and the weights that a step ran with."""
        variant = self.weights.in_use
        words = runner.label if variant is None else f"{runner.label} {variant.label}"
        return words if plan.use_cache else f"{words}, no KV cache"

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
        if isinstance(pending, DeviceTokens):
            pending.wait()
            device_ns = pending.device_ns
            phases.end("forward")
        # A request may have ended since the step was launched: by a stop token of the step before, or cancelled.
        alive = [place for place, item in enumerate(flight.sampling) if item.request.finish_reason is None]
        before = [len(item.request.tokens) for item in flight.sampling]
        chosen = _verify(flight.logits, flight.sampling, pending)
        phases.end("sample")
        if not flight.booked:
            self.scheduler.book(plan, flight.features)
        self.scheduler.resolve(plan, chosen.tokens, flight.features)
        tokens = SampledTokens(request=[], index=[], token_id=[], logprob=[], top=[], finish=[])
        accepted: dict[int, int] = {}
        for place in alive:
            item = flight.sampling[place]
            request = item.request
            count = len(request.tokens) - before[place]  # fewer than chosen where one of them ended the request
            logprobs, top = chosen.logprobs[place][:count], chosen.top[place][:count]
            first = before[place] - request.prompt_len
            tokens.request.extend([request.handle] * count)
            tokens.index.extend(range(first, first + count))
            tokens.token_id.extend(chosen.tokens[place][:count])
            tokens.logprob.extend(logprobs)
            tokens.top.extend(top)
            tokens.finish.extend([None] * (count - 1) + [request.finish_reason])
            if flight.proposers:
                tokens.origin.extend(_origins(item, len(chosen.tokens[place]))[:count])
            if item.drafts:
                accepted[request.handle] = len(chosen.tokens[place]) - 1
            if request.response_key is not None:
                request.logprobs += logprobs
                request.top += top
            if request.finish_reason is not None:
                self._remember(request)
                self.requests.pop(request.handle, None)
        step_ns = None if flight.novel else time.monotonic_ns() - begin - flight.draft_ns
        self.speculation.learn(plan, flight.features, accepted, step_ns, flight.draft_ns, ahead=flight.ahead)
        settled = self._settle(tokens.request)
        end = phases.end("update")
        self.busy_ns += end - begin + phases.before
        self._busy_since_ns = end
        if plan.use_cache and len(plan.items) == plan.num_tokens:
            self.precision.note_step(flight.path, len(plan.items), end - begin)
        event = self._step_event(flight, begin, end, phases, device_ns, accepted)
        report = StepReport(
            step=event,
            tokens=tokens,
            preempted=_handles(plan.preempted),
            started=_handles(plan.started),
            cached=[request.cached_prompt_tokens for request in plan.started],
            seeds=[request.seed for request in plan.started],
            begin_ns=begin,
            verified=list(accepted),
            drafted=[len(item.drafts) for item in flight.sampling if item.request.handle in accepted],
            accepted=list(accepted.values()),
            kv_events=self._kv_events(flight),
        )
        self.telemetry_ns += time.monotonic_ns() - end
        return report, settled

    def _step_event(
        self,
        flight: _Flight,
        begin: int,
        end: int,
        phases: _Phases,
        device_ns: int | None,
        accepted: dict[int, int],
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
            draft_ns=flight.draft_ns,
            attention_ns=attention_ns,
            speculation=flight.proposers,
            drafted=[len(item.drafts) for item in plan.items] if flight.proposers else [],
            accepted=[accepted.get(item.request.handle, 0) for item in plan.items] if flight.proposers else [],
        )

    def _kv_events(self, flight: _Flight) -> KvEvents | None:
        operations = flight.kv_events + self._take_kv_events()
        if not operations or self.features.instrumentation != "full":
            return None
        return as_event(flight.plan.step, operations)

    def _occupancy(self) -> tuple[int, int, KvUsage]:
        return len(self.scheduler.running), len(self.scheduler.waiting), self.cache.usage()

    def _land(self) -> None:
        """Complete a step that was launched ahead; :meth:`step` returns its report next."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            phases = _Phases(self._busy_since_ns)
            self._landed.append(self._complete(flight, phases.last, phases))

    def _take_kv_events(self) -> list[Operation]:
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


def _specs_here(
    defaults: Features,
    config: EngineConfig,
    num_layers: int,
    unavailable: dict[str, str],
    no_choices: dict[str, dict[str, str]],
) -> tuple[FeatureSpec, ...]:
    """Describe the switches with this server's own defaults and limits, and the reasons why some cannot be used."""
    specs = []
    for spec in SPECS:
        limits = {"max_num_seqs": config.max_num_seqs, "early_exit_layers": max(num_layers - 1, 1)}
        maximum = limits.get(spec.name, spec.maximum)
        specs.append(
            msgspec.structs.replace(
                spec,
                default=getattr(defaults, spec.name),
                maximum=maximum,
                available=spec.name not in unavailable,
                unavailable_reason=unavailable.get(spec.name),
                unavailable_choices=no_choices.get(spec.name, {}),
            )
        )
    return tuple(specs)


def _verify(logits: Tensor, items: list[Scheduled], greedy: Tokens | None) -> Verified:
    """Choose the tokens of each item; where memory runs out, for half of the items at a time."""
    try:
        return rejection.verify(logits, items, greedy)
    except Exception as error:
        if len(items) < 2 or not is_out_of_memory(error):
            raise
        if logits.device.type == "cuda":
            torch.cuda.empty_cache()
    half = len(items) // 2
    rows = sum(item.num_sampled for item in items[:half])
    parts = (_verify(logits[:rows], items[:half], None), _verify(logits[rows:], items[half:], None))
    return Verified(
        tokens=parts[0].tokens + parts[1].tokens,
        logprobs=parts[0].logprobs + parts[1].logprobs,
        top=parts[0].top + parts[1].top,
    )


def _origins(item: Scheduled, count: int) -> list[int]:
    """:class:`Origin` of each of ``count`` tokens that were chosen for an item."""
    if not item.drafts:
        return [int(Origin.PLAIN)] * count
    last = Origin.BONUS if count > len(item.drafts) else Origin.CORRECTED
    return [int(Origin.ACCEPTED)] * (count - 1) + [int(last)]


def _handles(requests: list[Request]) -> list[int]:
    return [request.handle for request in requests]
