"""An EAGLE-3 head: one decoder layer that reads the model's own hidden states and proposes its next tokens.

Li et al. 2025, *EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test*. Owns the
module, as it is trained and as the oracle of faster code, and the checkpoint: a folder with ``config.json`` and
``model.safetensors`` in the format of ``speculators`` (``speculators_model_type: eagle3``), which vLLM loads as well.

For position ``t`` the head gets the embedding of token ``t + 1`` and a feature of position ``t``: first the model's
hidden states of three layers, fused; then, for tokens that it proposes one after another, its own last hidden state.
Its output says what comes after token ``t + 1``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from inference_server.models.errors import ModelError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT_VERSION = "0.5.0"
"""Of ``speculators``, whose fields are written."""


class HeadShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of a head and where its features come from."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    """Of the model."""
    draft_vocab: int
    """Tokens that the head can propose."""
    eps: float
    rope_theta: float
    feature_layers: tuple[int, int, int]
    """The hidden states that enter these layers are the features; the number of layers stands for the last output."""
    norm_before_residual: bool = False


@dataclass(slots=True)
class KeysAndValues:
    """What the head remembers of the positions before, ``[batch, kv_heads, positions, head_dim]`` each."""

    keys: Tensor
    values: Tensor


class EagleHead(nn.Module):
    """The head's layers. The embedding is the model's own.

    Parameters
    ----------
    shape : HeadShape
    proposed : Tensor
        ``[draft_vocab]`` the model's ids of the tokens that the head can propose, rising.
    """

    def __init__(self, shape: HeadShape, proposed: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.stored = torch.float32
        """What the weights were read as: that type holds them all without rounding."""
        hidden, both = shape.hidden, 2 * shape.hidden
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.input_norm = nn.Parameter(torch.ones(hidden))
        self.hidden_norm = nn.Parameter(torch.ones(hidden))
        self.q = nn.Linear(both, shape.heads * shape.head_dim, bias=False)
        self.k = nn.Linear(both, shape.kv_heads * shape.head_dim, bias=False)
        self.v = nn.Linear(both, shape.kv_heads * shape.head_dim, bias=False)
        self.o = nn.Linear(shape.heads * shape.head_dim, hidden, bias=False)
        self.post_norm = nn.Parameter(torch.ones(hidden))
        self.gate = nn.Linear(hidden, shape.intermediate, bias=False)
        self.up = nn.Linear(hidden, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, hidden, bias=False)
        self.norm = nn.Parameter(torch.ones(hidden))
        self.lm_head = nn.Linear(hidden, shape.draft_vocab, bias=False)
        self.proposed: Tensor
        self.register_buffer("proposed", proposed.long())

    def fuse(self, features: Tensor) -> Tensor:
        """Make ``[..., hidden]`` of the hidden states of three layers, ``[..., 3 * hidden]``."""
        fused: Tensor = self.fc(features)
        return fused

    def qkv(self, embedded: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[batch, heads, positions, head_dim]`` of inputs ``[batch, positions, hidden]``."""
        shape = self.shape
        both = torch.cat([self._rms(embedded, self.input_norm), self._rms(hidden, self.hidden_norm)], -1)
        q, k, v = (each(both).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for each in (self.q, self.k, self.v))
        cos, sin = self._angles(positions)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, ``[batch, positions, hidden]``; ``attended`` is as queries are."""
        residual = self._rms(hidden, self.hidden_norm) if self.shape.norm_before_residual else hidden
        residual = residual + self.o(attended.transpose(1, 2).flatten(-2))
        x = self._rms(residual, self.post_norm)
        result: Tensor = residual + self.down(silu(self.gate(x)) * self.up(x))
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tokens that can be proposed, ``[..., draft_vocab]``."""
        result: Tensor = self.lm_head(self._rms(hidden, self.norm))
        return result

    def forward(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """Compute positions that follow those in ``past``, causally; return the output and what to remember."""
        q, k, v = self.qkv(embedded, hidden, positions)
        if past is not None:
            k, v = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
        count, known = q.shape[2], k.shape[2]
        mask = torch.ones(count, known, dtype=torch.bool, device=q.device).tril(known - count)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.after_attention(hidden, attended), KeysAndValues(k, v)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.shape.eps)
        return (scaled * weight).to(x.dtype)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = rope_frequencies(self.shape, positions.device)
        angles = positions[..., None].float() * frequencies
        return angles.cos()[:, None], angles.sin()[:, None]


def rope_frequencies(shape: HeadShape, device: torch.device) -> Tensor:
    """Angle per position of each pair of a head's components, ``[head_dim / 2]``."""
    exponents = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    return shape.rope_theta**-exponents


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


# -- the checkpoint ----------------------------------------------------------------------------------------------------

_NAMES = {
    "fc.weight": "fc.weight",
    "layers.0.input_layernorm.weight": "input_norm",
    "layers.0.hidden_norm.weight": "hidden_norm",
    "layers.0.self_attn.q_proj.weight": "q.weight",
    "layers.0.self_attn.k_proj.weight": "k.weight",
    "layers.0.self_attn.v_proj.weight": "v.weight",
    "layers.0.self_attn.o_proj.weight": "o.weight",
    "layers.0.post_attention_layernorm.weight": "post_norm",
    "layers.0.mlp.gate_proj.weight": "gate.weight",
    "layers.0.mlp.up_proj.weight": "up.weight",
    "layers.0.mlp.down_proj.weight": "down.weight",
    "norm.weight": "norm",
    "lm_head.weight": "lm_head.weight",
}
"""The checkpoint's names of the weights, and the module's."""


def save(head: EagleHead, folder: Path, *, verifier: str, architecture: str, dtype: torch.dtype, k: int) -> None:
    """Write a checkpoint.

    Parameters
    ----------
    head : EagleHead
    folder : Path
        Is made.
    verifier, architecture : str
        Name and class of the model that the head is for.
    dtype : torch.dtype
        Of the weights in the file.
    k : int
        Tokens to propose per step unless told otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape, state = head.shape, head.state_dict()
    tensors = {name: state[own].to(dtype).contiguous().cpu() for name, own in _NAMES.items()}
    proposed = head.proposed.cpu()
    tensors["d2t"] = proposed - torch.arange(len(proposed))
    tensors["t2d"] = torch.zeros(shape.vocab, dtype=torch.bool).scatter_(0, proposed, value=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": FORMAT_VERSION,
        "draft_vocab_size": shape.draft_vocab,
        "norm_before_residual": shape.norm_before_residual,
        "norm_before_fc": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": list(shape.feature_layers),
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": k}],
            "verifier": {"name_or_path": verifier, "architectures": [architecture]},
        },
        "transformer_layer_config": {
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": 1,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab,
            "rms_norm_eps": shape.eps,
            "rope_theta": shape.rope_theta,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": 8192,
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> EagleHead:
    """Read a checkpoint, with its weights in float32.

    Raises
    ------
    ModelError
        Saying what is wrong with it.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder} holds no EAGLE-style head that can be read: {error}") from error
    try:
        shape = _shape(config)
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / CONFIG} describes no EAGLE-3 head in the format of speculators: {error}"
        ) from error
    missing = sorted(set(_NAMES) - set(tensors))
    if missing:
        raise ModelError(f"the head in {folder} lacks {', '.join(missing)}")
    if "d2t" in tensors:
        proposed = tensors["d2t"].long() + torch.arange(len(tensors["d2t"]))
    else:
        proposed = torch.arange(shape.draft_vocab)
    head = EagleHead(shape, proposed)
    try:
        head.load_state_dict({own: tensors[name].float() for name, own in _NAMES.items()} | {"proposed": proposed})
    except RuntimeError as error:
        raise ModelError(
            f"the head in {folder} does not have the sizes that its configuration says: {error}"
        ) from error
    head.stored = tensors["fc.weight"].dtype
    return head.eval().requires_grad_(requires_grad=False)


def _shape(config: dict[str, Any]) -> HeadShape:
    kind = config.get("speculators_model_type")
    if kind != "eagle3":
        raise KeyError(f"speculators_model_type is {kind!r}, not 'eagle3'")
    if config.get("norm_before_fc"):
        raise KeyError("norm_before_fc is set, which is not known here")
    layer = config["transformer_layer_config"]
    if layer.get("num_hidden_layers", 1) != 1:
        raise KeyError(f"it has {layer['num_hidden_layers']} layers, not one")
    rope = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise KeyError("its rotary embedding is scaled, which is not known here")
    hidden, heads = layer["hidden_size"], layer["num_attention_heads"]
    first, second, third = config["eagle_aux_hidden_state_layer_ids"]
    return HeadShape(
        hidden=hidden,
        intermediate=layer["intermediate_size"],
        heads=heads,
        kv_heads=layer.get("num_key_value_heads") or heads,
        head_dim=layer.get("head_dim") or hidden // heads,
        vocab=layer["vocab_size"],
        draft_vocab=config["draft_vocab_size"],
        eps=layer["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", layer.get("rope_theta", 10_000.0))),
        feature_layers=(first, second, third),
        norm_before_residual=bool(config.get("norm_before_residual", False)),
    )
