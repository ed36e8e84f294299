"""GPTQ: its layers err less than rounding to nearest, its own forward pass is the model's, and it is one switch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import build

from inference_server.engine.llama import fuse
from inference_server.engine.quantization import gptq
from inference_server.engine.quantization.packing import GRIDS, Grid, Scheme, quantize, round_to_nearest

FAMILY = ["llama", "mistral-window", "qwen2", "qwen3", "smollm3"]


def correlated(samples: int, columns: int) -> torch.Tensor:
    """Inputs with a few strong directions, as activations have them."""
    mixing = torch.randn(columns // 8, columns)
    return torch.randn(samples, columns // 8) @ mixing + 0.1 * torch.randn(samples, columns)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("group", [0, 32, 96])
def test_the_output_errs_less_than_with_rounding_to_nearest(bits: int, group: int, grid: Grid) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 192), correlated(400, 192)
    scheme = Scheme(bits, group, grid)
    moment = x.T @ x
    solved = gptq.solve(weight, moment, scheme)
    assert solved.values.shape == weight.shape
    assert int(solved.values.max()) < scheme.levels
    exact = x.double() @ weight.double().T

    def error(values: torch.Tensor) -> float:
        return float((x.double() @ values.double().T - exact).square().sum() / exact.square().sum())

    nearest = round_to_nearest(weight, scheme)
    assert error(solved.dequantize()) < 0.6 * error(nearest.dequantize())
    assert gptq.output_error(weight, nearest, moment) == pytest.approx(error(nearest.dequantize()), rel=1e-3)


def test_with_independent_inputs_there_is_nothing_to_make_up_and_rounding_is_to_nearest() -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(16, 64), Scheme(4, 32)
    solved = gptq.solve(weight, torch.eye(64), scheme)
    assert torch.equal(solved.values, round_to_nearest(weight, scheme).values)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    torch.manual_seed(0)
    x = correlated(200, 64)
    x[:, 5] = 0
    solved = gptq.solve(torch.randn(16, 64), x.T @ x, Scheme(4, 32))
    assert torch.isfinite(solved.dequantize()).all()


@pytest.mark.parametrize("name", FAMILY)
def test_the_layers_are_computed_as_the_model_computes_them(name: str) -> None:
    model = build(name)
    tokens = torch.randint(0, 256, (2, 40))
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
        architecture = fuse(model, torch.float32, 64)
        x = architecture.embedding[tokens].float()
        for layer in architecture.layers:
            x = gptq.run_layer(architecture, layer, x, lambda _, weight, inputs: inputs @ weight.T)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + architecture.eps) * architecture.final_norm
        got = x @ architecture.head.T
    assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("bits", [4, 3])
def test_every_layer_of_a_model_errs_less_and_so_does_the_model(bits: int) -> None:
    model: Any = build("llama")
    architecture = fuse(model, torch.float32, 512)
    torch.manual_seed(0)
    # Text that the model itself would say, so that its layers get inputs as they do when it serves.
    tokens = model.generate(
        torch.randint(3, 256, (8, 1)), max_new_tokens=255, do_sample=True, pad_token_id=0, eos_token_id=None
    )
    told: list[float] = []
    packed, errors = gptq.round_model(
        architecture, tokens.flatten().tolist(), Scheme(bits, 32), lambda fraction, _: told.append(fraction)
    )
    assert len(errors) == len(packed) == 4 * len(architecture.layers)
    assert all(error.gptq < error.nearest for error in errors)
    assert told == sorted(told)

    def divergence(weights: dict[int, torch.Tensor]) -> float:
        ids = tokens[:, :128]
        with torch.inference_mode():
            outputs = []
            for chosen in ({}, weights):
                x = architecture.embedding[ids].float()
                for layer in architecture.layers:
                    x = gptq.run_layer(architecture, layer, x, lambda _, w, i, c=chosen: i @ c.get(w.data_ptr(), w).T)
                x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + architecture.eps) * architecture.final_norm
                outputs.append(torch.log_softmax(x @ architecture.head.T, -1))
        return float((outputs[0].exp() * (outputs[0] - outputs[1])).sum(-1).mean())

    matrices = [m for layer in architecture.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    nearest = {m.data_ptr(): quantize(m, Scheme(bits, 32)).dequantize() for m in matrices}
    assert divergence({address: each.dequantize() for address, each in packed.items()}) < divergence(nearest)


def test_a_text_that_is_too_short_is_refused() -> None:
    architecture = fuse(build("llama"), torch.float32, 64)
    with pytest.raises(ValueError, match="256 at least"):
        gptq.round_model(architecture, [5] * 100, Scheme(4, 32), lambda *_: None)


def test_the_damping_keeps_a_moment_of_few_inputs_invertible() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    assert math.isfinite(
        gptq.output_error(torch.ones(8, 64), gptq.solve(torch.ones(8, 64), x.T @ x, Scheme(4, 32)), x.T @ x)
    )
