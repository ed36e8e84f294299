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
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from inference_server.distill import head_training, hidden_states, student, teacher_text
from inference_server.distill.head_training import Batch
from inference_server.distill.hidden_states import Kept, Recomputed, Resident, Watched
from inference_server.distill.optimizer import Training
from inference_server.distill.teacher_text import Written
from inference_server.engine import loader
from inference_server.engine.core import Engine
from inference_server.engine.speculation import eagle_head
from inference_server.engine.speculation.eagle_head import HeadShape
from inference_server.models.errors import ModelError
from inference_server.models.locate import LocatedModel
from inference_server.protocol import EngineConfig

LONGEST_TEXT = 448
HELD_OUT_SHARE = 0.05
HELD_OUT_MOST = 512
"""Texts: more would take longer to judge without telling more."""
BATCH_TOKENS = {"cpu": 1536, "cuda": 16384}
UNROLLED = ((0.1, 1), (0.3, 2), (0.6, 3), (1.0, 4))
"""Until which share of the training how many tokens are proposed one after another."""
TEXTS_AT_ONCE = {"cpu": 48, "cuda": 256}
"""Texts that the teacher writes at a time."""
JUDGED = 4
"""Tokens proposed where a head is judged."""
JUDGED_AT_ONCE = {"cpu": 8, "cuda": 64}
JUDGE_EVERY = {"cpu": 60, "cuda": 200}
REPORT_EVERY = {"cpu": 1, "cuda": 10}
"""Steps. To say the loss is to wait for it, and a GPU should have its next step by then."""
SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to distill."""

    model: str
    folder: Path
    kind: Literal["head", "student"] = "head"
    """An EAGLE-3 head, or a model of its own with fewer layers."""
    device: str = "auto"
    tokens: int = 200_000
    """Of text that the teacher writes."""
    epochs: int = 6
    draft_vocab: int = 6144
    """Tokens that a head can propose: the most frequent ones of the texts."""
    layers: int = 0
    """Of a student; 0 takes half of the teacher's."""
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
    held_out: dict[str, float]
    """Measured on texts that were held out: see :meth:`Subject.judge`."""
    seconds: float


class Subject(Protocol):
    """What is trained."""

    module: nn.Module

    def loss(self, batch: Batch, share: float) -> Tensor:
        """Return the loss of a batch after a share of the training."""

    def judge(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Measure it on texts that were held out."""

    def export(self, folder: Path) -> Path:
        """Write what was made of it."""


def distill(options: Options, report: Callable[[Progress], None], stop: Callable[[], bool]) -> Outcome:
    """Train a head or a student.

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
    device = loader.resolve_device(options.device)

    def outcome(held_out: dict[str, float], checkpoint: Path | None = None) -> Outcome:
        return Outcome(checkpoint is not None, checkpoint, held_out, time.monotonic() - begin)

    located, written = _write_texts(options, report, stop)
    if written < options.tokens:
        return outcome({})
    texts = teacher_text.read(options.folder / "texts.jsonl", LONGEST_TEXT)
    model = _teacher(located.path, device)
    layers = _feature_layers(model.config.num_hidden_layers)
    watched = _watch(model, texts, layers, options.folder / "states", report, stop)
    if watched is None:
        return outcome({})
    subject: Subject
    if options.kind == "head":
        subject = _Head(options, located, model, layers, texts)
    else:
        subject = _Student(options, located, model)
    del model
    order = list(range(len(texts)))
    Random(options.seed).shuffle(order)  # noqa: S311 - nothing is a secret here
    count = min(max(round(len(order) * HELD_OUT_SHARE), 1), HELD_OUT_MOST)
    held_out, trained_on = order[:count], order[count:]
    size = BATCH_TOKENS[device.type]
    per_epoch = len(_batches(texts, trained_on, size, options.seed, 0))
    training = Training(subject.module, options.rate, options.epochs * per_epoch, options.folder)
    training.resume()

    def judge() -> dict[str, float]:
        at_once = JUDGED_AT_ONCE[device.type]
        places = range(0, len(held_out), at_once)
        batches = (watched.batch(held_out[at : at + at_once]) for at in places)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return subject.judge(batches)

    figures, saved = judge(), time.monotonic()
    for numbers in _epochs(texts, trained_on, size, options.seed, options.epochs, training.step):
        if stop():
            training.save(**figures)
            return outcome(figures)
        with torch.autocast(device.type, torch.bfloat16):
            loss = subject.loss(watched.batch(numbers), training.step / training.steps)
        training.descend(loss)
        if training.step % JUDGE_EVERY[device.type] == 0:
            figures = judge()
        if time.monotonic() - saved > SAVE_SECONDS:
            training.save(**figures)
            saved = time.monotonic()
        if training.step % REPORT_EVERY[device.type] == 0:
            said = f"loss {float(loss.detach()):.3f}, held out: {say(figures)}"
            detail = f"step {training.step} of {training.steps}, {said}"
            report(Progress("training", training.step / training.steps, detail))
    figures = judge()
    training.save(**figures)
    return outcome(figures, subject.export(options.folder))


def say(figures: dict[str, float]) -> str:
    """Figures of :meth:`Subject.judge` for a person."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in figures.items())


class _Head:
    """An EAGLE-3 head."""

    def __init__(
        self,
        options: Options,
        located: LocatedModel,
        model: Any,
        layers: tuple[int, int, int],
        texts: Sequence[Written],
    ) -> None:
        proposed = _most_frequent(texts, options.draft_vocab, model.config.vocab_size)
        shape = _shape(model, layers, len(proposed))
        self._head = head_training.start(shape, proposed, model, options.seed).to(model.device)
        self.module: nn.Module = self._head
        self._embed = model.get_input_embeddings().weight.detach().float()
        self._output = model.get_output_embeddings().weight.detach().float()
        self._proposed = self._output[proposed.to(model.device)]
        self._name, self._architecture = located.name, type(model).__name__

    def loss(self, batch: Batch, share: float) -> Tensor:
        unrolled = next(count for until, count in UNROLLED if share < until)
        return head_training.loss(self._head, self._embed, self._proposed, batch, unrolled)

    def judge(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Tokens a step, greedy, if :data:`JUDGED` are proposed all over answers; how often the first is right."""
        accepted, right, count = 0.0, 0.0, 0
        for batch in batches:
            found = head_training.judge(self._head, self._embed, self._output, batch, JUDGED)
            accepted += float(found.accepted.sum())
            right += float(found.right[0])
            count += int(found.count)
        return {"acceptance_length": 1 + accepted / max(count, 1), "first_right": right / max(count, 1)}

    def export(self, folder: Path) -> Path:
        checkpoint = folder / "head"
        eagle_head.save(
            self._head,
            checkpoint,
            verifier=self._name,
            architecture=self._architecture,
            dtype=torch.bfloat16,
            k=JUDGED,
        )
        return checkpoint


class _Student:
    """A model with fewer layers."""

    def __init__(
        self,
        options: Options,
        located: LocatedModel,
        model: Any,
    ) -> None:
        total = model.config.num_hidden_layers
        count = options.layers or max(total // 2, 1)
        if count >= total:
            raise ModelError(f"a student of {count} layers is none: {located.name} has {total}; ask for fewer")
        self.module: nn.Module = student.start(model, count).to(model.device)
        self._output = model.get_output_embeddings().weight.detach().clone().float()
        self._located = located

    def loss(self, batch: Batch, share: float) -> Tensor:
        del share
        return student.judge(self.module, self._output, batch).loss

    def judge(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Divergence from the teacher in nats per token, and how often the likeliest token is the teacher's."""
        self.module.eval()
        divergence, agreeing, count = 0.0, 0, 0
        for batch in batches:
            found = student.judge(self.module, self._output, batch)
            divergence += float(found.loss) * int(found.count)
            agreeing += int(found.agreeing)
            count += int(found.count)
        self.module.train()
        return {"divergence": divergence / max(count, 1), "agreement": agreeing / max(count, 1)}

    def export(self, folder: Path) -> Path:
        checkpoint = folder / "student"
        student.save(self.module, self._located.path, checkpoint, torch.bfloat16)
        return checkpoint


def _write_texts(
    options: Options, report: Callable[[Progress], None], stop: Callable[[], bool]
) -> tuple[LocatedModel, int]:
    """Have the teacher write what is missing; return where it is, and how many tokens there are."""
    at_once = TEXTS_AT_ONCE[loader.resolve_device(options.device).type]
    config = EngineConfig(
        model=options.model,
        device=options.device,
        dtype="bfloat16",
        max_model_len=teacher_text.LONGEST,
        features={"instrumentation": "off", "max_num_seqs": at_once},
    )
    engine = Engine.load(config, lambda stage, share, _: report(Progress("loading", share or 0.0, stage)))
    report(Progress("loading", 1.0))
    texts = teacher_text.TeacherText(engine, options.folder / "texts.jsonl", options.seed, at_once)
    written = texts.write(
        options.tokens, lambda done: report(Progress("texts", done / options.tokens, f"{done:,} tokens")), stop
    )
    if engine.loaded.device.type == "cuda":
        engine.sleep()  # its memory is for training now
    return engine.loaded.located, written


def _watch(
    model: Any,
    texts: Sequence[Written],
    layers: tuple[int, int, int],
    folder: Path,
    report: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> Watched | None:
    """Compute the texts' hidden states, wherever there is room; ``None`` if stopped."""
    if model.device.type == "cpu":
        if not hidden_states.compute(
            model, texts, layers, folder, lambda share: report(Progress("hidden states", share)), stop
        ):
            return None
        return Kept(texts, folder, model.device)
    source = Recomputed(model, texts, layers)
    if not Resident.fits(source):
        return source
    resident = Resident(source, lambda share: report(Progress("hidden states", share)), stop)
    return None if stop() else resident


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


def _most_frequent(texts: Sequence[Written], count: int, vocab: int) -> Tensor:
    """The ids of the most frequent tokens of answers, rising; as many as kernels like, a multiple of 16."""
    said = torch.tensor([token for text in texts for token in text.tokens[text.answer :]])
    frequency = torch.bincount(said, minlength=vocab)
    return frequency.topk(min(count, vocab) // 16 * 16).indices.sort().values


def _batches(texts: Sequence[Written], numbers: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Texts of about one length together, ``size`` tokens of them, in another order each epoch."""
    random = Random(f"{seed} {epoch}")  # noqa: S311 - nothing is a secret here
    batches: list[list[int]] = []
    batch: list[int] = []
    tokens = 0
    for number in sorted(numbers, key=lambda each: len(texts[each].tokens) + random.random() * 20):
        batch.append(number)
        tokens += len(texts[number].tokens)
        if tokens >= size:
            batches.append(batch)
            batch, tokens = [], 0
    random.shuffle(batches)
    return batches


def _epochs(
    texts: Sequence[Written], numbers: Sequence[int], size: int, seed: int, epochs: int, done: int
) -> Iterator[list[int]]:
    """The batches of all epochs but the first ``done`` ones."""
    per_epoch = len(_batches(texts, numbers, size, seed, 0))
    for epoch in range(epochs):
        # Sorting differs a little between epochs, and so may the number of batches: the first epoch's counts.
        for place, batch in enumerate(_batches(texts, numbers, size, seed, epoch)[:per_epoch]):
            if epoch * per_epoch + place >= done:
                yield batch
