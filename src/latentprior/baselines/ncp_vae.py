"""The noise contrastive prior: a VAE whose N(0, I) is reweighed by one unbounded density ratio."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from ..data.images import Images
from ..density.ladder import Ladder
from ..errors import StageSaturatedWarning
from ..fitting.settings import StageSettings
from ..models.model import LatentVariableModel
from ..training.two_phase import aggregate_posterior
from .vae import VAEConfig, fit_prior, train_vae

__all__ = ["NCPVAEConfig", "train_ncp_vae"]

BOUND_NATS = 50.0
"""Bound of the log ratio. The paper's has none. This one is none in practice: it takes 0.13 nats off a log ratio of 10,
and the normaliser still fits into floating point."""


def _ratio() -> StageSettings:
    return StageSettings(bound=BOUND_NATS, mixture_features=False, odds=1.0, optimizer="adamw", weight_decay=0.1)


@dataclass(frozen=True)
class NCPVAEConfig(VAEConfig):
    """How the VAE and the ratio are learned.

    Parameters
    ----------
    steps, batch_size, learning_rate, learn_sigma, average
        As in :class:`~latentprior.baselines.VAEConfig`.
    ratio : StageSettings
        Settings of the ratio's learning.
    candidates : int
        Proposals of N(0, I) for each draw, shared by all draws, in sampling-importance-resampling (paper: 5,000).
    """

    ratio: StageSettings = field(default_factory=_ratio)
    candidates: int = 256


def train_ncp_vae(
    model: LatentVariableModel, images: Images, config: NCPVAEConfig | None = None, **options: Any
) -> LatentVariableModel:
    r"""A VAE, then :math:`p(z) \propto N(z; 0, I)\,r(z)`, r learned by telling latents from :math:`N(0, I)`.

    With D the classifier, :math:`r = D / (1 - D)`: one stage of a ladder from the VAE's own prior, in its own
    coordinates. Returns ``model``, whose images are drawn as in the paper, from resampled proposals of
    :math:`N(0, I)`. The default sampler of :meth:`latentprior.LatentPrior.sample` corrects what that leaves out. Where
    held-out latents cannot be told from :math:`N(0, I)` the prior stays without a stage.

    Parameters
    ----------
    model, images
        As in :func:`~latentprior.baselines.train_vae`.
    config : NCPVAEConfig, optional
        Settings of the learning.
    **options
        ``seed``, ``checkpoint_dir``, ``resume``, ``callbacks`` and ``autoencoder`` of
        :func:`~latentprior.baselines.train_vae`. With an ``autoencoder`` only the ratio is learned.

    Notes
    -----
    Source: Aneja, Schwing, Kautz and Vahdat (NeurIPS 2021), section 3.
    """
    config = config or NCPVAEConfig()
    train_vae(model, images, config, **options)
    latents = aggregate_posterior(model, images)
    with warnings.catch_warnings():
        # The method is a single stage, however large its log ratios.
        warnings.simplefilter("ignore", StageSaturatedWarning)
        fit_prior(model, latents, options, base="normal", max_stages=1, whitening="none", settings=config.ratio)
    # The mixture that helped to find the normaliser is left out: the paper's proposals are draws of N(0, I).
    prior = model.prior
    model.prior = prior.with_ladder(Ladder(prior.base, prior.stages), prior.normalizer)
    model.sampler = {"sampler": "sir", "candidates": config.candidates}
    return model
