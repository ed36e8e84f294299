"""A model's weights in other precisions: packed beside the master when first asked for, kept within a memory budget.

The master weights never change. A variant is a packed copy of every matrix that a step multiplies with; putting one in
use changes which copy is read, between two steps. Embeddings that are looked up stay as they are.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear

from inference_server.engine.llama import Architecture
from inference_server.engine.memory import give_free_memory_back
from inference_server.engine.quantization import gptq, packing
from inference_server.engine.quantization.gptq import LayerError
from inference_server.engine.quantization.packing import BLOCK, Packed, Rounded, Scheme
from inference_server.features import FeatureError, Features
from inference_server.protocol import Notice, TaskProgress

TASK = "packing weights"
ALIGNMENT = 128
"""Where in memory a packed matrix begins, in bytes."""
TIED_TO = "model.embed_tokens.weight"
"""What the output layer is called in a file where it is the embedding."""
WIDE = {"F64", "F32"}
"""What safetensors calls the types that have more bits than a master of 16."""
EXPANDED_WEIGHTS = 1 << 26
"""Weights that the plain path expands at once."""
HEAD_OF_INT4 = Scheme(8, 32)
"""The output layer beside 4-bit layers: its errors go straight into the logits; GGUF files keep it in 8 bits too."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What a variant's weights are rounded to.

    Attributes
    ----------
    body : Scheme
        Of the matrices within the layers.
    head : Scheme
        Of the output layer.
    gptq : bool
        The layers are rounded by GPTQ, not to nearest.
    """

    body: Scheme
    head: Scheme
    gptq: bool = False

    @property
    def label(self) -> str:
        """What step records call it."""
        if self.body.bits == 8:
            return "fp8" if self.body.grid == "float" else "int8"
        return f"int{self.body.bits} g{self.body.group} {self.body.grid}{' gptq' if self.gptq else ''}"


def format_of(features: Features) -> WeightFormat | None:
    """The format that a setting of the switches asks for; ``None`` for the master weights."""
    if features.weight_precision == "master":
        return None
    if features.weight_precision == "int8":
        return WeightFormat(Scheme(8), Scheme(8))
    if features.weight_precision == "fp8":
        return WeightFormat(Scheme(8, grid="float"), Scheme(8, grid="float"))
    grid: Any = features.int4_grid
    bits = int(features.weight_precision.removeprefix("int"))
    return WeightFormat(Scheme(bits, int(features.int4_group), grid), HEAD_OF_INT4, features.int4_rounding == "gptq")


@dataclass(slots=True)
class Part:
    """The rows of a matrix that one module multiplies with."""

    name: str
    module: nn.Linear
    first: int
    last: int


@dataclass(slots=True)
class Matrix:
    """A matrix as a step reads it: one linear layer's, or several layers' that the fast path has stacked."""

    weight: Tensor
    """``[rows, columns]``, of the master."""
    parts: list[Part]
    head: bool

    def as_given(self, scheme: Scheme, rounded: dict[str, Rounded]) -> Rounded | None:
        """The integers that a checkpoint had for it, where all of its parts are there in the scheme that is wanted."""
        parts = [rounded.get(part.name) for part in sorted(self.parts, key=lambda part: part.first)]
        known = [part for part in parts if part is not None and part.scheme == scheme]
        if len(known) < len(parts):
            return None
        offsets = [part.offset for part in known if part.offset is not None]
        return Rounded(
            torch.cat([part.values for part in known]),
            torch.cat([part.scale for part in known]),
            torch.cat(offsets) if offsets else None,
            scheme,
        )

    def scheme(self, weights: WeightFormat) -> Scheme:
        """How it is rounded in a format."""
        return (weights.head if self.head else weights.body).fitted(self.weight.shape[1])


class Layout(Protocol):
    """The form that somebody's kernels read: a module that has these functions."""

    def packed_bytes(self, rows: int, columns: int, scheme: Scheme) -> int:
        """Memory that a matrix takes when packed."""

    def pack(self, rounded: Rounded, into: Tensor | None = None) -> Packed:
        """Lay a rounded matrix out, in ``into`` where that is given, on its device."""

    def quantize(self, weight: Tensor, scheme: Scheme, into: Tensor | None = None) -> Packed:
        """Round a matrix to nearest and lay it out."""


def key_of(weight: Tensor) -> tuple[int, int]:
    """What tells a matrix from others as long as it lives, also where its memory is given back and taken again."""
    storage: Any = weight.untyped_storage()
    return storage._cdata, int(weight.storage_offset())  # noqa: SLF001 - torch has no other name for it


@dataclass(slots=True, eq=False, weakref_slot=True)
class Variant:
    """One packed copy of a model's matrices."""

    weights: WeightFormat
    matrices: list[Matrix]
    packed: dict[tuple[int, int], Packed] = field(default_factory=dict)
    """By the master's matrix (:func:`key_of`)."""
    errors: list[LayerError] = field(default_factory=list)
    """Of each matrix on the calibration text, where GPTQ rounded it."""

    @property
    def label(self) -> str:
        """What step records call it."""
        return self.weights.label

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(matrix.nbytes for matrix in self.packed.values())

    def pairs(self) -> Iterator[tuple[Matrix, Packed]]:
        """Each master matrix with its packed copy."""
        for matrix in self.matrices:
            packed = self.packed.get(key_of(matrix.weight))
            if packed is not None:
                yield matrix, packed

    def of(self, weight: Tensor) -> Packed | None:
        """The packed copy of a master matrix, ``None`` where it stays as it is."""
        return self.packed.get(key_of(weight))


PackingProgress = Callable[[float, str], None]
"""Called with the fraction done and what is being packed."""


class PackingCancelled(Exception):  # noqa: N818 - not an error
    """Nobody waits for the variant any more."""


class WeightVariants:
    """Builds, keeps and gives up the variants of one model.

    Parameters
    ----------
    model : torch.nn.Module
    architecture : Architecture, optional
        Of the fast path: its stacked matrices are packed in one piece.
    budget : int
        Bytes that all variants together may take.
    report : callable
        Takes what a person should see; called from the packing thread.
    folder : Path, optional
        The model's: where its files hold weights in more bits than the master has, these are packed, so that they are
        rounded once.
    given : dict, optional
        Layers that the model's folder has rounded already, by name: they are packed as they are where the scheme fits.
    layout : Layout
        What the kernels read.
    built : callable, optional
        Called with each variant before it counts as ready, in the thread that built it.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture | None,
        budget: int,
        report: Callable[[TaskProgress | Notice], None],
        given: dict[str, Rounded] | None = None,
        folder: Path | None = None,
        layout: Layout = packing,
        built: Callable[[Variant], None] = lambda _: None,
    ) -> None:
        self.budget = budget
        self.matrices, self.left_out = matrices_of(model, architecture)
        self.in_use: Variant | None = None
        self._architecture = architecture
        self._given = given or {}
        self._folder = folder
        self._calibration: list[int] | None = None
        self._report = report
        self._layout = layout
        self._built = built
        self._kept: dict[WeightFormat, Variant] = {}
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._wanted: WeightFormat | None = None
        self._error: str | None = None

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def packing(self) -> bool:
        """Whether a variant is being built."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def nbytes(self) -> int:
        """Memory of all variants."""
        return sum(variant.nbytes for variant in self._kept.values())

    @property
    def tensors(self) -> list[Tensor]:
        """The memory of all variants."""
        return [matrix.data for variant in self._kept.values() for matrix in variant.packed.values()]

    def kept(self) -> list[Variant]:
        """All variants, the one used last at the end."""
        return list(self._kept.values())

    def ready(self, weights: WeightFormat | None) -> bool:
        """Whether :meth:`use` can be called with it."""
        return weights is None or weights in self._kept

    def take_error(self) -> str | None:
        """Why the last building failed, once."""
        error, self._error = self._error, None
        return error

    # -- changing ------------------------------------------------------------------------------------------------------

    def calibrate_with(self, tokens: list[int]) -> None:
        """Set the text that GPTQ sees; what was rounded with another one is given up.

        Raises
        ------
        FeatureError
            If such weights are in use.
        """
        if self.in_use is not None and self.in_use.weights.gptq:
            raise FeatureError("Weights that GPTQ rounded are in use; switch to others before the calibration changes.")
        self.cancel()
        self._calibration = tokens
        self._kept = {weights: each for weights, each in self._kept.items() if not weights.gptq}

    def get(self, weights: WeightFormat) -> Variant | None:
        """A variant that is there."""
        return self._kept.get(weights)

    @property
    def needs_calibration(self) -> bool:
        """Whether GPTQ has no text yet."""
        return self._calibration is None

    def prepare(self, weights: WeightFormat) -> None:
        """Begin to build a variant in a thread of its own, on one core; whatever was being built is given up.

        Raises
        ------
        FeatureError
            If it does not fit into the budget.
        """
        self.cancel()
        self._make_room(weights)
        self._cancelled = threading.Event()
        self._wanted, self._error = weights, None
        self._thread = threading.Thread(target=self._run, args=(weights, self._cancelled), name=TASK, daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until nothing is being built."""
        if self._thread is not None:
            self._thread.join(timeout)

    def cancel(self) -> None:
        """Give up what is being built."""
        if self._thread is not None:
            self._cancelled.set()
            self._thread.join()
            self._thread = None

    def build(self, weights: WeightFormat, progress: PackingProgress = lambda *_: None) -> None:
        """Build a variant now, on all cores.

        Raises
        ------
        FeatureError
            If it does not fit into the budget.
        """
        self._make_room(weights)
        self._kept[weights] = self._build(weights, progress, threading.Event())

    def use(self, weights: WeightFormat | None) -> Variant | None:
        """Put a variant in use in the model's own modules, or with ``None`` the master; return it."""
        for matrix in self.matrices:
            for part in matrix.parts:
                part.module.__dict__.pop("forward", None)
        self.in_use = None
        if weights is None:
            return None
        variant = self._kept.pop(weights)
        self._kept[weights] = variant  # used last, so given up last
        for matrix, packed in variant.pairs():
            for part in matrix.parts:
                # An attribute of the module itself goes before its class's method, and taking it away undoes it.
                part.module.__dict__["forward"] = _multiplier(packed, part)
        self.in_use = variant
        return variant

    def drop(self) -> int:
        """Give the memory of all variants back that are not in use; return how many bytes that were."""
        before = self.nbytes
        self._kept = {weights: each for weights, each in self._kept.items() if each is self.in_use}
        give_free_memory_back()
        return before - self.nbytes

    # -- private -------------------------------------------------------------------------------------------------------

    def _bytes(self, matrix: Matrix, weights: WeightFormat) -> int:
        rows, columns = matrix.weight.shape
        return self._layout.packed_bytes(rows, columns, matrix.scheme(weights))

    def _make_room(self, weights: WeightFormat) -> None:
        if weights.gptq and self._architecture is None:
            raise FeatureError("GPTQ knows a model's layers from the fast path, which cannot run this one.")
        needed = sum(self._bytes(matrix, weights) for matrix in self.matrices)
        held = self.in_use.nbytes if self.in_use is not None else 0
        if needed + held > self.budget:
            also = f" beside the {held / 1e6:,.0f} MB of {self.in_use.label}, in use" if self.in_use is not None else ""
            raise FeatureError(
                f"{weights.label} weights take {needed / 1e6:,.0f} MB{also}, and packed weights may take "
                f"{self.budget / 1e6:,.0f} MB; give the server more with --packed-memory"
            )
        for each in [each for each in self._kept.values() if each is not self.in_use]:
            if self.nbytes + needed <= self.budget:
                break
            del self._kept[each.weights]

    def _run(self, weights: WeightFormat, cancelled: threading.Event) -> None:
        # The engine goes on computing; a second pool of threads on the same cores would slow both more than it helps.
        torch.set_num_threads(1)
        try:
            variant = self._build(
                weights, lambda fraction, what: self._report(TaskProgress(TASK, fraction, what)), cancelled
            )
        except PackingCancelled:
            self._report(TaskProgress(TASK, 1.0, "given up"))
        except Exception as error:  # noqa: BLE001 - the switch is refused with it, and the engine serves on
            self._error = f"packing the weights failed: {error}"
            self._report(TaskProgress(TASK, 1.0, "failed"))
        else:
            self._kept[weights] = variant
            give_free_memory_back()
            self._report(TaskProgress(TASK, 1.0, f"{weights.label} is ready"))

    def _build(self, weights: WeightFormat, progress: PackingProgress, cancelled: threading.Event) -> Variant:
        variant = Variant(weights, self.matrices)
        told = -1.0

        def tell(fraction: float, what: str = "") -> None:
            nonlocal told
            if cancelled.is_set():
                raise PackingCancelled
            if fraction - told >= 0.01:
                told = fraction
                progress(min(fraction, 0.99), f"{weights.label} {what}".strip())

        device = self.matrices[0].weight.device if self.matrices else torch.device("cpu")
        # One piece of memory: many small ones would leave holes that the system does not get back.
        sizes = [-(-self._bytes(matrix, weights) // ALIGNMENT) * ALIGNMENT for matrix in self.matrices]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        with _beside_steps(device):
            self._fill(variant, list(torch.split(memory, sizes)), tell)
        self._built(variant)
        return variant

    def _fill(self, variant: Variant, parts: list[Tensor], tell: Callable[[float, str], None]) -> None:
        weights = variant.weights
        places = {key_of(matrix.weight): part for matrix, part in zip(self.matrices, parts, strict=True)}

        def room(matrix: Matrix) -> Tensor:
            return places[key_of(matrix.weight)][: self._bytes(matrix, weights)]

        if weights.gptq:
            assert self._architecture is not None
            solved, variant.errors = gptq.round_model(self._architecture, self._calibration or [], weights.body, tell)
            for matrix in self.matrices:
                rounded = solved.get(matrix.weight.data_ptr())
                if rounded is not None:
                    variant.packed[key_of(matrix.weight)] = self._layout.pack(rounded, room(matrix))
        files = WeightFiles(self._folder)
        left = [matrix for matrix in self.matrices if variant.of(matrix.weight) is None]
        total = sum(matrix.weight.numel() for matrix in left)
        done = 0
        for matrix in left:
            tell(done / total, "")
            scheme = matrix.scheme(weights)
            given = matrix.as_given(scheme, self._given)
            into = room(matrix)
            if given is None:
                packed = self._layout.quantize(files.finer(matrix), scheme, into)
            else:
                packed = self._layout.pack(given, into)
            variant.packed[key_of(matrix.weight)] = packed
            done += matrix.weight.numel()


@contextmanager
def _beside_steps(device: torch.device) -> Iterator[None]:
    """On a GPU, do what is within in a stream of its own, and wait for it: steps go on meanwhile."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


class WeightFiles:
    """The weights as a model's files have them.

    Parameters
    ----------
    folder : Path, optional
        Without one, or without safetensors files in it, nothing is found.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file_of: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
            with safe_open(path, framework="pt") as file:
                self._file_of |= dict.fromkeys(file.keys(), path)

    def finer(self, matrix: Matrix) -> Tensor:
        """A matrix in the bits of its file, where these are more than the master's; else the master's."""
        if matrix.weight.element_size() >= torch.float32.itemsize:
            return matrix.weight
        found = []
        for part in sorted(matrix.parts, key=lambda part: part.first):
            name = f"{part.name}.weight"
            if matrix.head and name not in self._file_of:
                name = TIED_TO
            path = self._file_of.get(name)
            if path is None:
                return matrix.weight
            with safe_open(path, framework="pt") as file:
                if file.get_slice(name).get_dtype() not in WIDE:
                    return matrix.weight
                found.append(file.get_tensor(name))
        whole = (torch.cat(found) if len(found) > 1 else found[0]).to(matrix.weight.device)
        finer = whole.shape == matrix.weight.shape and whole.element_size() > matrix.weight.element_size()
        # Not another matrix under the same name: it has to be what the master was rounded from.
        return whole if finer and torch.equal(whole.to(matrix.weight.dtype), matrix.weight) else matrix.weight


def matrices_of(model: nn.Module, architecture: Architecture | None) -> tuple[list[Matrix], list[str]]:
    """The matrices of a model that can be packed, and the names of linear layers that cannot.

    Returns
    -------
    tuple
        Of the matrices, and of the names of layers whose width is not a multiple of 32.
    """
    stacks: list[Tensor] = []
    if architecture is not None:
        stacks = [stack for layer in architecture.layers for stack in (layer.qkv, layer.gate_up)]
    by_begin = {stack.data_ptr(): stack for stack in stacks}
    bounds = {begin + stack.nbytes: begin for begin, stack in by_begin.items()}
    ends = sorted(bounds)
    head = cast("Any", model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: dict[int, Matrix] = {}
    left_out: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach()
        rows, columns = weight.shape
        if columns % BLOCK:
            left_out.append(name)
            continue
        stack = _around(weight, by_begin, bounds, ends)
        first = 0 if stack is None else (weight.data_ptr() - stack.data_ptr()) // (columns * weight.element_size())
        whole = weight if stack is None else stack
        matrix = found.setdefault(whole.data_ptr(), Matrix(whole, [], head=module is head))
        matrix.parts.append(Part(name, module, first, first + rows))
    return list(found.values()), left_out


def _around(weight: Tensor, by_begin: dict[int, Tensor], bounds: dict[int, int], ends: list[int]) -> Tensor | None:
    """The stacked matrix whose memory a weight is a part of."""
    place = bisect_right(ends, weight.data_ptr())
    if place == len(ends):
        return None
    begin = bounds[ends[place]]
    return by_begin[begin] if begin <= weight.data_ptr() else None


def _multiplier(packed: Packed, part: Part) -> Callable[[Tensor], Tensor]:
    """What a module's ``forward`` does while its weights are packed: expand them, multiply, forget them again."""
    bias = part.module.bias
    step = max(EXPANDED_WEIGHTS // packed.columns, 1)

    def forward(x: Tensor) -> Tensor:
        outputs = []
        for first in range(part.first, part.last, step):
            last = min(first + step, part.last)
            rows = None if bias is None else bias[first - part.first : last - part.first]
            outputs.append(linear(x, packed.dequantize(first, last).to(x.dtype), rows))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    return forward
