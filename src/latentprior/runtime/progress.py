"""What a person sees of a run: lines of progress and one-line warnings."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import LatentPriorWarning
from .events import Event

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Progress", "WorkBar", "note", "tidy_warnings", "work_bar"]

BAR_WIDTH_CHARACTERS = 24
REFRESHES_PER_SECOND = 4
"""As often as a clock of seconds needs at least; each refresh takes about a millisecond from the learning."""


class _Line:
    """One line that shows how far a piece of work is, with a bar if its amount is known, else with a clock alone."""

    def __init__(
        self,
        console: Console | None,
        name: str,
        total: int,
        *,
        completed: int = 0,
        stays: bool = True,
        unit: str = "",
        shown: bool = True,
    ) -> None:
        from rich import progress as rich
        from rich.console import Console
        from rich.table import Column

        # FORCE_COLOR and the like make rich take a file for a terminal, unless it is told.
        console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
        columns: list[rich.ProgressColumn] = [rich.TextColumn("{task.description}", markup=False)]
        if total:
            columns += [rich.BarColumn(BAR_WIDTH_CHARACTERS)]
            columns += [rich.TextColumn("{task.completed:,.0f}/{task.total:,.0f}{task.fields[unit]}", markup=False)]
        columns += [rich.TimeElapsedColumn()]
        if total:
            columns += [rich.TextColumn("<"), rich.TimeRemainingColumn()]
        # On a narrow terminal the remark is cut, and not the numbers before it.
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        columns += [rich.TextColumn("{task.fields[remark]}", markup=False, table_column=rest)]
        self.name = name
        self._rich = rich.Progress(
            *columns,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=not stays,
            expand=True,
            # What is printed to a pipe must not appear on the terminal instead.
            redirect_stdout=sys.stdout.isatty(),
            disable=not (shown and (console.is_terminal or console.is_jupyter)),
        )
        self._task = self._rich.add_task(name, total=total or None, completed=completed, remark="", unit=unit)
        # Older releases of rich end even a line that is not drawn by an empty one, so that it must not be stopped.
        self._close: Callable[[], object] = lambda: None
        if not self._rich.disable:
            self._rich.start()
            # An exception may leave the line open, and with it a terminal without a cursor.
            self._close = weakref.finalize(self, self._rich.stop)

    def show(self, **changes: Any) -> None:
        self._rich.update(self._task, **changes)

    def advance(self, amount: int) -> None:
        self._rich.advance(self._task, amount)

    def end_here(self) -> None:
        """Show the work as complete, although it took fewer steps than it might have taken."""
        completed = self._rich.tasks[0].completed
        self.show(total=completed or None)

    def close(self) -> None:
        self._close()


class Progress:
    """A callback that draws one line for each part of a run: its bar or clock, its losses and its held-out gain.

    A part is the base density, the autoencoder, a stage of the ladder, the settling of the decoder, or the log
    normaliser. Lines are drawn on standard error, and only if that is a terminal or the output of a notebook's cell
    (a notebook also needs the package ipywidgets).

    Parameters
    ----------
    console : rich.console.Console, optional
        Another place to draw on.

    Notes
    -----
    Use it as a context, or call :meth:`close`, so that the last line is left in order when the run ends by an
    exception. One object serves all parts of a run, and several runs one after the other.

    Examples
    --------
    >>> import latentprior as lp, torch
    >>> z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    >>> with Progress() as progress:
    ...     prior = lp.fit(z, base="normal", max_stages=0, callbacks=[progress])
    >>> progress.begun
    True
    """

    def __init__(self, console: Console | None = None) -> None:
        self.begun = False
        """Whether an event has arrived yet."""
        self._console = console
        self._line: _Line | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Show one event.

        Parameters
        ----------
        event : Event
            What a function that learns tells its callbacks.
        """
        self.begun = True
        if event.kind == "base":
            self._open(f"base {event.message}")
        elif event.kind == "normalizer":
            self._leave_stage_out()
            self._open("log normaliser")
        elif event.kind == "learned":
            if self._line is not None:
                self._line.end_here()
            self.close()
        elif event.kind == "end":
            self._leave_stage_out()
            self.close()
        else:
            self._follow(event)

    def close(self) -> None:
        """Leave what has been drawn as it stands, with the cursor on a fresh line."""
        if self._line is not None:
            self._line.close()
        self._line = None

    def _open(self, name: str, steps: int = 0, step: int = 0) -> _Line:
        self.close()
        self._line = _Line(self._console, name, steps, completed=step, unit=" steps")
        return self._line

    def _follow(self, event: Event) -> None:
        """Show how far a part of the run is."""
        name = f"stage {event.stage}" if event.kind in ("stage", "step", "evaluate") else event.kind
        line = self._line
        if line is None or line.name != name or event.kind == "stage":
            if event.kind == "settle":
                self._leave_stage_out()
            line = self._open(name, event.steps, event.step if event.kind == "stage" else event.step - 1)
        remarks = [f"{loss} {value:.4g}" for loss, value in event.losses.items()]
        if math.isfinite(event.gain):
            remarks.append(f"gain {event.gain:.3f} ±{event.gain_stderr:.3f}")
        line.show(completed=event.step, remark=", ".join(remarks))

    def _leave_stage_out(self) -> None:
        """Say so of a stage that is still open when something else begins: it has not joined the ladder."""
        if self._line is not None and self._line.name.startswith("stage "):
            self._line.show(remark="adds nothing, left out")


class WorkBar:
    """A piece of work that :func:`work_bar` shows.

    Parameters
    ----------
    task : str
        What is being done.
    line : object
        The line that shows it.
    """

    def __init__(self, task: str, line: _Line) -> None:
        self._task, self._line, self._begun = task, line, False

    def update(self, amount: int) -> None:
        """Count more of the work as done.

        Parameters
        ----------
        amount : int
            How much was done since the last call.
        """
        self._line.advance(amount)

    def begin(self, part: str) -> None:
        """Show which part of the work begins now, and count the part before it as done.

        Parameters
        ----------
        part : str
            Name of the part.
        """
        self._line.advance(int(self._begun))
        self._begun = True
        self._line.show(description=f"{self._task}: {part}")


@contextlib.contextmanager
def work_bar(task: str, total: int = 0, *, shown: bool = True, console: Console | None = None) -> Iterator[WorkBar]:
    """Show how far a piece of work is, on a line that disappears when the work is done.

    Parameters
    ----------
    task : str
        What is being done.
    total : int
        How many rows, or parts, there are to do. Where there is nothing to count, 0: a clock runs beside the task.
    shown : bool
        Whether anything is drawn.
    console : rich.console.Console, optional
        Where to draw. By default standard error, if it is a terminal or the output of a notebook's cell.

    Yields
    ------
    WorkBar
        The object that counts: call its ``update`` with numbers of rows, or its ``begin`` with the names of parts.
    """
    line = _Line(console, task, total, stays=False, shown=shown)
    try:
        yield WorkBar(task, line)
    finally:
        line.close()


def note(kind: str, message: str) -> None:
    """Write ``kind: message`` to standard error on one line, above any line of progress that is being drawn.

    Parameters
    ----------
    kind : str
        Such as ``"warning"``.
    message : str
        Any text; line breaks in it become spaces.
    """
    print(f"{kind}: {' '.join(message.split())}", file=sys.stderr)


@contextlib.contextmanager
def tidy_warnings(quiet: bool = False) -> Iterator[None]:
    """Within this context every warning is one line on standard error, ``warning: ...``.

    Parameters
    ----------
    quiet : bool
        Whether nothing is written at all.
    """

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if not quiet:
            note("warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", LatentPriorWarning)
        warnings.showwarning = show
        yield
