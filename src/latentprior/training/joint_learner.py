"""The moves of joint learning: the algorithm's four parts, brought together."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..data.images import Images
from ..density import normalizers
from ..density.bases import DistributionBase
from ..density.ladder import Ladder, Stage, passed_afresh
from ..density.prior import LatentPrior
from ..models.model import LatentVariableModel
from ..runtime.processes import Processes
from ..runtime.run import State
from ..storage.checkpoint import tensors_under
from .chains import PosteriorChains, PriorChains
from .config import TrainingConfig
from .decoder_learner import DecoderLearner
from .joint_task import JointTask
from .ratio_learner import RatioLearner
from .resumable import images_identity

__all__ = ["JointLearner"]

NORMALIZER_PARTICLES = 8192
"""Fresh particles that measure the constant of a stage."""


class JointLearner:
    """A decoder and its ladder that learn together: two kinds of chains, and a learner for each network.

    Parameters
    ----------
    model : LatentVariableModel
        The model that learns.
    images : Images
        What it learns from.
    config : TrainingConfig
        The settings.
    seed : int
        Seed of all random draws.
    processes : Processes
        Those that learn one model together.
    """

    def __init__(
        self, model: LatentVariableModel, images: Images, config: TrainingConfig, seed: int, processes: Processes
    ) -> None:
        self.task = JointTask(model, images, config, seed, processes)
        self.decoder = DecoderLearner(self.task)
        self.posterior = PosteriorChains(self.task)
        self.prior = PriorChains(self.task)
        self.ratio = RatioLearner(self.task)
        self.first_stage = self.task.stage
        """Number of stages that the prior had before."""
        self.arrived = False
        """Whether the last stage added nothing."""
        shapes = [(name, tuple(p.shape)) for name, p in self.decoder.networks.module.named_parameters()]
        self.identity = images_identity((asdict(config), seed, model.sigma, shapes, self.first_stage), images)

    @property
    def pace(self) -> float:
        """Factor on learning rates and step sizes: 1 until learning has diverged."""
        return self.task.pace

    @pace.setter
    def pace(self, pace: float) -> None:
        self.task.pace = pace

    @property
    def place(self) -> str:
        """How far learning is, in words."""
        return f"step {self.task.step} of stage {self.task.stage}"

    @property
    def wants_stage(self) -> bool:
        """Whether another stage is to be learned."""
        return not self.arrived and self.task.stage - self.first_stage < self.task.config.stages

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure the gain of the stage on held-out images and as many fresh particles."""
        posterior = self.posterior.sample_held_out()
        draws = self.task.draws("held out", self.task.updates)
        self.ratio.measure(posterior, self.task.ladder.fresh_particles(len(posterior), draws).position)

    def next_stage(self) -> Stage | None:
        """Multiply the ladder by the learned ratio, and begin the next stage.

        Returns
        -------
        Stage or None
            The stage, whose log normaliser comes from particles that trained nothing. With the adaptive switch None,
            if its held-out gain is not above zero by two standard errors or it does not raise the held-out log
            density enough: the stage is left out, and the ladder has arrived.
        """
        task = self.task
        if task.step % task.config.evaluate_every:
            self.evaluate()
        adaptive = task.config.switch == "adaptive"
        if adaptive and self.ratio.gain.value <= 2 * self.ratio.gain.stderr:
            self.arrived = True
            return None
        ladder = self._longer_ladder()
        stage = ladder.stages[-1]
        votes = torch.tensor(float(stage.is_worthwhile), device=task.device)
        task.processes.average([votes])
        if adaptive and votes <= 0.5:
            self.arrived = True
            return None
        task.model.prior = task.model.prior.with_ladder(ladder)
        self._begin_stage()
        return stage

    @torch.no_grad()
    def normalize(self) -> None:
        """Give the networks their averaged weights; measure log Z from both ends at held-out posterior draws."""
        task, prior = self.task, self.task.model.prior
        self.decoder.networks.finish()
        rows = self.posterior.sample_held_out()
        total = normalizers.estimate(prior.ladder, rows, task.draws("log Z"))
        info = {**prior.info, "training": asdict(task.config), "stopped": "no gain" if self.arrived else "stages"}
        task.model.prior = prior.with_ladder(prior.ladder.corrected(total.value, total.stderr), total, info)

    def state(self) -> State:
        """Return what :meth:`restore` needs."""
        prior, prior_tensors = self.task.model.prior.state()
        decoder, decoder_tensors = self.decoder.state()
        ratio, ratio_tensors = self.ratio.state()
        document = {
            "prior": prior,
            "task": self.task.state(),
            "decoder": decoder,
            "ratio": ratio,
            "arrived": self.arrived,
        }
        parts = {
            "prior": prior_tensors,
            "decoder": decoder_tensors,
            "ratio": ratio_tensors,
            "posterior-chains": self.posterior.state(),
            "prior-chains": self.prior.state(),
        }
        return document, {f"{part}.{name}": value for part, own in parts.items() for name, value in own.items()}

    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was called.

        Parameters
        ----------
        document : mapping
            The first part of the state.
        tensors : mapping of str to Tensor
            The second part of the state.
        """
        model = self.task.model
        given = model.prior.base.distribution if isinstance(model.prior.base, DistributionBase) else None
        saved = tensors_under(tensors, "prior.")
        model.prior = LatentPrior.from_state(document["prior"], saved, base=given).to(self.task.device)
        self._begin_stage()
        self.task.restore(document["task"])
        self.decoder.restore(document["decoder"], tensors_under(tensors, "decoder."))
        self.ratio.restore(document["ratio"], tensors_under(tensors, "ratio."))
        self.posterior.restore(tensors_under(tensors, "posterior-chains."))
        self.prior.restore(tensors_under(tensors, "prior-chains."))
        self.arrived = bool(document["arrived"])

    def _begin_stage(self) -> None:
        self.task.step = 0
        self.ratio = RatioLearner(self.task)
        self.prior.restart()

    def _longer_ladder(self) -> Ladder:
        """Multiply the ladder by the ratio as it stands."""
        task, ratio = self.task, self.ratio.averaged_ratio()
        before, after = (
            ladder.fresh_particles(NORMALIZER_PARTICLES, task.draws("normalizer", ladder.length))
            for ladder in (task.ladder, task.ladder.extended(Stage(ratio)))
        )
        rows = self.posterior.sample_held_out()
        seconds = time.monotonic() - self.ratio.began
        passed = passed_afresh(before, after)
        return task.ladder.times(ratio, passed, self.ratio.gain, rows, seconds=seconds, steps=task.step)
