"""What one step has to read and compute at least, from the model's shapes: the numerators of MBU and MFU."""

from __future__ import annotations

from typing import Any

from torch import nn

from inference_server.engine.loader import LoadedModel
from inference_server.engine.quantization.variants import Variant
from inference_server.protocol import StepWork


def step_work(loaded: LoadedModel, variant: Variant | None = None) -> StepWork | None:
    """Describe the work of a model; ``None`` where the weights that a step uses depend on its tokens (experts).

    Parameters
    ----------
    loaded
        Its linear layers are counted; a tied embedding counts as the output layer that it is.
    variant
        The packed weights that a step reads in place of the master's.
    """
    model: Any = loaded.model
    if any("expert" in name for name, _ in model.named_modules()):
        return None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    apart = {id(parameter) for module in (head, embedding) if module is not None for parameter in module.parameters()}
    body = {id(p): p for p in model.parameters() if id(p) not in apart}.values()
    # Norms and biases are read but multiply no matrix; the difference is far below a percent.
    matrices = sum(
        module.weight.numel()
        for module in model.modules()
        if module is not head and getattr(module, "weight", None) is not None and _is_matrix(module)
    )
    head_weights = sum(p.numel() for p in head.parameters()) if head is not None else 0
    head_bytes = sum(p.numel() * p.element_size() for p in head.parameters()) if head is not None else 0
    body_bytes = sum(p.numel() * p.element_size() for p in body)
    for matrix, packed in variant.pairs() if variant is not None else ():
        saved = matrix.weight.nbytes - packed.nbytes
        if matrix.head:
            head_bytes -= saved
        else:
            body_bytes -= saved
    heads = int(getattr(loaded.config, "num_attention_heads", 0) or 0)
    width = loaded.kv_shapes[0][1]
    return StepWork(
        body_weights=matrices,
        body_bytes=body_bytes,
        head_weights=head_weights,
        head_bytes=head_bytes,
        embedding_row_bytes=_row_bytes(embedding),
        kv_bytes_per_token=loaded.kv_bytes_per_token,
        attention_flops_per_pair=4 * heads * width * loaded.num_layers,
    )


def _is_matrix(module: nn.Module) -> bool:
    # transformers' Conv1D (GPT-2) is a matrix too; an embedding's rows are looked up, not multiplied.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _row_bytes(embedding: nn.Module | None) -> int:
    weight = getattr(embedding, "weight", None)
    return 0 if weight is None else weight.shape[-1] * weight.element_size()
