"""Typed messages between the front, the engine and every client. Owns the wire format; imports no torch.

Three conversations share these types:

* front ⇄ engine over ZeroMQ, MessagePack-encoded tagged structs (:data:`ToEngine`, :data:`FromEngine`);
* front → browser or notebook over one WebSocket (:data:`ServerMessage`), made of telemetry events (:data:`Event`);
* browser or notebook → front on the same socket (:data:`ClientMessage`).

Every time is an ``int`` of nanoseconds on a monotonic clock. The engine's times are converted to the front's clock by
the front before they go any further (:class:`Pong` gives the offset), so a client compares only one clock with itself.
A request is known on the wire by its *handle*, a small integer that the front hands out; the OpenAI-style id string
travels once, in :class:`RequestEvent`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Literal

import msgspec

PROTOCOL_VERSION = 1

EXIT_LOAD_FAILED = 2
"""Exit status of an engine process whose last words were :class:`LoadFailed`."""

Cost = Literal["free", "prebuilt", "catch-up", "recompute", "rebuild"]
EngineState = Literal["starting", "loading", "ready", "asleep", "failed", "restarting", "stopped"]
RequestState = Literal["queued", "running", "preempted", "finished", "cancelled", "failed"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
Severity = Literal["info", "warning", "error"]
TrafficState = Literal["running", "stopped"]
RecordingState = Literal["recording", "finishing", "finished", "failed"]
QuantizationAction = Literal["status", "measure", "cancel", "drop", "calibrate", "save"]
Instrumentation = Literal["off", "steps", "full"]

PARTS = (
    "tokenize",
    "queue",
    "prefill",
    "recompute",
    "others_prefill",
    "stall",
    "draft",
    "forward",
    "attention",
    "sampling",
    "host",
    "transport",
    "detokenize",
    "send",
    "unexplained",
)
"""Where a token's latency went, in the order of :attr:`TokensEvent.parts`; ``docs/attribution.md`` defines each."""


class Kind(IntEnum):
    """What one request's share of a step was for."""

    PREFILL = 0
    DECODE = 1
    RECOMPUTE = 2
    """Positions computed before and thrown away: after a preemption, a switch, or with the KV cache off."""
    DRAFT = 3
    VERIFY = 4


class Origin(IntEnum):
    """How an output token came about."""

    PLAIN = 0
    """Chosen where nothing was proposed."""
    ACCEPTED = 1
    """Proposed, and what the model chose too."""
    CORRECTED = 2
    """The model's choice where the token proposed was another one."""
    BONUS = 3
    """The model's choice after everything proposed was accepted."""


class KvOp(IntEnum):
    """What happened to a KV block."""

    ALLOCATE = 0
    HASH = 1
    """A full block became findable by its prefix."""
    SHARE = 2
    """One more request references it."""
    EVICT = 3
    """A cached block was given up for an allocation."""
    FREE = 4
    """The last reference went; it is cached if it has a hash, else free."""
    COPY = 5
    """Copy on write: this newly allocated block takes the place of a shared, partly filled one in its request's block
    table; the shared one is released next."""
    RELEASE = 6
    """One of several references went."""
    RESET = 7
    """The cache is empty and has as many blocks as the field ``block`` says: a new engine, or a new layout."""


class Message(msgspec.Struct, frozen=True, omit_defaults=False, tag_field="t"):
    """Base of every message: frozen, and tagged with the field ``t``."""


# ---------------------------------------------------------------------------------------------------------------------
# What is served
# ---------------------------------------------------------------------------------------------------------------------


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of a request are chosen and when it ends. Field names are those of the OpenAI and vLLM APIs."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report per token beside the chosen one; ``None`` reports nothing."""
    json_schema: str | None = None
    """A JSON schema that the output must satisfy, as JSON text; ``None`` leaves the output free."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The model that an engine has loaded."""

    name: str
    """The name it is served under in the OpenAI API."""
    source: str
    architecture: str
    path: str
    """Folder with ``tokenizer.json`` and ``tokenizer_config.json``, for the front's tokenizer."""
    num_parameters: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    device_name: str
    weight_bytes: int
    eos_token_ids: tuple[int, ...]
    num_heads: int = 0
    """Query heads; 0 where unknown."""
    hidden_size: int = 0
    quantized_source: str | None = None
    """Set when the loaded weights were themselves dequantized, e.g. ``"Q4_1"``: the baseline is not full precision."""
    revision: str | None = None
    notes: tuple[str, ...] = ()


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What was fixed when the engine started; :class:`~inference_server.features.Features` is what can be switched."""

    block_size: int
    """Token positions a KV block holds."""
    num_blocks: int
    kv_bytes: int
    """Memory of the whole KV cache."""
    kv_bytes_per_token: int
    max_num_seqs: int
    max_model_len: int


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine can do at best, measured; the reference of MBU and MFU."""

    device: str
    device_name: str
    dtype: str
    threads: int
    read_bytes_per_s: float
    """Streaming read of memory much larger than any cache."""
    copy_bytes_per_s: float
    """Bytes read plus bytes written of a large copy."""
    flops_per_s: float
    """Large matrix product in ``dtype``."""
    measured_at: str
    """ISO 8601."""
    seconds: float
    """How long the measurement took."""
    others_cores: float = 0.0
    """Cores that other processes kept busy meanwhile; with more than a fifth of one the figures may be too low."""
    versions: dict[str, str] = {}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to start an engine process; passed to it as JSON (``python -m inference_server.engine --config …``)."""

    model: str = "default"
    """``"default"``, a hub id, a folder with safetensors weights, or a ``.gguf`` file."""
    served_name: str | None = None
    device: str = "auto"
    """``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    block_size: int = 16
    kv_bytes: int | None = None
    """Memory for the KV cache; ``None`` sizes it from what is free."""
    packed_bytes: int | None = None
    """Memory for packed copies of the weights; ``None`` takes a quarter of what is free at the start."""
    max_num_seqs: int = 256
    max_model_len: int | None = None
    threads: int | None = None
    """CPU threads for the forward pass; ``None`` leaves torch's own choice."""
    draft_model: str | None = None
    """A smaller model with the same vocabulary that can propose tokens; named as ``model`` is."""
    eagle_head: str | None = None
    """Folder of an EAGLE-3 head in the format of ``speculators``; ``None`` takes the one that comes with the model."""
    features: dict[str, bool | int | str] = {}
    """Feature values to start with, where they differ from the defaults."""


class FeatureRelation(msgspec.Struct, frozen=True, kw_only=True):
    """How one feature's value depends on another feature."""

    value: bool | int | str | None
    """The value this is about; ``None`` for every value."""
    other: str
    values: tuple[bool | int | str, ...]
    """Values of the other feature."""
    reason: str


class FeaturePreset(msgspec.Struct, frozen=True, kw_only=True):
    """Feature values that are thrown together."""

    name: str
    title: str
    description: str
    values: dict[str, bool | int | str]


class FeatureSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One switch, described well enough to draw it, explain it and validate it."""

    name: str
    title: str
    group: str
    kind: Literal["bool", "int", "choice"]
    default: bool | int | str
    cost: Cost
    description: str
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    maximum: int | None = None
    available: bool = True
    unavailable_reason: str | None = None
    conflicts: tuple[FeatureRelation, ...] = ()
    """With which values of other features a value cannot hold together."""
    needs: tuple[FeatureRelation, ...] = ()
    """Which values another feature must have for this one to make a difference."""
    unavailable_choices: dict[str, str] = {}
    """Choices that cannot be made here, and why."""


# ---------------------------------------------------------------------------------------------------------------------
# Front → engine
# ---------------------------------------------------------------------------------------------------------------------


class Submit(Message, frozen=True, tag="submit", kw_only=True):
    """Start a request. ``requests`` has one handle per sample (``n``); they share the prompt."""

    requests: tuple[int, ...]
    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrival_ns: int
    """When the front accepted it, on the front's clock: only ever handed back, never compared by the engine."""
    priority: int = 0
    """Lower runs first under the ``priority`` policy."""
    overrides: dict[str, bool | int | str] = {}
    """Per-request feature values, for the features that allow one."""


class Cancel(Message, frozen=True, tag="cancel"):
    """End a request that nobody waits for any more, or that met a stop string."""

    request: int


class SetFeatures(Message, frozen=True, tag="set_features"):
    """Replace some feature values between two steps. Answered by :class:`FeaturesApplied` or :class:`CommandFailed`."""

    correlation: int
    values: dict[str, bool | int | str]


class CheckIntegrity(Message, frozen=True, tag="check_integrity"):
    """Verify that no KV block leaked. Answered by :class:`CommandDone` or :class:`CommandFailed`."""

    correlation: int


class ForgetCaches(Message, frozen=True, tag="forget_caches"):
    """Empty the prefix cache and the response cache; running requests keep their blocks.

    Answered by :class:`CommandDone` with how many ``blocks`` and ``answers`` were given up.
    """

    correlation: int


class Sleep(Message, frozen=True, tag="sleep"):
    """Give the device's memory back between two steps; requests wait.

    Answered by :class:`CommandDone` with the fields of ``inference_server.engine.sleeping.Freed``, or by
    :class:`CommandFailed`.
    """

    correlation: int


class Wake(Message, frozen=True, tag="wake"):
    """Take the memory again and go on with the requests that wait. Answered like :class:`Sleep`."""

    correlation: int


class Ping(Message, frozen=True, tag="ping"):
    """Ask for the engine's clock. Answered by :class:`Pong`."""

    sent_ns: int


class Shutdown(Message, frozen=True, tag="shutdown"):
    """Finish the current step, report running requests as failed, and exit."""


class MeasureCeilings(Message, frozen=True, tag="measure_ceilings"):
    """Measure what the machine can do at best, once the engine is idle.

    Answered by :class:`CommandDone`, or by :class:`CommandFailed` where the engine does not become idle.
    """

    correlation: int
    again: bool = False
    """Even if the figures are known from an earlier run on the same hardware and versions."""


class Quantization(Message, frozen=True, tag="quantization"):
    """Something about precisions that is no switch. Answered by :class:`CommandDone` or :class:`CommandFailed`.

    ``action`` is one of: ``status`` (what there is, what is measured, memory), ``measure`` (begin to measure quality;
    the result appears in the status), ``cancel``, ``drop`` (give up packed copies that are not in use), ``calibrate``
    (set GPTQ's text), ``save`` (write the weights in use as a folder). ``options`` are the arguments of that method of
    ``engine.quantization.precision.Precision``.
    """

    correlation: int
    action: QuantizationAction
    options: dict[str, Any] = {}


ToEngine = (
    Submit
    | Cancel
    | SetFeatures
    | CheckIntegrity
    | MeasureCeilings
    | ForgetCaches
    | Quantization
    | Sleep
    | Wake
    | Ping
    | Shutdown
)


# ---------------------------------------------------------------------------------------------------------------------
# Engine → front
# ---------------------------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello", kw_only=True):
    """First words of an engine process, before the model is loaded."""

    pid: int
    protocol: int
    versions: dict[str, str]


class LoadProgress(Message, frozen=True, tag="load_progress"):
    """What the engine is doing before it can serve. ``fraction`` is in [0, 1], ``None`` where it cannot be known."""

    stage: str
    fraction: float | None
    detail: str = ""


class StepWork(msgspec.Struct, frozen=True, kw_only=True):
    """What a step has to read and compute at least, per weight, position and pair (``docs/attribution.md``)."""

    body_weights: int
    """Weights of the matrices that every position is multiplied with."""
    body_bytes: int
    """Everything that is read whatever the number of positions, but for the output layer."""
    head_weights: int
    head_bytes: int
    embedding_row_bytes: int
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    """Per pair of a query and a key, in all layers."""


class Ready(Message, frozen=True, tag="ready", kw_only=True):
    """The engine serves."""

    model: ModelInfo
    capacity: Capacity
    features: dict[str, bool | int | str]
    specs: tuple[FeatureSpec, ...]
    epoch: int
    load_ns: int
    """From process start to now."""
    work: StepWork | None = None
    """``None`` where it depends on more than the number of positions."""
    ceilings: Ceilings | None = None
    """Where they are known from an earlier run; else :class:`CeilingsMeasured` follows."""


class LoadFailed(Message, frozen=True, tag="load_failed"):
    """The model cannot be served. ``error`` says what was wrong, ``hint`` what to do."""

    error: str
    hint: str = ""


class KvUsage(msgspec.Struct, frozen=True, kw_only=True):
    """KV cache occupancy, four ways: ``total = used + cached + free`` blocks, and filled slots of the used ones."""

    total_blocks: int
    used_blocks: int
    """Referenced by at least one request."""
    cached_blocks: int
    """Referenced by none, kept for prefix reuse, evictable at once."""
    filled_slots: int
    """Token positions of the used blocks that hold a key and a value (a shared block's count once)."""
    block_size: int


class StepEvent(Message, frozen=True, tag="step", kw_only=True):
    """One engine step, columnar: the lists ``request`` … ``kind`` have one entry per scheduled request."""

    step: int
    epoch: int
    begin_ns: int
    schedule_ns: int
    prepare_ns: int
    forward_ns: int
    sample_ns: int
    update_ns: int
    end_ns: int
    path: str
    """Which code ran the forward pass, e.g. ``"eager"``."""
    request: list[int]
    start: list[int]
    """First token position computed for that request."""
    scheduled: list[int]
    """Positions computed for that request (query tokens)."""
    kind: list[int]
    """:class:`Kind`, as a number."""
    running: int
    waiting: int
    kv: KvUsage
    idle_slots: int = 0
    """Static batching: seats of the batch that finished early and wait for the longest member."""
    device_ns: int | None = None
    """How long a GPU worked on the step, by its own clock. ``None`` on a CPU, where ``forward_ns`` is that time."""
    before_ns: int = 0
    """How long the engine was busy between the end of the step before (or waking up) and ``begin_ns``: commands,
    reports, telemetry."""
    draft_ns: int = 0
    """The part of ``forward_ns`` that went into proposing tokens."""
    attention_ns: int | None = None
    """The part of ``forward_ns`` that went into attention and reading the KV cache; ``None`` where the device cannot
    tell."""
    read_bytes: int | None = None
    """Bytes that the forward pass has to read and write at least: weights once, keys and values once per request."""
    flops: int | None = None
    """Floating-point operations of the forward pass: two per weight and position, and attention."""
    speculation: str = ""
    """Who proposed tokens that this step verified, e.g. ``"ngram"``; several are joined by ``"+"``."""
    drafted: list[int] = []
    """Tokens proposed for each scheduled request, 0 for none. Empty where nothing was proposed in this step."""
    accepted: list[int] = []
    """How many of them were accepted."""


class SampledTokens(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens one step produced, columnar, in the order of ``StepEvent.request``."""

    request: list[int]
    index: list[int]
    """0 for a request's first output token."""
    token_id: list[int]
    logprob: list[float | None]
    top: list[list[tuple[int, float]] | None]
    """Alternatives as (token id, logprob), most likely first, where the request asked for them."""
    finish: list[FinishReason | None]
    origin: list[int] = []
    """:class:`Origin`, as a number. Empty where all are :attr:`Origin.PLAIN`."""


NOBODY = -1
"""In place of a request's handle: the operation was not done for one."""


class KvEvents(Message, frozen=True, tag="kv", kw_only=True):
    """What happened to KV blocks in one step, columnar, in order.

    Whoever applies every operation since the last :attr:`KvOp.RESET` knows each block's state and each request's block
    table: ``ALLOCATE`` and ``SHARE`` append to it, ``COPY`` replaces in it.
    """

    step: int
    op: list[int]
    """:class:`KvOp`, as a number."""
    block: list[int]
    request: list[int]
    """Handle of the request whose block table changed; :data:`NOBODY` where none did."""


class StepReport(Message, frozen=True, tag="step_report", kw_only=True):
    """Everything one step did: sent once per step, encoded off the engine's thread."""

    step: StepEvent | None
    """``None`` while the feature ``instrumentation`` is off."""
    tokens: SampledTokens
    preempted: list[int] = []
    started: list[int] = []
    """Requests that left the queue in this step."""
    cached: list[int] = []
    """For each of ``started``, how many of its prompt's positions the prefix cache supplied."""
    seeds: list[int] = []
    """For each of ``started``, the seed that its draws come from, whether the client chose it or the engine."""
    begin_ns: int = 0
    """When the step began: known even while there is no :class:`StepEvent`."""
    verified: list[int] = []
    """Requests for which tokens had been proposed."""
    drafted: list[int] = []
    """For each of ``verified``, how many."""
    accepted: list[int] = []
    """For each of ``verified``, how many of them were accepted."""
    kv_events: KvEvents | None = None
    """``None`` when no block changed hands."""


class RequestFailed(Message, frozen=True, tag="request_failed"):
    """A request the engine had to end. Nothing else is affected."""

    request: int
    error: str
    code: Literal["invalid", "capacity", "internal"] = "internal"


class RequestCancelled(Message, frozen=True, tag="request_cancelled"):
    """Confirms a :class:`Cancel`: the request holds no memory any more."""

    request: int


class FeaturesApplied(Message, frozen=True, tag="features_applied", kw_only=True):
    """A switch took effect between two steps; every later step carries ``epoch``."""

    correlation: int
    epoch: int
    values: dict[str, bool | int | str]
    changed: list[str]
    cost: Cost
    apply_ns: int
    """How long the engine was held up applying it."""
    applied_at_ns: int
    preempted: int
    recompute_tokens: int
    """Positions that have to be computed again before the preempted requests go on."""
    work: StepWork | None = None
    """What a step has to read and compute from now on, where that is known."""
    max_model_len: int | None = None
    """Longest text from now on, where it may have changed."""


class FeaturesSettled(Message, frozen=True, tag="features_settled"):
    """Every request that a switch interrupted has emitted a token again."""

    epoch: int
    settled_at_ns: int


class CommandDone(Message, frozen=True, tag="command_done"):
    """Answer to a command that has no answer type of its own."""

    correlation: int
    result: dict[str, Any] = {}


class CommandFailed(Message, frozen=True, tag="command_failed"):
    """A command was refused; ``error`` says why and what to do."""

    correlation: int
    error: str


class Notice(Message, frozen=True, tag="notice"):
    """Something a person should know that ends no request: ``text`` says what happened and what follows from it."""

    severity: Severity
    text: str


class TaskProgress(Message, frozen=True, tag="task_progress"):
    """How far something is that the engine does beside serving, such as compiling the model.

    ``fraction`` is in [0, 1], ``None`` where it cannot be known; at 1 it is over, and ``detail`` says how it ended.
    """

    name: str
    fraction: float | None
    detail: str = ""


class Pong(Message, frozen=True, tag="pong"):
    """The engine's clock at the moment it read a :class:`Ping`."""

    sent_ns: int
    engine_ns: int


class CeilingsMeasured(Message, frozen=True, tag="ceilings_measured"):
    """The engine has measured what the machine can do at best."""

    ceilings: Ceilings


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """Sent about once a second from a thread of its own, so that loading does not look like death."""

    engine_ns: int
    steps: int
    rss_bytes: int
    telemetry_ns: int = 0
    """What the engine's own thread has spent on telemetry since it started."""
    encode_ns: int = 0
    """What its sender thread has spent on encoding step reports (on a core of its own, where there is one)."""
    busy_ns: int = 0
    """What its own thread has spent on steps, all in all."""


FromEngine = (
    Hello
    | LoadProgress
    | Ready
    | LoadFailed
    | StepReport
    | KvEvents
    | RequestFailed
    | RequestCancelled
    | FeaturesApplied
    | FeaturesSettled
    | CeilingsMeasured
    | CommandDone
    | CommandFailed
    | Notice
    | TaskProgress
    | Pong
    | Heartbeat
)


# ---------------------------------------------------------------------------------------------------------------------
# Telemetry: front → browser or notebook. The tables of a recording have the same names and fields.
# ---------------------------------------------------------------------------------------------------------------------


class TokensEvent(Message, frozen=True, tag="tokens", kw_only=True):
    """The tokens of one step as the front sent them, columnar."""

    step: int
    request: list[int]
    index: list[int]
    token_id: list[int]
    text: list[str]
    """Text this token added. Empty while the bytes of a character are incomplete."""
    logprob: list[float | None]
    sent_ns: list[int]
    latency_ns: list[int]
    """TTFT for index 0 (from arrival at the front), else the gap to the request's previous token."""
    parts: list[list[int]] = []
    """Where each latency went: one list per name in :data:`PARTS`, in its order, each with one entry (nanoseconds) per
    token. Over the names they add up to ``latency_ns``."""
    origin: list[int] = []
    """:class:`Origin` of each token, as a number. Empty where all are :attr:`Origin.PLAIN`."""


class RequestEvent(Message, frozen=True, tag="request", kw_only=True):
    """A request changed state. The newest event of a handle is its whole story so far."""

    request: int
    id: str
    state: RequestState
    at_ns: int
    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    preview: str
    """The first characters of the prompt, for labels."""
    cached_tokens: int = 0
    """Prompt positions that the prefix cache supplied."""
    first_token_ns: int | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    group: int | None = None
    """Handle of the first sample, when the request asked for n > 1."""
    submitted_ns: int | None = None
    """When the front handed it to the engine, its prompt tokenized."""
    started_ns: int | None = None
    """When the first step that computed it began."""
    last_token_ns: int | None = None
    """When its newest token was sent."""
    preemptions: int = 0
    seed: int | None = None
    """What its draws come from; known once it has started."""
    priority: int = 0
    drafted: list[int] = []
    """How often a token was proposed for it as the first, second … of a step."""
    accepted: list[int] = []
    """How often that token was accepted."""


class FeaturesEvent(Message, frozen=True, tag="features", kw_only=True):
    """A switch. Sent when applied, and once more with ``settled_ns`` when interrupted requests have caught up."""

    epoch: int
    values: dict[str, bool | int | str]
    changed: list[str]
    cost: Cost
    requested_ns: int
    applied_ns: int
    apply_ns: int
    preempted: int
    recompute_tokens: int
    settled_ns: int | None = None
    """``None`` while interrupted requests are still catching up."""


class EngineEvent(Message, frozen=True, tag="engine", kw_only=True):
    """The engine process changed state, or progressed in loading."""

    state: EngineState
    at_ns: int
    stage: str = ""
    fraction: float | None = None
    message: str = ""
    """For a person: what happened, and what to do where something can be done."""
    pid: int | None = None
    restarts: int = 0
    failed_requests: int = 0


class TrafficEvent(Message, frozen=True, tag="traffic", kw_only=True):
    """What the server's own load generator does: sent when it starts, changes or stops, and once a second between."""

    at_ns: int
    state: TrafficState
    workload: dict[str, Any]
    """``inference_server.workloads.workload.Workload`` as plain values."""
    started_ns: int
    sent: int
    """Requests since the start."""
    in_flight: int
    finished: int
    failed: int
    dropped: int
    """Arrivals that were left out because too many requests were under way already."""
    output_tokens: int
    message: str = ""
    """For a person: why it stopped, or the last failure."""


class NoticeEvent(Message, frozen=True, tag="notice_event"):
    """Something a person should know: memory ran out and what was done about it, a check that failed."""

    severity: Severity
    at_ns: int
    text: str


class TaskEvent(Message, frozen=True, tag="task"):
    """How far something is that the engine does beside serving; see :class:`TaskProgress`."""

    name: str
    fraction: float | None
    detail: str
    at_ns: int


class DeviceEvent(Message, frozen=True, tag="device", kw_only=True):
    """The hardware, sampled about once a second. What a machine does not tell is ``None``."""

    at_ns: int
    cores: int
    system_cpu: float
    """Cores in use by everybody on the machine."""
    system_memory_used: int
    system_memory_total: int
    process: list[str]
    """``"front"``, ``"engine"`` …; the lists ``pid``, ``cpu`` and ``rss`` have one entry for each."""
    pid: list[int]
    cpu: list[float]
    """Cores in use by the process since the sample before."""
    rss: list[int]
    """Resident bytes."""
    gpu_name: str | None = None
    gpu_memory_used: int | None = None
    gpu_memory_total: int | None = None
    gpu_power_w: float | None = None
    gpu_clock_mhz: int | None = None
    gpu_memory_clock_mhz: int | None = None
    gpu_utilization: float | None = None
    """Share of the last interval in which a kernel ran, 0 to 1."""
    gpu_memory_utilization: float | None = None
    gpu_temperature_c: int | None = None


class RecordingEvent(Message, frozen=True, tag="recording", kw_only=True):
    """A recording began, grew, ended, or turned into a file. The newest event of an ``id`` is its whole story."""

    id: str
    name: str
    note: str
    state: RecordingState
    at_ns: int
    started_ns: int
    bytes: int
    """Of the journal while recording, of the file once finished."""
    rows: int
    """Events so far."""
    tokens: int
    seconds: float
    fraction: float | None = None
    """Progress of turning the journal into a file."""
    file: str | None = None
    """Name of the finished file in the recordings' folder."""
    message: str = ""
    """For a person: why it ended or what went wrong."""
    lost: int = 0
    """Events that could not be written because the disk was too slow."""


class TelemetryCostEvent(Message, frozen=True, tag="telemetry_cost", kw_only=True):
    """What watching costs: sent about once a second while steps run. All times are sums over ``window_ns``."""

    at_ns: int
    window_ns: int
    level: str
    """Value of the feature ``instrumentation``."""
    steps: int
    step_ns: int
    """What the engine's thread spent on steps."""
    engine_ns: int
    """What the engine's thread spent on building telemetry: the part that delays tokens."""
    encode_ns: int
    """What the engine's sender thread spent on encoding reports."""
    front_ns: int
    """What the front spent on logging, attribution, metrics, frames and the recording's buffer."""
    journal_ns: int
    """What the recording's writer thread spent."""
    events: int
    bytes: int
    """Encoded bytes of the logged events."""


class CeilingsEvent(Message, frozen=True, tag="ceilings", kw_only=True):
    """The machine's ceilings became known, or were measured again."""

    at_ns: int
    ceilings: Ceilings


Event = (
    StepEvent
    | TokensEvent
    | RequestEvent
    | FeaturesEvent
    | EngineEvent
    | KvEvents
    | DeviceEvent
    | RecordingEvent
    | TelemetryCostEvent
    | CeilingsEvent
    | TrafficEvent
    | NoticeEvent
    | TaskEvent
)


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Which server this is. A changed ``instance`` tells a client that it talks to a new one."""

    version: str
    protocol: int
    instance: str
    pid: int
    started_ns: int


class Snapshot(Message, frozen=True, tag="snapshot", kw_only=True):
    """First message on every (re)connection: all that a client needs to draw, before any :class:`Frame`."""

    seq: int
    now_ns: int
    server: ServerInfo
    engine: EngineEvent
    model: ModelInfo | None
    capacity: Capacity | None
    specs: tuple[FeatureSpec, ...]
    features: FeaturesEvent | None
    """The current values, as the event that set them."""
    requests: list[RequestEvent]
    """Every active request, and the most recent ended ones."""
    history: list[Event]
    """The newest steps and tokens, oldest first."""
    recordings: list[RecordingEvent] = []
    """What is being recorded or finished now, and what ended lately."""
    ceilings: Ceilings | None = None
    """Of the loaded model's device and dtype, once measured."""
    traffic: TrafficEvent | None = None
    """What the load generator does, or did last."""
    device: DeviceEvent | None = None
    """The newest sample of the hardware: a quiet server makes the next one only in a while."""
    presets: tuple[FeaturePreset, ...] = ()
    kv: KvEvents | None = None
    """Operations that lead from nothing to the KV cache as it is now; ``None`` while no block is logged."""


class Frame(Message, frozen=True, tag="frame", kw_only=True):
    """A batch of events. ``seq`` rises by one per frame; ``dropped`` counts the events left out just before this."""

    seq: int
    now_ns: int
    dropped: int
    events: list[Event]


class ClockReply(Message, frozen=True, tag="clock"):
    """Answer to a :class:`ClockRequest`: lets a client put the server's times on its own clock."""

    client_time: float
    now_ns: int


class ServerError(Message, frozen=True, tag="error"):
    """The client said something that could not be understood; the connection stays open."""

    message: str


ServerMessage = Snapshot | Frame | ClockReply | ServerError


class Subscribe(Message, frozen=True, tag="subscribe", kw_only=True):
    """First message of a client. The server sends no more frames than it has credits."""

    protocol: int
    credits: int
    history: int = 2000
    """How many past events the snapshot should carry, at most."""
    min_interval_ms: int = 0
    """Wait at least this long between two frames; the events of the interval share one."""


class Credit(Message, frozen=True, tag="credit"):
    """The client has dealt with ``frames`` more frames and can take as many again."""

    frames: int


class ClockRequest(Message, frozen=True, tag="clock"):
    """Ask for the server's clock; ``client_time`` comes back untouched."""

    client_time: float


ClientMessage = Subscribe | Credit | ClockRequest
