"""Whether comparisons can be trusted: false alarms between identical settings, and power to find 5 %, measured live.

    python benchmarks/experiments.py record FILE [--blocks 200] [--seconds 200]   (again and again until it says done)
    python benchmarks/experiments.py judge FILE

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
from rich.console import Console
from rows import append, cpu_name
from slower_engine import MARK, SLOWDOWN

import inference_workbench as iw
from inference_workbench.experiments.compare import BASELINE, CANDIDATE, DEFAULT_PAIRS, Comparison
from inference_workbench.experiments.conductor import CancelledError, Slot
from inference_workbench.experiments.experiment import Options, Result, make
from inference_workbench.experiments.journal import Features, Journal, RunRecord

WORKLOAD = iw.workload("chat", output_tokens=(8, 24), ignore_eos=True)
REQUESTS = 4
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


def judge(path: Path, keep: Path | None) -> None:
    """Count false alarms and findings, and write the rows."""
    journal = Journal.read(path)
    same = list(comparisons(journal, "same"))
    slower = list(comparisons(journal, "slower"))
    alarms = sum(each.significant for each in same)
    found = [each.findings["tpot_ms"].verdict == "worse" for each in slower]
    ratios = [each.findings["tpot_ms"].effect.ratio for each in slower]
    covered = [each.findings["tpot_ms"].effect for each in same]
    console = Console()
    console.print(f"{len(same)} comparisons of identical settings: {alarms} called different")
    console.print(f"{len(slower)} comparisons with a planted {SLOWDOWN:.0%}: {sum(found)} found worse in TPOT")
    console.print(f"TPOT ratios found: {min(ratios):.3f} … {max(ratios):.3f}")
    inside = sum(effect.low <= 0 <= effect.high for effect in covered)
    console.print(f"intervals that hold 1 between identical settings (TPOT): {inside} of {len(covered)}")
    common = {"subject": "ours", "runs": len(same), "spread": 0, "pairs": DEFAULT_PAIRS, "requests": REQUESTS}
    rows = [
        {"metric": "aa_false_positives_of_20", "value": alarms * 20 / len(same), "unit": "comparisons"},
        {"metric": "power_at_5_percent", "value": sum(found) / len(found), "unit": "fraction"},
    ]
    append(
        "experiments",
        [{**common, **row} for row in rows],
        device="cpu",
        hardware=cpu_name(),
        packages=("inference-workbench", "torch", "numpy"),
    )
    if keep is not None:
        # Rounded to hundredths of a millisecond, and without what the statistics do not look at.
        kept = []
        for run in journal.measured():
            answers = [
                {
                    "index": answer.index,
                    "sent_s": round(answer.sent_s or 0.0, 5),
                    "times_s": [round(time, 5) for time in answer.times_s],
                }
                for answer in run.answers
            ]
            kept.append({"block": run.block, "setting": run.setting, "answers": answers})
        keep.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "judge"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--keep", type=Path, help="also write the times to a small file, for the tests")
    arguments = parser.parse_args()
    if arguments.action == "record":
        record(arguments.file, arguments.blocks, arguments.seconds)
    else:
        judge(arguments.file, arguments.keep)


if __name__ == "__main__":
    main()
