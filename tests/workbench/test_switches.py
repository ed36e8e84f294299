"""Switches read and thrown from Python, and as traits of the widget, in both directions."""

import time

import ipywidgets
import pytest
import traitlets

import inference_workbench as iw
from inference_workbench import panel as panel_module
from inference_workbench.switches import Switches


def eventually(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def on_server(wb, name):
    """What the server itself says, past every cache of ours."""
    return wb._call("GET", "/features")["values"][name]


def test_a_switch_is_thrown_by_attribute_by_item_and_together(wb):
    wb.features.kv_cache = False
    assert on_server(wb, "kv_cache") is False
    assert wb.features.kv_cache is False
    wb.features["max_num_seqs"] = 4
    applied = wb.features.update(kv_cache=True, max_num_seqs=8)
    assert set(applied.changed) == {"kv_cache", "max_num_seqs"}
    assert (on_server(wb, "kv_cache"), on_server(wb, "max_num_seqs")) == (True, 8)
    assert dict(wb.features)["max_num_seqs"] == 8


def test_a_switch_thrown_for_a_block_goes_back_even_after_an_error(wb):
    seen = []

    def fail():
        with wb.features.temporarily(kv_cache=False):
            seen.append(on_server(wb, "kv_cache"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [False]
    assert on_server(wb, "kv_cache") is True


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("kv_cach", True, "kv_cache"), ("kv_cache", "off", "true or false"), ("max_num_seqs", 0, "between 1 and")],
)
def test_a_refused_switch_says_why_and_changes_nothing(wb, name, value, words):
    before = dict(wb.features)
    with pytest.raises(iw.FeatureRefusedError, match=words):
        wb.features.update({name: value, "max_num_batched_tokens": 99})
    assert wb._call("GET", "/features")["values"] == before


def test_every_preset_is_accepted_and_sets_what_it_says(wb):
    before = dict(wb.features)
    for preset in wb.features.presets():
        assert preset.values
        assert wb.features.preset(preset.name).values.items() >= preset.values.items()
    with pytest.raises(iw.FeatureRefusedError, match="vllm-like"):
        wb.features.preset("vllm")
    wb.features.update(before)


def test_the_description_names_the_cost_of_every_switch(wb):
    table = wb.features.describe()
    assert table.loc["kv_cache", "cost"] == "recompute"
    assert set(table.index) == set(wb.features)


def test_a_switch_thrown_by_somebody_else_is_seen(server, wb):
    with iw.connect(uds=server.uds, token=server.token) as other:
        other.features.max_num_seqs = 3
    eventually(lambda: wb.features.max_num_seqs == 3)


@pytest.fixture
def panel(wb, tmp_path, monkeypatch):
    """A panel without its JavaScript, which the browser tests cover."""
    if not (panel_module._STATIC / "widget.js").exists():
        (tmp_path / "widget.js").write_text("export default { render() {} }")
        monkeypatch.setattr(panel_module, "_STATIC", tmp_path)
    panel = wb.panel()
    sent = []
    panel.send = lambda content, buffers=None: sent.append((content, buffers))
    panel.sent = sent
    yield panel
    panel.close()


def test_every_switch_is_a_trait_with_the_servers_value(wb, panel):
    assert {name: getattr(panel, name) for name in wb.features} == dict(wb.features)
    assert set(wb.features) <= set(panel.keys)


def test_setting_a_trait_throws_the_switch(wb, panel):
    panel.kv_cache = False
    assert on_server(wb, "kv_cache") is False


def test_news_of_an_older_switch_does_not_turn_back_a_trait_that_is_being_set(wb, panel, monkeypatch):
    panel.kv_cache = False
    seen = []
    panel.observe(lambda change: seen.append(change["new"]), "kv_cache")
    apply = Switches._apply

    def while_older_news_comes(switches, values):
        # Requests that the switch before interrupted have caught up: its event comes a second time.
        panel._server_said([wb.store.features()])
        return apply(switches, values)

    monkeypatch.setattr(Switches, "_apply", while_older_news_comes)
    panel.kv_cache = True
    assert panel.kv_cache is True
    assert wb.features.kv_cache is True
    assert seen == [True]


def test_a_switch_thrown_elsewhere_sets_the_trait_and_tells_observers(wb, panel):
    seen = []
    panel.observe(lambda change: seen.append(change["new"]), names="kv_cache")
    wb.features.kv_cache = False
    eventually(lambda: panel.kv_cache is False)
    assert seen == [False]


def test_two_panels_and_a_plain_widget_follow_each_other(wb, panel):
    other = wb.panel()
    box = ipywidgets.Checkbox(value=True)
    link = traitlets.link((box, "value"), (panel, "kv_cache"))
    box.value = False
    eventually(lambda: other.kv_cache is False)
    assert on_server(wb, "kv_cache") is False
    other.kv_cache = True
    eventually(lambda: box.value is True)
    link.unlink()
    other.close()


def test_a_trait_refuses_at_once_what_can_never_be(panel):
    with pytest.raises(traitlets.TraitError, match="between 1 and"):
        panel.max_num_seqs = 0


def test_a_trait_that_the_server_refuses_goes_back_and_says_why(wb, panel, monkeypatch):
    # A server that refuses what its description allows, as one does whose engine has just been stopped.
    wb.engine("stop")
    try:
        panel.kv_cache = False
        assert panel.kv_cache is True
        assert "stopped" in panel.message
        assert any(content["t"] == "reply" and not content["ok"] for content, _ in panel.sent)
    finally:
        wb.engine("start")
        wb.wait_ready(120)


def test_a_view_gets_a_snapshot_first_and_again_when_it_asks(wb, panel):
    def buffers():
        return [buffers[0] for content, buffers in panel.sent if content["t"] == "telemetry"]

    panel._handle_custom_msg({"t": "ready", "protocol": 1}, [])
    eventually(lambda: len(buffers()) >= 1)
    assert b"snapshot" in buffers()[0][:40]
    wb.generate("hello", max_tokens=8, stream=False)
    eventually(lambda: any(b"tokens" in raw for raw in buffers()[1:]))
    before = len(buffers())
    panel._handle_custom_msg({"t": "ready", "protocol": 1}, [])
    eventually(lambda: any(b"snapshot" in raw[:40] for raw in buffers()[before:]))


def test_a_view_can_generate_switch_cancel_and_ask_the_time(wb, panel):
    def replies(topic):
        return [content for content, _ in panel.sent if content["t"] == "reply" and content["for"] == topic]

    panel._handle_custom_msg({"t": "features", "values": {"kv_cache": False}}, [])
    eventually(lambda: replies("features"))
    assert on_server(wb, "kv_cache") is False
    panel._handle_custom_msg({"t": "generate", "body": {"prompt": "hello", "max_tokens": 8, "temperature": 0}}, [])
    eventually(lambda: replies("generate"))
    assert replies("generate")[0]["ok"]
    panel._handle_custom_msg({"t": "features", "values": {"kv_cache": 3}}, [])
    eventually(lambda: len(replies("features")) == 2)
    assert "true or false" in replies("features")[1]["message"]
    panel._handle_custom_msg({"t": "clock", "client_time": 12.5}, [])
    clock = next(content for content, _ in panel.sent if content["t"] == "clock")
    assert clock["client_time"] == 12.5
    body = {"prompt": "hello", "max_tokens": 1500, "ignore_eos": True, "request_id": "from-the-view"}
    panel._handle_custom_msg({"t": "generate", "body": body}, [])
    eventually(lambda: any(each.id == "from-the-view" and each.state == "running" for each in wb.requests()))
    panel._handle_custom_msg({"t": "cancel", "id": "from-the-view"}, [])
    eventually(lambda: len(replies("generate")) == 2)
    assert wb.status().active_requests == 0


def test_a_view_that_never_acknowledges_gets_a_bounded_number_of_frames(wb, panel, monkeypatch):
    monkeypatch.setattr(panel_module, "_UNACKNOWLEDGED", 5)
    panel._handle_custom_msg({"t": "ready", "protocol": 1}, [])
    run = wb.generate("hello", max_tokens=1200, ignore_eos=True, stream=False)
    frames = sum(content["t"] == "telemetry" for content, _ in panel.sent)
    assert run.summary().e2e_ms > 0
    assert frames <= 1 + 5 + panel_module._CREDITS
