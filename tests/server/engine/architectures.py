"""Tiny random models of many architectures, as transformers configures them: real code paths, toy sizes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4, "attention_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-window": ("phi3", {"sliding_window": 8}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "cohere": ("cohere", {}),
    "granite": ("granite", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "sliding_window": 8}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4}),
    "falcon": ("falcon", {}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3}),
}


def build(name: str, seed: int = 0) -> Any:
    """A model of architecture ``name`` with random float32 weights, in evaluation mode."""
    model_type, extra = ARCHITECTURES[name]
    values = {**COMMON, **extra}
    if model_type in {"gpt2", "bloom", "mpt", "falcon"}:
        values = {k: v for k, v in values.items() if k not in {"head_dim", "num_key_value_heads", "intermediate_size"}}
    config = AutoConfig.for_model(model_type, **values)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
