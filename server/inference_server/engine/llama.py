"""What the fast path must know of a model: its sizes and weights, or the reason why it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""
MAX_GROUP = 16
MAX_HEAD_DIM = 256


class UnsupportedError(ValueError):
    """The fast path cannot run this model; the message says why."""


@dataclass(slots=True)
class Layer:
    """Weights of one layer. Matrices are ``[out, in]``; vectors are float32."""

    input_norm: Tensor
    qkv: Tensor
    """Query, key and value projections, one below the other. The module's own weights are views of it."""
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    """Gate and up projections, one below the other, shared with the module as ``qkv`` is."""
    down: Tensor
    window: int
    """Sliding window in positions, 0 for none."""
    rotate: bool
    """Whether queries and keys are rotated (SmolLM3 leaves some layers out)."""


@dataclass(slots=True)
class Architecture:
    """A model of the Llama family, ready for the fast path."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    scaling: float
    dtype: torch.dtype
    embedding: Tensor
    final_norm: Tensor
    head: Tensor
    layers: list[Layer]
    cos: Tensor
    """float32 ``[positions, head_dim / 2]``"""
    sin: Tensor


def check_supported(model: Any, dtype: torch.dtype, multiple: int = 1) -> None:
    """Find out whether a model fits, without changing it.

    Parameters
    ----------
    model : torch.nn.Module
    dtype : torch.dtype
        To compute in.
    multiple : int
        What the kernels need all widths to be a multiple of.

    Raises
    ------
    UnsupportedError
        Saying why not.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if name not in FAMILY:
        raise UnsupportedError(f"{name} is not of the Llama family ({', '.join(FAMILY)})")
    if dtype not in {torch.float32, torch.bfloat16}:
        raise UnsupportedError(f"it computes in float32 or bfloat16, not {str(dtype).removeprefix('torch.')}")
    if config.hidden_act != "silu":
        raise UnsupportedError(f"its activation is {config.hidden_act}, not silu")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise UnsupportedError(f"its rotary embedding is of type {rope!r}, not one of {', '.join(ROPE_TYPES)}")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    if attention.o_proj.bias is not None or mlp.gate_proj.bias is not None or mlp.down_proj.bias is not None:
        raise UnsupportedError("its output or feed-forward projections have biases")
    if getattr(model.lm_head, "bias", None) is not None:
        raise UnsupportedError("its output head has a bias")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if attention.head_dim > MAX_HEAD_DIM or heads // kv_heads > MAX_GROUP:
        raise UnsupportedError(f"its heads are larger than {MAX_HEAD_DIM} or share a KV head by more than {MAX_GROUP}")
    widths = (config.hidden_size, config.intermediate_size, attention.head_dim, heads * attention.head_dim)
    if any(width % multiple for width in widths):
        raise UnsupportedError(f"its sizes {widths} are not all multiples of {multiple}")


def fuse(model: Any, dtype: torch.dtype, positions: int) -> Architecture:
    """Lay the weights out for the fast path.

    The query, key and value weights of a layer become rows of one matrix, and so do gate and up. The module's own
    parameters are made views of these rows, so that both paths read the same memory and it is held once.
    """
    config = model.config.get_text_config()
    attention = model.model.layers[0].self_attn
    cos, sin = _angles(model, attention.head_dim, positions)
    layers = []
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            bias = None
            if attention.q_proj.bias is not None:
                bias = torch.cat([each.bias for each in projections]).float()
            layers.append(
                Layer(
                    input_norm=layer.input_layernorm.weight.float().contiguous(),
                    qkv=_stack(*projections),
                    qkv_bias=bias,
                    q_norm=_vector(attention, "q_norm"),
                    k_norm=_vector(attention, "k_norm"),
                    output=_contiguous(attention.o_proj),
                    post_norm=layer.post_attention_layernorm.weight.float().contiguous(),
                    gate_up=_stack(mlp.gate_proj, mlp.up_proj),
                    down=_contiguous(mlp.down_proj),
                    window=_window(attention, config),
                    rotate=bool(getattr(attention, "use_rope", True)),
                )
            )
    return Architecture(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        vocab=model.lm_head.weight.shape[0],
        eps=config.rms_norm_eps,
        scaling=attention.scaling,
        dtype=dtype,
        embedding=model.model.embed_tokens.weight.detach(),
        final_norm=model.model.norm.weight.detach().float().contiguous(),
        head=_contiguous(model.lm_head),
        layers=layers,
        cos=cos,
        sin=sin,
    )


def _stack(*linears: Any) -> Tensor:
    """One matrix of several linears' weights; their parameters become views of it."""
    parts = [linear.weight for linear in linears]
    stacked = torch.cat([part.data for part in parts])
    row = 0
    for part in parts:
        part.data = stacked[row : row + part.shape[0]]
        row += part.shape[0]
    return stacked


def _contiguous(linear: Any) -> Tensor:
    if not linear.weight.is_contiguous():
        linear.weight.data = linear.weight.data.contiguous()
    weight: Tensor = linear.weight.detach()
    return weight


def _vector(module: Any, name: str) -> Tensor | None:
    part = getattr(module, name, None)
    return None if part is None else part.weight.detach().float().contiguous()


def _window(attention: Any, config: Any) -> int:
    if hasattr(attention, "sliding_window"):
        return int(attention.sliding_window or 0)
    if config.model_type == "mistral":
        return int(config.sliding_window or 0)
    return 0


def _angles(model: Any, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, from the model's own rotary embedding."""
    rotary = model.model.rotary_emb
    with torch.inference_mode():
        device = rotary.inv_freq.device
        place = torch.arange(positions, device=device)[None]
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32, device=device), place)
    half = head_dim // 2
    if cos.shape[-1] != head_dim:
        raise UnsupportedError("it rotates only a part of each head")
    return cos[0, :, :half].float().clone(), sin[0, :, :half].float().clone()
