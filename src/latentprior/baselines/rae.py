"""The regularised deterministic autoencoder with a density fitted afterwards (RAE-L2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..data.images import Images
from ..fitting.fit import fit
from ..models.model import LatentVariableModel, standard_normal_prior
from ..runtime.events import Callback
from ..training.config import AutoencoderConfig
from ..training.resumable import phase_folder
from ..training.two_phase import aggregate_posterior, train_autoencoder

__all__ = ["RAEConfig", "train_rae"]


@dataclass(frozen=True)
class RAEConfig:
    """How the autoencoder and the mixture are learned."""

    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 1e-3
    latent_penalty: float = 1e-3
    r"""Weight :math:`\beta` of half the squared norm of latents."""
    weight_decay: float = 0.01
    """The L2 penalty on the decoder's weights, decoupled from Adam."""
    components: int = 10
    """Full-covariance components of the mixture; the paper's number."""
    average: float = 0.999

    def autoencoder(self) -> AutoencoderConfig:
        """The same for :func:`~latentprior.training.two_phase.train_autoencoder`."""
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
    model: LatentVariableModel,
    images: Images,
    config: RAEConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
) -> LatentVariableModel:
    r"""Descend :math:`\|x - g(e(x))\|^2 + \frac\beta2 \|e(x)\|^2 + \lambda \|\theta\|^2`, then fit a mixture.

    The mixture of full-covariance Gaussians on the encoder's means is the prior of ``model``, which is returned;
    sigma is the root of the mean squared error. Source: Ghosh, Sajjadi, Vergari, Black and Schoelkopf (ICLR 2020),
    sections 3 and 4, the variant RAE-L2.
    """
    config = config or RAEConfig()
    model.prior = standard_normal_prior(model.event_shape).to(model.device, model.prior.dtype)
    phases = [phase_folder(checkpoint_dir, name) for name in ("autoencoder", "prior")]
    train_autoencoder(
        model,
        images,
        config.autoencoder(),
        seed=seed,
        checkpoint_dir=phases[0],
        resume=resume,
        callbacks=callbacks,
    )
    model.prior = fit(
        aggregate_posterior(model, images, source="means"),
        base=f"gmm:{config.components}",
        max_stages=0,
        seed=seed,
        device=model.device,
        checkpoint_dir=phases[1],
        resume=resume,
    )
    model.prior.info["sampler"] = {"sampler": "smc"}
    return model
