"""Converts a GGUF file into a folder of safetensors weights, once.

transformers does the reading and dequantizing. It runs in a process of its own (``python -m
inference_server.models.convert GGUF FOLDER``), because it needs torch, which the callers do not import, and several
times the model's memory, which ends with that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from inference_server.models.cache import Progress
from inference_server.models.errors import ModelError

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
        [sys.executable, "-m", __name__, str(gguf), str(target)],
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


def main(gguf: Path, target: Path) -> None:
    """Convert in this process; needs torch, transformers, gguf and accelerate."""
    import torch  # noqa: PLC0415 - only this process may import it
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
    print("tokenizer written", file=sys.stderr, flush=True)
    # float32 holds every dequantized value exactly; a 16-bit type would round them once more.
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
