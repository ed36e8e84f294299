"""What a step reads and computes, against torch's own count of operations and the weights' size on their device."""

from __future__ import annotations

import pytest
import torch
from serving import engine_for, submit
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from inference_server.engine.core import Engine
from inference_server.engine.work import step_work
from inference_server.protocol import StepEvent
from inference_server.recording.work import with_work

SIZE = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = LlamaConfig(
    **SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)
PROMPT = 24


def model_of(architecture: str) -> torch.nn.Module:
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SIZE, n_embd=32, n_layer=2, n_head=4)).eval()
    LLAMA.tie_word_embeddings = architecture == "llama, tied"
    return LlamaForCausalLM(LLAMA).eval()


def steps_of(engine: Engine, tokens: int) -> list[StepEvent]:
    submit(engine, 1, range(3, 3 + PROMPT), max_tokens=tokens, temperature=0.0, ignore_eos=True)
    work = step_work(engine.loaded)
    assert work is not None
    steps = []
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        assert report.step is not None
        steps.append(with_work(report.step, work, len(report.tokens.request)))
    return steps


@pytest.mark.parametrize("architecture", ["llama, tied", "llama", "gpt2"])
def test_the_operations_of_a_prompt_are_those_that_torch_counts(architecture: str) -> None:
    model = model_of(architecture)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(3, 3 + PROMPT)[None], logits_to_keep=1)
    counted = counter.get_total_flops()
    engine = engine_for(model)
    work = step_work(engine.loaded)
    assert work is not None
    # torch computes the whole square of scores; a causal model needs the half of it that the definition counts.
    square = work.attention_flops_per_pair * PROMPT**2
    triangle = work.attention_flops_per_pair * PROMPT * (PROMPT + 1) // 2
    # Where transformers computes the angles of rotation by a matrix product, torch counts that too.
    angles = 0 if architecture == "gpt2" else model.config.head_dim * PROMPT
    assert steps_of(engine, 1)[0].flops + square - triangle in {counted, counted - angles}


@pytest.mark.parametrize("architecture", ["llama, tied", "llama"])
def test_a_decode_step_reads_every_weight_once_and_its_context_once(architecture: str) -> None:
    model = model_of(architecture)
    engine = engine_for(model)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    row = model.get_input_embeddings().weight[0]
    if architecture == "llama":  # of an embedding of its own only a row is looked up
        weights -= model.get_input_embeddings().weight.nbytes
    per_position = 2 * 3 * 2 * LLAMA.head_dim * 4  # key and value, layers, KV heads, float32
    decode = steps_of(engine, 2)[1]
    assert decode.read_bytes == weights + row.nbytes + (PROMPT + 1 + 1) * per_position


def test_a_model_of_experts_has_no_such_figures_since_a_step_reads_only_some() -> None:
    config = MixtralConfig(
        **SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    assert step_work(engine_for(MixtralForCausalLM(config).eval()).loaded) is None


def test_attention_is_timed_apart_where_calling_it_is_doing_it() -> None:
    engine = engine_for(model_of("llama"))
    engine.set_features(0, {"fast_path": False} if engine.fast is not None else {})
    for step in steps_of(engine, 3):
        if engine.loaded.device.type == "cpu":
            assert step.attention_ns is not None
            assert 0 < step.attention_ns < step.forward_ns
        else:
            assert step.attention_ns is None
