"""Settings of joint and two-phase learning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..density.ratios import Gain
from ..errors import LatentPriorError

__all__ = ["UNKNOWN", "AutoencoderConfig", "TrainingConfig"]

UNKNOWN = Gain(math.nan, math.nan)


@dataclass(frozen=True)
class TrainingConfig:
    """How a decoder and its ladder are learned together. Defaults are the paper's where it gives them."""

    stages: int = 5
    """Most stages of the ladder."""
    steps: int = 3000
    """Steps of a stage; the most, where switching is adaptive, of one whose gain has not just fallen by half."""
    switch: Literal["adaptive", "schedule"] = "adaptive"
    """``adaptive``: a stage ends when its held-out gain has not risen for ``patience`` evaluations, unless it has
    fallen by half: then the posterior has moved under it, and it gets up to ``steps`` more to catch up."""
    settle_steps: int = 0
    """Steps of the decoder alone under the whole ladder, after the last stage."""
    batch_size: int = 100
    posterior_start: Literal["prior", "encoder", "persistent"] = "prior"
    """Where posterior chains begin: draws of the base (the paper), the encoder's draw, or the image's last latent."""
    posterior_steps: int = 20
    posterior_step_size: float = 0.1
    precondition: bool = False
    """Posterior chains move in units of the encoder's standard deviations, Metropolis-corrected, and the encoder learns
    by the evidence lower bound under the ladder instead of from where the chains end. For an encoder learned before:
    steps in the scales of an untrained one are refused."""
    prior_sampler: Literal["langevin", "persistent", "particles"] = "langevin"
    """Short-run dynamics from the base (the paper), chains kept between steps, or the ladder's fresh particles."""
    prior_steps: int = 60
    prior_step_size: float = 0.4
    ratio_width: int = 200
    ratio_depth: int = 2
    bound: float = 5.0
    learn_sigma: bool = False
    """Keep sigma at the root of the mean squared error at posterior samples, its maximum of the likelihood."""
    learning_rate: float = 1e-4
    """Of the decoder and the encoder (Adam, betas 0.5 and 0.999)."""
    ratio_learning_rate: float = 2e-5
    decay: float = 0.998
    """Factor on both learning rates every epoch."""
    average: float = 0.999
    """Decay of the moving averages of weights: the decoder's and encoder's that are returned, each stage's kept."""
    evaluate_every: int = 250
    patience: int = 3
    held_out: int = 500
    """Images, and as many particles, on which gains are measured: they train nothing."""
    mixed_precision: bool = False
    """bfloat16 in the generator, by torch's autocast: meant for CUDA. Weights and densities keep their precision."""

    def __post_init__(self) -> None:
        """Raise :class:`LatentPriorError` for settings that nothing can be learned with."""
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
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise LatentPriorError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.precondition and self.posterior_start != "encoder":
            raise LatentPriorError("precondition takes its scales from the encoder: set posterior_start to 'encoder'")

    def check(self, images: int, *, encoder: bool = True, processes: int = 1) -> None:
        """Raise :class:`LatentPriorError` where there is too little to learn from or with.

        ``images`` must be enough to hold some out and learn from others, ``encoder`` there to start chains from,
        and ``processes`` able to share a batch.
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
    """How decoder and encoder are learned before there is a prior."""

    kind: Literal["vae", "ae"] = "vae"
    """``vae``: the evidence lower bound under N(0, I); ``ae``: squared error with noise on the latents."""
    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 1e-3
    """Of Adam, falling to zero on a cosine."""
    learn_sigma: bool = True
    """``vae``: keep sigma at the root of the mean squared error, where the bound is highest, instead of fixed."""
    noise: float = 0.1
    """``ae``: standard deviation of the noise on latents, which the penalty keeps from growing."""
    latent_penalty: float = 1e-3
    """``ae``: weight of half the squared norm of latents beside the squared error."""
    weight_decay: float = 0.0
    """Of the decoder (decoupled from Adam)."""
    average: float = 0.999

    def __post_init__(self) -> None:
        """Raise :class:`LatentPriorError` for settings that nothing can be learned with."""
        if self.kind not in ("vae", "ae"):
            raise LatentPriorError(f"unknown kind {self.kind!r}: choose vae or ae")
        if min(self.steps, self.batch_size) < 1 or self.noise < 0 or self.latent_penalty < 0:
            raise LatentPriorError("steps and batch_size must be 1 or more, noise and latent_penalty 0 or more")
        if not 0 < self.learning_rate < math.inf:
            raise LatentPriorError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.average <= 1:
            raise LatentPriorError(f"average must be from 0 to 1, got {self.average}")
