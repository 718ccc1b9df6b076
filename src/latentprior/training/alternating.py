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
"""Settings of :func:`train_under_prior`: short chains from the encoder, in its scales. The learning rates fall to a
tenth in five epochs."""


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
    r"""Learn the decoder under the prior that the model has, then the prior of that decoder.

    :func:`~latentprior.train` moves decoder and encoder along posterior samples
    :math:`z^+ \sim p_\theta(x \mid z)\,p_K(z)` of the ladder that is there. The posteriors thereby move away from the
    ladder, so that :func:`~latentprior.fit` learns another one on draws of them.

    Parameters
    ----------
    model : LatentVariableModel
        A model with a learned prior and an encoder that returns ``(mean, scale)``; it is changed. To resume a run, give
        the model that the run began with.
    images : Images
        What it learns from.
    config : TrainingConfig, optional
        Settings of the first part; by default :data:`~latentprior.training.alternating.UNDER_A_PRIOR`. Its chains also
        make the draws of the second part.
    draws : int
        Number of posterior draws for each image in the second part.
    seed : int
        Seed of all random draws.
    checkpoint_dir : str or Path, optional
        Folder in which each part saves its state, in a folder of its own.
    resume : bool
        Whether to go on in the part that was stopped, if the folder holds one.
    callbacks : iterable of callables
        They receive every :class:`~latentprior.Event` of all parts. What they raise ends the run.
    **fit_options
        Options of :func:`~latentprior.fit`.

    Returns
    -------
    LatentVariableModel
        ``model``.

    Raises
    ------
    LatentPriorError
        What the two functions raise.
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
    """Learn an autoencoder and its prior, then the decoder under that prior, then the prior of that decoder.

    The first half is :func:`~latentprior.train_two_phase`, the second :func:`~latentprior.train_under_prior`.

    Parameters
    ----------
    model : LatentVariableModel
        The model, with an encoder that returns ``(mean, scale)``; it is changed.
    images : Images
        What it learns from.
    autoencoder : AutoencoderConfig, optional
        Settings of the autoencoder.
    config : TrainingConfig, optional
        Settings of the decoder under the prior.
    draws : int
        Number of posterior draws for each image that the last prior is learned on.
    seed : int
        Seed of all random draws.
    checkpoint_dir : str or Path, optional
        Folder in which each part saves its state, in a folder of its own.
    resume : bool
        Whether to go on in the part that was stopped, if the folder holds one.
    callbacks : iterable of callables
        They receive every :class:`~latentprior.Event` of all parts. What they raise ends the run.
    **fit_options
        Options of :func:`~latentprior.fit`; they go to both fits, each with a time budget of its own.

    Returns
    -------
    LatentVariableModel
        ``model``.

    Raises
    ------
    LatentPriorError
        What the two functions raise.
    """
    (config or UNDER_A_PRIOR).check(len(images))
    options: dict[str, Any] = {"seed": seed, "checkpoint_dir": checkpoint_dir, "resume": resume, **fit_options}
    options["callbacks"] = tuple(callbacks)
    train_two_phase(model, images, autoencoder, **options)
    return train_under_prior(model, images, config, draws=draws, **options)
