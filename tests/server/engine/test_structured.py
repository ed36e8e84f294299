"""Output under a JSON schema parses, validates and ends, whatever the model would rather say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving import run, submit
from tokenizers import Tokenizer

from inference_server.engine.core import Engine, RequestError
from inference_server.protocol import EngineConfig

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": ["red", "green"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(tiny_model), kv_bytes=1 << 20), lambda *_: None)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.5, "seed": 1}])
def test_a_random_model_is_made_to_answer_in_json(
    engine: Engine, tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    free = {"max_tokens": 30, "temperature": 1.0, "seed": 2, "ignore_eos": True}
    submit(engine, 100, [5, 6, 7], **free)
    alone = run(engine)[100]
    submit(engine, 100, [5, 6, 7], **free)
    for handle in range(4):
        submit(engine, handle, [10 + handle, 11], max_tokens=200, json_schema=json.dumps(SCHEMA), **sampling)
    requests = dict(engine.requests)
    outputs = run(engine, {3: {"kv_cache": False}, 6: {"kv_cache": True}})
    assert outputs[100] == alone, "a constraint concerns its own request only"
    for handle in range(4):
        assert requests[handle].finish_reason == "stop"
        answer = json.loads(tokenizer.decode(outputs[handle], skip_special_tokens=True))
        assert set(answer) == {"name", "age", "colour"}
        assert isinstance(answer["name"], str)
        assert 0 <= answer["age"] <= 150
        assert answer["colour"] in {"red", "green"}


@pytest.mark.parametrize("schema", ["{not json", '{"type": "no-such-type"}'])
def test_a_schema_that_cannot_be_used_is_refused(engine: Engine, schema: str) -> None:
    with pytest.raises(RequestError, match="JSON schema cannot be used"):
        submit(engine, 1, [5], max_tokens=5, json_schema=schema)
    assert not engine.has_work()
