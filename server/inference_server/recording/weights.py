"""Identifies a model's weights by content: the SHA-256 of each file, computed once per file and remembered."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec
from platformdirs import user_cache_path

from inference_server.recording.format import WeightsFile

_BLOB = re.compile(r"[0-9a-f]{64}")


def identify(model_path: Path) -> tuple[WeightsFile, ...]:
    """Return the weight files of a model's folder with their hashes.

    Files in a hub cache are named by their SHA-256 already; others are read once, and again when size or time changed.

    Parameters
    ----------
    model_path
        Folder with safetensors or GGUF files, or one such file.
    """
    if model_path.is_file():
        files = [model_path]
    else:
        files = sorted((*model_path.glob("*.safetensors"), *model_path.glob("*.gguf")))
    memory = user_cache_path("inference-workbench", appauthor=False) / "weight-hashes.json"
    known = _load(memory)
    before = dict(known)
    found = []
    for file in files:
        try:
            found.append(_identify(file, known))
        except OSError:
            found.append(WeightsFile(name=file.name, bytes=0, sha256=None))
    if known != before:
        _store(memory, known)
    return tuple(found)


def _identify(file: Path, known: dict[str, str]) -> WeightsFile:
    real = file.resolve()
    facts = real.stat()
    if _BLOB.fullmatch(real.name):
        return WeightsFile(name=file.name, bytes=facts.st_size, sha256=real.name)
    key = f"{real}:{facts.st_size}:{facts.st_mtime_ns}"
    if key not in known:
        with real.open("rb") as stream:
            known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return WeightsFile(name=file.name, bytes=facts.st_size, sha256=known[key])


def _load(memory: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(memory.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}


def _store(memory: Path, known: dict[str, str]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(".part")
        partial.write_bytes(msgspec.json.encode(known))
        partial.replace(memory)
    except OSError:
        pass  # it is read again next time
