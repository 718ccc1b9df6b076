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

__all__ = ["Learner", "epoch_rows", "images_identity", "keep_snapshot", "learn_with_one_retry", "phase_folder", "start"]

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
        """Stand where :meth:`state` was called."""


def learn_with_one_retry(run: Run, learner: Learner, learn: Callable[[], None]) -> None:
    """Learn; where that diverges, go back to the last snapshot of the run and learn on more slowly, once.

    ``learn`` goes on from where the learner stands to the end. Going back warns with :class:`LearningRetriedWarning`.
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


def start(run: Run, learner: Learner, *, resume: bool) -> None:
    """Let the learner stand where its run was saved, if it is to be resumed."""
    saved = run.load() if resume else None
    if saved is not None:
        with run.restoring():
            learner.restore(*saved)
    keep_snapshot(run, learner)


def keep_snapshot(run: Run, learner: Learner) -> State:
    """Return the state of the learner, and keep it in memory if learning may still go back once."""
    state = learner.state()
    if learner.pace == 1:
        run.snapshot(*state)
    return state


def images_identity(settings: object, images: Images) -> str:
    """Return a digest of what the ``repr`` of the settings tells apart, and of 64 images at most."""
    digest = hashlib.sha256(repr((settings, len(images), images.shape)).encode())
    sample = torch.linspace(0, len(images) - 1, min(64, len(images))).long()
    digest.update(images.batch(sample).numpy().tobytes())
    return digest.hexdigest()


def epoch_rows(n: int, first: int, size: int, order: Callable[[int], torch.Generator]) -> Tensor:
    """Return the indices of the next ``size`` rows of endless epochs, of which ``first`` were taken before.

    An epoch holds each of the ``n`` rows once, in the order that the generator ``order(epoch)`` draws.
    """
    places = torch.arange(first, first + size)
    epochs = torch.unique(places // n).tolist()
    return torch.cat([torch.randperm(n, generator=order(k))[places[places // n == k] % n] for k in epochs])


def phase_folder(folder: str | Path | None, phase: str) -> Path | None:
    """Return where a phase of a longer run saves its state; None saves nothing."""
    return None if folder is None else Path(folder) / phase
