"""The latent space energy-based prior, learned by maximum likelihood with short-run Langevin dynamics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import Images
from ..density.ladder import Pass, Stage
from ..density.ratios import gain
from ..density.sampling.resampling import LogMean
from ..errors import LearningDivergedError
from ..models.model import LatentVariableModel, standard_normal_prior
from ..runtime.events import TrainingEvent
from ..runtime.processes import SingleProcess
from ..runtime.seeding import derived_generator
from ..storage.checkpoint import locked
from ..training.config import TrainingConfig
from ..training.joint_learner import JointLearner
from ..training.joint_run import TrainingRun

__all__ = ["LEBMConfig", "contrastive_loss", "train_lebm"]

UNBOUNDED = 1e6
"""The energy has no bound; so far from it, tanh is the identity to the last bits of a float."""


@dataclass(frozen=True)
class LEBMConfig:
    """How the generator and the energy are learned together; the paper's numbers but for ``average`` and ``steps``."""

    steps: int = 6000
    batch_size: int = 100
    posterior_steps: int = 20
    posterior_step_size: float = 0.1
    prior_steps: int = 60
    prior_step_size: float = 0.4
    width: int = 200
    depth: int = 2
    """Hidden layers of the energy."""
    learning_rate: float = 1e-4
    """Of the decoder (Adam, betas 0.5 and 0.999)."""
    energy_learning_rate: float = 2e-5
    decay: float = 0.998
    """Factor on both learning rates every epoch."""
    average: float = 0.999
    """Decay of the moving averages of weights that are returned."""
    held_out: int = 500
    """Images that train nothing; the log normaliser is bracketed at their latents."""

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
            bound=UNBOUNDED,
            learning_rate=self.learning_rate,
            ratio_learning_rate=self.energy_learning_rate,
            decay=self.decay,
            average=self.average,
            held_out=self.held_out,
        )


def contrastive_loss(f_posterior: Tensor, f_prior: Tensor) -> Tensor:
    r"""The loss :math:`\mathbb E_{p(z)} f - \mathbb E_{p(z \mid x)} f`, whose gradient is that of minus log likelihood.

    Shapes ``(n,)`` and ``(m,)`` to a scalar, in nats; the draws are held fixed. Source: Pang et al. (2020), section 2.
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
    callbacks: Iterable[Callable[[TrainingEvent], None]] = (),
) -> LatentVariableModel:
    r"""Learn the decoder with :math:`p_\alpha(z) = e^{f_\alpha(z)} N(z; 0, I) / Z` by maximum likelihood.

    Every step draws :math:`z^+ \sim p_\theta(x \mid z)\,p_\alpha(z)` and :math:`z^- \sim p_\alpha(z)` by short-run
    Langevin dynamics from :math:`N(0, I)` with f as it stands; f ascends
    :math:`\mathbb E f(z^+) - \mathbb E f(z^-)`, the decoder :math:`\log p_\theta(x \mid z^+)`.

    Returns ``model`` without its encoder, which the method does not have. The prior is a ladder of one stage, f; its
    log normaliser is estimated when f is learned, with an error
    (:class:`~latentprior.errors.NormalizerBracketWarning` where that is large). Short-run dynamics need not follow
    :math:`p_\alpha`: the paper's images are ``model.generate(n, **model.prior.info["sampler"])``. Callbacks hear a
    ``step`` with the losses ``energy`` (nats) and ``reconstruction`` (squared error a pixel). Raises
    :class:`~latentprior.errors.LearningDivergedError` when f is not finite.

    Source: Pang, Han, Nijkamp, Zhu and Wu (NeurIPS 2020), section 2 and algorithm 1.
    """
    config = config or LEBMConfig()
    model.encoder = None
    model.prior = standard_normal_prior(model.event_shape).to(model.device, model.prior.dtype)
    learner = JointLearner(model, images, config.training(), seed, SingleProcess(model.device))
    run = TrainingRun(learner, checkpoint_dir, callbacks)
    with locked(run.folder):
        if resume:
            run.load()
        _learn(run, learner, config)
        _conclude(learner, config, seed, run.seconds())
    return model


def _learn(run: TrainingRun, learner: JointLearner, config: LEBMConfig) -> None:
    """Go on from where the learner stands to the last step; the networks then have their averaged weights."""
    model, energy, optimizer = learner.model, learner.ratio, learner.ratio_optimizer
    # In the ladder from the beginning: both kinds of chains then follow f as it stands.
    model.prior = model.prior.with_ladder(model.prior.ladder.extended(Stage(energy)))
    for step in range(learner.updates + 1, config.steps + 1):
        x, index = learner.batch()
        posterior, prior = learner.posterior_samples(x, index), learner.prior_samples(len(x))
        loss = contrastive_loss(energy(posterior), energy(prior))
        if not math.isfinite(float(loss.detach())):
            raise LearningDivergedError(
                f"the energy is not finite at step {step}; lower energy_learning_rate or prior_step_size"
            )
        for group in optimizer.param_groups:
            group["lr"] = config.energy_learning_rate * config.decay ** (
                learner.updates * config.batch_size // len(learner.train_rows)
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decay = min(config.average, step / (step + 9))
            for name, parameter in energy.named_parameters():
                learner.ratio_average[name].lerp_(parameter, 1 - decay)
        losses = {"energy": float(loss.detach()), **learner.update_decoder(x, posterior)}
        event = TrainingEvent("step", 0, step, config.steps, losses, seconds=run.seconds(), model=model)
        for callback in run.callbacks:
            callback(event)
        if step % learner.config.evaluate_every == 0 or step == config.steps:
            run.save()
    energy.load_weights(learner.ratio_average)
    energy.eval().requires_grad_(False)
    learner.normalize()


@torch.no_grad()
def _conclude(learner: JointLearner, config: LEBMConfig, seed: int, seconds: float) -> None:
    """Put the log normaliser into the stage, and how well f tells held-out latents from N(0, I)."""
    model, prior = learner.model, learner.model.prior
    x = learner.images.batch(learner.held_out_rows, device=learner.device).to(prior.dtype)
    parts = enumerate(x.split(config.batch_size))
    z = torch.cat([learner.posterior_samples(part, use=f"gain {i}") for i, part in parts])
    base = prior.base.sample(len(z), derived_generator(model.device, seed, "lebm gain"))
    c = prior.normalizer
    measured = gain(learner.ratio(z) - c.value, learner.ratio(base) - c.value)
    passed = Pass(LogMean(c.value, c.stderr, c.ess), c.ess, math.nan, c.source)
    ladder = prior.ladder.first(0).times(
        learner.ratio, passed, measured, ess=c.ess, seconds=seconds, particles=c.source, steps=config.steps
    )
    sampler = {"sampler": "langevin", "steps": config.prior_steps, "step_size": config.prior_step_size}
    model.prior = prior.with_ladder(ladder, c, {"training": asdict(config), "sampler": sampler})
