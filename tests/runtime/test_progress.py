import io
import re
import sys
import warnings

import pytest
from rich.console import Console

from latentprior.errors import LatentPriorWarning
from latentprior.runtime.events import Event
from latentprior.runtime.progress import Progress, note, tidy_warnings, work_bar
from latentprior.runtime.stopping import Stopped

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


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def console(clock, monkeypatch):
    """A terminal of 100 characters a line, without colours."""
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100, get_time=clock)


def drawn(console):
    """What a terminal shows in the end: the last state of every line."""
    text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", console.file.getvalue())
    return [line.rpartition("\r")[2].strip() for line in text.split("\n")]


def follow(progress, events, clock=None):
    for event in events:
        if clock is not None:
            clock.now = event.seconds
        progress(event)


def test_a_terminal_sees_base_stages_and_normaliser(console, clock):
    with Progress(console) as progress:
        follow(progress, RUN, clock)
    assert progress.begun
    base, first, second, normaliser = drawn(console)[:4]
    assert base == "base gmm 0:00:01"
    assert first.startswith("stage 0 ━")
    assert "100/100 steps" in first
    assert "gain 0.250 ±0.010" in first
    assert second.startswith("stage 1 ")
    assert "1/200 steps" in second
    assert "left out" in second
    assert normaliser == "log normaliser 0:00:01"


def test_a_file_sees_nothing(clock, monkeypatch):
    # Some continuous integration sets it, and rich would then draw into its logs.
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with Progress() as progress, work_bar("scoring", 10) as bar:
        follow(progress, RUN)
        bar.update(10)
    assert progress.begun
    assert file.getvalue() == ""


def test_parts_of_unlike_work_are_counted(console):
    with work_bar("report", 4, console=console) as bar:
        for name in ("reading", "samples", "planes"):
            bar.begin(name)
            bar._line._rich.refresh()
    assert re.search(r"report: reading +0/4 ", console.file.getvalue())
    assert re.search(r"report: planes ━+ +2/4 ", console.file.getvalue())
    # It disappears when the work is done.
    assert drawn(console)[-1] == ""


def test_a_narrow_terminal_cuts_the_remark(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    narrow = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    with Progress(narrow) as progress:
        progress(Event("step", 0, 100, 3000, 0.25, 0.01, losses={"reconstruction": 0.0123, "encoder": 3.25}))
    line = drawn(narrow)[0]
    assert "100/3,000 steps" in line
    assert line.endswith("…")


def test_rows_are_counted_unless_nothing_is_to_be_shown(console):
    for shown in (False, True):
        with work_bar("scoring", 2000, shown=shown, console=console) as bar:
            bar.update(1500)
        assert ("1,500/2,000" in console.file.getvalue()) == shown


def test_work_without_parts_shows_a_clock_that_goes_on(console, clock):
    with work_bar("opening [/prior]", console=console) as bar:
        clock.now = 2.3
        bar._line._rich.refresh()
    assert "opening [/prior] 0:00:00" in console.file.getvalue()
    assert "opening [/prior] 0:00:02" in console.file.getvalue()


def test_a_notebook_counts_as_a_terminal(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    notebook = Console(file=io.StringIO(), force_jupyter=True)
    with pytest.warns(UserWarning, match="ipywidgets"), work_bar("scoring", 10, console=notebook) as bar:
        bar.update(10)


def test_a_line_follows_a_stage_that_is_learned_again_and_one_that_is_resumed(console):
    with Progress(console) as progress:
        seen = []
        for event in (Event("stage", 0, 100, 200), Event("step", 0, 150, 200), Event("step", 0, 1, 200)):
            progress(event)
            seen.append(progress._line._rich.tasks[0].completed)
    assert seen == [100, 150, 1]


def test_an_exception_leaves_the_terminal_in_order(console):
    stderr = sys.stderr

    def stop(event):
        raise Stopped

    with pytest.raises(Stopped), Progress(console) as progress:
        follow(lambda event: (progress(event), stop(event)), RUN)
    assert sys.stderr is stderr
    assert console.file.getvalue().endswith("\x1b[?25h")


def test_training_shows_a_line_for_each_part(console):
    losses = {"ratio": 0.5, "reconstruction": 0.0123}
    gain = {"gain": 0.25, "gain_stderr": 0.01}
    with Progress(console) as progress:
        follow(
            progress,
            [
                *(Event("autoencoder", 0, k, 30, losses={"divergence": 7.0}) for k in range(1, 31)),
                *(Event("step", 0, k, 200, **gain, losses=losses) for k in range(1, 101)),
                Event("evaluate", 0, 100, 200, **gain, losses=losses),
                Event("learned", 0, 100, 200),
                # Resumed: the stage goes on at its 51st step.
                *(Event("step", 1, k, 200, losses=losses) for k in range(51, 61)),
                *(Event("settle", 1, k, 40, losses=losses) for k in range(1, 41)),
                Event("normalizer", 1),
                Event("end", 1),
            ],
        )
    autoencoder, first, second, settling, normaliser = drawn(console)[:5]
    assert "30/30 steps" in autoencoder
    assert "divergence 7" in autoencoder
    assert first.startswith("stage 0 ━")
    assert "100/100 steps" in first
    assert "gain" not in second
    assert second.startswith("stage 1 ")
    assert "60/200 steps" in second
    assert second.endswith("adds nothing, left out")
    assert "settle" in settling
    assert "40/40 steps" in settling
    assert normaliser.startswith("log normaliser")


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
