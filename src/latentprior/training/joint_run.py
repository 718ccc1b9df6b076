"""Clock, callbacks and checkpoints of a joint training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..density.bases import DistributionBase
from ..density.prior import LatentPrior
from ..density.ratios import Gain
from ..errors import CheckpointError
from ..runtime.events import TrainingEvent
from ..storage.checkpoint import UNFIT, load_state, save_state, tensors_under
from .resumable import foreign, images_identity, network_state, restore_network

if TYPE_CHECKING:
    from .joint_learner import JointLearner

__all__ = ["TrainingRun"]


class TrainingRun:
    """What surrounds a :class:`~latentprior.training.joint_learner.JointLearner`: its state is saved and resumed."""

    def __init__(
        self, learner: JointLearner, folder: str | Path | None, callbacks: Iterable[Callable[[Any], None]]
    ) -> None:
        self.learner = learner
        self.folder = None if folder is None else Path(folder)
        self.callbacks = tuple(callbacks)
        self.begun, self.before = time.monotonic(), 0.0
        self.identity = _identity(learner)
        self._kept: tuple[dict[str, Any], dict[str, Tensor]] | None = None

    def seconds(self) -> float:
        """Seconds spent on the run, earlier calls that it resumed included."""
        return self.before + time.monotonic() - self.begun

    def tell(self, kind: str, losses: Mapping[str, float]) -> None:
        """Tell every callback, in the main process."""
        learner = self.learner
        if learner.processes.rank != 0:
            return
        settling = kind == "settle"
        event = TrainingEvent(
            kind,
            learner.stage,
            learner.settled if settling else learner.step,
            learner.config.settle_steps if settling else learner.config.steps,
            losses,
            learner.gain,
            self.seconds(),
            learner.model,
        )
        for callback in self.callbacks:
            callback(event)

    def save(self) -> None:
        """Write everything that the next step depends on, atomically, in the main process."""
        learner = self.learner
        self.keep()
        if self.folder is not None and learner.processes.rank == 0:
            document, tensors = _state(learner)
            document |= {"identity": self.identity, "seconds": self.seconds()}
            save_state(self.folder, "training", document, tensors)
        learner.processes.wait()

    def keep(self) -> None:
        """Remember the state in memory, for :meth:`go_back`; nothing once learning has diverged, as it may but once."""
        self._kept = None
        if self.learner.pace == 1:
            document, tensors = _state(self.learner)
            self._kept = document, {name: value.detach().clone() for name, value in tensors.items()}

    def go_back(self) -> None:
        """Stand where :meth:`keep` was called last."""
        assert self._kept is not None
        _restore(self.learner, *self._kept)

    def load(self) -> None:
        """Stand where the folder's run was saved; a folder without one begins afresh.

        Raises :class:`CheckpointError` for a run on other images or settings, or a damaged one.
        """
        if self.folder is None:
            raise CheckpointError("resume=True needs the checkpoint_dir of the run to go on with")
        if not (self.folder / "config.json").exists():
            return
        document, tensors = load_state(self.folder, "training")
        if document.get("identity") != self.identity:
            raise foreign(self.folder)
        try:
            self.before = float(document["seconds"])
            _restore(self.learner, document, tensors)
        except UNFIT as error:
            raise CheckpointError(f"{self.folder}: its checkpoint is damaged ({type(error).__name__})") from None


def _state(learner: JointLearner) -> tuple[dict[str, Any], dict[str, Tensor]]:
    prior, tensors = learner.model.prior.state()
    everything = {f"prior.{k}": v for k, v in tensors.items()}
    for part in _trained(learner):
        everything.update(network_state(*part))
    for name in ("latents", "chains", "pool"):
        kept = getattr(learner, name)
        if kept is not None and kept.numel():
            everything[f"kept.{name}"] = kept
    counters = {k: getattr(learner, k) for k in ("step", "updates", "settled", "waited", "arrived")}
    best = learner.best_gain if learner.waited or learner.step else None
    document = {
        "prior": prior,
        "counters": counters,
        "error": learner.error,
        "pace": learner.pace,
        "sigma": learner.model.sigma,
        "gain": None if learner.gain.value != learner.gain.value else list(learner.gain),
        "best_gain": best if best is not None and best > -float("inf") else None,
    }
    return document, everything


@torch.no_grad()
def _restore(learner: JointLearner, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    device = learner.device
    saved = tensors_under(tensors, "prior.")
    base = learner.model.prior.base
    given = base.distribution if isinstance(base, DistributionBase) else None
    learner.model.prior = LatentPrior.from_state(document["prior"], saved, base=given).to(device)
    learner._begin_stage()
    for part in _trained(learner):
        restore_network(*part, tensors)
    # Chains and pool are the main process's: shared, they would be the same particles twice.
    for name in ("latents", "chains", "pool") if learner.processes.rank == 0 else ("latents",):
        if f"kept.{name}" in tensors:
            kept = tensors[f"kept.{name}"].clone()
            setattr(learner, name, kept if name == "latents" else kept.to(device))
    for name, value in document["counters"].items():
        setattr(learner, name, bool(value) if name == "arrived" else int(value))
    learner.pace = float(document.get("pace", 1.0))
    learner.error, learner.model.sigma = float(document["error"]), float(document["sigma"])
    learner.gain = Gain(float("nan"), float("nan")) if document["gain"] is None else Gain(*document["gain"])
    learner.best_gain = -float("inf") if document["best_gain"] is None else float(document["best_gain"])


def _trained(learner: JointLearner) -> list[tuple[str, torch.nn.Module, dict[str, Tensor], torch.optim.Optimizer]]:
    return [
        ("networks", learner.networks, learner.average, learner.optimizer),
        ("ratio", learner.ratio, learner.ratio_average, learner.ratio_optimizer),
    ]


def _identity(learner: JointLearner) -> str:
    """A digest of everything that decides the outcome: settings, networks' shapes, and a sample of the images."""
    shapes = [(k, tuple(v.shape)) for k, v in learner.networks.named_parameters()]
    settings = (asdict(learner.config), learner.seed, learner.model.sigma, shapes, learner.first)
    return images_identity(settings, learner.images)
