"""``torch.compile`` is switched on while requests are served; it changes no token, and its failure costs nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build
from serving import DEVICE, GREEDY, engine_for, run, submit

from inference_server.engine import compiled
from inference_server.protocol import Notice, TaskProgress

needs_compiler = pytest.mark.skipif(
    compiled.unavailable_reason(DEVICE) is not None, reason=str(compiled.unavailable_reason(DEVICE))
)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3] * 20, [40, 41]]


@needs_compiler
def test_compiling_goes_on_behind_the_serving_and_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":  # generating C++ takes a minute on two cores; all else is the same without
        monkeypatch.setattr(compiled, "BACKEND", "eager")
    engine = engine_for(build("llama"))
    engine.set_features(0, {"fast_path": False})
    for handle, prompt in enumerate(PROMPTS):
        submit(engine, handle, prompt, max_tokens=30, **GREEDY)
    expected = run(engine)
    engine.set_features(0, {"compiled": True})
    paths: list[str] = []
    outputs: dict[int, list[int]] = {}
    handle = 0
    compilation = engine._compilation
    assert compilation is not None
    while compilation.running or paths.count("compiled") < 40 or engine.has_work():
        if not engine.has_work():
            for prompt in PROMPTS:
                submit(engine, handle, prompt, max_tokens=30, **GREEDY)
                handle += 1
        report, _ = engine.step()
        assert report is not None
        paths.append(report.step.path)
        for who, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
            outputs.setdefault(who, []).append(token)
    assert compilation.runner is not None
    assert paths[0] == "eager"
    assert paths[-1] == "compiled"
    assert paths.index("compiled") > 0
    assert all(tokens == expected[who % 3] for who, tokens in outputs.items())
    progress = [each for each in engine.take_news() if isinstance(each, TaskProgress)]
    assert [each.fraction for each in progress] == sorted(each.fraction or 0.0 for each in progress)
    assert progress[-1] == TaskProgress("compile", 1.0, "ready")
    engine.set_features(0, {"compiled": False})
    submit(engine, 0, PROMPTS[0], max_tokens=2, **GREEDY)
    report, _ = engine.step()
    assert report is not None
    assert report.step.path == "eager"


def test_a_failure_is_explained_and_the_model_serves_on_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, **_: Any) -> Any:
        raise RuntimeError("no such backend")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(compiled, "unavailable_reason", lambda _: None)
    engine = engine_for(build("qwen2"))
    engine.set_features(0, {"fast_path": False, "compiled": True})
    assert engine._compilation is not None
    engine._compilation.wait()
    submit(engine, 0, PROMPTS[0], max_tokens=5, **GREEDY)
    assert len(run(engine)[0]) == 5
    notices = [each.text for each in engine.take_news() if isinstance(each, Notice)]
    assert notices == ["torch.compile failed and the model runs uncompiled: RuntimeError: no such backend"]


def test_a_compiled_model_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, **_: Any) -> Any:
        def call(**inputs: Any) -> Any:
            out = model(**inputs)
            out.logits = out.logits * 1.1
            return out

        return call

    monkeypatch.setattr(torch, "compile", wrong)
    monkeypatch.setattr(compiled, "unavailable_reason", lambda _: None)
    engine = engine_for(build("qwen2"))
    engine.set_features(0, {"compiled": True})
    assert engine._compilation is not None
    engine._compilation.wait()
    assert engine._compilation.runner is None
    notices = [each.text for each in engine.take_news() if isinstance(each, Notice)]
    assert "differ by 0.1" in notices[0]


def test_without_a_compiler_the_switch_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    spec = next(spec for spec in engine_for(build("qwen2")).specs if spec.name == "compiled")
    assert not spec.available
    assert "install g++" in str(spec.unavailable_reason)
