"""The switches: one immutable :class:`Features` snapshot, its description, and its validation. Imports no torch.

A step reads the snapshot once and stamps its record with the epoch, so that every measured number can be traced to
the exact settings it was measured under.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from inference_server.protocol import Cost, FeaturePreset, FeatureRelation, FeatureSpec

FeatureValue = bool | int | str

MAX_DRAFTS = 16
"""Most tokens that can be proposed for a request in one step."""
PROPOSERS = ("ngram", "draft", "early_exit", "eagle")
SPECULATION = ("off", *PROPOSERS)
PACKED_PRECISIONS = ("int8", "fp8", "int4", "int3")
WEIGHT_FEATURES = ("weight_precision", "int4_group", "int4_grid", "int4_rounding")
"""Switches that say which copy of the weights is read."""

COST_ORDER: tuple[Cost, ...] = ("free", "prebuilt", "catch-up", "recompute", "rebuild")


class FeatureError(ValueError):
    """A feature value was refused. The message names the feature, what was wrong, and what is allowed."""


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be switched while serving. Defaults are what a user wants who never opens the switchboard."""

    kv_cache: bool = True
    kv_layout: str = "paged"
    block_size: int = 16
    kv_cache_dtype: str = "master"
    prefix_cache_read: bool = True
    prefix_cache_write: bool = True
    batching: str = "continuous"
    scheduling_policy: str = "fcfs"
    chunked_prefill: bool = True
    preemption: str = "recompute"
    response_cache: bool = False
    speculation: str = "off"
    num_speculative_tokens: int = 4
    adaptive_speculation: bool = True
    early_exit_layers: int = 1
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    fast_path: bool = True
    cuda_graphs: bool = True
    overlap: bool = True
    compiled: bool = False
    weight_precision: str = "master"
    int4_group: str = "32"
    int4_grid: str = "minimum"
    int4_rounding: str = "nearest"
    instrumentation: str = "full"

    def as_dict(self) -> dict[str, FeatureValue]:
        """Return the values by name, in declaration order."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


SPECS: tuple[FeatureSpec, ...] = (
    FeatureSpec(
        name="kv_cache",
        title="KV cache",
        group="Memory",
        kind="bool",
        default=True,
        cost="recompute",
        description=(
            "Keep every token's keys and values. Off, each new token computes all tokens before it again, "
            "so a step takes longer the longer the text is."
        ),
    ),
    FeatureSpec(
        name="kv_layout",
        title="KV layout",
        group="Memory",
        kind="choice",
        choices=("paged", "contiguous"),
        default="paged",
        cost="recompute",
        description=(
            "paged: blocks on demand, anywhere, shareable. contiguous: one run of blocks for the longest that a "
            "request could get, reserved when it starts; what stays unfilled is wasted."
        ),
    ),
    FeatureSpec(
        name="block_size",
        title="Block size",
        group="Memory",
        kind="int",
        default=16,
        minimum=1,
        maximum=256,
        cost="recompute",
        description="Token positions per KV block. Larger blocks waste more of their last one and share less.",
    ),
    FeatureSpec(
        name="kv_cache_dtype",
        title="KV precision",
        group="Memory",
        kind="choice",
        choices=("master", "int8", "fp8"),
        default="master",
        cost="recompute",
        description=(
            "How keys and values are stored. master: in the type that the model computes in. int8: in 8 bits with a "
            "scale for each position and head, so that the same memory holds a longer context or more requests. fp8: "
            "the same with 8-bit floating point (e4m3), on a GPU that has it."
        ),
    ),
    FeatureSpec(
        name="prefix_cache_read",
        title="Prefix cache: read",
        group="Memory",
        kind="bool",
        default=True,
        cost="free",
        description="Start a request from the blocks that an earlier one with the same beginning left behind.",
    ),
    FeatureSpec(
        name="prefix_cache_write",
        title="Prefix cache: write",
        group="Memory",
        kind="bool",
        default=True,
        cost="free",
        description="Keep full blocks findable after their request has ended, until the memory is needed.",
    ),
    FeatureSpec(
        name="batching",
        title="Batching",
        group="Batching",
        kind="choice",
        choices=("continuous", "static", "single"),
        default="continuous",
        cost="free",
        description=(
            "continuous: requests join and leave between steps. static: a batch runs until its longest member is done. "
            "single: one request at a time."
        ),
    ),
    FeatureSpec(
        name="scheduling_policy",
        title="Scheduling policy",
        group="Batching",
        kind="choice",
        choices=("fcfs", "priority", "shortest-first"),
        default="fcfs",
        cost="free",
        description="Who runs first, and who is preempted last: by arrival, by priority, or by what is left to do.",
    ),
    FeatureSpec(
        name="chunked_prefill",
        title="Chunked prefill",
        group="Batching",
        kind="bool",
        default=True,
        cost="free",
        description="Spread a long prompt over several steps, so that requests that answer do not stall behind it.",
    ),
    FeatureSpec(
        name="preemption",
        title="Preemption",
        group="Batching",
        kind="choice",
        choices=("recompute", "swap"),
        default="recompute",
        cost="free",
        description=(
            "When the KV memory runs out, a request has to give way. recompute: its keys and values are thrown away "
            "and computed again later. swap: they wait in host memory."
        ),
    ),
    FeatureSpec(
        name="response_cache",
        title="Response cache",
        group="Caching",
        kind="bool",
        default=False,
        cost="free",
        description="Answer a request that is exactly like an earlier one, greedy or with the same seed, from memory.",
    ),
    FeatureSpec(
        name="speculation",
        title="Speculative decoding",
        group="Speculation",
        kind="choice",
        choices=SPECULATION,
        default="off",
        cost="free",
        description=(
            "Propose some tokens cheaply and let the model verify them in one step; the output keeps its distribution, "
            "and its seed. ngram: what followed the same words earlier in the text. draft: a smaller model. "
            "early_exit: this model's first layers."
        ),
    ),
    FeatureSpec(
        name="num_speculative_tokens",
        title="Tokens proposed",
        group="Speculation",
        kind="int",
        default=4,
        minimum=1,
        maximum=MAX_DRAFTS,
        cost="free",
        description="How many tokens are proposed for a request in a step, at most. Each rejected one was in vain.",
    ),
    FeatureSpec(
        name="adaptive_speculation",
        title="Adaptive speculation",
        group="Speculation",
        kind="bool",
        default=True,
        cost="free",
        description=(
            "Propose for each request as many tokens as pay, by measured acceptance and step times: none where plain "
            "steps are faster. Off, always as many as there is room for."
        ),
    ),
    FeatureSpec(
        name="early_exit_layers",
        title="Early-exit layers",
        group="Speculation",
        kind="int",
        default=1,
        minimum=1,
        maximum=256,
        cost="free",
        description="How many of the first layers propose under early_exit: few are quick, many are more often right.",
    ),
    FeatureSpec(
        name="max_num_seqs",
        title="Batch cap",
        group="Batching",
        kind="int",
        default=32,
        minimum=1,
        maximum=256,
        cost="free",
        description="How many requests may share one step.",
    ),
    FeatureSpec(
        name="max_num_batched_tokens",
        title="Token budget",
        group="Batching",
        kind="int",
        default=2048,
        minimum=1,
        maximum=65536,
        cost="free",
        description="How many token positions one step may compute. Smaller keeps decode smooth while prompts come in.",
    ),
    FeatureSpec(
        name="fast_path",
        title="Fast path",
        group="Compute",
        kind="bool",
        default=True,
        cost="prebuilt",
        description=(
            "Run the model through fused kernels that were chosen by measurement on this machine. Off, through "
            "transformers' own modules. Both read the same weights and the same cache."
        ),
    ),
    FeatureSpec(
        name="cuda_graphs",
        title="CUDA graphs",
        group="Compute",
        kind="bool",
        default=True,
        cost="prebuilt",
        description=(
            "Replay a decode step of the fast path as one recorded graph. Off, its kernels are launched one by one, "
            "and a small model waits for the host. Graphs are recorded when a batch size is first met."
        ),
    ),
    FeatureSpec(
        name="compiled",
        title="torch.compile",
        group="Compute",
        kind="bool",
        default=False,
        cost="prebuilt",
        description=(
            "Run transformers' own modules through torch.compile: fused operations, fewer launches. Switched on for "
            "the first time it compiles for up to some minutes while the model serves uncompiled. The fast path goes "
            "first: switch it off to see this one."
        ),
    ),
    FeatureSpec(
        name="weight_precision",
        title="Weight precision",
        group="Compute",
        kind="choice",
        choices=("master", *PACKED_PRECISIONS),
        default="master",
        cost="prebuilt",
        description=(
            "Which copy of the weights a step reads. master: as they were loaded. int8: one scale per output channel. "
            "fp8: the same with 8-bit floating point (e4m3), on a GPU that has it. "
            "int4: one scale per group of weights, the output layer in 8 bits. int3: the same with 8 values in place "
            "of 16, in the memory of 4 bits, to see what is lost. A copy is packed beside the master when "
            "it is first asked for, while the model serves on; the switch is done when it is ready."
        ),
    ),
    FeatureSpec(
        name="int4_group",
        title="int4: group",
        group="Compute",
        kind="choice",
        choices=("32", "64", "128"),
        default="32",
        cost="prebuilt",
        description=(
            "How many 4-bit weights share a scale. Larger groups take less memory and lose more. Where a group does "
            "not divide a layer's width, the layer has the next smaller one that does."
        ),
    ),
    FeatureSpec(
        name="int4_grid",
        title="int4: grid",
        group="Compute",
        kind="choice",
        choices=("minimum", "zero-point", "symmetric"),
        default="minimum",
        cost="prebuilt",
        description=(
            "Where the 16 values of a 4-bit group lie. minimum: from its smallest weight up, the grid of GGUF's Q4_1. "
            "zero-point: moved by whole steps, zero is one of them. symmetric: around zero, nothing but a scale."
        ),
    ),
    FeatureSpec(
        name="int4_rounding",
        title="int4: rounding",
        group="Compute",
        kind="choice",
        choices=("nearest", "gptq"),
        default="nearest",
        cost="prebuilt",
        description=(
            "How 4-bit weights are rounded. nearest: each to the next value on the grid. gptq: one column after the "
            "other on a calibration text, so that the columns that are left make up for the errors; takes minutes."
        ),
    ),
    FeatureSpec(
        name="overlap",
        title="Overlap",
        group="Compute",
        kind="bool",
        default=True,
        cost="free",
        description=(
            "Schedule and launch the next step while the GPU still computes this one; its tokens stay on the device "
            "until then. Needs the fast path; penalties and schemas need each token before the next step, and end it."
        ),
    ),
    FeatureSpec(
        name="instrumentation",
        title="Instrumentation",
        group="Measurement",
        kind="choice",
        choices=("off", "steps", "full"),
        default="full",
        cost="free",
        description=(
            "How much is measured. off: no record of steps or tokens is made, requests still work. steps: one record "
            "a step. full: tokens with the parts of their latency, and every KV block too. Its cost is shown."
        ),
    ),
)


def specs_by_name() -> dict[str, FeatureSpec]:
    """Return :data:`SPECS` keyed by feature name."""
    return {spec.name: spec for spec in SPECS}


def validate(name: str, value: object, specs: Mapping[str, FeatureSpec]) -> FeatureValue:
    """Check one value against its description.

    Raises
    ------
    FeatureError
        If the feature is unknown or unavailable here, or the value has the wrong type or is out of range.
    """
    spec = specs.get(name)
    if spec is None:
        raise FeatureError(f"There is no feature {name!r}. The features are: {', '.join(sorted(specs))}.")
    if not spec.available and value != spec.default:
        raise FeatureError(f"{name!r} cannot be changed here: {spec.unavailable_reason}")
    if spec.kind == "bool":
        if not isinstance(value, bool):
            raise FeatureError(f"{name!r} is true or false, not {value!r}.")
        return value
    if spec.kind == "int":
        if isinstance(value, bool) or not isinstance(value, int):
            raise FeatureError(f"{name!r} is a whole number, not {value!r}.")
        low, high = spec.minimum, spec.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            raise FeatureError(f"{name!r} must be between {low} and {high}, not {value}.")
        return value
    if not isinstance(value, str) or value not in spec.choices:
        raise FeatureError(f"{name!r} is one of {', '.join(spec.choices)}, not {value!r}.")
    if value in spec.unavailable_choices:
        raise FeatureError(f"{name!r} cannot be {value!r} here: {spec.unavailable_choices[value]}")
    return value


def apply(current: Features, values: Mapping[str, object], specs: Mapping[str, FeatureSpec]) -> Features:
    """Return ``current`` with ``values`` replaced, or raise :class:`FeatureError` and change nothing."""
    checked = {name: validate(name, value, specs) for name, value in values.items()}
    after = msgspec.structs.replace(current, **checked)
    for conflict in CONFLICTS:
        if all(getattr(after, name) == value for name, value in conflict.settings.items()):
            settings = " and ".join(f"{name}={_spell(value)}" for name, value in conflict.settings.items())
            raise FeatureError(
                f"{settings} exclude each other: {conflict.reason}. Switch one of them in the same request."
            )
    return after


class Conflict(msgspec.Struct, frozen=True):
    """Feature values that cannot hold together."""

    settings: dict[str, FeatureValue]
    reason: str


CONFLICTS = (
    Conflict(
        {"kv_layout": "contiguous", "prefix_cache_read": True},
        "a shared prefix lies in blocks of another request, and a contiguous reservation has to be in one piece",
    ),
    *(
        Conflict(
            {"kv_cache": False, "speculation": method},
            "without a KV cache every step computes the whole text anyway, and what was proposed besides",
        )
        for method in PROPOSERS
    ),
    *(
        Conflict(
            {"compiled": True, "weight_precision": precision},
            "torch.compile compiles the model's own modules, which multiply with the master weights",
        )
        for precision in PACKED_PRECISIONS
    ),
)


_NEEDS: dict[str, tuple[str, tuple[FeatureValue, ...], str]] = {
    "kv_layout": ("kv_cache", (True,), "nothing is kept without a KV cache"),
    "block_size": ("kv_cache", (True,), "nothing is kept without a KV cache"),
    "kv_cache_dtype": ("kv_cache", (True,), "nothing is kept without a KV cache"),
    "prefix_cache_read": ("kv_cache", (True,), "nothing is kept without a KV cache"),
    "prefix_cache_write": ("kv_cache", (True,), "nothing is kept without a KV cache"),
    "preemption": ("kv_cache", (True,), "without a KV cache its memory cannot run out"),
    "max_num_seqs": ("batching", ("continuous", "static"), "one request at a time is a batch of one"),
    "cuda_graphs": ("fast_path", (True,), "the fast path’s steps are what is recorded"),
    "overlap": ("fast_path", (True,), "only the fast path’s tokens can stay on the device"),
    "compiled": ("fast_path", (False,), "the fast path goes first"),
    "num_speculative_tokens": ("speculation", PROPOSERS, "nothing is proposed"),
    "early_exit_layers": ("speculation", ("early_exit",), "nothing is proposed by the first layers"),
    "int4_group": ("weight_precision", ("int4", "int3"), "no weight is stored in 4 bits"),
    "int4_grid": ("weight_precision", ("int4", "int3"), "no weight is stored in 4 bits"),
    "int4_rounding": ("weight_precision", ("int4", "int3"), "no weight is stored in 4 bits"),
}
"""For each feature that may make no difference: the feature and the values that it needs, and why."""


def _with_relations(spec: FeatureSpec) -> FeatureSpec:
    conflicts = tuple(
        FeatureRelation(value=conflict.settings[spec.name], other=other, values=(value,), reason=conflict.reason)
        for conflict in CONFLICTS
        if spec.name in conflict.settings
        for other, value in conflict.settings.items()
        if other != spec.name
    )
    needs: tuple[FeatureRelation, ...] = ()
    if spec.name in _NEEDS:
        other, values, reason = _NEEDS[spec.name]
        needs = (FeatureRelation(value=None, other=other, values=values, reason=reason),)
    return msgspec.structs.replace(spec, conflicts=conflicts, needs=needs)


SPECS = tuple(_with_relations(spec) for spec in SPECS)

_PRODUCTION: dict[str, FeatureValue] = {
    "kv_cache": True, "kv_layout": "paged", "block_size": 16, "prefix_cache_read": True, "prefix_cache_write": True,
    "batching": "continuous", "scheduling_policy": "fcfs", "chunked_prefill": True, "preemption": "recompute",
    "response_cache": False, "max_num_batched_tokens": 2048, "fast_path": True, "cuda_graphs": True, "overlap": True,
    "compiled": False, "speculation": "off",
}  # fmt: skip
"""What a production server's defaults come to."""

_PRESETS = (
    FeaturePreset(
        name="naive",
        title="Naive",
        description=(
            "One request at a time, every token computes its whole text again, through the library’s own modules: how "
            "a first script would do it."
        ),
        values={
            "speculation": "off", "kv_cache": False, "prefix_cache_read": False, "prefix_cache_write": False,
            "batching": "single", "chunked_prefill": False, "response_cache": False, "fast_path": False,
            "cuda_graphs": False, "overlap": False, "compiled": False,
        },
    ),
    FeaturePreset(
        name="vllm-like",
        title="vLLM-like",
        description=(
            "What a production server does when it is started with its defaults: paged KV cache, prefix cache, "
            "continuous batching, chunked prefill, fused kernels and recorded graphs."
        ),
        values=_PRODUCTION,
    ),
    FeaturePreset(
        name="everything",
        title="Everything on",
        description=(
            "Every optimization that leaves the distribution of the output alone: that of a production server, the "
            "response cache, and tokens proposed from the text so far."
        ),
        values={**_PRODUCTION, "response_cache": True, "speculation": "ngram"},
    ),
)  # fmt: skip


def presets(specs: Iterable[FeatureSpec]) -> tuple[FeaturePreset, ...]:
    """Return the presets with the values that can be set on a server that describes its features by ``specs``."""
    available = {spec.name: spec for spec in specs if spec.available}
    return tuple(
        msgspec.structs.replace(
            preset,
            values={
                name: value
                for name, value in preset.values.items()
                if name in available and value not in available[name].unavailable_choices
            },
        )
        for preset in _PRESETS
    )


def _spell(value: FeatureValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed(before: Features, after: Features) -> list[str]:
    """Names of the features whose value differs."""
    return [name for name in before.__struct_fields__ if getattr(before, name) != getattr(after, name)]


def cost_of(names: list[str], specs: Mapping[str, FeatureSpec]) -> Cost:
    """The dearest cost class among ``names``; ``"free"`` for none."""
    return max((specs[name].cost for name in names), key=COST_ORDER.index, default="free")
