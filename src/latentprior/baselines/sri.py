"""Short-run inference, and alternating back-propagation: a decoder without encoder or learned prior."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..data.images import Images
from ..models.model import LatentVariableModel, standard_normal_prior
from ..runtime.events import Callback
from ..training.config import TrainingConfig
from ..training.joint import train

__all__ = ["SRIConfig", "train_sri"]


@dataclass(frozen=True)
class SRIConfig:
    """How the decoder is learned; chains as in the paper."""

    steps: int = 6000
    batch_size: int = 100
    posterior_steps: int = 20
    posterior_step_size: float = 0.1
    persistent: bool = False
    """Whether each image's chain goes on from where it was left (alternating back-propagation) instead of N(0, I)."""
    learning_rate: float = 1e-4
    decay: float = 0.998
    """Factor on the learning rate every epoch."""
    average: float = 0.999

    def training(self) -> TrainingConfig:
        """The joint learner's settings for no stage at all."""
        return TrainingConfig(
            stages=0,
            settle_steps=self.steps,
            batch_size=self.batch_size,
            posterior_start="persistent" if self.persistent else "prior",
            posterior_steps=self.posterior_steps,
            posterior_step_size=self.posterior_step_size,
            learning_rate=self.learning_rate,
            decay=self.decay,
            average=self.average,
            # Without stages there is nothing to measure on held-out images: two is the least.
            held_out=2,
        )


def train_sri(
    model: LatentVariableModel,
    images: Images,
    config: SRIConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
) -> LatentVariableModel:
    r"""Ascend :math:`\log p_\theta(x \mid z^+)` at short-run draws of :math:`p_\theta(x \mid z)\,N(z; 0, I)`.

    .. math:: z \leftarrow z + \tfrac{s^2}{2} \nabla_z \log p_\theta(x, z) + s\,\epsilon, \quad z_0 \sim N(0, I)

    Returns ``model`` without its encoder, which the method does not have; the prior is :math:`N(0, I)`. Sigma
    stays as it is (paper: 0.3). Source: Nijkamp, Pang, Han, Zhou, Zhu and Wu (ECCV 2020); with ``persistent``: Han,
    Lu, Zhu and Wu (AAAI 2017), algorithm 1.
    """
    model.encoder = None
    model.prior = standard_normal_prior(model.event_shape).to(model.device, model.prior.dtype)
    train(
        model,
        images,
        (config or SRIConfig()).training(),
        seed=seed,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        callbacks=callbacks,
    )
    model.prior.info["sampler"] = {"sampler": "smc"}
    return model
