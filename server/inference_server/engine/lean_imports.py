"""Makes the imports of an engine short: what serving never uses stays out, and the GPU starts meanwhile.

transformers imports scikit-learn (and with it SciPy, pandas and PyArrow), torchvision and more wherever they are
installed, for models and metrics that a text server has not. Importing them takes longer than loading a small model.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = (
    "av", "cv2", "decord", "flax", "jax", "librosa", "matplotlib", "nltk", "pandas", "scipy", "sklearn", "soundfile",
    "tensorflow", "torchaudio", "torchvision",
)  # fmt: skip
"""Packages that transformers imports where it finds them and works without."""


@contextmanager
def unused_hidden() -> Iterator[None]:
    """Within, packages of :data:`UNUSED` that are not imported yet cannot be found."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                del sys.modules[name]


def start_device(name: str) -> None:
    """Start the GPU's driver, context and matrix library in a thread, if the engine is going to use one.

    Parameters
    ----------
    name : str
        Device as configured: ``"auto"``, ``"cpu"`` or ``"cuda[:N]"``.
    """
    if name == "cpu":
        return
    import torch  # noqa: PLC0415 - takes seconds; callers have something to say first

    def run() -> None:
        try:
            x = torch.ones(64, 64, device="cuda" if name == "auto" else name, dtype=torch.bfloat16)
            (x @ x).sum().item()
        except (RuntimeError, AssertionError):
            pass  # loading the model will say what is wrong with the device

    if torch.cuda.is_available():
        threading.Thread(target=run, name="device", daemon=True).start()
