"""Converts a GGUF file into a folder of safetensors weights, once.

The work is done in a process of its own, :mod:`inference_server.models.convert_process`, because it needs torch, which
the callers do not import, and several times the model's memory, which ends with that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from inference_server.models.cache import Progress
from inference_server.models.errors import ModelError

CONVERTER = "inference_server.models.convert_process"
ORIGIN_FILE = "inference_workbench.json"
"""Says where a converted folder came from and whether its weights had been quantized."""


def convert_gguf(gguf: Path, target: Path, progress: Progress, *, source: str) -> None:
    """Write weights, configuration and tokenizer of ``gguf`` into the folder ``target``.

    Raises
    ------
    ModelError
        If transformers cannot read the file.
    """
    begin = time.monotonic()
    process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", CONVERTER, str(gguf), str(target)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stderr is not None
    tail: list[str] = []
    try:
        for line in process.stderr:
            text = line.rstrip().rsplit("\r", 1)[-1]
            tail = [*tail[-20:], text]
            progress(
                "converting the model to safetensors", None, f"{time.monotonic() - begin:.0f} s, usually about 15 s"
            )
        if process.wait():
            raise ModelError(f"{gguf.name} cannot be converted: {tail[-1] if tail else 'no reason given'}")
    finally:
        process.kill()
        process.wait()
    (target / ORIGIN_FILE).write_text(json.dumps({"file": gguf.name, "quantized_source": source}), encoding="utf-8")
