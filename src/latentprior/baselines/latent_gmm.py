"""A Gaussian mixture on the latents of a VAE: what a user would try first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..data.images import Images
from ..fitting.fit import fit
from ..models.model import LatentVariableModel
from ..runtime.events import Callback
from ..training.resumable import phase_folder
from ..training.two_phase import aggregate_posterior
from .vae import VAEConfig, learn_vae

__all__ = ["LatentGMMConfig", "train_latent_gmm"]


@dataclass(frozen=True)
class LatentGMMConfig(VAEConfig):
    """How the VAE and the mixture are learned."""

    components: int | None = None
    """Full-covariance components; None: chosen by held-out log density."""


def train_latent_gmm(
    model: LatentVariableModel,
    images: Images,
    config: LatentGMMConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
    autoencoder: LatentVariableModel | None = None,
) -> LatentVariableModel:
    r"""A VAE, then :math:`p(z) = \sum_k \pi_k \mathcal N(z; m_k, \Sigma_k)` on its aggregate posterior, by EM.

    Returns ``model`` with that prior. With a trained ``autoencoder`` only the mixture is learned.
    Source: Ghosh et al. (2020), section 4, for variational autoencoders.
    """
    config = config or LatentGMMConfig()
    learn_vae(model, images, config, autoencoder, seed, callbacks, checkpoint_dir, resume)
    base = "gmm" if config.components is None else f"gmm:{config.components}"
    model.prior = fit(
        aggregate_posterior(model, images),
        base=base,
        max_stages=0,
        seed=seed,
        device=model.device,
        checkpoint_dir=phase_folder(checkpoint_dir, "prior"),
        resume=resume,
    )
    model.prior.info["sampler"] = {"sampler": "smc"}
    return model
