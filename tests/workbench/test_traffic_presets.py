"""The page offers the workloads that the server has, and starts its controls with the server's own values."""

import re
from pathlib import Path

from inference_server.workloads.workload import PRESETS, ClosedLoop

VIEW = Path(__file__).parents[2] / "extension/src/views/traffic.ts"


def test_the_presets_of_the_page_are_those_of_the_server():
    source = VIEW.read_text(encoding="utf-8")
    block = source[source.index("TRAFFIC_PRESETS = {") : source.index("} as const")]
    rows = re.findall(
        r"'?(\w[\w ]*?)'?: \{ arrivals: '(\w+)', concurrency: (\d+), rate: ([\d.]+), output: (\d+), shared: (\d+) \}",
        block,
    )
    assert {row[0] for row in rows} == set(PRESETS)
    for name, arrivals, concurrency, rate, output, shared in rows:
        workload = PRESETS[name][1]
        if isinstance(workload.arrivals, ClosedLoop):
            assert (arrivals, int(concurrency)) == ("closed", workload.arrivals.concurrency), name
        else:
            assert (arrivals, float(rate)) == ("poisson", workload.arrivals.rate), name
        assert (int(output), int(shared)) == (workload.output_tokens.high, workload.shared_prefix_tokens), name
