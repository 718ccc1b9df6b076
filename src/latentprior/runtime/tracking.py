"""Curves and pictures of a run, while it runs: as lines of JSON, for TensorBoard, or for a tracker of your own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..errors import LatentPriorError, MissingExtraError
from .events import Callback, Event

__all__ = ["JSONLinesTracker", "TensorBoardTracker", "Tracker", "tracked"]


class Tracker(Protocol):
    """An object that records a run; anything with these three methods serves."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers.

        Parameters
        ----------
        step : int
            The step, in the part of the run that the names begin with.
        values : mapping of str to float
            Numbers by name, such as ``stage-0/ratio``.
        """

    def images(self, step: int, name: str, x: Tensor) -> None:
        """Record images.

        Parameters
        ----------
        step : int
            The step.
        name : str
            What the images are.
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].
        """

    def close(self) -> None:
        """Write what was not written yet, and end."""


class JSONLinesTracker:
    """A tracker that appends one JSON object a line to a file, such as ``{"step": 10, "stage-0/ratio": 1.2}``.

    Numbers that are not finite become null. Images are left out.

    Parameters
    ----------
    file : str or Path
        The file; folders above it are made.

    Raises
    ------
    LatentPriorError
        Where the file cannot be written.
    """

    def __init__(self, file: str | Path) -> None:
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            # Every line is written at once, so that a run that is killed leaves them.
            self._file = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise LatentPriorError(f"{file}: cannot write the log there ({error.strerror})") from None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line.

        Parameters
        ----------
        step : int
            The step, in the part of the run that the names begin with.
        values : mapping of str to float
            Numbers by name, such as ``stage-0/ratio``.
        """
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")

    def images(self, step: int, name: str, x: Tensor) -> None:
        """Do nothing: lines are for numbers.

        Parameters
        ----------
        step : int
            The step.
        name : str
            What the images are.
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].
        """

    def close(self) -> None:
        """Close the file, if it is open."""
        self._file.close()


class TensorBoardTracker:
    """A tracker that writes event files for TensorBoard (extra ``tracking``).

    Parameters
    ----------
    folder : str or Path
        Where the files go.

    Raises
    ------
    MissingExtraError
        Without tensorboard.
    LatentPriorError
        Where the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("logging to TensorBoard", "tracking") from None
        try:
            self._writer: Any = SummaryWriter(str(folder))
        except OSError as error:
            raise LatentPriorError(f"{folder}: cannot write the log there ({error.strerror})") from None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve.

        Parameters
        ----------
        step : int
            The step, in the part of the run that the names begin with.
        values : mapping of str to float
            Numbers by name, such as ``stage-0/ratio``.
        """
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, x: Tensor) -> None:
        """Add a grid of images.

        Parameters
        ----------
        step : int
            The step.
        name : str
            What the images are.
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].
        """
        self._writer.add_images(name, x.detach().float().cpu().clamp(-1, 1) / 2 + 0.5, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def tracked(tracker: Tracker, *, every: int = 10) -> Callback:
    """Return a callback that writes the curves of a run to a tracker.

    Parameters
    ----------
    tracker : Tracker
        Where the curves go.
    every : int
        Losses are written at every step that this number divides. Gains are written at every evaluation.

    Returns
    -------
    callable
        A callback for :func:`latentprior.fit`, :func:`latentprior.train` and every other function that learns.

    Raises
    ------
    LatentPriorError
        For an ``every`` below 1.

    Notes
    -----
    Each part of a run has curves of its own over its own steps, so that a resumed run continues them at the right
    place: ``autoencoder``, ``stage-K`` and ``settle`` while a decoder is learned, ``prior-stage-K`` in
    :func:`latentprior.fit`, and ``ladder``, the gain of each stage that joined. Gains are in nats.
    """
    if every < 1:
        raise LatentPriorError(f"every must be 1 or more, got {every}")

    def write(event: Event) -> None:
        gains = {"gain": event.gain, "gain_stderr": event.gain_stderr}
        stage = f"stage-{event.stage}" if event.losses else f"prior-stage-{event.stage}"
        if event.kind == "learned":
            _write(tracker, "ladder", event.stage, gains)
        elif event.kind == "evaluate":
            _write(tracker, stage, event.step, {**event.losses, **gains})
        elif event.losses and event.step % every == 0:
            _write(tracker, stage if event.kind == "step" else event.kind, event.step, event.losses)

    return write


def _write(tracker: Tracker, curve: str, step: int, values: Mapping[str, float]) -> None:
    tracker.scalars(step, {f"{curve}/{name}": value for name, value in values.items()})
