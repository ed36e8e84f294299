"""Builds the proposers that a model can have, and says why it cannot have the others."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.cpu import path as fast_path
from inference_server.engine.gpu import path as gpu_path
from inference_server.engine.kv_cache import KVCache
from inference_server.engine.llama import UnsupportedError
from inference_server.engine.loader import LoadedModel
from inference_server.engine.runner import ModelRunner, Runner
from inference_server.engine.speculation.eagle import EagleProposer, HeadRunner, TorchHeadRunner
from inference_server.engine.speculation.eagle_head import EagleHead
from inference_server.engine.speculation.ngram import NgramProposer
from inference_server.engine.speculation.proposer import Proposer
from inference_server.engine.speculation.sequential import DraftModelProposer, EarlyExitProposer, first_layers
from inference_server.models.errors import ModelError
from inference_server.protocol import Capacity

if TYPE_CHECKING:  # importing it compiles the kernels
    from inference_server.engine.cpu.runner import FastRunner
    from inference_server.engine.gpu.runner import GpuRunner

DRAFT_BLOCK = 16


@dataclass(slots=True)
class Proposers:
    """What an engine can propose tokens with."""

    by_name: dict[str, Proposer]
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why the other choices of the feature ``speculation`` cannot be made."""
    weights: list[Tensor] = field(default_factory=list)
    """Of their own models."""
    caches: list[Tensor] = field(default_factory=list)
    """Their own keys and values."""


def proposers(
    loaded: LoadedModel,
    draft: LoadedModel | None,
    head: EagleHead | None,
    plain: ModelRunner,
    fast: FastRunner | GpuRunner | None,
    capacity: Capacity,
) -> Proposers:
    """Build them.

    Parameters
    ----------
    loaded : LoadedModel
        The model that is served.
    draft : LoadedModel or None
        A smaller one.
    head : EagleHead or None
        Made for it.
    plain : ModelRunner
        Of the model that is served.
    fast : FastRunner or GpuRunner or None
        Its fast path, where it has one.
    capacity : Capacity
        Of its cache.

    Raises
    ------
    ModelError
        If the draft model's vocabulary is another one, or the head is for another model.
    """
    result = Proposers({"ngram": NgramProposer()})

    def early_exit(count: int) -> Runner:
        if fast is not None:
            return fast.sibling(architecture=replace(fast.architecture, layers=fast.architecture.layers[:count]))
        return ModelRunner(first_layers(loaded.model, count), plain.tensors)

    try:
        first_layers(loaded.model, 1)
    except UnsupportedError as error:
        result.unavailable["early_exit"] = f"this model cannot be left early: {error}"
    else:
        result.by_name["early_exit"] = EarlyExitProposer(plain.tensors, early_exit)
    if draft is None:
        result.unavailable["draft"] = "there is no draft model; start the server with --draft-model"
    else:
        _add_draft_model(result, loaded, draft, capacity)
    if head is None:
        result.unavailable["eagle"] = (
            "there is no EAGLE-style head for this model; train one with inference-workbench distill, or start the "
            "server with --eagle-head"
        )
    elif loaded.device.type != "cpu":
        result.unavailable["eagle"] = "EAGLE-style heads run on a CPU only so far"
    else:
        _add_head(result, loaded, head, plain, cast("FastRunner | None", fast), capacity)
    return result


def _own_blocks(capacity: Capacity) -> int:
    """As many positions as the model's own cache has, and room for proposals behind each request's text."""
    return -(-capacity.num_blocks * capacity.block_size // DRAFT_BLOCK) + capacity.max_num_seqs


def _add_head(
    result: Proposers,
    loaded: LoadedModel,
    head: EagleHead,
    plain: ModelRunner,
    fast: FastRunner | None,
    capacity: Capacity,
) -> None:
    check_head(loaded, head)
    blocks = _own_blocks(capacity)
    model: Any = loaded.model
    embed = model.get_input_embeddings().weight.detach()
    runner: HeadRunner
    layers = head.shape.feature_layers
    plain.capture_at(layers)
    if fast is not None:
        from inference_server.engine.cpu import kernels  # noqa: PLC0415 - compiled
        from inference_server.engine.cpu.head import CpuHeadRunner  # noqa: PLC0415 - imports the compiled kernels

        fast.capture_at(layers)
        # Half as many bytes to read for each proposal, of a head that was rounded already.
        narrow = head.stored == torch.bfloat16 and kernels.NATIVE_BF16
        slots, threads = blocks * DRAFT_BLOCK, fast.team.threads
        runner = CpuHeadRunner(
            head,
            embed,
            torch.bfloat16 if narrow else embed.dtype,
            slots,
            DRAFT_BLOCK,
            capacity.max_model_len,
            threads,
        )
    else:
        runner = TorchHeadRunner(head, embed, blocks * DRAFT_BLOCK, DRAFT_BLOCK)
    result.by_name["eagle"] = EagleProposer(runner, KVCache(blocks, DRAFT_BLOCK), capacity.max_model_len)


def check_head(loaded: LoadedModel, head: EagleHead) -> None:
    """See that a head is made for a model.

    Raises
    ------
    ModelError
        If it is for another one.
    """
    shape, config, model = head.shape, loaded.config, loaded.model
    name = loaded.located.name
    if (shape.hidden, shape.vocab) != (config.hidden_size, config.vocab_size):
        raise ModelError(
            f"the EAGLE-style head is for a model of width {shape.hidden} with {shape.vocab} tokens; {name} has width "
            f"{config.hidden_size} and {config.vocab_size} tokens. Train one with inference-workbench distill"
        )
    if not 0 <= min(shape.feature_layers) <= max(shape.feature_layers) < loaded.num_layers:
        raise ModelError(
            f"the EAGLE-style head reads layers {shape.feature_layers}; {name} has {loaded.num_layers} layers"
        )
    if int(head.proposed.max()) >= shape.vocab:
        raise ModelError("the EAGLE-style head proposes tokens outside of the vocabulary")
    if not hasattr(getattr(model, "model", None), "layers"):
        raise ModelError(f"the layers of {type(model).__name__} are not where their hidden states could be taken from")


def _add_draft_model(result: Proposers, loaded: LoadedModel, draft: LoadedModel, capacity: Capacity) -> None:
    check_vocabulary(loaded, draft)
    blocks = _own_blocks(capacity)
    longest = min(draft.max_model_len, capacity.max_model_len)
    tensors = PagedKVTensors(blocks, DRAFT_BLOCK, draft.device, draft.dtype)
    tensors.reserve(draft.kv_shapes)
    runner: Runner = ModelRunner(draft.model, tensors)
    with suppress(UnsupportedError):  # the plain path can run any model that was loaded
        plain = ModelRunner(draft.model, tensors)
        if draft.device.type == "cpu":
            runner = fast_path.start(draft.model, plain, longest)
        else:
            runner = gpu_path.start(draft.model, plain, longest, capacity.max_num_seqs)
    vocabulary = loaded.config.vocab_size
    result.by_name["draft"] = DraftModelProposer(runner, KVCache(blocks, DRAFT_BLOCK), longest, vocabulary)
    result.weights += [*draft.model.parameters(), *draft.model.buffers()]
    result.caches += [*tensors.keys, *tensors.values]


def check_vocabulary(loaded: LoadedModel, draft: LoadedModel) -> None:
    """See that a token means the same to both models.

    Raises
    ------
    ModelError
        If it does not.
    """
    one, other = _vocabulary(loaded.located.path), _vocabulary(draft.located.path)
    same = one == other if one and other else loaded.config.vocab_size == draft.config.vocab_size
    if not same:
        raise ModelError(
            f"{draft.located.name} cannot propose tokens for {loaded.located.name}: its vocabulary is another one. "
            "Choose a draft model of the same family, with the same tokenizer"
        )


def _vocabulary(folder: Path) -> Any:
    """What a folder's tokenizer calls each token; ``None`` where it does not say."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = {(token["id"], token["content"]) for token in content.get("added_tokens", ())}
        return content["model"]["vocab"], added
    except (OSError, ValueError, KeyError, TypeError):
        return None
