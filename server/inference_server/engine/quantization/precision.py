"""What an engine offers about precisions beside the switches: quality, memory, GPTQ's text. Owns the measurements."""

from __future__ import annotations

import statistics
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from torch import Tensor
from transformers import AutoTokenizer

from inference_server import features as feature_rules
from inference_server.engine.memory import available_bytes
from inference_server.engine.quantization import checkpoint, quality, texts
from inference_server.engine.quantization.quality import Measurement, QualityResult, Side
from inference_server.engine.quantization.variants import TASK as PACKING
from inference_server.engine.quantization.variants import Variant, WeightFormat, format_of
from inference_server.engine.runner import ModelRunner, WeightReader
from inference_server.features import WEIGHT_FEATURES, FeatureError, Features
from inference_server.protocol import TaskProgress

if TYPE_CHECKING:
    from collections.abc import Callable

    from inference_server.engine.core import Engine

TASK = "measuring quality"
SHARE_BESIDE = 0.1
"""Of the time, at most, that a measurement takes while requests are served."""
NAMES = (*WEIGHT_FEATURES, "kv_cache_dtype")
"""Switches that have a price in quality."""
MAX_TEXT = 200_000
"""Characters of a text of the user's own."""
STEPS = 64
"""Steps of each path and batch size whose times are kept, the newest."""
RESULTS = 32
"""Results that are kept, the newest."""


class Precision:
    """Measurements of quality, the memory of everything, and GPTQ's calibration text.

    Parameters
    ----------
    engine : Engine
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokenizer: Any = None
        self._waiting: tuple[Features, str | None] | None = None
        self._measurement: Measurement | None = None
        self._results: dict[str, QualityResult] = {}
        self._spent_ns = 0
        self._since_ns = 0
        self._told = 0.0
        self._calibration = "built-in"
        self._failure = ""
        self._number = 0
        self._step_ns: dict[str, dict[int, deque[int]]] = {}

    # -- commands ------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What there is: variants, memory, results, and what is going on."""
        engine = self._engine
        weights, work = engine.weights, engine.work
        master = None if work is None else work.body_bytes + work.head_bytes + self._saved(weights.in_use)
        return {
            "in_use": "master" if weights.in_use is None else weights.in_use.label,
            "variants": [
                {
                    "label": each.label,
                    "bytes": each.nbytes,
                    "bytes_per_step": None if master is None else master - self._saved(each),
                    "predicted_speedup": None if master is None else master / (master - self._saved(each)),
                    "layer_errors": [
                        {"name": error.name, "gptq": error.gptq, "nearest": error.nearest} for error in each.errors
                    ],
                }
                for each in weights.kept()
            ],
            "master_bytes_per_step": master,
            "left_out": weights.left_out,
            "budget": weights.budget,
            "memory": self.memory(),
            "baseline": engine.loaded.located.quantized_source,
            "calibration": self._calibration,
            "measured_steps": [
                {"path": path, "batch": batch, "median_ms": statistics.median(taken) / 1e6, "steps": len(taken)}
                for path, by_batch in self._step_ns.items()
                for batch, taken in sorted(by_batch.items())
            ],
            "results": [msgspec.to_builtins(result) for result in self._results.values()],
            "measuring": None if self._measurement is None else self._measurement.fraction,
            "waiting": self.waits,
            "packing": weights.packing,
            "last_failure": self._failure,
        }

    def memory(self) -> dict[str, int]:
        """Bytes by what they are for.

        ``weights`` (the master), ``packed`` (copies in other precisions), ``kv`` (keys and values, reserved),
        ``activations`` (the fast path's buffers, logits included) and ``free`` (what the machine could still give).
        """
        engine = self._engine
        fast = engine.fast
        return {
            "weights": engine.loaded.weight_bytes,
            "packed": engine.weights.nbytes,
            "kv": sum(each.nbytes for each in engine.runner.tensors.whole),
            "activations": fast.buffer_bytes if isinstance(fast, WeightReader) else 0,
            "free": available_bytes(engine.loaded.device),
        }

    def measure(self, text: str | None = None, values: dict[str, Any] | None = None) -> dict[str, Any]:
        """Begin to measure; what was being measured is given up.

        Parameters
        ----------
        text : str, optional
            The user's own; the built-in one without.
        values : dict, optional
            Switches to measure, by name, where they differ from those in use.

        Raises
        ------
        FeatureError
            If that cannot be measured.
        """
        engine = self._engine
        for name in values or {}:
            if name not in NAMES:
                raise FeatureError(f"{name!r} has no price in quality; what can be measured is {', '.join(NAMES)}.")
        if text is not None and not 0 < len(text) <= MAX_TEXT:
            raise FeatureError(f"A text has 1 to {MAX_TEXT:,} characters, not {len(text):,}.")
        wanted = feature_rules.apply(engine.features, values or {}, engine.specs_by_name)
        if not engine.weights.ready(format_of(wanted)):
            if engine.weights.packing:
                raise FeatureError("Weights are being packed; measure when they are ready, or cancel that.")
            self.prepare(wanted)
        self._measurement, self._waiting = None, (wanted, text)
        self._number += 1
        number = self._number
        self._take_up()
        return {"label": _label(wanted), "number": number}

    def cancel(self) -> dict[str, Any]:
        """Give up what is being measured, and weights that are being packed."""
        engine = self._engine
        stopped = [PACKING] * engine.weights.packing + [TASK] * (self.has_work or self.waits)
        if self.has_work or self.waits:
            self._fail("it was cancelled")
        self._measurement = self._waiting = None
        engine.give_up_packing()
        return {"stopped": stopped}

    def drop(self) -> dict[str, Any]:
        """Give the memory of packed weights back that are not in use."""
        return {"freed": self._engine.weights.drop(), "memory": self.memory()}

    def calibrate(self, text: str | None = None) -> dict[str, Any]:
        """Set the text that GPTQ sees, or with ``None`` the built-in one.

        Raises
        ------
        FeatureError
            If it is too short or too long, or weights that GPTQ rounded are in use.
        """
        if text is not None and len(text) > MAX_TEXT:
            raise FeatureError(f"A calibration text has at most {MAX_TEXT:,} characters, not {len(text):,}.")
        tokens = self._encode(texts.calibration() if text is None else text)
        if len(tokens) < 256:
            raise FeatureError(f"The calibration text has {len(tokens)} tokens; GPTQ needs 256 at least.")
        self._engine.weights.calibrate_with(tokens)
        self._calibration = "built-in" if text is None else _name(text)
        return {"tokens": len(tokens)}

    def save(self, folder: str) -> dict[str, Any]:
        """Write the packed weights in use as a folder in the compressed-tensors format.

        Raises
        ------
        FeatureError
            If the master is in use, the format has no word for the grid, or the folder cannot be written.
        """
        engine, path = self._engine, Path(folder).expanduser()
        if not path.is_absolute():
            raise FeatureError(f"{folder!r} is not an absolute path; the server would write it beside itself.")
        if engine.weights.in_use is None:
            raise FeatureError("The master weights are in use; switch weight_precision to what should be saved.")
        written = checkpoint.save(engine.loaded.model, engine.weights.in_use, engine.loaded.located.path, path)
        return {"folder": str(path), "bytes": written}

    def note_step(self, path: str, batch: int, taken_ns: int) -> None:
        """Remember how long a step took in which every request had one position."""
        by_batch = self._step_ns.setdefault(path, {})
        if batch not in by_batch:
            by_batch[batch] = deque(maxlen=STEPS)
        by_batch[batch].append(taken_ns)

    # -- weights for others --------------------------------------------------------------------------------------------

    def prepare(self, wanted: Features) -> None:
        """Begin to pack the weights that a setting of the switches asks for."""
        weights = format_of(wanted)
        assert weights is not None, "the master is always there"
        self.calibrate_where_needed(weights)
        self._engine.weights.prepare(weights)

    def calibrate_where_needed(self, weights: WeightFormat) -> None:
        """See that GPTQ has a text."""
        if weights.gptq and self._engine.weights.needs_calibration:
            self.calibrate()

    # -- working -------------------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether a measurement waits for its weights."""
        return self._waiting is not None

    @property
    def has_work(self) -> bool:
        """Whether a measurement has a portion to compute."""
        self._take_up()
        return self._measurement is not None

    def advance(self, rows: int = quality.ROWS_IDLE) -> None:
        """Compute a portion."""
        measurement = self._measurement
        if measurement is None:
            return
        begin = time.monotonic_ns()
        try:
            result = measurement.advance(rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the measurement and nothing else
            self._measurement = None
            self._fail(f"{type(error).__name__}: {error}")
            return
        self._spent_ns += time.monotonic_ns() - begin
        if result is not None:
            self._measurement = None
            key = f"{result.label} {result.text}"
            self._results.pop(key, None)
            self._results[key] = result
            while len(self._results) > RESULTS:
                del self._results[next(iter(self._results))]
            self._engine.tell(TaskProgress(TASK, 1.0, f"{result.label}: perplexity {result.perplexity:.2f}"))
        elif measurement.fraction - self._told >= 0.01:
            self._told = measurement.fraction
            self._engine.tell(TaskProgress(TASK, min(self._told, 0.99), ""))

    def advance_beside(self) -> None:
        """Compute a small portion where requests have had their share of the time."""
        if self.has_work and self._spent_ns < SHARE_BESIDE * (time.monotonic_ns() - self._since_ns):
            self.advance(quality.ROWS_BUSY)

    def _take_up(self) -> None:
        """Begin a measurement whose weights are ready."""
        if self._waiting is None or self._engine.weights.packing:
            return
        wanted, text = self._waiting
        engine = self._engine
        if engine.gpu is not None:
            if engine.gpu.compiling:
                return
            if (error := engine.gpu.take_error(wanted.kv_cache_dtype)) is not None:
                self._waiting = None
                self._fail(error)
                return
            if not engine.gpu.ready_for(wanted.kv_cache_dtype):
                return
        self._waiting = None
        if not engine.weights.ready(format_of(wanted)):
            error = engine.weights.take_error() or "its weights were not packed, because other ones were asked for"
            self._fail(str(error))
            return
        weights = format_of(wanted)
        variant = None if weights is None else engine.weights.get(weights)
        sides = (self._side(None, "master"), self._side(variant, wanted.kv_cache_dtype))
        label = _label(wanted)
        about = {
            "number": self._number,
            "label": label,
            "values": {name: getattr(wanted, name) for name in NAMES},
            "text": "built-in" if text is None else _name(text),
            "baseline": engine.loaded.located.quantized_source,
        }
        try:
            self._measurement = Measurement(
                self._encode(texts.evaluation() if text is None else text), sides, self._decode, about
            )
        except ValueError as error:
            self._fail(str(error))
            return
        self._since_ns, self._spent_ns, self._told = time.monotonic_ns(), 0, 0.0
        engine.tell(TaskProgress(TASK, 0.0, label))

    def _fail(self, why: str) -> None:
        self._failure = why
        self._engine.tell(TaskProgress(TASK, 1.0, f"failed: {why}"))

    def _side(self, variant: Variant | None, kv: str) -> Side:
        engine = self._engine
        tensors = quality.tensors_for(engine.runner.tensors, kv)
        if isinstance(engine.fast, WeightReader):
            runner = engine.fast.sibling(tensors)
            runner.use(variant)
            return Side(runner, tensors)
        weights, wanted = engine.weights, None if variant is None else variant.weights

        def around(compute: Callable[[], Tensor]) -> Tensor:
            # The plain path has one set of modules, and requests go on with theirs after this portion.
            before = None if weights.in_use is None else weights.in_use.weights
            if before == wanted:
                return compute()
            weights.use(wanted)
            try:
                return compute()
            finally:
                weights.use(before)

        return Side(ModelRunner(engine.loaded.model, tensors), tensors, around)

    # -- private -------------------------------------------------------------------------------------------------------

    def _saved(self, variant: Variant | None) -> int:
        return 0 if variant is None else sum(matrix.weight.nbytes - packed.nbytes for matrix, packed in variant.pairs())

    def _tokens_of(self) -> Any:
        if self._tokenizer is None:
            folder: Path = self._engine.loaded.located.path
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise FeatureError(f"The model's tokenizer cannot be loaded from {folder}: {error}") from error
        return self._tokenizer

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokens_of()(text, add_special_tokens=False)["input_ids"]
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokens_of().decode(ids)
        return text


def _label(wanted: Features) -> str:
    weights = format_of(wanted)
    words = "master" if weights is None else weights.label
    return words if wanted.kv_cache_dtype == "master" else f"{words}, KV {wanted.kv_cache_dtype}"


def _name(text: str) -> str:
    start = " ".join(text.split())
    return start if len(start) <= 40 else f"{start[:39]}…"
