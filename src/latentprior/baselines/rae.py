"""The regularised deterministic autoencoder with a density fitted afterwards (RAE-L2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data.images import Images
from ..models.model import LatentVariableModel
from ..training.config import AutoencoderConfig
from ..training.resumable import phase_folder
from ..training.two_phase import aggregate_posterior, train_autoencoder
from .vae import fit_prior, start_over

__all__ = ["RAEConfig", "train_rae"]


@dataclass(frozen=True)
class RAEConfig:
    r"""How the autoencoder and the mixture are learned.

    Parameters
    ----------
    steps : int
        Steps of Adam.
    batch_size : int
        Images of a step.
    learning_rate : float
        Adam's rate at the first step, which falls to zero on a cosine.
    latent_penalty : float
        Weight :math:`\beta` of half the squared norm of latents.
    weight_decay : float
        The L2 penalty on the decoder's weights, decoupled from Adam.
    components : int
        Full-covariance components of the mixture; the paper's number.
    average : float
        Decay of the moving average of weights that is returned.
    """

    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 1e-3
    latent_penalty: float = 1e-3
    weight_decay: float = 0.01
    components: int = 10
    average: float = 0.999

    def autoencoder(self) -> AutoencoderConfig:
        """The same settings for :func:`~latentprior.training.two_phase.train_autoencoder`."""
        return AutoencoderConfig(
            "ae",
            self.steps,
            self.batch_size,
            self.learning_rate,
            noise=0.0,
            latent_penalty=self.latent_penalty,
            weight_decay=self.weight_decay,
            average=self.average,
        )


def train_rae(
    model: LatentVariableModel, images: Images, config: RAEConfig | None = None, **options: Any
) -> LatentVariableModel:
    r"""Descend :math:`\|x - g(e(x))\|^2 + \frac\beta2 \|e(x)\|^2 + \lambda \|\theta\|^2`, then fit a mixture.

    The mixture of full-covariance Gaussians on the encoder's means is the prior of ``model``, which is returned;
    sigma is the root of the mean squared error.

    Parameters
    ----------
    model, images
        As in :func:`~latentprior.baselines.train_vae`.
    config : RAEConfig, optional
        Settings of the learning.
    **options
        ``seed``, ``checkpoint_dir``, ``resume`` and ``callbacks`` of :func:`~latentprior.baselines.train_vae`.

    Notes
    -----
    Source: Ghosh, Sajjadi, Vergari, Black and Schoelkopf (ICLR 2020), sections 3 and 4, the variant RAE-L2.
    """
    config = config or RAEConfig()
    start_over(model)
    folder = phase_folder(options.get("checkpoint_dir"), "autoencoder")
    train_autoencoder(model, images, config.autoencoder(), **{**options, "checkpoint_dir": folder})
    latents = aggregate_posterior(model, images, source="means")
    return fit_prior(model, latents, options, base=f"gmm:{config.components}", max_stages=0)
