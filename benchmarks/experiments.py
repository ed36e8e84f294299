"""Whether comparisons can be trusted: false alarms between identical settings, and power to find 5 %, measured live.

    python benchmarks/experiments.py record FILE [--blocks 200] [--seconds 200]   (again and again until it says done)
    python benchmarks/experiments.py judge FILE … [--keep tests/workbench/experiments/data/calibration.json.gz]

``record`` runs the default model under three settings in turns: one, the same again, and the same with an engine that
is 5 % slower (``slower_engine.py``). ``judge`` makes comparisons of the default number of pairs out of disjoint blocks.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
from rich.console import Console
from rows import append, cpu_name
from slower_engine import MARK, SLOWDOWN

import inference_workbench as iw
from inference_workbench.experiments.compare import BASELINE, CANDIDATE, DEFAULT_PAIRS, Comparison
from inference_workbench.experiments.conductor import CancelledError, Slot
from inference_workbench.experiments.experiment import Options, Result, make
from inference_workbench.experiments.figures import paired_effects
from inference_workbench.experiments.journal import Features, Journal, RunRecord
from inference_workbench.experiments.sender import Answer
from inference_workbench.experiments.statistics import joint_p

WORKLOAD = iw.workload("chat", output_tokens=(8, 24), ignore_eos=True)
REQUESTS = 4
DRAWS = 100
ORDERS = list(itertools.permutations(("one", "same", "slower")))


class Calibration(Result):
    """Blocks of three runs: one setting twice, and a slower engine; in all orders by turns."""

    kind: ClassVar[str] = "calibration"
    function: ClassVar[str] = "calibration"

    @classmethod
    def settings(cls, arguments: Mapping[str, Any]) -> dict[str, Features]:
        del arguments
        return {"one": {}, "same": {}, "slower": {"max_num_seqs": MARK}}

    @classmethod
    def slots(cls, arguments: Mapping[str, Any]) -> list[Slot]:
        warm_up = Slot(key="warm-up", setting="one", load="workload", block=-1, warm_up=True)
        return [warm_up] + [
            Slot(key=f"{block} {setting}", setting=setting, load="workload", block=block)
            for block in range(arguments["blocks"])
            for setting in ORDERS[block % len(ORDERS)]
        ]


def record(path: Path, blocks: int, seconds: float) -> None:
    """Record blocks for some time, going on where an earlier call stopped."""
    command = [sys.executable, str(Path(__file__).parent / "slower_engine.py")]
    os.environ["INFERENCE_WORKBENCH_ENGINE_COMMAND"] = json.dumps(command)
    cancel = threading.Event()
    with iw.connect(model="default") as wb:
        threading.Timer(seconds, cancel.set).start()
        arguments = {"workload": msgspec.to_builtins(WORKLOAD), "requests": REQUESTS, "blocks": blocks, "features": {}}
        try:
            make(Calibration, arguments, Options(site=wb, path=path, progress=False, cancel=cancel))
        except CancelledError as error:
            print(error)
        else:
            print("done")


def comparisons(journal: Journal, candidate: str) -> Iterator[Comparison]:
    """Make comparisons of the default number of pairs out of disjoint blocks."""
    by_block: dict[int, dict[str, RunRecord]] = {}
    for run in journal.measured():
        by_block.setdefault(run.block, {})[run.setting] = run
    whole = [runs for _, runs in sorted(by_block.items()) if len(runs) == 3]
    for begin in range(0, len(whole) - DEFAULT_PAIRS + 1, DEFAULT_PAIRS):
        arguments = {**journal.manifest.arguments, "baseline": {}, "candidate": {}, "pairs": DEFAULT_PAIRS}
        arguments["confidence"] = 0.95
        made = Journal(journal.path, msgspec.structs.replace(journal.manifest, kind="compare", arguments=arguments))
        made.loads = journal.loads
        for pair, runs in enumerate(whole[begin : begin + DEFAULT_PAIRS]):
            for name, source in ((BASELINE, "one"), (CANDIDATE, candidate)):
                run = msgspec.structs.replace(runs[source], key=f"pair {pair} {name}", setting=name, block=pair)
                made.runs[run.key] = run
        yield Comparison(made)


def judge(paths: list[Path], together: int, keep: Path | None) -> None:
    """Count false alarms in all recordings and findings in the last one, and write the rows."""
    journals = [Journal.read(path) for path in paths]
    same = [each for journal in journals for each in comparisons(journal, "same")]
    alarms = sum(each.significant for each in same)
    effects = np.array([list(paired_effects(one, slower).values()) for one, slower in _blocks(journals[-1], "slower")])
    pairs = np.array(
        [effects[at : at + together].mean(axis=0) for at in range(0, len(effects) - together + 1, together)]
    )
    names = list(paired_effects([], []))
    random = np.random.default_rng(1)
    found = 0
    for _ in range(DRAWS):
        chosen = pairs[random.choice(len(pairs), DEFAULT_PAIRS, replace=False)]
        found += joint_p(dict(zip(names, chosen.T, strict=True)))["tpot_ms"] <= 0.05
    ratio = float(np.exp(effects[:, names.index("tpot_ms")].mean()))
    console = Console()
    console.print(f"{len(same)} comparisons of identical settings: {alarms} called different")
    console.print(
        f"planted {SLOWDOWN:.0%}, found {ratio - 1:.1%}: {found} of {DRAWS} comparisons say worse ({DEFAULT_PAIRS} of "
        f"{len(pairs)} pairs of {together} recorded runs each)"
    )
    common = {"subject": "ours", "spread": 0, "pairs": DEFAULT_PAIRS, "requests": REQUESTS}
    rows = [
        {
            "metric": "aa_false_positives_of_20",
            "value": alarms * 20 / len(same),
            "unit": "comparisons",
            "runs": len(same),
        },
        {
            "metric": "power_at_5_percent",
            "value": found / DRAWS,
            "unit": "fraction",
            "runs": DRAWS,
            "together": together,
        },
    ]
    append(
        "experiments",
        [{**common, **row} for row in rows],
        device="cpu",
        hardware=cpu_name(),
        packages=("inference-workbench", "torch", "numpy"),
    )
    if keep is not None:
        keep.write_bytes(gzip.compress(json.dumps(_kept(journals)).encode(), mtime=0))


def _blocks(journal: Journal, candidate: str) -> list[tuple[list[Answer], list[Answer]]]:
    by_block: dict[int, dict[str, RunRecord]] = {}
    for run in journal.measured():
        by_block.setdefault(run.block, {})[run.setting] = run
    whole = [runs for _, runs in sorted(by_block.items()) if len(runs) == 3]
    return [(runs["one"].answers, runs[candidate].answers) for runs in whole]


def _kept(journals: list[Journal]) -> list[dict[str, Any]]:
    """Return times in units of 10 µs, each from the one before, without what the statistics do not look at."""
    kept = []
    for number, journal in enumerate(journals):
        for run in journal.measured():
            if run.setting == "slower" and journal is not journals[-1]:
                continue
            answers = []
            for answer in run.answers:
                units = np.round(np.array([answer.sent_s or 0.0, *answer.times_s]) * 1e5).astype(int)
                answers.append([answer.index, int(units[0]), *np.diff(units).tolist()])
            kept.append({"recording": number, "block": run.block, "setting": run.setting, "answers": answers})
    return kept


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "judge"])
    parser.add_argument("files", type=Path, nargs="+", help="judge takes several: power comes from the last")
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--together", type=int, default=8, help="recorded runs that make one, for the power")
    parser.add_argument("--keep", type=Path, help="also write the times to a small file, for the tests")
    arguments = parser.parse_args()
    if arguments.action == "record":
        record(arguments.files[0], arguments.blocks, arguments.seconds)
    else:
        judge(arguments.files, arguments.together, arguments.keep)


if __name__ == "__main__":
    main()
