"""Clock, callbacks and checkpoints of one call of fit, whichever processes it runs in."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..density.prior import LatentPrior
from ..density.ratios import Gain
from ..errors import CheckpointError
from ..runtime.events import Callback, Event
from ..runtime.processes import Processes
from ..storage.checkpoint import UNFIT, load_state, save_state, tensors_under
from .stage import StageLearner

__all__ = ["FitRun", "SavedFit", "StageState", "restored"]

SHORTEST_STAGE = 0.5
"""Share of the last stage's seconds that must be left for another."""
MOST_KEPT = 0.2
"""Share of a time budget that the normaliser has at most."""


class FitRun:
    """Clock, callbacks and checkpoints of one call; of several processes the first alone tells, saves and loads."""

    def __init__(
        self,
        time_budget: float | None,
        callbacks: tuple[Callback, ...],
        folder: Path | None,
        processes: Processes,
    ) -> None:
        self.begun = time.monotonic()
        self.before = 0.0
        self.time_budget = time_budget
        self.end = None if time_budget is None else self.begun + time_budget
        # Until the ladder says what its normaliser takes.
        self.deadline = None if time_budget is None else self.begun + (1 - MOST_KEPT) * time_budget
        self.processes = processes
        main = processes.rank == 0
        self.callbacks, self.folder = callbacks if main else (), folder if main else None
        self.identity = ""

    def seconds(self) -> float:
        """Seconds spent on the run, earlier calls that it resumed included."""
        return self.before + time.monotonic() - self.begun

    def tell(
        self,
        kind: Literal["base", "stage", "step", "evaluate", "learned", "normalizer", "end"],
        stage: int = 0,
        step: int = 0,
        steps: int = 0,
        gain: Gain | None = None,
        message: str = "",
    ) -> None:
        """Tell every callback."""
        value, stderr = gain or Gain(math.nan, math.nan)
        for callback in self.callbacks:
            callback(Event(kind, stage, step, steps, value, stderr, self.seconds(), message))

    def tell_of(self, kind: Literal["step", "evaluate", "learned"], learner: StageLearner) -> None:
        """Tell every callback how far a stage is."""
        self.tell(kind, learner.index, learner.step, learner.settings.steps, learner.best_gain)

    def time_for(self, seconds: float) -> bool:
        """Whether there is time for another stage, after one that took ``seconds``."""
        if self.deadline is None:
            return True
        left = self.deadline - time.monotonic()
        return self.processes.first(left > SHORTEST_STAGE * seconds and left > 0)

    def keep(self, seconds: float) -> None:
        """Leave ``seconds`` of the budget to the normaliser, a fifth of it at most."""
        if self.end is not None and self.time_budget is not None:
            self.deadline = self.end - min(MOST_KEPT * self.time_budget, self.processes.first(seconds))

    def shared(
        self, prior: LatentPrior | None, base: torch.distributions.Distribution | None, device: torch.device
    ) -> LatentPrior:
        """The first process's ladder in all of them; ``base`` gives each a Distribution that it stands on."""
        if prior is not None and self.processes.count == 1:
            return prior
        told = self.processes.first(None if prior is None else SavedFit.of(prior))
        assert told is not None
        return told.prior(base, device)

    def save(self, prior: LatentPrior, learner: StageLearner | None) -> None:
        """Write everything that the next step depends on, atomically, if there is a folder."""
        if self.folder is None:
            return
        state = SavedFit.of(prior, learner)
        head = {"identity": self.identity, "seconds": self.seconds()}
        save_state(self.folder, "fit", {**head, **state.document}, state.tensors)

    def load(self) -> SavedFit | None:
        """Read where the run stood, if it was saved; raises :class:`CheckpointError` for another run's folder."""
        if self.folder is None:
            raise CheckpointError("resume=True needs the checkpoint_dir of the run to go on with")
        if not (self.folder / "config.json").exists():
            return None
        document, tensors = load_state(self.folder, "fit")
        if document.get("identity") != self.identity:
            raise CheckpointError(
                f"{self.folder}: holds a run on other latents or settings; choose another folder, or do not resume"
            )
        try:
            self.before = float(document["seconds"])
        except UNFIT:
            raise CheckpointError(f"{self.folder}: its checkpoint is damaged; start afresh in another folder") from None
        return SavedFit(document, tensors)


@dataclass(frozen=True)
class SavedFit:
    """Where a run stood."""

    document: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, prior: LatentPrior, learner: StageLearner | None = None) -> SavedFit:
        """A ladder, and where its next stage stands if that has begun; tensors on the CPU."""
        config, tensors = prior.state()
        document: dict[str, Any] = {"prior": config}
        everything = {f"prior.{k}": v for k, v in tensors.items()}
        if learner is not None:
            document["learner"], part = learner.state()
            everything.update({f"learner.{k}": v for k, v in part.items()})
        return cls(document, {k: v.detach().cpu() for k, v in everything.items()})

    def prior(self, base: torch.distributions.Distribution | None, device: torch.device) -> LatentPrior:
        """The ladder so far; ``base`` gives back a Distribution that it stands on."""
        config = self.document.get("prior")
        if not isinstance(config, dict):
            raise CheckpointError("the checkpoint holds no prior")
        return LatentPrior.from_state(
            config, tensors_under(self.tensors, "prior."), base=base, where="the checkpoint"
        ).to(device)

    def stage_state(self) -> StageState | None:
        """Where the next stage stood, if the run was saved amid one."""
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
