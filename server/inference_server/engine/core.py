"""The engine: scheduler, cache, model and sampler put together, one step at a time. Knows no process and no socket."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil
import torch

from inference_server import features as feature_rules
from inference_server.engine import loader, sampler
from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.cpu.architecture import UnsupportedError
from inference_server.engine.cpu.path import Compilation
from inference_server.engine.cpu.path import start as start_fast_path
from inference_server.engine.kv_cache import KVCache
from inference_server.engine.loader import LoadedModel, Progress
from inference_server.engine.request import Request
from inference_server.engine.runner import ModelRunner
from inference_server.engine.scheduler import Scheduler
from inference_server.features import SPECS, FeatureError, Features
from inference_server.models import locate
from inference_server.models.errors import ModelError
from inference_server.protocol import (
    Capacity,
    EngineConfig,
    FeaturesApplied,
    FeatureSpec,
    FeaturesSettled,
    ModelInfo,
    RequestCancelled,
    RequestFailed,
    SampledTokens,
    StepEvent,
    StepReport,
    Submit,
)

CPU_KV_BYTES = 1 << 30
"""KV memory on a CPU unless told otherwise: 23,000 positions of the default model in float32."""


class RequestError(ValueError):
    """A request that cannot be served as asked; the message says why and what to change."""


@dataclass(slots=True)
class _Settling:
    """Requests that a switch interrupted and that have not emitted a token since."""

    epoch: int
    requests: set[int] = field(default_factory=set)


class Engine:
    """Serves one model. Call :meth:`step` while :meth:`has_work`.

    Parameters
    ----------
    config : EngineConfig
    loaded : LoadedModel
    compilation : Compilation, optional
        Of the CPU kernels, where it was started beforehand.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel, compilation: Compilation | None = None) -> None:
        self.config = config
        self.loaded = loaded
        self.specs: tuple[FeatureSpec, ...] = SPECS
        self.epoch = 0
        self.capacity = self._capacity()
        tensors = PagedKVTensors(self.capacity.num_blocks, config.block_size, loaded.device, loaded.dtype)
        tensors.reserve(loaded.kv_shapes)
        self.cache = KVCache(self.capacity.num_blocks, config.block_size)
        self.scheduler = Scheduler(self.cache, loaded.eos_token_ids)
        self.runner = ModelRunner(loaded.model, tensors)
        self.fast: Any = None
        """The :class:`~inference_server.engine.cpu.runner.FastRunner`, where the model has one."""
        initial = Features()
        try:
            self.fast = start_fast_path(loaded.model, self.runner, self.capacity.max_model_len, compilation=compilation)
        except UnsupportedError as error:
            reason = f"The fast path cannot run this model: {error}."
            self.specs = tuple(
                msgspec.structs.replace(spec, default=False, available=False, unavailable_reason=reason)
                if spec.name == "fast_path"
                else spec
                for spec in SPECS
            )
            initial = msgspec.structs.replace(initial, fast_path=False)
        self._specs = {spec.name: spec for spec in self.specs}
        self.features = feature_rules.apply(initial, config.features, self._specs)
        self.requests: dict[int, Request] = {}
        self._arrivals = 0
        self._settling: list[_Settling] = []

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
        compilation = Compilation() if device.type == "cpu" else None
        located = locate.locate(config.model, progress)
        loaded = loader.load(located, device, dtype, progress)
        progress("reserving the KV cache", 0.95, "")
        if compilation is not None and compilation.running:
            progress("compiling the CPU kernels", 0.96, "once on this machine")
        return cls(config, loaded, compilation)

    # -- what is served ------------------------------------------------------------------------------------------------

    def model_info(self) -> ModelInfo:
        """Describe the model for the front and the views."""
        loaded = self.loaded
        heads, head_dim, _ = loaded.kv_shapes[0]
        device = loaded.device
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
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
                wanted = min(CPU_KV_BYTES, psutil.virtual_memory().available // 4)
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
        if sampling.json_schema is not None:
            raise RequestError("structured output (json_schema) is not available")
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
                )
            )
        self._arrivals += len(samples)
        first, rest = samples[0], tuple(samples[1:])
        first.group = rest
        for request in rest:
            request.parent = first
        self.requests.update((request.handle, request) for request in samples)
        self.scheduler.add(first)

    def cancel(self, handle: int) -> RequestCancelled | None:
        """End a request; ``None`` if it had ended already."""
        request = self.requests.pop(handle, None)
        if request is None:
            return None
        self.scheduler.cancel(request)
        return RequestCancelled(handle)

    def fail_all(self, error: str) -> list[RequestFailed]:
        """End every request after an internal error, leaving the engine clean."""
        failed = [RequestFailed(handle, error) for handle in self.requests]
        for request in self.requests.values():
            self.scheduler.cancel(request)
        self.requests.clear()
        self._settling.clear()
        return failed

    def has_work(self) -> bool:
        """Whether a step has something to compute."""
        return self.scheduler.has_work()

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
        if after.max_num_seqs > self.capacity.max_num_seqs:
            raise FeatureError(
                f"'max_num_seqs' is at most {self.capacity.max_num_seqs} on this server, its capacity at start"
            )
        names = feature_rules.changed(self.features, after)
        interrupted: set[int] = set()
        lost = 0
        if "kv_cache" in names:
            interrupted = {request.handle for request in self.scheduler.running}
            lost = self.scheduler.recompute_all() or sum(request.num_tokens for request in self.scheduler.running)
        self.features = after
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
        if interrupted:
            self._settling.append(_Settling(self.epoch, interrupted))
            return [applied]
        return [applied, FeaturesSettled(self.epoch, applied.applied_at_ns)]

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> tuple[StepReport | None, list[FeaturesSettled]]:
        """Compute one step. Returns its report (``None`` when nothing could be scheduled) and switches that settled."""
        features, epoch = self.features, self.epoch
        t0 = time.monotonic_ns()
        plan = self.scheduler.schedule(features)
        t1 = time.monotonic_ns()
        if not plan.items:
            return None, []
        fast = features.fast_path and self.fast is not None
        runner = self.fast if fast else self.runner
        packed = runner.prepare(plan)
        t2 = time.monotonic_ns()
        logits = runner.forward(plan, packed)
        t3 = time.monotonic_ns()
        sampling = [item.request for item in plan.items if item.sample]
        sampled = sampler.sample(logits, sampling, greedy=self.fast.greedy if fast else None)
        t4 = time.monotonic_ns()
        indices = [request.num_output for request in sampling]
        reasons = self.scheduler.update(plan, sampled.tokens, features)
        tokens = SampledTokens(
            request=[request.handle for request in sampling],
            index=indices,
            token_id=sampled.tokens,
            logprob=sampled.logprobs,
            top=sampled.top,
            finish=reasons,
        )
        for request in sampling:
            if request.finish_reason is not None:
                self.requests.pop(request.handle, None)
        settled = self._settle(tokens.request)
        usage = self.cache.usage()
        t5 = time.monotonic_ns()
        event = StepEvent(
            step=plan.step,
            epoch=epoch,
            begin_ns=t0,
            schedule_ns=t1 - t0,
            prepare_ns=t2 - t1,
            forward_ns=t3 - t2,
            sample_ns=t4 - t3,
            update_ns=t5 - t4,
            end_ns=t5,
            path=runner.label if plan.use_cache else f"{runner.label}, no KV cache",
            request=[item.request.handle for item in plan.items],
            start=[item.start for item in plan.items],
            scheduled=[item.count for item in plan.items],
            kind=[int(item.kind) for item in plan.items],
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv=usage,
            idle_slots=plan.idle_slots,
        )
        report = StepReport(
            step=event, tokens=tokens, preempted=_handles(plan.preempted), started=_handles(plan.started)
        )
        return report, settled

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


def _handles(requests: list[Request]) -> list[int]:
    return [request.handle for request in requests]
