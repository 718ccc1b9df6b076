"""The run of one call of fit: its time budget, its callbacks and its checkpoints, in one process or several."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..density.prior import LatentPrior
from ..errors import CheckpointError
from ..runtime.events import Callback
from ..runtime.processes import Processes
from ..runtime.run import Run
from ..storage.checkpoint import UNFIT, tensors_under
from .stage import StageLearner

__all__ = ["Budget", "FitRun", "SavedFit", "StageState", "restored"]

LEAST_SHARE_OF_LAST_STAGE = 0.5
"""Share of the last stage's seconds that must be left for another stage."""
MOST_RESERVED_SHARE = 0.2
"""Share of a time budget that the normaliser has at most."""


class Budget:
    """The seconds that a call may take, less what the normaliser needs; the first process decides for all."""

    def __init__(self, seconds: float | None, processes: Processes) -> None:
        self.seconds, self._processes = seconds, processes
        self.end: float | None = None
        """When the call must end, by :func:`time.monotonic`."""
        self.deadline: float | None = None
        """When learning must end, so that the normaliser has its time."""
        if seconds is not None:
            self.end = time.monotonic() + seconds
            # Until it is known what the normaliser of the ladder takes.
            self.deadline = self.end - MOST_RESERVED_SHARE * seconds

    def time_for(self, seconds: float) -> bool:
        """Return whether there is time for another stage, after one that took ``seconds``."""
        if self.deadline is None:
            return True
        left = self.deadline - time.monotonic()
        return self._processes.first(left > LEAST_SHARE_OF_LAST_STAGE * seconds and left > 0)

    def reserve(self, seconds: float) -> None:
        """Reserve ``seconds`` for the normaliser, at most a fifth of the budget."""
        if self.end is not None and self.seconds is not None:
            self.deadline = self.end - min(MOST_RESERVED_SHARE * self.seconds, self._processes.first(seconds))


class FitRun(Run):
    """The run of one call of fit or refine, with its time budget; the first of several processes tells and saves."""

    def __init__(
        self, time_budget: float | None, callbacks: tuple[Callback, ...], folder: Path | None, processes: Processes
    ) -> None:
        super().__init__(folder if processes.rank == 0 else None, "fit", "", callbacks, processes.rank)
        self.budget = Budget(time_budget, processes)
        self.processes = processes

    def tell_of(self, kind: Literal["step", "evaluate", "learned"], learner: StageLearner) -> None:
        """Tell every callback how far a stage is."""
        self.tell(kind, learner.index, learner.step, learner.settings.steps, learner.best_gain)

    def shared(
        self, prior: LatentPrior | None, base: torch.distributions.Distribution | None, device: torch.device
    ) -> LatentPrior:
        """Return the first process's ladder in all of them; ``base`` is the Distribution that a file cannot hold."""
        if prior is not None and self.processes.count == 1:
            return prior
        told = self.processes.first(None if prior is None else SavedFit.of(prior))
        assert told is not None
        return told.prior(base, device)

    def save_fit(self, prior: LatentPrior, learner: StageLearner | None) -> None:
        """Write everything that the next step depends on, if there is a folder."""
        if self.folder is not None:
            state = SavedFit.of(prior, learner)
            self.save(state.document, state.tensors)

    def load_fit(self) -> SavedFit | None:
        """Read where the run stood, if it was saved; raises :class:`CheckpointError` for another run's folder."""
        state = self.load()
        return None if state is None else SavedFit(*state)


@dataclass(frozen=True)
class SavedFit:
    """Where a fit stood: a document that JSON can hold, and tensors by name."""

    document: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, prior: LatentPrior, learner: StageLearner | None = None) -> SavedFit:
        """Return the state of a ladder, and of its next stage if that has begun; the tensors are on the CPU."""
        config, tensors = prior.state()
        document: dict[str, Any] = {"prior": config}
        everything = {f"prior.{k}": v for k, v in tensors.items()}
        if learner is not None:
            document["learner"], part = learner.state()
            everything.update({f"learner.{k}": v for k, v in part.items()})
        return cls(document, {k: v.detach().cpu() for k, v in everything.items()})

    def prior(self, base: torch.distributions.Distribution | None, device: torch.device) -> LatentPrior:
        """Return the ladder so far; ``base`` gives back a Distribution that it stands on."""
        config = self.document.get("prior")
        if not isinstance(config, dict):
            raise CheckpointError("the checkpoint holds no prior")
        return LatentPrior.from_state(
            config, tensors_under(self.tensors, "prior."), base=base, where="the checkpoint"
        ).to(device)

    def stage_state(self) -> StageState | None:
        """Return where the next stage stood, if the run was saved in the middle of one."""
        if "learner" not in self.document:
            return None
        return self.document["learner"], tensors_under(self.tensors, "learner.")


StageState = tuple[dict[str, Any], dict[str, Tensor]]
"""What :meth:`StageLearner.state` gives."""


def restored(learner: StageLearner, state: StageState) -> None:
    """Let a learner stand where another one was saved; raises :class:`CheckpointError` for a damaged state."""
    try:
        learner.restore(*state)
    except UNFIT as error:
        raise CheckpointError(f"the checkpoint's learner is damaged ({type(error).__name__})") from None
