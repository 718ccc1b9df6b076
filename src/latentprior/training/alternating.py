"""Alternating learning: a two-phase model, its decoder under the learned prior, then the prior of that decoder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.images import Images
from ..models.model import LatentVariableModel
from ..runtime.events import Callback
from ..runtime.seeding import derived_generator
from .config import AutoencoderConfig, TrainingConfig
from .joint import train
from .resumable import phase_folder
from .two_phase import aggregate_posterior, refit_prior, train_two_phase

__all__ = ["UNDER_A_PRIOR", "train_alternating", "train_under_prior"]

UNDER_A_PRIOR = TrainingConfig(
    stages=1, steps=1500, settle_steps=1500, posterior_start="encoder", posterior_steps=2, posterior_step_size=0.5,
    precondition=True, learn_sigma=True, prior_sampler="particles", learning_rate=1e-3, ratio_learning_rate=1e-3,
    decay=0.6,
)  # fmt: skip
"""Short chains from the encoder, in its scales; the rate falls to a tenth in five epochs."""


def train_under_prior(
    model: LatentVariableModel,
    images: Images,
    config: TrainingConfig | None = None,
    *,
    draws: int = 3,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
    **fit_options: Any,
) -> LatentVariableModel:
    r"""Go on from a model with a learned prior: generator given prior, then prior given generator. Returns ``model``.

    :func:`~latentprior.train` moves decoder and encoder along posterior samples
    :math:`z^+ \sim p_\theta(x \mid z)\,p_K(z)` of the ladder that is there. That moves the posteriors away from the
    ladder, so that :func:`~latentprior.fit` learns another on ``draws`` of them an image, made by the chains of the
    training. ``fit_options`` go there, ``config`` (by default
    :data:`~latentprior.training.alternating.UNDER_A_PRIOR`) to the former.

    The model needs an encoder that returns (mean, scale). A run that was stopped goes on with ``resume=True``, from
    its ``checkpoint_dir`` and the model that it began with. Raises what :func:`~latentprior.train` and
    :func:`~latentprior.fit` raise.
    """
    config, callbacks = config or UNDER_A_PRIOR, tuple(callbacks)
    phases = [phase_folder(checkpoint_dir, name) for name in ("joint", "refit")]
    train(model, images, config, seed=seed, checkpoint_dir=phases[0], resume=resume, callbacks=callbacks)
    latents = aggregate_posterior(
        model, images, source="posterior", draws=draws, method="langevin", steps=config.posterior_steps,
        step_size=config.posterior_step_size, precondition=config.precondition,
        generator=derived_generator(model.device, seed, "posterior draws"),
    )  # fmt: skip
    return refit_prior(
        model, latents, seed=seed, checkpoint_dir=phases[1], resume=resume, callbacks=callbacks, **fit_options
    )


def train_alternating(
    model: LatentVariableModel,
    images: Images,
    autoencoder: AutoencoderConfig | None = None,
    config: TrainingConfig | None = None,
    *,
    draws: int = 3,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
    **fit_options: Any,
) -> LatentVariableModel:
    """:func:`~latentprior.train_two_phase`, then :func:`train_under_prior` on what it made. Returns ``model``.

    With a ``checkpoint_dir`` all four parts save their state in folders of it, and ``resume=True`` goes on in the one
    that was stopped. Options as there; ``fit_options`` go to both fits, each with a time budget of its own.
    """
    (config or UNDER_A_PRIOR).check(len(images))
    options: dict[str, Any] = {"seed": seed, "checkpoint_dir": checkpoint_dir, "resume": resume, **fit_options}
    options["callbacks"] = tuple(callbacks)
    train_two_phase(model, images, autoencoder, **options)
    return train_under_prior(model, images, config, draws=draws, **options)
