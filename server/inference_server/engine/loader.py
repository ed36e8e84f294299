"""Loads a causal language model into transformers and proves that the engine computes it correctly.

A model is refused, with a message, unless attention went through the engine's function once per layer and each layer's
agrees with transformers' own eager attention on a short prompt, both as one prefill and token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from inference_server.engine import attention
from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.quantization import checkpoint
from inference_server.engine.quantization.packing import Rounded
from inference_server.engine.request import Request
from inference_server.engine.runner import ModelRunner
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.models.errors import ModelError
from inference_server.models.locate import LocatedModel
from inference_server.protocol import Kind, SamplingParams

Progress = Callable[[str, float | None, str], None]
"""Called with (stage, fraction or None, detail)."""

CHECK_LENGTH = 12


@dataclass(slots=True)
class LoadedModel:
    """A model on its device, with what the engine needs to know about it."""

    model: nn.Module
    config: Any
    located: LocatedModel
    device: torch.device
    dtype: torch.dtype
    num_layers: int
    kv_shapes: list[tuple[int, int, int]]
    """(KV heads, key size, value size) of each layer."""
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    rounded: dict[str, Rounded] = field(default_factory=dict)
    """Integers and scales of linear layers, where the folder had them."""

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied one counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights, a tied one counted once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one position in all layers."""
        return sum(heads * (key + value) for heads, key, value in self.kv_shapes) * self.dtype.itemsize


def resolve_device(name: str) -> torch.device:
    """Turn ``"auto"``, ``"cpu"`` or ``"cuda[:N]"`` into a device that exists.

    Raises
    ------
    ModelError
        If it does not.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ModelError(f"device {name!r} was asked for, but torch finds no CUDA GPU here; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ModelError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise ModelError(f"device {name!r} is not supported; use cpu or cuda")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a dtype name into a torch dtype; ``"auto"`` is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"there is no dtype {name!r}")
    return dtype


def load(located: LocatedModel, device: torch.device, dtype: torch.dtype, progress: Progress) -> LoadedModel:
    """Load a model from its folder and verify it.

    Raises
    ------
    ModelError
        If the architecture is unknown, needs code of its own, or fails the check.
    """
    progress("reading the configuration", None, str(located.path))
    try:
        config: Any = AutoConfig.from_pretrained(located.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{located.path} holds no model configuration that transformers knows: {error}") from error
    progress("loading weights", 0.0, located.name)
    cast(
        "Any", transformers_logging
    ).disable_progress_bar()  # progress goes to the front; a bar in the log would hide the words before a crash
    rounded: dict[str, Rounded] = {}
    how: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention.NAME,
        "trust_remote_code": False,
        "use_safetensors": True,
        "device_map": {"": device} if device.type == "cuda" else None,
    }
    try:
        if checkpoint.is_compressed(config):
            found = checkpoint.read(located.path)
            rounded = found.rounded
            located = replace(
                located,
                quantized_source=found.description,
                notes=(f"The weights were dequantized from {found.description}: this baseline is not full precision.",),
            )
            del config.quantization_config  # expanded here, without the package that transformers would need for it
            family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model: Any = family.from_pretrained(None, config=config, state_dict=found.state, **how)
        else:
            model = AutoModelForCausalLM.from_pretrained(located.path, **how)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{located.name} cannot be loaded as a causal language model: {error}") from error
    model.eval().requires_grad_(requires_grad=False)
    loaded = inspect(model, located, device, dtype, progress)
    loaded.rounded = rounded
    return loaded


def inspect(
    model: Any, located: LocatedModel, device: torch.device, dtype: torch.dtype, progress: Progress
) -> LoadedModel:
    """Find out a loaded model's cache layout and verify it against eager attention."""
    config = model.config.get_text_config()
    progress("checking attention", 0.9, "one prefill and one decode against the reference")
    kv_shapes, blocks = _attention_layers(model)
    if not kv_shapes:
        raise ModelError(
            f"{located.name} ({model.config.model_type}) does not route attention through transformers' registry, so "
            "its keys and values cannot be cached here; choose a model whose attention supports 'sdpa'"
        )
    loaded = LoadedModel(
        model=model,
        config=config,
        located=located,
        device=device,
        dtype=dtype,
        num_layers=config.num_hidden_layers,
        kv_shapes=kv_shapes,
        eos_token_ids=_eos_token_ids(model),
        max_model_len=getattr(config, "max_position_embeddings", None) or 1 << 17,
    )
    check(loaded, blocks)
    return loaded


def check(loaded: LoadedModel, blocks: list[nn.Module]) -> float:
    """Compare the engine's attention with transformers' eager one, layer by layer; return the largest difference.

    Both run over the same prompt, and wherever the engine's attention block has given its result, the recorded one of
    the eager run goes on: every layer gets the inputs it got there. So the differences of one layer do not add up over
    the depth, where rounding alone makes them larger than a mistake would be.

    Raises
    ------
    ModelError
        If a layer differs by more than rounding, or attention was not called once per layer.
    """
    model, config, name = loaded.model, loaded.config, loaded.located.name
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (CHECK_LENGTH,), generator=generator).tolist()
    ids = torch.tensor([tokens], device=loaded.device)
    recorded: dict[int, Tensor] = {}
    differences: list[Tensor] = []
    place = slice(0, CHECK_LENGTH)

    def record(module: nn.Module, _: Any, output: Any) -> None:
        recorded[id(module)] = _first(output)

    def compare(module: nn.Module, _: Any, output: Any) -> Any:
        expected = recorded[id(module)][:, place]
        got = _first(output)
        differences.append((got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6))
        return (expected, *output[1:]) if isinstance(output, tuple) else expected

    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        with _hooks(blocks, record), torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=2).logits[0].float()
    finally:
        model.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    tensors = PagedKVTensors(4, 8, loaded.device, loaded.dtype)
    tensors.reserve(loaded.kv_shapes)
    runner = ModelRunner(model, tensors)
    # Blocks out of order on purpose: a model that ignored the block table would give itself away.
    request = Request(
        handle=0, prompt_len=CHECK_LENGTH, tokens=tokens, sampling=SamplingParams(max_tokens=1), seed=0, arrival=0
    )
    request.blocks = [2, 0]
    with _hooks(blocks, compare):
        for start, count in ((0, CHECK_LENGTH - 1), (CHECK_LENGTH - 1, 1)):
            place = slice(start, start + count)
            plan = StepPlan(0, [Scheduled(request, start, count, Kind.PREFILL, sample=True)], use_cache=True)
            got = runner.forward(plan, runner.prepare(plan))[0].float()
            expected = logits[start + count - CHECK_LENGTH + 1]
            differences.append((got - expected).norm() / expected.norm().clamp(min=1e-6))
            if runner.last_attention_calls != loaded.num_layers:
                raise ModelError(
                    f"{name}: attention was called {runner.last_attention_calls} times for {loaded.num_layers} "
                    "layers, so part of the model bypasses the KV cache; it cannot be served"
                )
    worst: list[float] = torch.stack(differences).nan_to_num(nan=torch.inf).view(2, -1).amax(0).tolist()
    tolerance = 1e-4 if loaded.dtype == torch.float32 else 5e-2
    if max(worst) > tolerance:
        first = next(place for place, difference in enumerate(worst) if difference > tolerance)
        what = "logits differ" if first == loaded.num_layers else f"attention of layer {first} differs"
        raise ModelError(
            f"{name}: {what} from transformers' own by {worst[first]:.2g} (relative; allowed {tolerance:.0e}). It does "
            "something that this engine does not know; the model cannot be served"
        )
    return max(worst)


def _first(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextmanager
def _hooks(modules: list[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention_layers(model: Any) -> tuple[list[tuple[int, int, int]], list[nn.Module]]:
    """Run one token; note what each attention layer hands to the registered function, and the modules that do."""
    shapes: dict[int, tuple[int, int, int]] = {}
    blocks: dict[int, nn.Module] = {}

    def spy(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        shapes[module.layer_idx] = (key.shape[1], key.shape[3], value.shape[3])  # type: ignore[index]
        blocks[module.layer_idx] = module  # type: ignore[index]
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, 1).transpose(1, 2), None

    name = f"{attention.NAME}_spy"
    AttentionInterface.register(name, spy)
    model.set_attn_implementation(name)
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"{model.config.model_type} models call attention in a way this engine cannot: {error}"
        ) from error
    finally:
        model.set_attn_implementation(attention.NAME)
    if sorted(shapes) != list(range(len(shapes))):
        return [], []
    return [shapes[layer] for layer in sorted(shapes)], [blocks[layer] for layer in sorted(blocks)]


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    ids: set[int] = set()
    for source in (model.config.get_text_config(), model.generation_config):
        value = getattr(source, "eos_token_id", None)
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(value)
    return tuple(sorted(ids))
