"""How a stage is learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..errors import LatentPriorError

__all__ = ["StageSettings", "multiplies_bfloat16"]

Precision = Literal["auto", "float32", "bfloat16"]
Optimization = Literal["muon", "adamw", "natural"]
LEAST_DECAY, MOST_DECAY = 0.1, 0.5
"""Weight decays between which the default moves."""
FEW_REMEMBERED, MANY_REMEMBERED = 0.1, 0.25
"""Shares of the gain that are missing on held-out rows at which the least and the most decay begin."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for matrix products of bfloat16, by which they are faster than float32's."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)


@dataclass(frozen=True)
class StageSettings:
    """How a stage is learned. The defaults were chosen on latents of 16 to 128 coordinates and serve every set.

    Parameters
    ----------
    ratio : str
        The network: ``residual``, ``mlp``, ``quadratic`` or ``conv``. ``auto`` is ``conv`` for latents (C, H, W) that
        are 4 or more wide, else ``residual``. :func:`~latentprior.refine` takes ``decoded``, which reads what a decoder
        makes of the latents.
    width, depth : int
        Units of a hidden layer, and number of hidden layers, residual blocks or strided convolutions.
    bound : float
        Largest log ratio of one stage, in nats.
    mixture_features : bool
        Whether the network also reads where a row stands in the ladder's mixture.
    steps : int
        Most steps of a stage.
    batch_size : int
        Rows and particles a step; an eighth of the rows where that is less, but 64 at least.
    odds : float
        Weight of the particles in the loss, as if there were so many of them to a row of latents. A higher value lets a
        given number of rows teach more, since particles can be had anew; a lower one suits particles that are few.
    optimizer : {"muon", "adamw", "natural"}
        ``muon`` is orthogonalised momentum for hidden layers and AdamW for the rest; ``adamw`` is AdamW for all;
        ``natural`` are natural gradients, for a ``quadratic`` ratio only.
    learning_rate : float
        Highest rate of the cosine schedule.
    weight_decay : float, optional
        Bounds how steep hidden layers can become. A lower value fits large sets better, a higher one prevents
        overfitting of small ones. By default it moves between 0.1 and 0.5: it is the higher, the larger a share of the
        gain on rows that were learned from is missing on held-out rows.
    average : float
        Decay of the exponential moving average of weights that is evaluated and kept.
    patience : int
        Evaluations without a better held-out loss after which a stage ends.
    precision : {"auto", "float32", "bfloat16"}
        Floating type of the matrix products in training; ``auto`` is bfloat16 where the processor multiplies it
        natively. Weights, their average, gains and the learned ratio are in the prior's dtype.
    waypoints : int
        How many of the first stages tell neighbouring waypoints between base and target apart, for targets too far from
        the base for one classifier (Rhodes, Xu and Gutmann, NeurIPS 2020); in one process only.

    Raises
    ------
    LatentPriorError
        For settings that no stage can be learned with.
    """

    ratio: str = "auto"
    width: int = 256
    depth: int = 2
    bound: float = 5.0
    mixture_features: bool = True
    steps: int = 3000
    batch_size: int = 1024
    odds: float = 16.0
    optimizer: Optimization = "muon"
    learning_rate: float = 3e-3
    weight_decay: float | None = None
    average: float = 0.999
    patience: int = 3
    precision: Precision = "auto"
    waypoints: int = 0

    def __post_init__(self) -> None:
        """Raise :class:`LatentPriorError` for settings that no stage can be learned with."""
        if min(self.width, self.batch_size, self.patience) < 1 or min(self.depth, self.steps) < 0:
            raise LatentPriorError("width, batch_size and patience must be 1 or more, depth and steps 0 or more")
        if self.waypoints < 0:
            raise LatentPriorError(f"waypoints must be 0 or more, got {self.waypoints}")
        if not all(0 < value < math.inf for value in (self.bound, self.odds, self.learning_rate)):
            raise LatentPriorError("bound, odds and learning_rate must be positive and finite")
        if self.precision not in get_args(Precision):
            raise LatentPriorError(f"unknown precision {self.precision!r}: choose {', '.join(get_args(Precision))}")
        if self.optimizer not in get_args(Optimization):
            raise LatentPriorError(f"unknown optimizer {self.optimizer!r}: choose {', '.join(get_args(Optimization))}")
        if self.optimizer == "natural" and self.ratio != "quadratic":
            raise LatentPriorError('optimizer="natural" learns quadratic forms alone: set ratio="quadratic" with it')
        if not 0 <= (self.weight_decay or 0.0) < math.inf or not 0 <= self.average <= 1:
            raise LatentPriorError("weight_decay must be 0 or more and finite, average from 0 to 1")

    def decay(self, remembered: float) -> float:
        """Weight decay where a share of the gain is missing on held-out rows.

        Parameters
        ----------
        remembered : float
            That share.
        """
        if self.weight_decay is not None:
            return self.weight_decay
        share = (remembered - FEW_REMEMBERED) / (MANY_REMEMBERED - FEW_REMEMBERED)
        return LEAST_DECAY + (MOST_DECAY - LEAST_DECAY) * min(1.0, max(0.0, share))

    def spec(self, event_shape: tuple[int, ...], features: bool = False) -> dict[str, Any]:
        """The network's specification for :func:`~latentprior.density.ratios.build_ratio`.

        Parameters
        ----------
        event_shape : tuple of int
            Shape of one latent.
        features : bool
            Whether there is a mixture that the network may read features of.
        """
        spatial = len(event_shape) == 3 and min(event_shape[1:]) >= 4
        kind = self.ratio if self.ratio != "auto" else ("conv" if spatial else "residual")
        width = self.width // 4 if kind == "conv" else self.width
        return {
            "kind": kind,
            "event_shape": list(event_shape),
            "width": width,
            "depth": self.depth,
            "bound": self.bound,
            "features": features and self.mixture_features,
        }
