"""The latent space energy-based prior, learned by maximum likelihood with short-run Langevin dynamics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import Images
from ..density.ladder import Pass, Stage
from ..density.ratios import gain
from ..density.sampling.resampling import LogMean
from ..errors import LearningDivergedError
from ..models.model import LatentVariableModel
from ..runtime.events import Callback
from ..runtime.processes import SingleProcess
from ..runtime.run import Run
from ..runtime.seeding import derived_generator
from ..training.config import TrainingConfig
from ..training.joint import joint_run, save, start
from ..training.joint_learner import JointLearner
from .vae import start_over

__all__ = ["LEBMConfig", "contrastive_loss", "train_lebm"]

BOUND_NATS = 1e6
"""Bound of the energy; the paper's has none. So far below it, tanh is the identity to the last bits of a float."""
AVERAGE_WARM_UP = 9
"""The moving average takes 9 / (t + 9) or more of the weights of step t, so that it forgets the first ones."""


@dataclass(frozen=True)
class LEBMConfig:
    """How the decoder and the energy are learned together; the paper's numbers but for ``average`` and ``steps``.

    Parameters
    ----------
    steps : int
        Steps of both networks.
    batch_size : int
        Images of a step, and as many draws of the prior.
    posterior_steps, prior_steps : int
        Steps of a chain of the posterior, and of the prior.
    posterior_step_size, prior_step_size : float
        Sizes of these steps.
    width : int
        Units of a hidden layer of the energy.
    depth : int
        Hidden layers of the energy.
    learning_rate : float
        The decoder's rate in the first epoch (Adam, betas 0.5 and 0.999).
    energy_learning_rate : float
        The energy's rate in the first epoch.
    decay : float
        Factor on both learning rates every epoch.
    average : float
        Decay of the moving averages of weights that are returned.
    held_out : int
        Images that train nothing; the log normaliser is bracketed at their latents.
    """

    steps: int = 6000
    batch_size: int = 100
    posterior_steps: int = 20
    posterior_step_size: float = 0.1
    prior_steps: int = 60
    prior_step_size: float = 0.4
    width: int = 200
    depth: int = 2
    learning_rate: float = 1e-4
    energy_learning_rate: float = 2e-5
    decay: float = 0.998
    average: float = 0.999
    held_out: int = 500

    def training(self) -> TrainingConfig:
        """The joint learner's settings."""
        return TrainingConfig(
            stages=0,
            steps=self.steps,
            batch_size=self.batch_size,
            posterior_steps=self.posterior_steps,
            posterior_step_size=self.posterior_step_size,
            prior_steps=self.prior_steps,
            prior_step_size=self.prior_step_size,
            ratio_width=self.width,
            ratio_depth=self.depth,
            bound=BOUND_NATS,
            learning_rate=self.learning_rate,
            ratio_learning_rate=self.energy_learning_rate,
            decay=self.decay,
            average=self.average,
            held_out=self.held_out,
        )


def contrastive_loss(f_posterior: Tensor, f_prior: Tensor) -> Tensor:
    r"""The loss :math:`\mathbb E_{p(z)} f - \mathbb E_{p(z \mid x)} f`, whose gradient is that of minus log likelihood.

    Returns a scalar in nats.

    Parameters
    ----------
    f_posterior, f_prior : Tensor
        The energy at draws of the posterior ``(n,)`` and of the prior ``(m,)``, which are held fixed.

    Notes
    -----
    Source: Pang et al. (2020), section 2.
    """
    return f_prior.mean() - f_posterior.mean()


def train_lebm(
    model: LatentVariableModel,
    images: Images,
    config: LEBMConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
) -> LatentVariableModel:
    r"""Learn the decoder with :math:`p_\alpha(z) = e^{f_\alpha(z)} N(z; 0, I) / Z` by maximum likelihood.

    Every step draws :math:`z^+ \sim p_\theta(x \mid z)\,p_\alpha(z)` and :math:`z^- \sim p_\alpha(z)` by short-run
    Langevin dynamics from :math:`N(0, I)` with f as it stands; f ascends
    :math:`\mathbb E f(z^+) - \mathbb E f(z^-)`, the decoder :math:`\log p_\theta(x \mid z^+)`.

    Returns ``model`` without its encoder, which the method does not have. The prior is a ladder of one stage, f; its
    log normaliser is estimated when f is learned, with an error. Short-run dynamics need not follow :math:`p_\alpha`;
    they are the sampler of the model, as in the paper.

    Parameters
    ----------
    model, images
        As in :func:`~latentprior.baselines.train_vae`; an encoder is not needed.
    config : LEBMConfig, optional
        Settings of the learning.
    seed : int
        Seed of all random numbers.
    checkpoint_dir : str or Path, optional
        Folder that the state is saved in.
    resume : bool
        Whether to go on from the state in ``checkpoint_dir``, to the same weights.
    callbacks : iterable of callable
        Called after every step with an event of kind ``step``, whose losses are ``energy`` (nats) and
        ``reconstruction`` (squared error a pixel).

    Raises
    ------
    LearningDivergedError
        When f is not finite.

    Warns
    -----
    NormalizerBracketWarning
        Where the error of the log normaliser is large.

    Notes
    -----
    Source: Pang, Han, Nijkamp, Zhu and Wu (NeurIPS 2020), section 2 and algorithm 1.
    """
    config = config or LEBMConfig()
    model.encoder = None
    start_over(model)
    learner = JointLearner(model, images, config.training(), seed, SingleProcess(model.device))
    run = joint_run(learner, checkpoint_dir, callbacks)
    with run.lock():
        start(run, learner, resume=resume)
        _learn(run, learner, config)
        _conclude(learner, config, seed, run.seconds())
    return model


def _learn(run: Run, learner: JointLearner, config: LEBMConfig) -> None:
    """Go on from where the learner stands to the last step; the networks then have their averaged weights."""
    task, energy = learner.task, learner.ratio.ratio
    # The energy is part of the ladder from the beginning, so that both kinds of chains follow it as it changes.
    task.model.prior = task.model.prior.with_ladder(task.model.prior.ladder.extended(Stage(energy)))
    for step in range(task.updates + 1, config.steps + 1):
        x, index = task.batch()
        posterior, prior = learner.posterior.sample(x, index), learner.prior.sample(len(x))
        loss = contrastive_loss(energy(posterior), energy(prior))
        if not math.isfinite(float(loss.detach())):
            raise LearningDivergedError(
                f"the energy is not finite at step {step}; lower energy_learning_rate or prior_step_size"
            )
        learner.ratio.descend(loss)
        losses = {"energy": float(loss.detach()), **learner.decoder.update(x, posterior)}
        run.tell("step", 0, step, config.steps, losses=losses, model=task.model)
        if step % task.config.evaluate_every == 0 or step == config.steps:
            save(run, learner)
    learner.ratio.averaged_ratio()
    learner.normalize()


@torch.no_grad()
def _conclude(learner: JointLearner, config: LEBMConfig, seed: int, seconds: float) -> None:
    """Put the log normaliser into the stage, and how well f tells held-out latents from N(0, I)."""
    model, prior, ratio = learner.task.model, learner.task.model.prior, learner.ratio.ratio
    z = learner.posterior.sample_held_out("gain")
    base = prior.base.sample(len(z), derived_generator(model.device, seed, "lebm gain"))
    c = prior.normalizer
    measured = gain(ratio(z) - c.value, ratio(base) - c.value)
    passed = Pass(LogMean(c.value, c.stderr, c.ess), c.ess, math.nan, c.source)
    ladder = prior.ladder.first(0).times(
        ratio, passed, measured, ess=c.ess, seconds=seconds, particles=c.source, steps=config.steps
    )
    model.prior = prior.with_ladder(ladder, c, {"training": asdict(config)})
    model.sampler = {"sampler": "langevin", "steps": config.prior_steps, "step_size": config.prior_step_size}
