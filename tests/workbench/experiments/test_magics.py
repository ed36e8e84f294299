"""``%%infer`` in a real IPython shell, against a real server."""

import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell


@pytest.fixture
def shell(wb):
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "inference_workbench")
    shell.user_ns["wb"] = wb
    return shell


def test_a_cell_generates_under_its_switches_and_keeps_the_run(shell, wb, capsys):
    shell.run_cell_magic("infer", "-n 6 --set kv_cache=off --set max_num_seqs=3 --as run", "Why is the sky blue?\n")
    run = shell.user_ns["run"]
    assert run.text.strip() in capsys.readouterr().out
    assert len(run.tokens) <= 6
    (epoch,) = run.summary().epochs
    values = next(event.values for event in wb.store.switches() if event.epoch == epoch)
    assert (values["kv_cache"], values["max_num_seqs"]) == (False, 3)
    assert (wb.features.kv_cache, wb.features.max_num_seqs) == (True, 32)
    assert wb.last_run is run


def test_raw_goes_on_with_the_text_instead_of_answering_it(shell):
    shell.run_cell_magic("infer", "-n 1 --as chat", "Hello")
    shell.run_cell_magic("infer", "-n 1 --raw --as plain", "Hello")
    assert shell.user_ns["plain"].request.prompt_tokens < shell.user_ns["chat"].request.prompt_tokens


@pytest.mark.parametrize(
    ("line", "cell", "message"),
    [
        ("--set kv_cash=off", "Hi", "no feature 'kv_cash'"),
        ("--set kv_cache", "Hi", "sets nothing"),
        ("--tokens 3", "Hi", "unrecognized arguments"),
        ("", "  ", "cell is empty"),
    ],
)
def test_a_mistake_is_named_in_a_line(shell, line, cell, message):
    with pytest.raises(UsageError, match=message):
        shell.run_cell_magic("infer", line, cell)
