"""GPTQ (Frantar et al. 2022): rounds a matrix column by column; the columns that are left make up for the errors.

What counts is the error of a layer's output on the inputs it gets. With ``H`` the second moment of these inputs, the
best correction of the remaining columns for the rounding error of one column is a row of the Cholesky factor of ``H``'s
inverse. A model is rounded from its first layer to its last, each matrix on the inputs that the rounded ones before it
give, so that errors made early are seen later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from inference_server.engine.llama import Architecture, Layer
from inference_server.engine.quantization.packing import Rounded, Scheme, grid_of, nearest, round_to_nearest

WINDOW = 256
"""Tokens of a calibration sequence."""
DAMPING = 0.01
"""Added to the diagonal of ``H``, as a share of its mean, so that it can be inverted."""
LAZY_COLUMNS = 128
"""Columns whose corrections are carried out at once in those after them."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a rounded matrix is from the whole one, on the inputs it was rounded for.

    Attributes
    ----------
    name : str
        Such as ``"layers.3.down"``.
    gptq, nearest : float
        Squared error of the output, relative to the output's square: of GPTQ, and of rounding to nearest.
    """

    name: str
    gptq: float
    nearest: float


def solve(weight: Tensor, moment: Tensor, scheme: Scheme) -> Rounded:
    """Round a matrix for inputs with a given second moment.

    Parameters
    ----------
    weight : Tensor
        ``[rows, columns]``, floating point.
    moment : Tensor
        ``[columns, columns]``: the inputs' ``x.T @ x``, of any scale.
    scheme : Scheme
        Its group must divide ``columns``.

    Returns
    -------
    Rounded
    """
    columns = weight.shape[1]
    group = scheme.group or columns
    w = weight.detach().float().T.contiguous()  # a column of the matrix is one row here, next to itself in memory
    moment = moment.double().clone()
    unused = moment.diagonal() == 0
    moment.diagonal()[unused] = 1
    moment.diagonal().add_(DAMPING * moment.diagonal().mean())
    factor = _inverse_factor(moment)
    lazy = group * max(LAZY_COLUMNS // group, 1) if scheme.group else LAZY_COLUMNS
    values = torch.empty_like(w, dtype=torch.int8 if scheme.bits == 8 else torch.uint8)
    scales, offsets = [], []
    if not scheme.group:
        scale, offset = grid_of(w.T, scheme)
        scales.append(scale)
        offsets.append(offset)
    for begin in range(0, columns, lazy):
        end = min(begin + lazy, columns)
        block, inverse = w[begin:end], factor[begin:end, begin:end]
        errors = torch.empty_like(block)
        for index in range(end - begin):
            if scheme.group and (begin + index) % group == 0:
                # From the weights as corrected so far, which is what is about to be rounded.
                scale, offset = grid_of(w[begin + index : begin + index + group].T, scheme)
                scales.append(scale)
                offsets.append(offset)
            column = block[index]
            rounded = nearest(column, scale, offset, scheme)
            values[begin + index] = rounded
            meant = Rounded(rounded[:, None], scale[:, None], None if offset is None else offset[:, None], scheme)
            error = (column - meant.dequantize()[:, 0]) / inverse[index, index]
            errors[index] = error
            block[index + 1 :].addr_(inverse[index, index + 1 :], error, alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    kept = [offset for offset in offsets if offset is not None]
    return Rounded(values.T.contiguous(), torch.stack(scales, 1), torch.stack(kept, 1) if kept else None, scheme)


def output_error(weight: Tensor, rounded: Rounded, moment: Tensor) -> float:
    """Squared error of the output on inputs with second moment ``moment``, relative to the output's square."""
    whole = weight.detach().float()
    difference = whole - rounded.dequantize()
    return float(((difference @ moment) * difference).sum() / ((whole @ moment) * whole).sum().clamp(min=1e-30))


def round_model(
    architecture: Architecture,
    tokens: list[int],
    scheme: Scheme,
    progress: Callable[[float, str], None],
) -> tuple[dict[int, Rounded], list[LayerError]]:
    """Round the matrices of all layers, from the first to the last.

    Parameters
    ----------
    architecture : Architecture
    tokens : list of int
        The calibration text, cut into sequences of :data:`WINDOW`; what is left over is not used.
    scheme : Scheme
    progress : callable
        Called with a fraction and what was done, before each matrix. What it raises ends the work.

    Returns
    -------
    tuple
        Rounded matrices by the address of the master's, and each one's error.

    Raises
    ------
    ValueError
        If the text is shorter than one sequence.
    """
    count = len(tokens) // WINDOW
    if not count:
        raise ValueError(f"the calibration text has {len(tokens)} tokens; it needs {WINDOW} at least")
    ids = torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)
    solved: dict[int, Rounded] = {}
    errors: list[LayerError] = []
    steps = 4 * len(architecture.layers)

    def rounded(name: str, weight: Tensor, inputs: Tensor) -> Tensor:
        progress(len(errors) / steps, name)
        fitted = scheme.fitted(weight.shape[1])
        flat = inputs.reshape(-1, inputs.shape[-1])
        moment = flat.T @ flat
        result = solve(weight, moment, fitted)
        errors.append(
            LayerError(
                name,
                output_error(weight, result, moment),
                output_error(weight, round_to_nearest(weight, fitted), moment),
            )
        )
        solved[weight.data_ptr()] = result
        return inputs @ result.dequantize().T

    with torch.inference_mode():
        x = architecture.embedding[ids.to(architecture.embedding.device)].float()
        for number, layer in enumerate(architecture.layers):
            x = run_layer(architecture, layer, x, lambda name, *rest, at=number: rounded(f"layers.{at}.{name}", *rest))
    return solved, errors


Multiply = Callable[[str, Tensor, Tensor], Tensor]
"""``(name, weight, inputs) -> inputs @ weight.T``, in whatever precision."""


def run_layer(a: Architecture, layer: Layer, x: Tensor, multiply: Multiply) -> Tensor:
    """Compute one layer of whole texts in float32.

    Parameters
    ----------
    a : Architecture
    layer : Layer
    x : Tensor
        ``[sequences, positions, hidden]``, the residual stream.
    multiply : callable
        Is given each of the four matrices in the order of their use.
    """
    sequences, length, _ = x.shape
    qkv = multiply("qkv", layer.qkv, _normed(x, layer.input_norm, a.eps))
    if layer.qkv_bias is not None:
        qkv = qkv + layer.qkv_bias
    qkv = qkv.view(sequences, length, a.heads + 2 * a.kv_heads, a.head_dim).transpose(1, 2)
    query, key, value = torch.split(qkv, [a.heads, a.kv_heads, a.kv_heads], dim=1)
    if layer.q_norm is not None:
        query = _normed(query, layer.q_norm, a.eps)
    if layer.k_norm is not None:
        key = _normed(key, layer.k_norm, a.eps)
    if layer.rotate:
        cos, sin = a.cos[:length], a.sin[:length]
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    mask = None
    if layer.window and layer.window < length:
        place = torch.arange(length, device=x.device)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < layer.window)
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=a.scaling, enable_gqa=a.heads != a.kv_heads
    )
    x = x + multiply("output", layer.output, attended.transpose(1, 2).reshape(sequences, length, -1))
    gate, up = multiply("gate_up", layer.gate_up, _normed(x, layer.post_norm, a.eps)).chunk(2, dim=-1)
    return x + multiply("down", layer.down, silu(gate) * up)


def _inverse_factor(moment: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of a positive definite matrix, float32."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
