"""Converts a GGUF file with transformers: ``python -m inference_server.models.convert_process GGUF FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(gguf: Path, target: Path) -> None:
    """Convert in this process; needs torch, transformers, gguf and accelerate."""
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
