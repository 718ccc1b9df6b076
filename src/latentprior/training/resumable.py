"""What functions that learn from images share: their order, the identity of a run, and a second attempt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.images import Images
from ..errors import LearningDivergedError, LearningRetriedWarning, warn
from ..runtime.run import Run, State

__all__ = ["Learner", "epoch_rows", "images_identity", "keep_snapshot", "learn_with_one_retry", "phase_folder"]

RETRY_PACE = 0.25
"""Factor on learning rates and step sizes after learning has diverged."""


class Learner(Protocol):
    """Something that learns in steps and can go back to an earlier state."""

    pace: float
    """Factor on learning rates and step sizes: 1 until learning has diverged."""

    @property
    def place(self) -> str:
        """How far learning is, in words."""

    def state(self) -> State:
        """Return what :meth:`restore` needs."""

    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was called.

        Parameters
        ----------
        document : mapping
            The first part of the state.
        tensors : mapping of str to Tensor
            The tensors of the state.
        """


def learn_with_one_retry(run: Run, learner: Learner, learn: Callable[[], None]) -> None:
    """Learn; where that diverges, go back to the last snapshot of the run and learn on more slowly, once.

    Parameters
    ----------
    run : Run
        The run, which keeps snapshots.
    learner : Learner
        What learns.
    learn : callable
        Goes on from where the learner stands to the end.

    Raises
    ------
    LearningDivergedError
        When learning diverges a second time.

    Warns
    -----
    LearningRetriedWarning
        When learning diverges for the first time.
    """
    while True:
        try:
            learn()
            return
        except LearningDivergedError as error:
            if learner.pace < 1:
                raise
            learner.restore(*run.go_back())
            learner.pace = RETRY_PACE
            message = f"{error}; gone back to {learner.place}, to learn on at a quarter of its rates and step sizes"
            warn(message, LearningRetriedWarning)


def keep_snapshot(run: Run, learner: Learner) -> State:
    """Return the state of the learner, and keep it in memory if learning may still go back once.

    Parameters
    ----------
    run : Run
        The run.
    learner : Learner
        What learns.

    Returns
    -------
    (dict, dict)
        The document and the tensors of the state.
    """
    state = learner.state()
    if learner.pace == 1:
        run.snapshot(*state)
    return state


def images_identity(settings: object, images: Images) -> str:
    """Return a digest of settings and of a sample of the images.

    Parameters
    ----------
    settings : object
        Anything whose ``repr`` tells the settings apart.
    images : Images
        The images; at most 64 of them are read.

    Returns
    -------
    str
        Hexadecimal digits.
    """
    digest = hashlib.sha256(repr((settings, len(images), images.shape)).encode())
    sample = torch.linspace(0, len(images) - 1, min(64, len(images))).long()
    digest.update(images.batch(sample).numpy().tobytes())
    return digest.hexdigest()


def epoch_rows(n: int, first: int, size: int, order: Callable[[int], torch.Generator]) -> Tensor:
    """Return the next rows of endless epochs; an epoch holds every row once, in an order of its own.

    Parameters
    ----------
    n : int
        Number of rows in an epoch.
    first : int
        Number of rows that were taken before.
    size : int
        Number of rows to take.
    order : callable
        Gives the generator that shuffles an epoch, from the epoch's number.

    Returns
    -------
    Tensor
        Indices ``(size,)`` from 0 to n - 1.
    """
    places = torch.arange(first, first + size)
    epochs = torch.unique(places // n).tolist()
    return torch.cat([torch.randperm(n, generator=order(k))[places[places // n == k] % n] for k in epochs])


def phase_folder(folder: str | Path | None, phase: str) -> Path | None:
    """Return where a phase of a longer run saves its state.

    Parameters
    ----------
    folder : str, Path or None
        The folder of the whole run; None saves nothing.
    phase : str
        Name of the phase.

    Returns
    -------
    Path or None
        A folder in ``folder``, or None.
    """
    return None if folder is None else Path(folder) / phase
