"""The EAGLE-style head: what it proposes against the dense computation, its fast kernels, its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from serving import DEVICE, GREEDY, generate, run, submit
from test_speculation import engine_for, head_for, repetitive

from inference_server.engine.cpu.head import CpuHeadRunner
from inference_server.engine.request import Request
from inference_server.engine.speculation import eagle_head
from inference_server.engine.speculation.eagle import EagleProposer, HeadRows, TorchHeadRunner
from inference_server.engine.speculation.eagle_head import EagleHead, HeadShape
from inference_server.engine.speculation.own_cache import GREEDY as HEAD_GREEDY
from inference_server.models.errors import ModelError

on_a_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="EAGLE-style heads run on a CPU only so far")


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def dense(model: Any, head: EagleHead, tokens: list[int], k: int) -> list[int]:
    """What a head proposes after a text, computed at once from transformers' own hidden states."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([tokens])
    states = model.model(input_ids=ids[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    model.set_attn_implementation(implementation)
    embed = model.get_input_embeddings().weight
    hidden = head.fuse(torch.cat([states[layer] for layer in head.shape.feature_layers], -1))
    positions = torch.arange(len(tokens) - 1)[None]
    out, past = head(embed[ids[:, 1:]], hidden, positions)
    last, proposed = out[:, -1:], []
    while True:
        proposed.append(int(head.proposed[head.logits(last[0, 0]).argmax()]))
        if len(proposed) == k:
            return proposed
        position = torch.tensor([[len(tokens) - 2 + len(proposed)]])
        last, past = head(embed[torch.tensor([[proposed[-1]]])], last, position, past)


@on_a_cpu
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_it_proposes_what_the_dense_computation_does(model: Any, fast: bool, residual: bool) -> None:
    head = head_for(model, norm_before_residual=residual)
    engine = engine_for(
        model, head=head, features={"speculation": "eagle", "num_speculative_tokens": 4, "prefix_cache_read": False}
    )
    proposer = engine.speculation._proposers["eagle"]
    assert isinstance(proposer, EagleProposer)
    if not fast:
        proposer._runner = TorchHeadRunner(head, model.get_input_embeddings().weight, 4096, 16)
        engine.set_features(0, {"fast_path": False})
    propose, seen = proposer.propose, []

    def recorded(plan: Any, items: Any, features: Any) -> list[list[int]]:
        drafts = propose(plan, items, features)
        seen.extend(zip([list(item.request.tokens) for item in items], drafts, strict=True))
        return drafts

    proposer.propose = recorded  # type: ignore[method-assign]
    # Prompts of one and of several chunks, together, so that the head catches up with many rows and with few.
    engine.set_features(0, {"max_num_batched_tokens": 24})
    for handle, length in enumerate((5, 40, 33)):
        submit(engine, handle, repetitive(length, handle), max_tokens=12, **GREEDY)
    run(engine)
    assert len(seen) > 12
    for tokens, drafts in seen:
        assert drafts == dense(model, head, tokens, len(drafts))


@on_a_cpu
@torch.no_grad()
def test_what_it_has_not_seen_it_begins_without(model: Any) -> None:
    head = head_for(model)
    prompts = {handle: [*repetitive(48, 5), 3 + handle] for handle in range(3)}
    engine = engine_for(model, head=head, kv_bytes=1 << 18)
    for handle, prompt in prompts.items():
        submit(engine, handle, prompt, max_tokens=30, **GREEDY)
    steps = {3: {"speculation": "eagle"}, 6: {"speculation": "off"}, 9: {"speculation": "eagle"}}
    steps |= {12: {"fast_path": False}, 14: {"block_size": 4}, 16: {"preemption": "swap", "max_num_seqs": 1}}
    assert run(engine, steps) == {handle: generate(model, prompt, 30) for handle, prompt in prompts.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_kernels_compute_what_torch_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = HeadShape(
        hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=32, vocab=256, draft_vocab=64, eps=1e-5,
        rope_theta=10_000.0, feature_layers=(0, 1, 2),
    )  # fmt: skip
    head = EagleHead(shape, torch.arange(64) * 3)
    for norm in (head.input_norm, head.hidden_norm, head.post_norm, head.norm):
        norm.data.uniform_(0.5, 1.5)
    embed = torch.randn(256, 64).to(dtype)
    plain, fast = TorchHeadRunner(head, embed, 1024, 16), CpuHeadRunner(head, embed, dtype, 1024, 16, 600, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    features = torch.randn(5, 192)
    assert (fast.fuse(features) - plain.fuse(features)).norm() <= tolerance * plain.fuse(features).norm()
    long, short = (Request(handle, 0, [], HEAD_GREEDY, 0, 0) for handle in range(2))
    long.blocks, short.blocks = list(range(20, 59)), [3, 1]
    passes = [
        HeadRows(list(range(250)), list(range(250)), [(long, 0, 250)], []),  # nothing kept: catching up
        HeadRows([7] * 60, [*range(250, 290), *range(20)], [(long, 0, 40), (short, 40, 20)], [39, 59]),
        HeadRows([9, 8], [290, 20], [(long, 0, 1), (short, 1, 1)], [0, 1]),
    ]
    for rows in passes:
        hidden = torch.randn(len(rows.ids), 64)
        (got, states), (expected, right) = fast.run(rows, hidden), plain.run(rows, hidden)
        assert (states - right).norm() <= tolerance * right.norm()
        assert dtype == torch.bfloat16 or got == expected


def test_a_checkpoint_is_what_it_was_and_has_the_formats_names(model: Any, tmp_path: Path) -> None:
    head = head_for(model)
    eagle_head.save(head, tmp_path, verifier="a/model", architecture="Llama", dtype=torch.float32, k=4)
    again = eagle_head.load(tmp_path)
    assert again.shape == head.shape
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in head.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3"
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert config["transformer_layer_config"]["hidden_size"] == 64
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (64, 128)
    assert torch.equal(torch.arange(48) + tensors["d2t"], head.proposed)
    assert tensors["t2d"].nonzero().flatten().tolist() == head.proposed.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculators_model_type": "mlp"}, "is 'mlp', not 'eagle3'"),
        ({"draft_vocab_size": 3}, "does not have the sizes that its configuration says"),
        ({"norm_before_fc": True}, "norm_before_fc"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(
    model: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    eagle_head.save(head_for(model), tmp_path, verifier="m", architecture="L", dtype=torch.float32, k=4)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        eagle_head.load(tmp_path)


@on_a_cpu
def test_a_head_for_another_model_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="reads layers"):
        engine_for(model, head=head_for(model, feature_layers=(0, 1, 9)))
    with pytest.raises(ModelError, match="holds no EAGLE-style head"):
        eagle_head.load(tmp_path)
