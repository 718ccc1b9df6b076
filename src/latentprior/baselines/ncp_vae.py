"""The noise contrastive prior: a VAE whose N(0, I) is reweighed by one unbounded density ratio."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..data.images import Images
from ..density.ladder import Ladder
from ..errors import StageSaturatedWarning
from ..fitting.fit import fit
from ..fitting.settings import StageSettings
from ..models.model import LatentVariableModel
from ..runtime.events import TrainingEvent
from ..training.resumable import phase_folder
from ..training.two_phase import aggregate_posterior
from .vae import VAEConfig, learn_vae

__all__ = ["NCPVAEConfig", "train_ncp_vae"]

UNBOUNDED = 50.0
"""The paper's ratio has no bound. This one is no bound in practice (at a log ratio of 10 it takes off 0.13 nats), and
its normaliser still fits into floating point."""


def _ratio() -> StageSettings:
    return StageSettings(bound=UNBOUNDED, mixture_features=False, odds=1.0, optimizer="adamw", weight_decay=0.1)


@dataclass(frozen=True)
class NCPVAEConfig(VAEConfig):
    """How the VAE and the ratio are learned."""

    ratio: StageSettings = field(default_factory=_ratio)
    candidates: int = 256
    """Proposals of N(0, I) a draw, pooled over all draws, in sampling-importance-resampling (paper: 5,000)."""


def train_ncp_vae(
    model: LatentVariableModel,
    images: Images,
    config: NCPVAEConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callable[[TrainingEvent], None]] = (),
    autoencoder: LatentVariableModel | None = None,
) -> LatentVariableModel:
    r"""A VAE, then :math:`p(z) \propto N(z; 0, I)\,r(z)`, r learned by telling latents from :math:`N(0, I)`.

    With D the classifier, :math:`r = D / (1 - D)`: one stage of a ladder from the VAE's own prior, in its own
    coordinates. Returns ``model``; its images are drawn, as in the paper, by
    ``model.generate(n, **model.prior.info["sampler"])``: resampled proposals of :math:`N(0, I)`. The default sampler of
    :meth:`~latentprior.LatentPrior.sample` corrects what that leaves out.

    With a trained ``autoencoder`` only the ratio is learned. Where held-out latents cannot be told from
    :math:`N(0, I)` the prior stays without a stage. Source: Aneja, Schwing, Kautz and Vahdat (NeurIPS 2021),
    section 3.
    """
    config = config or NCPVAEConfig()
    learn_vae(model, images, config, autoencoder, seed, callbacks, checkpoint_dir, resume)
    with warnings.catch_warnings():
        # One saturated stage is what the method is.
        warnings.simplefilter("ignore", StageSaturatedWarning)
        learned = fit(
            aggregate_posterior(model, images),
            base="normal",
            max_stages=1,
            whitening="none",
            settings=config.ratio,
            seed=seed,
            device=model.device,
            checkpoint_dir=phase_folder(checkpoint_dir, "prior"),
            resume=resume,
        )
    # Without the mixture that helped to find the normaliser: the paper's proposals are those of N(0, I).
    model.prior = learned.with_ladder(Ladder(learned.base, learned.stages), learned.normalizer)
    model.prior.info["sampler"] = {"sampler": "sir", "candidates": config.candidates}
    return model
