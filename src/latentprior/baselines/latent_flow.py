"""A neural spline flow on the latents of a VAE: what a user would try for more than a mixture."""

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

__all__ = ["LatentFlowConfig", "train_latent_flow"]


@dataclass(frozen=True)
class LatentFlowConfig(VAEConfig):
    """How the VAE is learned; the flow's own training ends on held-out log density."""


def train_latent_flow(
    model: LatentVariableModel,
    images: Images,
    config: LatentFlowConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
    autoencoder: LatentVariableModel | None = None,
) -> LatentVariableModel:
    r"""A VAE, then :math:`\log p(z) = \log N(T(z); 0, I) + \log|\det J_T(z)|` on its aggregate posterior.

    Returns ``model`` with the flow as its prior (zuko; extra ``flow``,
    else :class:`~latentprior.errors.MissingExtraError`). With a trained ``autoencoder`` only the flow is learned.
    Source: Durkan, Bekasov, Murray and Papamakarios (NeurIPS 2019).
    """
    config = config or LatentFlowConfig()
    learn_vae(model, images, config, autoencoder, seed, callbacks, checkpoint_dir, resume)
    model.prior = fit(
        aggregate_posterior(model, images),
        base="flow",
        max_stages=0,
        seed=seed,
        device=model.device,
        checkpoint_dir=phase_folder(checkpoint_dir, "prior"),
        resume=resume,
    )
    model.prior.info["sampler"] = {"sampler": "smc"}
    return model
