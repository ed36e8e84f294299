"""Reads and writes checkpoints in the compressed-tensors format, which transformers and vLLM read too.

Only the form ``pack-quantized`` is known: integers packed into int32 along a row, a scale for each group or channel,
and packed integer zeros where the grid is not symmetric. Activations stay whole. Embeddings and the output layer are
kept as the master has them, as that form's readers expect.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inference_server.engine.quantization.packing import BLOCK, Rounded, Scheme
from inference_server.engine.quantization.variants import TIED_TO, Variant
from inference_server.features import FeatureError
from inference_server.models.errors import ModelError

METHOD = "compressed-tensors"
FORM = "pack-quantized"
COPIED = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*", "generation_config.json")
"""Files beside the weights that go with a model."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a folder holds.

    Attributes
    ----------
    state : dict
        Every parameter by name, the packed ones expanded to float32.
    rounded : dict
        By the name of a linear layer, its integers and scales as they were stored, where own kernels can read them.
    description : str
        For a person: the scheme of most layers.
    """

    state: dict[str, Tensor]
    rounded: dict[str, Rounded]
    description: str


def is_compressed(config: Any) -> bool:
    """Whether a model's configuration says that its weights are in this format."""
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method)) == METHOD


# -- writing -----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, variant: Variant, source: Path, folder: Path) -> int:
    """Write a packed variant of a model as a folder.

    Parameters
    ----------
    model : torch.nn.Module
        With its master weights.
    variant : Variant
    source : Path
        The master's folder; its tokenizer is copied.
    folder : Path
        Must not exist, or be empty.

    Returns
    -------
    int
        Bytes of the weights' file.

    Raises
    ------
    FeatureError
        If the format has no word for the variant's grid, or the folder cannot be written.
    """
    scheme = variant.weights.body
    if scheme.grid == "minimum" and scheme.bits != 8:
        raise FeatureError(
            "The compressed-tensors format has no grid that begins at a group's minimum; switch int4_grid to "
            "zero-point or symmetric, and save that."
        )
    if scheme.grid == "float":
        raise FeatureError(
            "Floating-point weights cannot be saved so far; switch weight_precision to int8, and save that."
        )
    if scheme.bits == 3:
        raise FeatureError("3-bit weights are for looking at, not for keeping; save 4 or 8 bits.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FeatureError(f"{folder} is not empty; name a new folder.")
        tensors: dict[str, Tensor] = {}
        groups: dict[Scheme, list[str]] = {}
        for matrix, packed in variant.pairs():
            if matrix.head:
                continue
            for part in matrix.parts:
                rounded = packed.unpack(part.first, part.last).to(torch.device("cpu"))
                tensors |= {f"{part.name}.{name}": value for name, value in _stored(rounded).items()}
                groups.setdefault(packed.scheme, []).append(part.name)
        replaced = {name for names in groups.values() for name in names}
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        for name, value in model.state_dict().items():
            module, _, kind = name.rpartition(".")
            tied = name != TIED_TO and value.data_ptr() == embedding.weight.data_ptr()
            if not (kind == "weight" and module in replaced) and not tied:
                tensors[name] = value.contiguous().clone()
        every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
        config["quantization_config"] = _described(groups, [name for name in every if name not in replaced])
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        weights = folder / "model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        for pattern in COPIED:
            for file in source.glob(pattern):
                shutil.copy2(file, folder / file.name)
    except OSError as error:
        raise FeatureError(f"{folder} cannot be written: {error}") from error
    return weights.stat().st_size


def _stored(rounded: Rounded) -> dict[str, Tensor]:
    scheme, (rows, columns) = rounded.scheme, rounded.values.shape
    unsigned = rounded.values.int() + 128 if scheme.bits == 8 else rounded.values.int()
    found = {
        "weight_packed": _pack_int32(unsigned, scheme.bits),
        "weight_scale": rounded.scale.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if rounded.offset is not None:
        found["weight_zero_point"] = _pack_int32(rounded.offset.int().T, scheme.bits).T.contiguous()
    return found


def _pack_int32(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers along rows, the first in the lowest bits; the last int32 is filled up with zeros."""
    rows, columns = values.shape
    per = 32 // bits
    missing = -columns % per
    parts = torch.nn.functional.pad(values.long(), (0, missing)).view(rows, -1, per)
    packed = (parts << (bits * torch.arange(per))).sum(-1)
    return (packed - ((packed >> 31) << 32)).int()


def _unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    per = 32 // bits
    parts = (packed.long()[..., None] >> (bits * torch.arange(per))) & ((1 << bits) - 1)
    return parts.flatten(1)[:, :columns]


def _described(groups: dict[Scheme, list[str]], ignored: list[str]) -> dict[str, Any]:
    return {
        "quant_method": METHOD,
        "format": FORM,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            f"group_{number}": {
                "targets": names,
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": scheme.bits,
                    "type": "int",
                    "symmetric": scheme.grid == "symmetric",
                    "strategy": "group" if scheme.group else "channel",
                    "group_size": scheme.group or None,
                    "dynamic": False,
                    "actorder": None,
                    "observer": "minmax",
                },
            }
            for number, (scheme, names) in enumerate(groups.items())
        },
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Checkpoint:
    """Read all weights of a folder.

    Raises
    ------
    ModelError
        If it is of a kind that is not known here.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described = config["quantization_config"]
    form = described.get("format")
    if form != FORM:
        raise ModelError(f"{folder.name} has compressed weights of the form {form!r}; only {FORM!r} can be read here")
    bits = {int(group["weights"]["num_bits"]) for group in described["config_groups"].values()}
    if not bits <= {4, 8} or any(group.get("input_activations") for group in described["config_groups"].values()):
        raise ModelError(
            f"{folder.name} has weights of {sorted(bits)} bits, or quantized activations; what can be read here are "
            "4 or 8 bits and whole activations"
        )
    if any(group["weights"].get("actorder") for group in described["config_groups"].values()):
        raise ModelError(f"{folder.name} has groups in the order of activations, which cannot be read here")
    whole: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, value in _tensors(folder):
        module, _, kind = name.rpartition(".")
        if kind.startswith("weight_"):
            packed.setdefault(module, {})[kind] = value
        else:
            whole[name] = value
    by_channel = {
        name
        for group in described["config_groups"].values()
        if group["weights"].get("strategy") == "channel"
        for name in group["targets"]
    }
    rounded: dict[str, Rounded] = {}
    words: list[str] = []
    for module, parts in packed.items():
        try:
            found = _rounded(parts, by_channel=module in by_channel or "Linear" in by_channel)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"{folder.name}: the weights of {module} cannot be read: {error}") from error
        whole[f"{module}.weight"] = found.dequantize()
        words.append(f"int{found.scheme.bits}" + (f" g{found.scheme.group}" if found.scheme.group else ""))
        if found.scheme.bits == 8 or bool((found.scale == found.scale.half().float()).all()):
            rounded[module] = found
    most = max(set(words), key=words.count, default="no packed layers")
    return Checkpoint(whole, rounded, f"{METHOD} {most}")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder.name} has no safetensors weights")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                yield name, file.get_tensor(name)


def _rounded(parts: dict[str, Tensor], *, by_channel: bool) -> Rounded:
    rows, columns = parts["weight_shape"].tolist()
    packed, scale = parts["weight_packed"], parts["weight_scale"].float()
    per = -(-columns // packed.shape[1])
    if per not in {4, 8} or len(packed) != rows or len(scale) != rows:
        raise ValueError(f"{list(packed.shape)} packed integers do not make {rows} rows of {columns} weights")
    bits, groups = 32 // per, scale.shape[1]
    group = columns // groups
    values = _unpack_int32(packed, bits, columns)
    zero = parts.get("weight_zero_point")
    if bits == 8:
        if zero is not None:
            raise ValueError("8-bit weights with zero points are not known")
        return Rounded((values - 128).to(torch.int8), scale, None, Scheme(8, 0 if by_channel else group))
    if group % BLOCK:
        raise ValueError(f"groups of {group} weights are not a multiple of {BLOCK}")
    offset = None if zero is None else _unpack_int32(zero.T, bits, rows).T.float().contiguous()
    scheme = Scheme(bits, 0 if by_channel else group, "symmetric" if zero is None else "zero-point")
    return Rounded(values.to(torch.uint8), scale, offset, scheme)
