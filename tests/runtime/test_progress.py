import io
import os
import re
import signal
import time
import warnings

import pytest

from latentprior.density.ratios import Gain
from latentprior.errors import LatentPriorWarning
from latentprior.runtime.events import Event, TrainingEvent
from latentprior.runtime.progress import (
    FitProgress,
    Stopped,
    StopSignals,
    TrainingProgress,
    note,
    part_bar,
    row_bar,
    tidy_warnings,
)

RUN = [
    Event("base", message="gmm"),
    Event("stage", 0, 0, 200, seconds=1.5),
    *(Event("step", 0, step, 200, 0.25, 0.01, seconds=2.0) for step in range(1, 101)),
    Event("evaluate", 0, 100, 200, 0.25, 0.01, seconds=2.0),
    Event("learned", 0, 100, 200, 0.25, 0.01, seconds=2.5),
    Event("stage", 1, 0, 200, seconds=2.5),
    Event("step", 1, 1, 200, seconds=2.6),
    Event("normalizer", 1, seconds=3.0),
    Event("end", 1, seconds=4.0, message="no gain"),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(file):
    with FitProgress(file) as progress:
        for event in RUN:
            progress(event)
    assert progress.begun
    return file.getvalue()


def test_a_terminal_sees_base_stages_and_normaliser():
    left = [line.rpartition("\r")[2].rstrip() for line in show(Terminal()).split("\n")]
    assert left[0] == "base gmm 1.5 s"
    assert left[1].startswith("stage 0 100%")
    assert "100/100 steps" in left[1]
    assert "gain 0.250 ±0.010" in left[1]
    assert left[2].startswith("stage 1")
    assert "left out" in left[2]
    assert left[3] == "log normaliser 1.0 s"


def test_a_file_sees_nothing():
    assert show(io.StringIO()) == ""
    file = io.StringIO()
    with row_bar(10, "scoring", file) as bar:
        bar.update(10)
    assert file.getvalue() == ""


def test_parts_of_unlike_work_are_counted_with_the_time_left():
    file = Terminal()
    with part_bar(4, "report", file) as begin:
        for name in ("reading", "samples", "planes"):
            begin(name)
    drawn = file.getvalue()
    assert "report: reading   0% |" in drawn
    assert re.search(r"report: planes +50% \|.* 2/4 \[00:00<00:00\]", drawn)
    # It goes away.
    assert drawn.endswith("\r")
    assert drawn.split("\r")[-2].strip() == ""


def test_work_without_parts_shows_a_clock_that_goes_on():
    file = Terminal()
    with part_bar(task="opening prior", file=file):
        time.sleep(2.3)
    # The thread draws once a second.
    assert "opening prior ... [00:00]" in file.getvalue()
    assert "opening prior ... [00:02]" in file.getvalue()
    file = Terminal()
    with FitProgress(file) as progress:
        progress(Event("base", message="gmm"))
        time.sleep(1.3)
    assert "base gmm ... [00:01]" in file.getvalue()


def test_a_notebook_counts_as_a_terminal():
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    with row_bar(10, "scoring", stream) as bar:
        bar.update(10)
    assert "scoring" in stream.getvalue()
    file = io.StringIO()
    with part_bar(3, "report", file) as begin:
        begin("reading")
    assert file.getvalue() == ""


def test_a_bar_follows_a_stage_that_is_learned_again_and_one_that_is_resumed():
    file = Terminal()
    with FitProgress(file) as progress:
        progress(Event("stage", 0, 100, 200))
        assert progress._bar.n == 100
        progress(Event("step", 0, 150, 200))
        progress(Event("step", 0, 1, 200))
        assert progress._bar.n == 1


def train_on(file):
    known = Gain(0.25, 0.01)
    losses = {"ratio": 0.5, "reconstruction": 0.0123}
    with TrainingProgress(file) as progress:
        for event in [
            *(TrainingEvent("autoencoder", 0, k, 30, {"divergence": 7.0}) for k in range(1, 31)),
            *(TrainingEvent("step", 0, k, 200, losses, known) for k in range(1, 101)),
            TrainingEvent("evaluate", 0, 100, 200, losses, known),
            TrainingEvent("learned", 1, 0, 200),
            # Resumed: the stage goes on at its 51st step.
            *(TrainingEvent("step", 1, k, 200, losses) for k in range(51, 61)),
            TrainingEvent("normalizer", 1),
            TrainingEvent("end", 1),
        ]:
            progress(event)
    assert progress.begun
    return file.getvalue()


def test_training_shows_a_bar_a_phase():
    left = [line.rpartition("\r")[2].rstrip() for line in train_on(Terminal()).split("\n")]
    assert left[0].startswith("autoencoder 100%")
    assert "divergence 7" in left[0]
    assert left[1].startswith("stage 0 100%")
    assert "100/100 steps" in left[1]
    assert "reconstruction 0.0123" in left[1]
    assert "gain 0.250 ±0.010" in left[1]
    assert left[2].startswith("stage 1  30%")
    assert "gain" not in left[2]
    assert left[3] == "log normaliser ..."
    assert train_on(io.StringIO()) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_at_once_and_again_at_the_next_event(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        stop.check(RUN[0])
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
        with pytest.raises(Stopped):
            stop.check(RUN[0])
    assert signal.getsignal(number) == before


def test_warnings_are_one_line(capsys):
    shown = warnings.showwarning
    with tidy_warnings():
        for _ in range(2):
            warnings.warn("the bracket\n  is wide", LatentPriorWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: the bracket is wide\n" * 2
    with tidy_warnings(quiet=True):
        warnings.warn("said by another process", LatentPriorWarning, stacklevel=1)
    assert capsys.readouterr().err == ""
    assert warnings.showwarning is shown


def test_a_note_is_one_line(capsys):
    note("error", "a\nb")
    assert capsys.readouterr().err == "error: a b\n"
