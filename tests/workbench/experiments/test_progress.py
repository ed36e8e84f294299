"""Progress says how far it is and how long the rest takes, and its button cancels."""

import threading

import pytest

from inference_workbench.experiments.progress import (
    NotebookProgress,
    Report,
    Silent,
    TerminalProgress,
    duration,
    progress_for,
)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3599.6, "1 h 00 min"), (7260, "2 h 01 min")]
)
def test_times_are_written_in_a_persons_units(seconds, words):
    assert duration(seconds) == words


def test_a_terminal_shows_how_far_it_is_and_the_last_words(capfd):
    progress = TerminalProgress("compare")
    progress.report(Report(done=3, total=12, name="pair 1 candidate", left_s=75))
    progress.requests(1, 2)
    progress.close("12 runs, kept in x.iwexp")
    shown = capfd.readouterr().err
    assert "3 of 12 runs" in shown
    assert "1 min 15 s left" in shown
    assert shown.rstrip().endswith("12 runs, kept in x.iwexp")


def test_a_notebook_has_a_bar_and_a_button_that_cancels():
    cancel = threading.Event()
    progress = NotebookProgress("compare", cancel)
    progress.report(Report(done=3, total=12, name="pair 1 candidate", left_s=None))
    assert (progress._bar.value, progress._bar.max) == (3, 12)
    assert progress._words.value == "3 of 12 runs · pair 1 candidate"
    assert not cancel.is_set()
    progress._button.click()
    assert cancel.is_set()
    progress.close("done")
    assert progress._button.layout.display == "none"


def test_where_nobody_looks_nothing_is_shown_and_a_function_is_called():
    assert isinstance(progress_for(wanted=False, title="x", cancel=threading.Event()), Silent)
    seen = []
    report = Report(done=1, total=2, name="a", left_s=None)
    progress_for(seen.append, "x", threading.Event()).report(report)
    assert seen == [report]
