"""What a setting does to outputs: *identical*, *diverged at token i where the top-2 gap was g*, *distribution changed*.

Greedy outputs are compared token by token. Where they part, the server is asked, under the baseline's settings, how
much likelier the baseline's token was than the candidate's: if next to nothing, rounding decided (a near-tie); if more
than rounding can, the candidate computes another distribution. Sampled outputs are compared by the frequencies of their
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pandas as pd

from inference_workbench.experiments.journal import Probe
from inference_workbench.experiments.sender import Request
from inference_workbench.experiments.statistics import two_sample_p

if TYPE_CHECKING:
    from inference_workbench.client import Workbench

Verdict = Literal["identical", "near-ties", "distribution changed", "not told apart", "unknown"]

NEAR_TIE = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.5}
"""Largest gap between two log-probabilities that rounding in a number format may turn around: a few units in the last
place of logits around 20 (bfloat16: steps of 0.125), and for float32 what other orders of summation make of it in deep
models."""
_LIKELIEST = 20
MAX_PROBES = 64


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """Where two outputs of the same request part."""

    request: int
    position: int
    """Output position of the first difference."""
    first: int | None
    second: int | None
    """The tokens there; ``None`` where one output had ended."""


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on all requests."""

    verdict: Verdict
    words: str
    requests: int
    identical: int
    divergences: list[Divergence] = []
    gaps: dict[int, float | None] = {}
    """Top-2 gap by request, where it was asked for."""
    unstable: int = 0
    """Requests for which the baseline differs from itself, in two of its own runs."""
    p: float | None = None
    """Of the test on sampled outputs."""

    def to_frame(self) -> pd.DataFrame:
        """Return a row a request that diverged: where, the tokens, and the gap."""
        rows = [msgspec.structs.asdict(each) | {"gap": self.gaps.get(each.request)} for each in self.divergences]
        return pd.DataFrame(rows, columns=["request", "position", "first", "second", "gap"])

    def __str__(self) -> str:
        return self.words


def divergences(baseline: Mapping[int, Sequence[int]], candidate: Mapping[int, Sequence[int]]) -> list[Divergence]:
    """Return where the outputs of each request part, for the requests that both have."""
    found = []
    for request in sorted(set(baseline) & set(candidate)):
        one, other = baseline[request], candidate[request]
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        if at < max(len(one), len(other)):
            found.append(
                Divergence(
                    request=request,
                    position=at,
                    first=one[at] if at < len(one) else None,
                    second=other[at] if at < len(other) else None,
                )
            )
    return found


def judge(
    requests: Sequence[Request],
    baseline: Sequence[Mapping[int, Sequence[int]]],
    candidate: Sequence[Mapping[int, Sequence[int]]],
    probes: Mapping[int, Probe],
    dtype: str,
) -> Outputs:
    """Compare the outputs of all runs.

    Parameters
    ----------
    requests
        What was sent.
    baseline, candidate
        Output tokens by request, of each run.
    probes
        What the server said where outputs part.
    dtype
        The number format that decides how small a gap is a near-tie.
    """
    known = [request for request in requests if all(request.index in run for run in (*baseline, *candidate))]
    if not known or not baseline or not candidate or not any(baseline[0][request.index] for request in known):
        return Outputs(
            verdict="unknown", words="The server did not tell the tokens' ids.", requests=len(requests), identical=0
        )
    if any(request.temperature > 0 for request in known):
        return _judge_sampled([request.index for request in known], baseline, candidate)
    unstable = {each.request for run in baseline[1:] for each in divergences(baseline[0], run)}
    found: dict[int, Divergence] = {}
    for run in candidate:
        for each in divergences(baseline[0], run):
            known_one = found.get(each.request)
            if known_one is None or each.position < known_one.position:
                found[each.request] = each
    total = len(known)
    parted = [found[request] for request in sorted(found)]
    gaps = {request: probes[request].gap for request in found if request in probes}
    common: dict[str, Any] = {
        "requests": total,
        "identical": total - len(parted),
        "divergences": parted,
        "gaps": gaps,
        "unstable": len(unstable),
    }
    self_words = (
        f" The baseline itself is not repeatable: {len(unstable)} requests differ between its runs." if unstable else ""
    )
    if not parted:
        return Outputs(verdict="identical", words=f"Identical outputs for all {total} requests.{self_words}", **common)
    limit = NEAR_TIE.get(dtype, NEAR_TIE["bfloat16"])
    large = [each for each in parted if each.request in gaps and not _is_tie(gaps[each.request], limit)]
    worst = max(parted, key=lambda each: _size(gaps.get(each.request, 0.0)))
    widest = _size(gaps.get(worst.request))
    if large:
        gap = gaps[worst.request]
        how = f"{gap:.3g}" if gap is not None else f"more than the {_LIKELIEST} likeliest tokens span"
        return Outputs(
            verdict="distribution changed",
            words=(
                f"Distribution changed: {len(parted)} of {total} outputs differ, {len(large)} of them where rounding "
                f"cannot be the reason (request {worst.request} diverged at token {worst.position} where the gap was "
                f"{how}; a near-tie in {dtype} is below {limit:g}).{self_words}"
            ),
            **common,
        )
    if not gaps:
        return Outputs(
            verdict="unknown",
            words=f"{len(parted)} of {total} outputs differ; the gaps there are not known.{self_words}",
            **common,
        )
    return Outputs(
        verdict="near-ties",
        words=(
            f"{total - len(parted)} of {total} outputs identical; the others diverged at near-ties, the widest at "
            f"token {worst.position} of request {worst.request}, where the top-2 gap was {widest:.2g} "
            f"(rounding in {dtype} may decide up to {limit:g}).{self_words}"
        ),
        **common,
    )


def ask_gaps(
    workbench: Workbench,
    requests: Sequence[Request],
    baseline: Mapping[int, Sequence[int]],
    found: Sequence[Divergence],
    known: Mapping[int, Probe],
    keep: Callable[[Probe], object],
) -> None:
    """Ask the server how likely the two tokens were where outputs part; the switches have to stand at the baseline.

    Parameters
    ----------
    baseline
        The outputs whose beginnings are continued.
    known
        What was asked before.
    keep
        Called with each answer.
    """
    by_index = {request.index: request for request in requests}
    for each in found[:MAX_PROBES]:
        request = by_index[each.request]
        if each.request in known or request.ids is None or each.first is None or each.second is None:
            continue
        body = {
            "prompt": [*request.ids, *baseline[each.request][: each.position]],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": _LIKELIEST,
            "return_tokens_as_token_ids": True,
            "ignore_eos": True,
        }
        answer = workbench._call("POST", "/v1/completions", json=body)  # noqa: SLF001 -- our own
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        first, second = (top.get(f"token_id:{token}") for token in (each.first, each.second))
        gap = None if first is None or second is None else first - second
        keep(Probe(request=each.request, position=each.position, first=each.first, second=each.second, gap=gap))


def _judge_sampled(
    known: Sequence[int],
    baseline: Sequence[Mapping[int, Sequence[int]]],
    candidate: Sequence[Mapping[int, Sequence[int]]],
) -> Outputs:
    # Repeated runs draw from the same seeds, so only one of each counts.
    ones, others = ([run[index] for index in known] for run in (baseline[0], candidate[0]))
    same = sum(list(a) == list(b) for a, b in zip(ones, others, strict=True))
    if same == len(known):
        return Outputs(
            verdict="identical",
            words=f"Identical outputs for all {len(known)} requests, sampled from the same seeds.",
            requests=len(known),
            identical=len(known),
        )
    p = two_sample_p(ones, others)
    tokens = sum(map(len, ones)) + sum(map(len, others))
    changed = p < 0.01
    words = (
        f"Distribution changed: the frequencies of sampled tokens differ (p = {p:.2g}, {tokens:,} tokens)."
        if changed
        else f"Sampled outputs differ, their tokens' frequencies cannot be told apart (p = {p:.2g}, {tokens:,} tokens)."
    )
    verdict: Verdict = "distribution changed" if changed else "not told apart"
    return Outputs(verdict=verdict, words=words, requests=len(known), identical=same, p=p)


def _size(gap: float | None) -> float:
    return float("inf") if gap is None else abs(gap)


def _is_tie(gap: float | None, limit: float) -> bool:
    return gap is not None and abs(gap) <= limit
