"""Settings of joint and two-phase learning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import LatentPriorError

__all__ = ["AutoencoderConfig", "TrainingConfig"]


@dataclass(frozen=True)
class TrainingConfig:
    """How a decoder and its ladder are learned together. Defaults are the paper's where the paper gives them.

    Parameters
    ----------
    stages : int
        Number of stages of the ladder, at most.
    steps : int
        Number of steps of a stage, at most. With the adaptive switch a stage whose gain has just fallen by half may
        take twice as many.
    switch : str
        When a stage ends. ``"schedule"``: after ``steps`` steps. ``"adaptive"``: also when its held-out gain has not
        risen for ``patience`` evaluations, unless it has fallen by half: then the posterior has moved, and the stage
        may take up to ``steps`` more to follow it. An adaptive ladder ends with the first stage that adds nothing.
    settle_steps : int
        Number of steps of the decoder alone under the whole ladder, after the last stage.
    batch_size : int
        Number of images in a step.
    posterior_start : str
        Where posterior chains begin: ``"prior"`` (at draws of the base, as in the paper), ``"encoder"`` (at a draw of
        the encoder) or ``"persistent"`` (where the chain of the same image ended).
    posterior_steps : int
        Number of steps of a posterior chain.
    posterior_step_size : float
        Step size of posterior chains, in standardised coordinates.
    precondition : bool
        Whether posterior chains move in units of the encoder's standard deviations and are Metropolis-corrected. The
        encoder then learns by the evidence lower bound under the ladder, and not from where the chains end. Only for
        an encoder that was learned before: steps in the scales of an untrained one are refused.
    prior_sampler : str
        How the ladder is sampled: ``"langevin"`` (short runs from the base, as in the paper), ``"persistent"`` (chains
        that are kept between steps) or ``"particles"`` (the ladder's fresh particles).
    prior_steps, prior_step_size : int, float
        Number of steps of a prior chain, and their size in standardised coordinates.
    ratio_width, ratio_depth : int
        Number of units in a hidden layer of a log ratio, and of hidden layers.
    bound : float
        Largest absolute value of a log ratio, in nats.
    learn_sigma : bool
        Whether sigma, the noise of the pixels, follows the root of the mean squared error at posterior samples, where
        the likelihood is highest.
    learning_rate, ratio_learning_rate : float
        Learning rates of the decoder with the encoder, and of the log ratios (Adam with betas 0.5 and 0.999).
    decay : float
        Factor on both learning rates in every epoch, from 0 to 1.
    average : float
        Decay of the moving averages of weights, from 0 to 1. The averages are what learning returns.
    evaluate_every : int
        Number of steps between two evaluations of the gain, each of which saves the state.
    patience : int
        Number of evaluations without a rise of the gain after which a stage ends, with the adaptive switch.
    held_out : int
        Number of images, and of particles, that gains are measured on: they train nothing.

    Raises
    ------
    LatentPriorError
        For settings that nothing can be learned with.
    """

    stages: int = 5
    steps: int = 3000
    switch: Literal["adaptive", "schedule"] = "adaptive"
    settle_steps: int = 0
    batch_size: int = 100
    posterior_start: Literal["prior", "encoder", "persistent"] = "prior"
    posterior_steps: int = 20
    posterior_step_size: float = 0.1
    precondition: bool = False
    prior_sampler: Literal["langevin", "persistent", "particles"] = "langevin"
    prior_steps: int = 60
    prior_step_size: float = 0.4
    ratio_width: int = 200
    ratio_depth: int = 2
    bound: float = 5.0
    learn_sigma: bool = False
    learning_rate: float = 1e-4
    ratio_learning_rate: float = 2e-5
    decay: float = 0.998
    average: float = 0.999
    evaluate_every: int = 250
    patience: int = 3
    held_out: int = 500

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "posterior_steps", "prior_steps", "ratio_width", "evaluate_every", "patience")
        for name in counts:
            if getattr(self, name) < 1:
                raise LatentPriorError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("posterior_step_size", "prior_step_size", "bound", "learning_rate", "ratio_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise LatentPriorError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("decay", "average"):
            if not 0 <= getattr(self, name) <= 1:
                raise LatentPriorError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.stages < 0 or self.settle_steps < 0 or self.held_out < 2:
            raise LatentPriorError("stages and settle_steps must be 0 or more, held_out 2 or more")
        choices = {
            "switch": ("adaptive", "schedule"),
            "posterior_start": ("prior", "encoder", "persistent"),
            "prior_sampler": ("langevin", "persistent", "particles"),
        }
        for name, options in choices.items():
            if getattr(self, name) not in options:
                raise LatentPriorError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(options)}")
        if self.precondition and self.posterior_start != "encoder":
            raise LatentPriorError("precondition takes its scales from the encoder: set posterior_start to 'encoder'")

    def check(self, images: int, *, encoder: bool = True, processes: int = 1) -> None:
        """Raise :class:`LatentPriorError` where these settings cannot learn from so many images.

        Parameters
        ----------
        images : int
            Number of images.
        encoder : bool
            Whether the model has an encoder.
        processes : int
            Number of processes that share a batch.
        """
        if images < self.held_out + 2:
            raise LatentPriorError(
                f"{images} images are too few beside {self.held_out} held out: lower held_out, or bring more"
            )
        if self.posterior_start == "encoder" and not encoder:
            raise LatentPriorError("posterior_start='encoder' needs a model with an encoder")
        if self.batch_size % processes:
            raise LatentPriorError(
                f"a batch of {self.batch_size} is no multiple of {processes} processes: change batch_size"
            )


@dataclass(frozen=True)
class AutoencoderConfig:
    """How a decoder and an encoder are learned before there is a prior.

    Parameters
    ----------
    kind : str
        What is learned. ``"vae"``: the evidence lower bound under N(0, I). ``"ae"``: the squared error, with noise on
        the latents.
    steps : int
        Number of steps.
    batch_size : int
        Number of images in a step.
    learning_rate : float
        Learning rate of Adam at the first step; it falls to zero on a cosine.
    learn_sigma : bool
        ``"vae"``: whether sigma, the noise of the pixels, follows the root of the mean squared error, where the bound
        is highest. Otherwise it stays as it is.
    noise : float
        ``"ae"``: standard deviation of the noise on latents. The penalty keeps the latents from growing beyond it.
    latent_penalty : float
        ``"ae"``: weight of half the squared norm of the latents beside the squared error.
    weight_decay : float
        Weight decay of the decoder, as in AdamW.
    average : float
        Decay of the moving average of weights, from 0 to 1. The average is what learning returns.

    Raises
    ------
    LatentPriorError
        For settings that nothing can be learned with.
    """

    kind: Literal["vae", "ae"] = "vae"
    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 1e-3
    learn_sigma: bool = True
    noise: float = 0.1
    latent_penalty: float = 1e-3
    weight_decay: float = 0.0
    average: float = 0.999

    def __post_init__(self) -> None:
        if self.kind not in ("vae", "ae"):
            raise LatentPriorError(f"unknown kind {self.kind!r}: choose vae or ae")
        if min(self.steps, self.batch_size) < 1 or self.noise < 0 or self.latent_penalty < 0:
            raise LatentPriorError("steps and batch_size must be 1 or more, noise and latent_penalty 0 or more")
        if not 0 < self.learning_rate < math.inf:
            raise LatentPriorError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.average <= 1:
            raise LatentPriorError(f"average must be from 0 to 1, got {self.average}")
