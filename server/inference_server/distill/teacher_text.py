"""Has the teacher write texts, questions and answers, with this server's own engine. Owns the file they are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from inference_server.distill.prompts import (
    ANSWER_TOKENS,
    LONG_OPENINGS,
    LONG_QUESTION_TOKENS,
    OPENINGS,
    QUESTION_TOKENS,
    TEMPERATURES,
)
from inference_server.engine.core import Engine
from inference_server.models.errors import ModelError
from inference_server.protocol import SamplingParams, Submit

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
LONGEST = 1024
"""Positions of a text that an engine has to have room for, its chat template's included."""
FULL_ENOUGH = 7 / 8
"""Texts are begun and answered only when so few of the places are taken: prompts come in few steps then.

A step without prompts is a CUDA graph on a GPU; replacing each text as it ends would leave none of these.
"""


class TeacherText:
    """Texts of one teacher, appended to a file as they are finished, so that a run that was cut off goes on.

    Parameters
    ----------
    engine : Engine
        Serves the teacher; nobody else may use it meanwhile.
    path : Path
        One JSON object a line: ``question`` and ``answer``, token ids with the chat template's.
    seed : int
    at_once : int
        Texts that are written at a time.
    """

    def __init__(self, engine: Engine, path: Path, seed: int, at_once: int) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415 - takes a second

        self._engine, self._path, self._seed, self._at_once = engine, path, seed, at_once
        tokenizer: Any = AutoTokenizer.from_pretrained(engine.loaded.located.path, trust_remote_code=False)
        self._tokenizer = tokenizer
        self._before, self._between = _turns(tokenizer, engine.loaded.located.name)
        self._eos = set(engine.loaded.eos_token_ids)

    def write(self, tokens: int, progress: Callable[[int], None], stop: Callable[[], bool]) -> int:
        """Write until there are so many tokens; return how many there are.

        Parameters
        ----------
        tokens : int
        progress : callable
            Told how many there are so far.
        stop : callable
            Asked after each step whether to end now.
        """
        done, number = _count(self._path)
        engine, asked = self._engine, 0
        asking: dict[int, list[int]] = {}
        asked_of: dict[int, list[int]] = {}
        answering: dict[int, list[int]] = {}
        outputs: dict[int, list[int]] = {}
        with self._path.open("a", encoding="utf-8") as file:
            while done < tokens and not stop():
                if len(asking) + len(answering) <= FULL_ENOUGH * self._at_once:
                    for handle, prompt in asked_of.items():
                        temperature = TEMPERATURES[handle // 2 % len(TEMPERATURES)]
                        self._submit(handle, prompt, ANSWER_TOKENS, temperature, Random(handle))  # noqa: S311
                    answering |= asked_of
                    asked_of.clear()
                    while len(asking) + len(answering) < self._at_once:
                        asked += 1
                        random = Random(f"{self._seed} {number + asked}")  # noqa: S311 - nothing is a secret here
                        opening = random.choice(OPENINGS)
                        prompt = self._before + self._tokenizer.encode(opening, add_special_tokens=False)
                        most = LONG_QUESTION_TOKENS if opening in LONG_OPENINGS else QUESTION_TOKENS
                        asking[2 * asked] = prompt
                        self._submit(2 * asked, prompt, most, 1.0, random)
                report, _ = engine.step()
                if report is None:
                    continue
                for handle, token, finish in zip(
                    report.tokens.request, report.tokens.token_id, report.tokens.finish, strict=True
                ):
                    output = outputs.setdefault(handle, [])
                    if token not in self._eos:
                        output.append(token)
                    if finish is None:
                        continue
                    del outputs[handle]
                    if handle in asking:
                        asked_of[handle + 1] = asking.pop(handle) + output + self._between
                    else:
                        question = answering.pop(handle)
                        answer = [*output, token] if token in self._eos else output
                        file.write(json.dumps({"question": question, "answer": answer}) + "\n")
                        file.flush()
                        done += len(question) + len(answer)
                        progress(done)
        engine.fail_all("enough was written")
        return done

    def _submit(self, handle: int, prompt: list[int], most: int, temperature: float, random: Random) -> None:
        sampling = SamplingParams(max_tokens=most, temperature=temperature, top_p=0.95, seed=random.getrandbits(32))
        self._engine.submit(Submit(requests=(handle,), prompt=tuple(prompt), sampling=sampling, arrival_ns=0))


@dataclass(frozen=True, slots=True)
class Written:
    """A text of the teacher's."""

    tokens: list[int]
    answer: int
    """Where the answer begins: what stands before was begun for the teacher, and drawn from all that it could say."""


def read(path: Path, longest: int) -> list[Written]:
    """The texts of a file, none of them longer than so many tokens."""
    texts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)
        texts.append(Written((text["question"] + text["answer"])[:longest], len(text["question"])))
    return texts


def _count(path: Path) -> tuple[int, int]:
    """Tokens and texts that are in a file."""
    if not path.exists():
        return 0, 0
    texts = read(path, 1 << 30)
    return sum(len(text.tokens) for text in texts), len(texts)


def _turns(tokenizer: Any, name: str) -> tuple[list[int], list[int]]:
    """What stands before a question, and between it and the answer, by the chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{name} has no chat template; only a model that can be asked writes texts of its own")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
    )
    before, mark, between = text.partition(MARK)
    if not mark:
        raise ModelError(f"the chat template of {name} changes what is said, so texts cannot be begun in it")
    return (tokenizer.encode(each, add_special_tokens=False) for each in (before, between))  # type: ignore[return-value]
