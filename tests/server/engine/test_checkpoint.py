"""Folders in the compressed-tensors format: transformers reads what is written, and it comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import DEVICE, GREEDY, run, submit

import tiny_model

pytest.importorskip("numba")

from inference_server.engine.core import Engine
from inference_server.features import FeatureError
from inference_server.models.errors import ModelError
from inference_server.protocol import EngineConfig

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="told against the fast path of the CPU")

FORMATS: list[dict[str, Any]] = [
    {"weight_precision": "int8"},
    {"weight_precision": "int4", "int4_group": "32", "int4_grid": "symmetric"},
    {"weight_precision": "int4", "int4_group": "64", "int4_grid": "zero-point"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("models") / "tiny-llama")


def engine_of(folder: Path, **features: Any) -> Engine:
    return Engine.load(EngineConfig(model=str(folder), kv_bytes=1 << 20, features=features), lambda *_: None)


def expanded(engine: Engine) -> dict[str, torch.Tensor]:
    variant = engine.weights.in_use
    assert variant is not None
    return {
        part.name: packed.dequantize(part.first, part.last)
        for matrix, packed in variant.pairs()
        for part in matrix.parts
        if not matrix.head
    }


@pytest.mark.parametrize("values", FORMATS, ids=lambda values: "-".join(values.values()))
def test_a_saved_folder_comes_back_with_the_same_integers(folder: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    engine = engine_of(folder, **values)
    written = engine.precision.save(str(tmp_path / "saved"))
    assert written["bytes"] == (tmp_path / "saved" / "model.safetensors").stat().st_size
    again = engine_of(tmp_path / "saved", **values)
    assert again.loaded.located.quantized_source is not None
    assert again.loaded.located.quantized_source.startswith("compressed-tensors int")
    before, after = expanded(engine), expanded(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Its master is what was rounded, so both say the same.
    for each in (engine, again):
        submit(each, 0, [5, 6, 7], max_tokens=20, **GREEDY)
    assert run(engine) == run(again)


@pytest.mark.parametrize("values", FORMATS[:2], ids=lambda values: "-".join(values.values()))
def test_transformers_reads_a_saved_folder_with_the_same_logits(
    folder: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    engine = engine_of(folder, **values)
    engine.precision.save(str(tmp_path / "saved"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = dict(ours.named_modules())
    for name, weight in expanded(engine).items():
        modules[name].weight.data = weight
    ids = torch.randint(3, 300, (2, 30))
    with torch.inference_mode():
        got, expected = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
    assert float((got - expected).norm() / expected.norm()) < 1e-4


def test_zero_points_are_packed_as_the_formats_own_library_unpacks_them(folder: Path, tmp_path: Path) -> None:
    """Layer by layer: its release 0.20 expects them unpacked when transformers loads a whole model, and fails."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    engine = engine_of(folder, **FORMATS[2])
    engine.precision.save(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    (group,) = config["quantization_config"]["config_groups"].values()
    scheme = QuantizationScheme(targets=group["targets"], weights=QuantizationArgs(**group["weights"]))
    for name, expected in expanded(engine).items():
        parts = {
            key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.weight_")
        }
        got = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.allclose(got, expected, atol=1e-6)


def test_what_the_format_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder)
    with pytest.raises(FeatureError, match="master weights are in use"):
        engine.precision.save(str(tmp_path / "a"))
    engine = engine_of(folder, weight_precision="int4")
    with pytest.raises(FeatureError, match="zero-point or symmetric"):
        engine.precision.save(str(tmp_path / "a"))
    engine = engine_of(folder, weight_precision="int8")
    with pytest.raises(FeatureError, match="absolute"):
        engine.precision.save("a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FeatureError, match="not empty"):
        engine.precision.save(str(tmp_path / "full"))


def test_a_folder_of_another_kind_or_with_damaged_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder, weight_precision="int8")
    saved = tmp_path / "saved"
    engine.precision.save(str(saved))
    config = json.loads((saved / "config.json").read_text())
    weights = load_file(saved / "model.safetensors")

    def refusal(change: dict[str, Any], **tensors: torch.Tensor) -> str:
        (saved / "config.json").write_text(
            json.dumps({**config, "quantization_config": {**config["quantization_config"], **change}})
        )
        save_file({**weights, **tensors}, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError) as refused:
            engine_of(saved)
        return str(refused.value)

    assert "naive-quantized" in refusal({"format": "naive-quantized"})
    groups = json.loads(json.dumps(config["quantization_config"]["config_groups"]))
    groups["group_0"]["weights"]["num_bits"] = 2
    assert "4 or 8 bits" in refusal({"config_groups": groups})
    name = "model.layers.0.mlp.down_proj"
    cut = {f"{name}.weight_packed": weights[f"{name}.weight_packed"][:, :3].contiguous()}
    assert name in refusal({}, **cut)
