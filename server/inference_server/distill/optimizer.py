"""One training run: steps of AdamW with a warm-up and a cosine, checkpoints that it goes on from, and when to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WARM_UP = 40
LAST_RATE = 0.02
"""Of the first learning rate, at the end."""


class Training:
    """AdamW over a module's parameters.

    Parameters
    ----------
    module : torch.nn.Module
    rate : float
        Learning rate after the warm-up.
    steps : int
        In all.
    folder : Path
        Keeps the checkpoint: weights and moments as safetensors, the rest as JSON.
    """

    def __init__(self, module: nn.Module, rate: float, steps: int, folder: Path) -> None:
        self.module, self.rate, self.steps = module, rate, steps
        self.step = 0
        self._names = [name for name, _ in module.named_parameters()]
        self._parameters = list(module.parameters())
        self._adam = torch.optim.AdamW(self._parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        self._weights, self._state = folder / "checkpoint.safetensors", folder / "checkpoint.json"

    def descend(self, loss: torch.Tensor) -> None:
        """Make one step."""
        share = self.step / max(self.steps, 1)
        warm = min(1.0, (self.step + 1) / WARM_UP)
        cosine = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share))
        for group in self._adam.param_groups:
            group["lr"] = self.rate * warm * cosine
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adam.step()
        self.step += 1

    def save(self, **more: float) -> None:
        """Write the checkpoint. It is whole or the one before, whenever the process ends."""
        tensors = {f"weight.{name}": p.detach() for name, p in zip(self._names, self._parameters, strict=True)}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            state = self._adam.state.get(parameter)
            if state:
                tensors |= {f"mean.{name}": state["exp_avg"], f"square.{name}": state["exp_avg_sq"]}
        partial = self._weights.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"step": str(self.step)})
        partial.replace(self._weights)
        self._state.write_text(json.dumps({"step": self.step, "steps": self.steps, **more}) + "\n", encoding="utf-8")

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one."""
        if not self._weights.exists() or not self._state.exists():
            return False
        tensors = load_file(self._weights)
        self.step = int(json.loads(self._state.read_text(encoding="utf-8"))["step"])
        with torch.no_grad():
            for name, parameter in zip(self._names, self._parameters, strict=True):
                parameter.copy_(tensors[f"weight.{name}"])
                if f"mean.{name}" in tensors:
                    self._adam.state[parameter] = {
                        "step": torch.tensor(float(self.step)),
                        "exp_avg": tensors[f"mean.{name}"].to(parameter.device),
                        "exp_avg_sq": tensors[f"square.{name}"].to(parameter.device),
                    }
        return True
