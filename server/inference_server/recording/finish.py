"""The process that turns a journal into a recording: ``python -m inference_server.recording.finish JOURNAL``.

It is a process of its own, and nice, so that the front never stops for it. It prints one JSON object a line:
``{"fraction": 0.5}`` and at last ``{"file": …, "bytes": …}`` or ``{"error": …}``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from inference_server.recording.convert import finish
from inference_server.recording.format import RecordingError

_SAY_EVERY_S = 0.1


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="inference_server.recording.finish", description=__doc__)
    parser.add_argument("journal", type=Path)
    journal: Path = parser.parse_args().journal
    with contextlib.suppress(OSError):
        os.nice(10)
    said = 0.0

    def say(fraction: float) -> None:
        nonlocal said
        if (now := time.monotonic()) - said >= _SAY_EVERY_S:
            said = now
            _print({"fraction": fraction})

    try:
        file = finish(journal, progress=say)
    except (RecordingError, OSError) as error:
        _print({"error": str(error)})
        return 1
    _print({"file": file.name, "bytes": file.stat().st_size})
    return 0


def _print(line: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever started us may be gone: finish all the same
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
