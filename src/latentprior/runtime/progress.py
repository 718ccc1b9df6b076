"""What a person sees of a run and can do to it: progress bars, one-line warnings, a clean stop."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from ..errors import LatentPriorWarning
from .events import Event, TrainingEvent

__all__ = ["FitProgress", "StopSignals", "Stopped", "TrainingProgress", "note", "part_bar", "row_bar", "tidy_warnings"]

STAGE_BAR = "{desc} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"


CLOCK = "{desc} ... [{elapsed}]"
PARTS = "{desc} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


def draws(file: TextIO) -> bool:
    """Whether bars are drawn on ``file``: a terminal, or the output of a notebook's cell."""
    return file.isatty() or type(file).__module__.startswith("ipykernel.")


class Stopped(BaseException):
    """Somebody asked the run to end; ``resumable`` says whether its state is on disk."""

    def __init__(self, message: str = "nothing was saved", *, resumable: bool = False) -> None:
        super().__init__(message)
        self.resumable = resumable


class StopSignals:
    """Within this context Ctrl-C and SIGTERM raise :class:`Stopped`, wherever the run is.

    :meth:`check`, a callback for :func:`latentprior.fit`, raises again at the next event, in case the signal
    met code that swallows exceptions, such as a finaliser.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        raise Stopped

    def check(self, event: object) -> None:
        """Raise :class:`Stopped` if a signal has come."""
        if self.asked:
            raise Stopped


class FitProgress:
    """A callback for :func:`latentprior.fit` that draws one bar a stage, with its held-out gain in nats.

    Nothing is drawn unless ``file`` (standard error by default) is a terminal or a notebook's. Close it, or use it
    as a context, before writing anything else to ``file``. What has no steps to count shows its clock.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = sys.stderr if file is None else file
        self.begun = False
        self._bar: tqdm[Any] | None = None
        self._task, self._since = "", 0.0
        self._ticker: _Ticker | None = None

    def __enter__(self) -> FitProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self.begun = True
        if not draws(self.file):
            return
        if event.kind == "base":
            self._line(f"base {event.message}", event.seconds)
        elif event.kind == "stage":
            self._finish(event.seconds)
            self._bar = tqdm(
                total=event.steps,
                initial=event.step,
                desc=f"stage {event.stage}",
                bar_format=STAGE_BAR,
                file=self.file,
                dynamic_ncols=True,
            )
        elif event.kind in ("step", "evaluate") and self._bar is not None:
            if math.isfinite(event.gain):
                self._bar.set_postfix_str(f"gain {event.gain:.3f} ±{event.gain_stderr:.3f}", refresh=False)
            self._bar.update(event.step - self._bar.n)
        elif event.kind == "learned" and self._bar is not None:
            self._bar.total = event.step
            self._finish(event.seconds)
        elif event.kind == "normalizer":
            if self._bar is not None and not self._task:
                self._bar.set_postfix_str("adds nothing, left out", refresh=False)
            self._line("log normaliser", event.seconds)
        elif event.kind == "end":
            self._finish(event.seconds)

    def close(self) -> None:
        """Leave what has been drawn as it stands, with the cursor on a fresh line."""
        if self._ticker is not None:
            self._ticker.stop()
        if self._bar is not None:
            self._bar.close()
        self._bar, self._task, self._ticker = None, "", None

    def _line(self, task: str, seconds: float) -> None:
        self._finish(seconds)
        self._task, self._since = task, seconds
        self._bar = tqdm(total=0, desc=task, bar_format=CLOCK, file=self.file)
        self._ticker = _Ticker(self._bar)

    def _finish(self, seconds: float) -> None:
        if self._bar is not None and self._task:
            self._bar.bar_format = "{desc}"
            self._bar.set_description_str(f"{self._task} {seconds - self._since:.1f} s", refresh=False)
        if self._bar is not None:
            self._bar.refresh()
        self.close()


class TrainingProgress:
    """A callback for the training of a generator: one bar a phase, with its losses and the stage's gain in nats.

    A phase is the autoencoder, a stage of the ladder, or the settling of the generator. Nothing is drawn unless
    ``file`` (standard error by default) is a terminal or a notebook's; close it as :class:`FitProgress`.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = sys.stderr if file is None else file
        self.begun = False
        self._bar: tqdm[Any] | None = None
        self._phase = ""

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, event: TrainingEvent) -> None:
        """Show one event."""
        self.begun = True
        if not draws(self.file):
            return
        if event.kind in ("learned", "end"):
            self._leave()
        elif event.kind == "normalizer":
            self._enter("log normaliser", 0, 0)
        elif event.losses:
            phase = f"stage {event.stage}" if event.kind in ("step", "evaluate") else event.kind
            bar = self._bar
            if bar is None or phase != self._phase or event.step < bar.n:
                bar = self._enter(phase, event.step - 1, event.steps)
            shown = [f"{name} {value:.4g}" for name, value in event.losses.items()]
            if math.isfinite(event.gain.value):
                shown.append(f"gain {event.gain.value:.3f} ±{event.gain.stderr:.3f}")
            bar.set_postfix_str(", ".join(shown), refresh=False)
            bar.update(event.step - bar.n)

    def close(self) -> None:
        """Leave what has been drawn as it stands, with the cursor on a fresh line."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._phase = None, ""

    def _enter(self, phase: str, step: int, steps: int) -> tqdm[Any]:
        self.close()
        form = STAGE_BAR if steps else "{desc} ..."
        bar = tqdm(total=steps, initial=step, desc=phase, bar_format=form, file=self.file, dynamic_ncols=True)
        self._bar, self._phase = bar, phase
        return bar

    def _leave(self) -> None:
        if self._bar is not None and self._bar.total:
            # A stage that gains no more ends before its most steps.
            self._bar.total = self._bar.n
            self._bar.refresh()
        self.close()


def row_bar(total: int, task: str, file: TextIO | None = None) -> tqdm[Any]:
    """A bar that counts rows and goes away when done; nothing unless ``file`` is a terminal or a notebook's."""
    file = sys.stderr if file is None else file
    return tqdm(
        total=total,
        desc=task,
        unit=" rows",
        unit_scale=True,
        file=file,
        leave=False,
        disable=not draws(file),
    )


@contextlib.contextmanager
def part_bar(parts: int = 0, task: str = "", file: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """A bar over ``parts`` of unlike work, or with none a clock beside ``task``; it goes away when done.

    Call what this gives with the name of each part as it begins. Nothing is drawn unless ``file`` (standard error by
    default) is a terminal or a notebook's.
    """
    file = sys.stderr if file is None else file
    with tqdm(
        total=parts, desc=task, bar_format=PARTS if parts else CLOCK, file=file, leave=False, disable=not draws(file)
    ) as bar:
        begun = False

        def begin(name: str) -> None:
            nonlocal begun
            bar.update(int(begun and parts > 0))
            begun = True
            bar.set_description_str(f"{task}: {name}" if task else name)

        ticker = _Ticker(bar)
        try:
            yield begin
        finally:
            ticker.stop()


class _Ticker:
    """Draws a bar anew every second, so that its clock goes on while nothing else happens."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, args=(bar,), name="latentprior-clock", daemon=True)
        if not bar.disable:
            self._thread.start()

    def _tick(self, bar: tqdm[Any]) -> None:
        while not self._ended.wait(1.0):
            bar.refresh()

    def stop(self) -> None:
        """End before the bar is closed: a late line would stand below it."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()


def note(kind: str, message: str) -> None:
    """Write ``kind: message`` to standard error on one line, above any bar that is being drawn."""
    tqdm.write(f"{kind}: {' '.join(message.split())}", file=sys.stderr)


@contextlib.contextmanager
def tidy_warnings(quiet: bool = False) -> Iterator[None]:
    """Within this context every warning is one line on standard error, ``warning: ...``, or none if ``quiet``."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if not quiet:
            note("warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", LatentPriorWarning)
        warnings.showwarning = show
        yield
