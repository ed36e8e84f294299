"""A whole distillation: the teacher's texts, its hidden states, training, and the checkpoint that comes of it.

Everything is kept in one folder and nothing is computed twice: what was cut off, by Ctrl-C or by a power cut, goes on
where it was when it is started again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from inference_server.distill import head_training, hidden_states, teacher_text
from inference_server.distill.head_training import Batch
from inference_server.distill.hidden_states import Texts
from inference_server.distill.optimizer import Training
from inference_server.engine import loader
from inference_server.engine.core import Engine
from inference_server.engine.speculation import eagle_head
from inference_server.engine.speculation.eagle_head import HeadShape
from inference_server.models.errors import ModelError
from inference_server.protocol import EngineConfig

LONGEST_TEXT = 448
HELD_OUT_SHARE = 0.05
BATCH_TOKENS = 1536
UNROLLED = ((0.15, 1), (0.55, 2), (1.0, 3))
"""Until which share of the training how many tokens are proposed one after another; later it may be asked for more."""
JUDGED = 4
JUDGE_EVERY = 60
SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to distill."""

    model: str
    folder: Path
    device: str = "auto"
    tokens: int = 200_000
    """Of text that the teacher writes."""
    epochs: int = 6
    draft_vocab: int = 6144
    """Tokens that the head can propose: the most frequent ones of the texts."""
    rate: float = 1e-3
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has to say."""

    stage: str
    share: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run."""

    finished: bool
    """Otherwise it was stopped, and goes on when it is started again."""
    checkpoint: Path | None
    acceptance_length: float | None
    """On texts that were held out, greedy, if :data:`JUDGED` tokens are proposed everywhere."""
    seconds: float


def distill_head(options: Options, report: Callable[[Progress], None], stop: Callable[[], bool]) -> Outcome:
    """Train an EAGLE-3 head.

    Parameters
    ----------
    options : Options
    report : callable
        Takes the progress.
    stop : callable
        Asked often whether to end now.

    Raises
    ------
    ModelError
        If the model cannot be a teacher, or the folder belongs to another run.
    """
    begin = time.monotonic()
    options.folder.mkdir(parents=True, exist_ok=True)
    _claim(options)
    texts_path = options.folder / "texts.jsonl"
    device = loader.resolve_device(options.device)

    def outcome(*, finished: bool, checkpoint: Path | None = None, length: float | None = None) -> Outcome:
        return Outcome(finished, checkpoint, length, time.monotonic() - begin)

    config = EngineConfig(
        model=options.model, device=options.device, dtype="bfloat16", features={"instrumentation": "off"}
    )
    engine = Engine.load(config, lambda stage, share, _: report(Progress("loading", share or 0.0, stage)))
    report(Progress("loading", 1.0))
    name, architecture = engine.loaded.located.name, type(engine.loaded.model).__name__
    path = engine.loaded.located.path
    written = teacher_text.TeacherText(engine, texts_path, options.seed).write(
        options.tokens,
        lambda done: report(Progress("texts", done / options.tokens, f"{done:,} tokens")),
        stop,
    )
    del engine
    if written < options.tokens:
        return outcome(finished=False)
    texts = teacher_text.read(texts_path, LONGEST_TEXT)
    model = _teacher(path, device)
    layers = _feature_layers(model.config.num_hidden_layers)
    whole = hidden_states.compute(
        model, texts, layers, options.folder / "states", lambda share: report(Progress("hidden states", share)), stop
    )
    if not whole:
        return outcome(finished=False)
    proposed = _most_frequent(texts, options.draft_vocab, model.config.vocab_size)
    head = head_training.start(_shape(model, layers, len(proposed)), proposed, model)
    embed = model.get_input_embeddings().weight.detach().float()
    output = model.get_output_embeddings().weight.detach()[proposed].float()
    del model
    known = Texts(texts, options.folder / "states")
    order = list(range(len(texts)))
    Random(options.seed).shuffle(order)  # noqa: S311 - nothing is a secret here
    held_out = max(round(len(order) * HELD_OUT_SHARE), 1)
    judged_on, trained_on = order[:held_out], order[held_out:]
    per_epoch = len(_batches(texts, trained_on, options.seed, 0))
    training = Training(head, options.rate, options.epochs * per_epoch, options.folder)
    training.resume()

    def judge() -> float:
        lengths, counts = 0.0, 0
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            for first in range(0, len(judged_on), 8):
                batch = Batch.of([known[number] for number in judged_on[first : first + 8]])
                found = head_training.judge(head, embed, output, batch, JUDGED)
                lengths += float(found.accepted.sum())
                counts += int(found.count)
        return 1 + lengths / max(counts, 1)

    length, saved = judge() if training.step else 1.0, time.monotonic()
    for numbers in _epochs(texts, trained_on, options.seed, options.epochs, training.step):
        if stop():
            training.save(acceptance_length=length)
            return outcome(finished=False, length=length)
        with torch.autocast(device.type, torch.bfloat16):
            share = training.step / training.steps
            unrolled = next(count for until, count in UNROLLED if share < until)
            found = head_training.judge(head, embed, output, Batch.of([known[n] for n in numbers]), unrolled)
        training.descend(found.loss)
        if training.step % JUDGE_EVERY == 0:
            length = judge()
        if time.monotonic() - saved > SAVE_SECONDS:
            training.save(acceptance_length=length)
            saved = time.monotonic()
        detail = f"step {training.step} of {training.steps}, loss {float(found.loss.detach()):.3f}"
        detail += f", {length:.2f} tokens a step held out"
        report(Progress("training", training.step / training.steps, detail))
    length = judge()
    training.save(acceptance_length=length)
    checkpoint = options.folder / "head"
    eagle_head.save(head, checkpoint, verifier=name, architecture=architecture, dtype=torch.bfloat16, k=JUDGED)
    return outcome(finished=True, checkpoint=checkpoint, length=length)


def _claim(options: Options) -> None:
    """See that a folder is new, or of a run with the same options."""
    path = options.folder / "options.json"
    wanted = {name: str(value) for name, value in asdict(options).items() if name not in {"folder", "device"}}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != wanted:
            other = ", ".join(f"{name}={found.get(name)}" for name in wanted if found.get(name) != wanted[name])
            raise ModelError(
                f"{options.folder} holds a run with other options ({other}); give these to go on with it, or choose "
                "another folder"
            )
        return
    path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _teacher(path: Path, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - takes a second

    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True
    )
    if not hasattr(getattr(model, "model", None), "layers"):
        raise ModelError(f"the layers of {type(model).__name__} are not where a head could be made from one of them")
    return model.eval().requires_grad_(requires_grad=False).to(device)


def _feature_layers(num_layers: int) -> tuple[int, int, int]:
    """An early, a middle and the last layer."""
    return (min(2, num_layers - 1), num_layers // 2, num_layers - 1)


def _shape(model: Any, layers: tuple[int, int, int], draft_vocab: int) -> HeadShape:
    config, attention = model.config.get_text_config(), model.model.layers[-1].self_attn
    rope = getattr(config, "rope_parameters", None) or {}
    return HeadShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        # As many as for queries, also where the model has fewer: a token's embedding gets into the head by them alone.
        kv_heads=config.num_attention_heads,
        head_dim=attention.head_dim,
        vocab=config.vocab_size,
        draft_vocab=draft_vocab,
        eps=config.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        feature_layers=layers,
    )


def _most_frequent(texts: Sequence[Sequence[int]], count: int, vocab: int) -> Tensor:
    """The ids of the most frequent tokens, rising; as many as kernels like, a multiple of 16."""
    frequency = torch.zeros(vocab)
    for text in texts:
        frequency.index_add_(0, torch.tensor(text), torch.ones(len(text)))
    return frequency.topk(min(count, vocab) // 16 * 16).indices.sort().values


def _batches(texts: Sequence[Sequence[int]], numbers: Sequence[int], seed: int, epoch: int) -> list[list[int]]:
    """Texts of about one length together, in another order each epoch."""
    random = Random(f"{seed} {epoch}")  # noqa: S311 - nothing is a secret here
    batches: list[list[int]] = []
    batch: list[int] = []
    for number in sorted(numbers, key=lambda each: len(texts[each]) + random.random() * 20):
        batch.append(number)
        if sum(len(texts[each]) for each in batch) >= BATCH_TOKENS:
            batches.append(batch)
            batch = []
    random.shuffle(batches)
    return batches


def _epochs(
    texts: Sequence[Sequence[int]], numbers: Sequence[int], seed: int, epochs: int, done: int
) -> Iterator[list[int]]:
    """The batches of all epochs but the first ``done`` ones."""
    per_epoch = len(_batches(texts, numbers, seed, 0))
    for epoch in range(epochs):
        # Sorting differs a little between epochs, and so may the number of batches: the first epoch's counts.
        for place, batch in enumerate(_batches(texts, numbers, seed, epoch)[:per_epoch]):
            if epoch * per_epoch + place >= done:
                yield batch
