"""Ablations and crossovers: what they compute, on runs whose truth is known, and that they run on a real server."""

import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from servers_under_test import python_path, wait_for_socket

import inference_workbench as iw
from inference_workbench.experiments.ablation import Ablation
from inference_workbench.experiments.crossover import Crossover, first_crossing
from inference_workbench.experiments.factorial import aliases, contrasts, design_points
from inference_workbench.experiments.journal import Environment, Journal, Manifest, RunRecord
from inference_workbench.experiments.sender import Answer, Request
from inference_workbench.experiments.workloads import Load

CHAT = iw.workload("chat", output_tokens=(4, 8), concurrency=2, ignore_eos=True)


def journal(kind, arguments, tmp_path, seconds):
    """A finished experiment in which each run takes ``seconds(slot)``."""
    where = Environment(server="", client="", model="m", model_source="", dtype="float32", device="d")
    manifest = Manifest(
        kind=kind.kind, arguments=arguments, settings={}, environment=where, features_before={}, created=""
    )
    made = Journal(tmp_path / "x.iwexp", manifest)
    load = Load(requests=[Request(index=0, ids=[1], max_tokens=2)])
    for place, slot in enumerate(kind.slots(arguments)):
        took = seconds(slot)
        answer = Answer(index=0, sent_s=0.0, times_s=[took / 2, took], counts=[1, 1], output_tokens=2)
        made.loads[slot.load] = load
        made.runs[slot.key] = RunRecord(
            key=slot.key,
            setting=slot.setting,
            load=slot.load,
            block=slot.block,
            place=place,
            warm_up=slot.warm_up,
            started="",
            seconds=took,
            lag_ms=0.0,
            answers=[answer],
        )
    return made


@pytest.mark.parametrize(
    ("factors", "design"), [(2, "full"), (3, "half"), (5, "quarter"), (7, "smallest"), (8, "quarter")]
)
def test_designs_are_balanced_and_their_main_effects_orthogonal(factors, design):
    points = design_points(factors, design)
    assert (points.sum(axis=0) == 0).all()
    assert (points.T @ points == len(points) * np.eye(factors)).all()
    assert len({tuple(point) for point in points}) == len(points)


@pytest.mark.parametrize(
    ("factors", "design", "runs", "clear"),
    [(4, "half", 8, True), (6, "quarter", 16, True), (5, "quarter", 8, False)],
)
def test_a_fraction_mixes_main_effects_with_pairs_only_where_it_must(factors, design, runs, clear):
    points = design_points(factors, design)
    assert len(points) == runs
    names = [f"f{place}" for place in range(factors)]
    mixed = aliases(contrasts(points, names))
    assert all(not mixed[name,] for name in names) == clear
    assert any(mixed.values())


def test_known_effects_and_interactions_are_recovered_with_noise(tmp_path):
    factors = {"a": [False, True], "b": [False, True], "c": [0, 1]}
    arguments = {
        "features_varied": factors,
        "design": "full",
        "blocks": 8,
        "seed": 1,
        "confidence": 0.95,
        "workload": {"name": "chat"},
        "requests": 1,
    }
    random = np.random.default_rng(2)

    def seconds(slot):
        a, b, _ = (1 if sign == "+" else -1 for sign in slot.setting)
        log = -0.5 * np.log(2) * a + 0.5 * np.log(1.1) * b + 0.5 * np.log(1.2) * a * b
        return float(np.exp(log + random.normal(0, 0.01)))

    result = Ablation(journal(Ablation, arguments, tmp_path, seconds))
    table = result.effects("e2e_ms")
    assert table.loc["a", "ratio"] == pytest.approx(0.5, rel=0.02)
    assert table.loc["b", "ratio"] == pytest.approx(1.1, rel=0.02)
    assert table.loc["a × b", "ratio"] == pytest.approx(1.2, rel=0.02)
    assert table["found"].to_dict() == {
        "a": True, "b": True, "c": False, "a × b": True, "a × c": False, "b × c": False,
    }  # fmt: skip
    plot = result.plot()
    assert set(plot.renderers[0].data_source.data["text"]) >= {f"×{table.loc['a', 'ratio']:.3g}"}
    with pytest.raises(iw.WorkbenchError, match="no metric 'speed'"):
        result.effects("speed")


def test_every_block_has_every_combination_and_orders_reverse():
    arguments = {"features_varied": {"a": [0, 1], "b": [0, 1]}, "design": "full", "blocks": 4, "seed": 3}
    slots = [slot for slot in Ablation.slots(arguments) if not slot.warm_up]
    blocks = [[slot.setting for slot in slots if slot.block == block] for block in range(4)]
    assert all(sorted(block) == ["++", "+-", "-+", "--"] for block in blocks)
    assert blocks[1] == blocks[0][::-1]
    assert blocks[3] == blocks[2][::-1]


def crossing_experiment(tmp_path, effect, noise=0.01, values=(1, 2, 4, 8)):
    arguments = {
        "over": "concurrency",
        "values": list(values),
        "baseline": {},
        "candidate": {"x": True},
        "pairs": 8,
        "confidence": 0.95,
        "workload": {"name": "chat"},
        "requests": 1,
    }
    random = np.random.default_rng(4)

    def seconds(slot):
        value = int(slot.load.split("=")[1])
        log = effect(value) if slot.setting == "candidate" else 0.0
        return float(np.exp(log + random.normal(0, noise)))

    return Crossover(journal(Crossover, arguments, tmp_path, seconds))


def test_a_known_crossing_lies_in_its_interval(tmp_path):
    result = crossing_experiment(tmp_path, lambda value: 0.1 * np.log(value / 3))
    crossing = result.crossing()
    assert crossing.turns == "gain to loss"
    assert crossing.low <= 3 <= crossing.high
    assert crossing.high / crossing.low < 1.5
    assert "from gain to loss in E2E at concurrency = " in result.verdict
    assert result.crossing("output_tokens_per_s").turns == "gain to loss", "fewer tokens a second are a loss, too"
    assert result.effects()["verdict"].tolist()[::3] == ["gain", "loss"]
    assert result.plot().renderers


def test_where_nothing_crosses_nothing_is_claimed(tmp_path):
    gain = crossing_experiment(tmp_path, lambda _: -0.2)
    assert gain.crossing() is None
    assert gain.verdict == "The candidate is a gain in E2E at every concurrency from 1 to 8."
    nothing = crossing_experiment(tmp_path, lambda _: 0.0, noise=0.05)
    assert "No difference" in nothing.verdict or "no crossing is certain" in nothing.verdict


def test_a_crossing_is_interpolated_where_the_line_is_zero():
    x = np.array([0.0, 1.0, 3.0])
    assert first_crossing(x, np.array([-1.0, -0.5, 0.5])) == (2.0, True)
    assert first_crossing(x, np.array([1.0, -1.0, 1.0])) == (0.5, False)
    assert first_crossing(x, np.array([1.0, -1.0, 1.0]), rising=True) == (2.0, True)
    assert first_crossing(x, np.array([1.0, 2.0, 3.0])) is None


def test_an_ablation_on_a_server_sets_every_combination(wb, folder):
    seen = []
    update = wb.features.update

    def spy(*args, **values):
        seen.append(dict(*args, **values))
        return update(*args, **values)

    object.__setattr__(wb.features, "update", spy)
    try:
        result = iw.ablate(
            {"prefix_cache_read": (False, True), "max_num_seqs": (1, 8)},
            CHAT,
            wb=wb,
            requests=3,
            progress=False,
            path=folder / "a.iwexp",
        )
    finally:
        object.__delattr__(wb.features, "update")
    settings = result.manifest.settings
    combinations = {(each["prefix_cache_read"], each["max_num_seqs"]) for each in settings.values()}
    assert combinations == set(itertools.product((False, True), (1, 8)))
    assert len(result.to_frame()) == 24
    assert seen
    assert wb.features.max_num_seqs == 32
    assert "prefix_cache_read × max_num_seqs" in result.summary()
    assert "features={'prefix_cache_read': [False, True]" in result.cell()
    assert iw.open_result(folder / "a.iwexp").summary() == result.summary()


def test_a_kernel_and_a_server_that_are_killed_in_mid_ablation_cost_the_run_under_way(server, wb, folder):
    path = folder / "killed.iwexp"
    code = (
        "import inference_workbench as iw\n"
        f"wb = iw.connect(uds={str(server.uds)!r}, token={server.token!r})\n"
        "load = iw.workload('chat', output_tokens=30, concurrency=2, ignore_eos=True)\n"
        "factors = {'prefix_cache_read': (False, True), 'max_num_seqs': (1, 8)}\n"
        f"iw.ablate(factors, load, wb=wb, requests=2, progress=False, path={str(path)!r})\n"
    )
    kernel = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": python_path()})
    deadline = time.monotonic() + 120
    while not path.exists() or len(Journal.read(path).runs) < 7:
        assert kernel.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kernel.kill()
    kernel.wait()
    server.kill()
    before = Journal.read(path)
    server.start()
    wait_for_socket(server, 60)
    resumed = iw.resume(path, wb=wb, progress=False)
    assert resumed.complete
    kept = {key: run.started for key, run in before.runs.items()}
    assert len(kept) >= 7
    assert {key: resumed.journal.runs[key].started for key in kept} == kept
    assert resumed.journal.loads == before.loads, "the very same requests"
    assert wb.features.max_num_seqs == 32
    assert len(resumed.effects()) == 3


def test_a_crossover_on_a_server_varies_the_load(wb, folder):
    result = iw.crossover(
        baseline={},
        candidate={"batching": "single"},
        over="concurrency",
        values=[1, 4],
        workload=iw.workload("chat", output_tokens=16, ignore_eos=True),
        requests=4,
        wb=wb,
        progress=False,
    )
    assert [load.limit for load in result.journal.loads.values()] == [1, 4]
    assert result.effects("ttft_ms").loc[4, "ratio"] > 1.5, result.summary()
    assert wb.features.batching == "continuous"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iw.ablate("kv_cache"), "as a list"),
        (lambda: iw.ablate(["kv_cache"]), "2 to 8 switches"),
        (lambda: iw.ablate({"a": (1, 1), "b": (0, 1)}), "two different levels"),
        (lambda: iw.ablate(["a", "b"], design="half"), "no 'half' design for 2"),
        (lambda: iw.ablate(["a", "b"], blocks=3), "6 blocks at least"),
        (lambda: iw.ablate(["a", "b"], confidence=1.0), "between 0.5 and 1"),
        (lambda: iw.crossover("a", over="concurrency", values=[1, 2], confidence=95), "between 0.5 and 1"),
        (lambda: iw.crossover("a", over="concurrency", values=[4, 2]), "have to rise"),
        (lambda: iw.crossover(over="concurrency", values=[1, 2]), "Give either a switch"),
        (lambda: iw.crossover("a", over="rate", values=[1, 2], workload=iw.RequestSet(name="x", requests=[])), "fixed"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_server_is_asked(call, message):
    with pytest.raises(iw.WorkbenchError, match=message):
        call()
