"""A model is refused for what its layers compute, not for how deep it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import COMMON, build
from serving import engine_for
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from inference_server.engine import attention
from inference_server.models.errors import ModelError


def test_a_deep_bfloat16_model_whose_logits_are_off_by_rounding_alone_is_served() -> None:
    config = AutoConfig.for_model("llama", **{**COMMON, "num_hidden_layers": 48})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 256, (1, 12))
    logits = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            logits.append(model(input_ids=ids).logits.float())
    whole = float((logits[0] - logits[1]).norm() / logits[0].norm())
    assert whole > 5e-2, "transformers' own two ways agree: the model is no test"
    engine_for(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_is_wrong_in_one_layer_is_refused_and_the_layer_named(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AttentionInterface()[attention.NAME]

    def wrong(module: Any, query: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return right(module, query * 1.3 if module.layer_idx == 1 else query, *rest, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, wrong)
    with pytest.raises(ModelError, match="attention of layer 1 differs"):
        engine_for(build("llama").to(dtype))


def test_a_model_that_does_not_use_the_positions_it_is_given_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    forward = model.model.rotary_emb.forward
    monkeypatch.setattr(
        model.model.rotary_emb, "forward", lambda x, position_ids: forward(x, position_ids - position_ids[:, :1])
    )
    with pytest.raises(ModelError, match="differs"):
        engine_for(model)


def test_a_model_that_is_wrong_outside_of_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: forward(x) * (2 if x.shape[1] == 1 else 1) + x[..., :1])
    monkeypatch.setattr(
        model.model.norm, "forward", lambda x: x if x.shape[1] == 1 else x / x.norm(dim=-1, keepdim=True)
    )
    with pytest.raises(ModelError, match="logits differ"):
        engine_for(model)
