"""Short-run inference, and alternating back-propagation: a decoder without encoder or learned prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data.images import Images
from ..models.model import LatentVariableModel
from ..training.config import TrainingConfig
from ..training.joint import train
from .vae import start_over

__all__ = ["SRIConfig", "train_sri"]

LEAST_HELD_OUT = 2
"""Images held out, the least that joint learning takes: without stages there is nothing to measure on them."""


@dataclass(frozen=True)
class SRIConfig:
    """How the decoder is learned; chains as in the paper.

    Parameters
    ----------
    steps : int
        Steps of Adam.
    batch_size : int
        Images of a step.
    posterior_steps : int
        Steps of a posterior chain.
    posterior_step_size : float
        Size of a step of a posterior chain.
    persistent : bool
        Whether each image's chain goes on from where it was left (alternating back-propagation) instead of N(0, I).
    learning_rate : float
        Adam's rate in the first epoch.
    decay : float
        Factor on the learning rate every epoch.
    average : float
        Decay of the moving average of weights that is returned.
    """

    steps: int = 6000
    batch_size: int = 100
    posterior_steps: int = 20
    posterior_step_size: float = 0.1
    persistent: bool = False
    learning_rate: float = 1e-4
    decay: float = 0.998
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
            held_out=LEAST_HELD_OUT,
        )


def train_sri(
    model: LatentVariableModel, images: Images, config: SRIConfig | None = None, **options: Any
) -> LatentVariableModel:
    r"""Ascend :math:`\log p_\theta(x \mid z^+)` at short-run draws of :math:`p_\theta(x \mid z)\,N(z; 0, I)`.

    .. math:: z \leftarrow z + \tfrac{s^2}{2} \nabla_z \log p_\theta(x, z) + s\,\epsilon, \quad z_0 \sim N(0, I)

    Returns ``model`` without its encoder, which the method does not have; the prior is :math:`N(0, I)`. Sigma
    stays as it is (paper: 0.3).

    Parameters
    ----------
    model, images
        As in :func:`~latentprior.baselines.train_vae`.
    config : SRIConfig, optional
        Settings of the learning.
    **options
        ``seed``, ``checkpoint_dir``, ``resume`` and ``callbacks`` of :func:`~latentprior.baselines.train_vae`.

    Notes
    -----
    Source: Nijkamp, Pang, Han, Zhou, Zhu and Wu (ECCV 2020); with ``persistent``: Han, Lu, Zhu and Wu (AAAI 2017),
    algorithm 1.
    """
    model.encoder = None
    start_over(model)
    return train(model, images, (config or SRIConfig()).training(), **options)
