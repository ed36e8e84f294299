"""Writes ``small.iwrec`` and ``small.json``, its tables as pyarrow reads them: the oracle of the reader in TypeScript."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path += [str(ROOT / "server"), str(ROOT / "tests")]

from synthetic_recording import write_recording  # noqa: E402 -- found by the line above

from inference_server.front.kv_state import KvState  # noqa: E402
from inference_server.protocol import KvEvents  # noqa: E402
from inference_server.recording.file import RecordingFile  # noqa: E402
from inference_server.recording.format import PART_COLUMNS  # noqa: E402

SHARES = ("request", "start", "scheduled", "kind", "drafted", "accepted")


def main() -> None:
    folder = Path(__file__).parent
    path = write_recording(folder / "small.iwrec", tokens=120, parallel=4, tokens_per_request=16, pause_s=3)
    with RecordingFile(path) as file:
        shares = file.table("step_requests").to_pandas().groupby("step")
        steps = file.table("steps").to_pylist()
        for step in steps:
            rows = shares.get_group(step["step"])
            step |= {name: rows[name].tolist() for name in SHARES}
        tokens = file.table("tokens").to_pylist()
        for token in tokens:
            token["parts"] = [token.pop(name) for name in PART_COLUMNS]
        kv = KvState()
        blocks = {}
        for row in file.table("kv_events").to_pylist():
            kv.apply(KvEvents(step=row["step"], op=[row["op"]], block=[row["block"]], request=[row["request"]]))
            tables = [[request, list(table)] for request, table in sorted(kv.tables.items())]
            blocks[row["step"]] = {"tables": tables, "cached": sorted(kv.cached)}
        oracle = {
            "kv": blocks,
            "steps": steps,
            "tokens": tokens,
            "requests": file.table("request_events").num_rows,
            "features": file.table("features").num_rows,
        }
    (folder / "small.json").write_text(json.dumps(oracle) + "\n")


if __name__ == "__main__":
    main()
