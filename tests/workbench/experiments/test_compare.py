"""Comparisons on a real server: what they find, what they leave behind, and how they go on after a crash."""

import math
import threading
import time

import pytest
from jupyter_client.manager import start_new_kernel
from servers_under_test import python_path

import inference_workbench as iw
from inference_workbench.experiments.compare import Comparison, _changes
from inference_workbench.experiments.journal import Journal
from inference_workbench.experiments.sites import OwnServer

CHAT = iw.workload("chat", output_tokens=(8, 16), concurrency=2, ignore_eos=True)
SHORT = {"requests": 4, "pairs": 6, "progress": False}


@pytest.fixture(scope="module")
def one_by_one(module_workbench, tmp_path_factory):
    """A comparison with an effect that no noise can hide."""
    at_once = iw.workload("chat", output_tokens=32, concurrency=8, ignore_eos=True)
    path = tmp_path_factory.mktemp("result") / "one-by-one.iwexp"
    reports = []
    module_workbench.features.max_num_seqs = 7
    candidate = {"batching": "single", "kv_cache": False}
    options = {"requests": 8, "pairs": 8, "progress": reports.append}
    result = iw.compare({}, candidate, at_once, wb=module_workbench, path=path, **options)
    return result, reports, dict(module_workbench.features.current())


def test_a_large_effect_is_found_with_the_right_sign_and_said_in_words(one_by_one):
    result, _, _ = one_by_one
    ttft = result.findings["ttft_ms"]
    assert result.significant
    assert ttft.verdict == "worse", result.summary() + result.effects.to_string()
    assert 1 < ttft.effect.ratio_low < ttft.effect.ratio < ttft.effect.ratio_high
    assert ttft.p <= 0.05
    assert "TTFT is" in result.verdict
    assert "worse" in result.summary()


def test_a_change_and_its_bounds_are_said_in_one_unit():
    assert _changes(math.log(0.4), math.log(0.3), math.log(0.6)) == ["0.40×", "0.30×", "0.60×"]
    assert _changes(math.log(0.9), math.log(0.8), math.log(1.1)) == ["-10.0 %", "-20.0 %", "+10.0 %"]
    assert _changes(-math.inf, math.inf) == ["anything", "anything"]


def test_neither_batching_nor_the_kv_cache_changes_an_output(one_by_one):
    result, _, _ = one_by_one
    assert result.outputs.verdict == "identical"
    assert result.outputs.requests == result.outputs.identical == 8


def test_runs_alternate_pair_by_pair_after_one_of_each_that_does_not_count(one_by_one):
    result, reports, _ = one_by_one
    order = [run.setting[0] for run in sorted(result.journal.runs.values(), key=lambda run: run.place)]
    assert "".join(order) == "bc" + "bccb" * 4
    assert len(result.to_frame()) == 16
    assert [report.done for report in reports] == list(range(19))
    assert reports[0].left_s is None
    assert reports[5].left_s > reports[12].left_s >= 0


def test_every_run_starts_with_empty_caches(one_by_one):
    result, _, _ = one_by_one
    prompts = result.requests["prompt_tokens"].groupby(result.requests["run"]).sum()
    # The chat template's beginning is all that the prompts of one run share.
    cached = result.to_frame().set_index("run")["server_cached_tokens"]
    assert (cached < prompts.loc[cached.index] / 2).all()


def test_the_server_saw_what_the_client_saw_within_the_clients_times(one_by_one):
    result, _, _ = one_by_one
    frame = result.to_frame()
    assert (frame["server_ttft_ms"] <= frame["ttft_ms"]).all(), "a client's TTFT begins earlier and ends later"
    assert (result.requests["output_tokens"] == 32).all()


def test_switches_stand_as_before_and_belong_to_the_definition(one_by_one, module_workbench):
    result, _, after = one_by_one
    assert after["max_num_seqs"] == 7
    assert after["kv_cache"] is True
    assert result.arguments["features"] == {"max_num_seqs": 7}
    settings = result.manifest.settings
    assert [settings[name]["batching"] for name in ("baseline", "candidate")] == ["continuous", "single"]
    assert settings["candidate"]["max_num_seqs"] == 7


def test_a_saved_result_says_the_same_when_it_is_opened(one_by_one, tmp_path):
    result, _, _ = one_by_one
    opened = iw.open_result(result.save(tmp_path / "copy"))
    assert isinstance(opened, Comparison)
    assert opened.path == tmp_path / "copy.iwexp"
    assert opened.summary() == result.summary()
    assert opened.to_frame().equals(result.to_frame())


def test_its_cell_in_a_fresh_kernel_finds_the_same_within_the_stated_tolerance(one_by_one, server, folder, monkeypatch):
    result, _, _ = one_by_one
    monkeypatch.setenv("PYTHONPATH", python_path())
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(server.runtime))  # iw.connect() finds the server by itself
    manager, kernel = start_new_kernel(kernel_name="python3")
    try:
        told = []
        saved = folder / "again.iwexp"
        cell = f"{result.cell()}\nresult.save({str(saved)!r})"
        reply = kernel.execute_interactive(cell, timeout=300, output_hook=told.append)
        assert reply["content"]["status"] == "ok", reply["content"]
        assert not [each["content"] for each in told if each["msg_type"] == "error"]
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
    again = iw.open_result(saved)
    assert again.arguments == result.arguments
    assert again.journal.loads == result.journal.loads, "the very same requests"
    assert again.outputs.verdict == result.outputs.verdict
    agreement = result.agreement(again)
    assert agreement.environment_changes == []
    table = agreement.table.set_index("figure")
    assert (table[["before", "again"]].loc["log ratio of TTFT"] > 0.2).all(), agreement
    # Not whether the intervals agree: each knows of the spread within its own experiment, and the machine may have
    # become faster or slower as a whole between the two. Effects as strong as these keep their sign all the same.
    strong = table.loc[["log ratio of TTFT", "log ratio of E2E", "log ratio of output tokens/s"]]
    assert (strong["before"] * strong["again"] > 0).all(), agreement


def test_the_plot_has_every_metric_and_both_settings(one_by_one):
    result, _, _ = one_by_one
    ratios, latencies = result.plot().children
    assert len(ratios.y_range.factors) == 5
    assert [item.label.value for item in latencies.legend[0].items] == ["baseline", "candidate"]


def test_a_setting_that_is_refused_is_refused_before_anything_runs(wb, folder):
    with pytest.raises(iw.FeatureRefusedError, match="no feature 'kv_cash'"):
        iw.compare({}, {"kv_cash": False}, CHAT, wb=wb, **SHORT)
    with pytest.raises(iw.FeatureRefusedError, match="exclude each other"):
        iw.compare({}, {"kv_layout": "contiguous"}, CHAT, wb=wb, **SHORT)
    with pytest.raises(iw.WorkbenchError, match="takes 6 pairs"):
        iw.compare({}, {"kv_cache": False}, CHAT, wb=wb, pairs=5)
    assert not list(folder.rglob("*.iwexp"))


def test_a_server_that_lacks_a_switch_of_the_experiment_is_not_measured_without_it(wb):
    with pytest.raises(iw.FeatureRefusedError, match="no switch warp_drive any more"):
        OwnServer(wb).prepare({"kv_cache": True, "warp_drive": True})


def test_a_request_that_the_server_refuses_is_named_and_switches_are_put_back(wb, folder):
    too_long = iw.workload("chat", source="random", prompt_tokens=5000)
    with pytest.raises(iw.WorkbenchError, match=r"requests of the run 'warm-up baseline' failed.*2,048"):
        iw.compare({"kv_cache": False}, {}, too_long, wb=wb, **SHORT)
    assert wb.features.kv_cache is True


def test_traffic_of_somebody_else_is_not_measured_but_named(wb, folder, monkeypatch):
    monkeypatch.setattr("inference_workbench.experiments.sites._BUSY_PATIENCE_S", 0.2)
    with (
        wb.traffic.start("chat", concurrency=1, ignore_eos=True, output_tokens=1000),
        pytest.raises(iw.WorkbenchError, match=r"busy with 1 requests of somebody else \(such as 'traffic-"),
    ):
        iw.compare({}, {"kv_cache": False}, CHAT, wb=wb, **SHORT)


def test_an_interrupted_comparison_restores_the_switches_and_resumes_where_it_was(wb, folder):
    path = folder / "long.iwexp"

    def interrupt(report):
        if report.done == 5:
            raise KeyboardInterrupt

    options = {**SHORT, "progress": interrupt}
    with pytest.raises(KeyboardInterrupt):
        iw.compare({}, {"prefix_cache_read": False}, CHAT, wb=wb, path=path, **options)
    assert wb.features.prefix_cache_read is True
    done = Journal.read(path).runs
    assert len(done) == 5
    resumed = iw.resume(path, wb=wb, progress=False)
    assert resumed.complete
    assert {key: resumed.journal.runs[key].started for key in done} == {key: run.started for key, run in done.items()}


def test_cancelling_returns_what_there_is_if_it_is_enough(wb, folder):
    cancel = threading.Event()

    def stop_at(count):
        return lambda report: cancel.set() if report.done == count else None

    options = {**SHORT, "pairs": 9, "cancel": cancel}
    result = iw.compare({}, {"prefix_cache_read": False}, CHAT, wb=wb, **{**options, "progress": stop_at(15)})
    assert not result.complete
    assert len(result.pairs) == 6
    assert "Interrupted: 15 of 20" in result.summary()
    cancel.clear()
    with pytest.raises(iw.CancelledError, match=r"too few.*resume\("):
        iw.compare({}, {"prefix_cache_read": False}, CHAT, wb=wb, **{**options, "progress": stop_at(3)})


def test_a_file_that_holds_another_experiment_is_not_overwritten(wb, one_by_one):
    result, _, _ = one_by_one
    with pytest.raises(iw.ExperimentFileError, match="holds another experiment"):
        iw.compare({}, {"kv_cache": False}, CHAT, wb=wb, path=result.path, **SHORT)


def test_a_line_that_a_crash_cut_off_costs_one_run(one_by_one, tmp_path):
    result, _, _ = one_by_one
    torn = tmp_path / "torn.iwexp"
    torn.write_bytes(result.path.read_bytes()[:-200])
    journal = Journal.read(torn)
    assert len(journal.runs) == len(result.journal.runs) - 1
    last = max(result.journal.runs.values(), key=lambda run: run.place)
    journal.append(last)
    assert len(Journal.read(torn).runs) == len(result.journal.runs)


@pytest.mark.parametrize(
    ("content", "message"), [("", "is no experiment"), ('{"t":"manifest","format":99}', "newer|format 99")]
)
def test_a_file_that_is_no_experiment_says_so(tmp_path, content, message):
    path = tmp_path / "x.iwexp"
    path.write_text(content)
    with pytest.raises(iw.ExperimentFileError, match=message):
        iw.open_result(path)
    with pytest.raises(iw.ExperimentFileError, match="cannot be read"):
        iw.open_result(tmp_path / "missing.iwexp")


def test_a_server_that_dies_in_mid_experiment_costs_one_run(server, wb, folder):
    killed = []

    def kill(report):
        if report.done == 4 and not killed:
            killed.append(True)
            threading.Thread(target=kill_and_restart).start()

    def kill_and_restart():
        time.sleep(0.05)
        server.kill()
        server.start()

    slow = iw.workload("chat", output_tokens=100, concurrency=2, ignore_eos=True)
    options = {**SHORT, "progress": kill}
    result = iw.compare({}, {"prefix_cache_read": False}, slow, wb=wb, **options)
    assert killed
    assert result.complete
    assert result.outputs.verdict == "identical"
