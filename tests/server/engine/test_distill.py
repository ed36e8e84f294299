"""Distillation of a tiny teacher from end to end: it learns, goes on where it was stopped, and its head serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import GREEDY, run, submit
from test_eagle import dense
from test_speculation import head_for
from transformers import AutoModelForCausalLM

from inference_server.distill import hidden_states
from inference_server.distill import run as runs
from inference_server.distill.head_training import Batch, Text, judge, start
from inference_server.distill.hidden_states import Kept, Recomputed, Resident
from inference_server.distill.run import Options, Outcome, Progress
from inference_server.distill.teacher_text import Written
from inference_server.engine.core import Engine
from inference_server.engine.speculation import eagle_head
from inference_server.models.errors import ModelError
from inference_server.protocol import EngineConfig


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runs.BATCH_TOKENS, "cpu", 300)
    monkeypatch.setitem(runs.JUDGE_EVERY, "cpu", 5)
    monkeypatch.setattr("inference_server.distill.optimizer.WARM_UP", 5)
    monkeypatch.setattr("inference_server.distill.teacher_text.ANSWER_TOKENS", 30)


def distill(model: Path, folder: Path, stop_after: int = 1 << 30, **changes: Any) -> tuple[Outcome, list[Progress]]:
    told: list[Progress] = []
    given = {"device": "cpu", "tokens": 2500, "epochs": 6, "draft_vocab": 96, "rate": 4e-3, **changes}
    options = Options(model=str(model), folder=folder, **given)
    outcome = runs.distill(options, told.append, lambda: len(told) >= stop_after)
    return outcome, told


def test_a_run_that_is_stopped_anywhere_goes_on_and_ends_as_one_that_is_not(tiny_model: Path, tmp_path: Path) -> None:
    whole, told = distill(tiny_model, tmp_path / "whole")
    assert whole.finished
    losses = [float(each.detail.split("loss ")[1].split(",")[0]) for each in told if each.stage == "training"]
    assert losses[-1] < 0.8 * losses[0], "it learns"
    stages = [each.stage for each in told]
    for place, after in enumerate((stages.index("texts") + 5, stages.index("training") + 3)):
        folder = tmp_path / f"stopped-{place}"
        stopped, _ = distill(tiny_model, folder, stop_after=after)
        assert not stopped.finished
        assert stopped.checkpoint is None
    # From the stop in training on, everything is as it was in the other run.
    assert (tmp_path / "stopped-1" / "checkpoint.json").exists()
    again, _ = distill(tiny_model, tmp_path / "stopped-1")
    assert again.finished
    heads = [eagle_head.load(outcome.checkpoint).state_dict() for outcome in (whole, again) if outcome.checkpoint]
    texts = [(tmp_path / name / "texts.jsonl").read_text() for name in ("whole", "stopped-1")]
    assert texts[0] == texts[1]
    for name, value in heads[0].items():
        assert torch.allclose(value.float(), heads[1][name].float(), atol=2e-2), name
    with pytest.raises(ModelError, match="other options"):
        distill(tiny_model, tmp_path / "whole", seed=7)
    # What comes of it serves, and is told apart by what it says of itself.
    config = json.loads((tmp_path / "whole" / "head" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]
    engine = Engine.load(
        EngineConfig(
            model=str(tiny_model), kv_bytes=1 << 20, eagle_head=str(tmp_path / "whole" / "head"),
            features={"speculation": "eagle", "adaptive_speculation": False},
        ),
        lambda *_: None,
    )  # fmt: skip
    submit(engine, 0, [5, 6, 7, 8], max_tokens=12, **GREEDY)
    request, drafted = engine.requests[0], 0
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        drafted += sum(report.drafted)
    assert drafted > 0
    engine.set_features(0, {"speculation": "off"})
    submit(engine, 1, [5, 6, 7, 8], max_tokens=12, **GREEDY)
    assert run(engine)[1] == request.tokens[4:]


def test_a_student_comes_nearer_to_its_teacher_and_is_a_model_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    outcome, told = distill(tiny_model, tmp_path, kind="student", layers=1)
    assert outcome.checkpoint is not None
    first = next(each.detail for each in told if each.stage == "training")
    assert outcome.held_out["divergence"] < 0.9 * float(first.split("divergence ")[1].split(",")[0])
    with pytest.raises(ModelError, match="ask for fewer"):
        distill(tiny_model, tmp_path / "other", kind="student", layers=2, tokens=300)
    config = EngineConfig(model=str(tiny_model), draft_model=str(outcome.checkpoint), kv_bytes=1 << 20)
    engine = Engine.load(config, lambda *_: None)
    engine.set_features(0, {"adaptive_speculation": False})
    outputs = []
    for method in ("off", "draft"):
        engine.set_features(0, {"speculation": method})
        submit(engine, 0, [5, 6, 7, 8], max_tokens=12, **GREEDY)
        outputs.append(run(engine))
    assert outputs[0] == outputs[1]
    alone = Engine.load(EngineConfig(model=str(outcome.checkpoint), kv_bytes=1 << 20), lambda *_: None)
    assert alone.loaded.num_layers == 1
    submit(alone, 0, [5, 6, 7, 8], max_tokens=4, **GREEDY)
    assert len(run(alone)[0]) == 4


@torch.no_grad()
def test_hidden_states_are_the_same_wherever_they_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    texts = [Written([5 + place] * (3 + 7 * place % 11) + [9, 7], 2 + place % 2) for place in range(20)]
    layers = (0, 1, 1)
    told: list[float] = []
    assert hidden_states.compute(model, texts, layers, tmp_path, told.append, lambda: False)
    recomputed = Recomputed(model, texts, layers)
    sources = [Kept(texts, tmp_path, model.device), Resident(recomputed, told.append, lambda: False), recomputed]
    assert told.count(1.0) == 2
    numbers = [7, 0, 19, 3]
    kept, *others = (source.batch(numbers) for source in sources)
    inside = torch.arange(kept.tokens.shape[1])[None] < kept.lengths[:, None]
    assert kept.answers.tolist() == [texts[number].answer for number in numbers]
    for other in others:
        assert torch.equal(other.lengths, kept.lengths)
        assert torch.equal(other.answers, kept.answers)
        assert torch.equal(other.tokens[inside], kept.tokens[inside])
        # Texts that were computed together differ, and so does the order in which a product is summed.
        assert torch.allclose(other.features[inside], kept.features[inside], atol=2e-2, rtol=2e-2)
        assert torch.allclose(other.final[inside], kept.final[inside], atol=5e-2, rtol=5e-2)


@torch.no_grad()
def test_training_judges_what_serving_will_see() -> None:
    """The unrolled head of training proposes, row by row, what the head proposes one token after another."""
    from architectures import build

    model = build("llama")
    head = head_for(model)
    tokens = torch.randint(0, 256, (24,)).tolist()
    implementation = model.config._attn_implementation
    out = model.model(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    model.config._attn_implementation = implementation
    features = torch.cat([out.hidden_states[layer] for layer in head.shape.feature_layers], -1)[0]
    text = Text(torch.tensor(tokens), features, out.last_hidden_state[0])
    proposals: list[torch.Tensor] = []
    logits = head.logits

    def recorded(hidden: torch.Tensor) -> torch.Tensor:
        result = logits(hidden)
        proposals.append(head.proposed[result.argmax(-1)][0])
        return result

    head.logits = recorded  # type: ignore[method-assign]
    judge(head, model.get_input_embeddings().weight, model.lm_head.weight, Batch.of([text]), 3)
    head.logits = logits  # type: ignore[method-assign]
    for row in range(4, 18):
        # Where the text goes on as proposed; elsewhere training reads the text, serving its own proposals.
        first = dense(model, head, tokens[: row + 2], 1)
        assert proposals[0][row] == first[0]
    assert start(head.shape, head.proposed, model).shape == head.shape
