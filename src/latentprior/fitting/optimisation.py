"""A ratio network while it is learned: its optimisers, and the moving average of its weights that is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..density.ratios import BoundedRatio
from .optimizers import REMEMBERED, NaturalGradient, build_optimizers
from .settings import StageSettings

__all__ = ["Optimisation"]

WARM_UP_STEPS = 50
AVERAGE_DELAY_STEPS = 9
"""The average of the first n steps has a decay of n / (n + 9), so that it forgets the initial weights."""


class Optimisation:
    """The weights of a ratio network, their optimisers under a cosine schedule, their average, and the best average."""

    def __init__(
        self, ratio: BoundedRatio, settings: StageSettings, learning_rate: float, half_precision: bool
    ) -> None:
        self.ratio, self.settings, self.learning_rate = ratio, settings, learning_rate
        self.parameters = {name: p for name, p in ratio.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.best = {name: p.clone() for name, p in self.average.items()}
        self.weight_decay = settings.decay(1.0)
        hidden = ratio.network.hidden_matrices() if settings.optimizer == "muon" else []
        form = ratio.network.form_parameters() if settings.optimizer == "natural" else ()
        self.optimizers = build_optimizers(
            self.parameters.values(), hidden, form, learning_rate, self.weight_decay, halved=half_precision
        )

    @property
    def natural_gradients(self) -> list[NaturalGradient]:
        """The optimisers that need the metric of the rows."""
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, NaturalGradient)]

    def schedule(self, step: int, progress: float) -> None:
        """Set rates for a step, ``progress`` from 0 to 1 along the cosine."""
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * progress))
                group["weight_decay"] = self.weight_decay

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Differentiate a loss; the gradients may be changed in place before :meth:`update`."""
        self.ratio.zero_grad()
        loss.backward()
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Move the weights by their gradients, and the average towards the weights."""
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(self.settings.average, steps_done / (steps_done + AVERAGE_DELAY_STEPS))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)

    def adapt_decay(self, remembered: float) -> None:
        """Follow the weight decay that the settings ask for where this share of the gain is missing on held-out rows.

        The decay rises to its target at once, and falls halfway to it at each evaluation.
        """
        target = self.settings.decay(remembered)
        self.weight_decay = max(target, (self.weight_decay + target) / 2)

    def averaged(self, u: Tensor) -> Tensor:
        """Log ratios ``(n,)`` under the averaged weights."""
        parts = [torch.func.functional_call(self.ratio, self.average, (block,)) for block in u.split(8192)]
        return torch.cat(parts)

    def keep_best(self) -> None:
        """Remember the average as the best so far."""
        self.best = {name: p.clone() for name, p in self.average.items()}

    @torch.no_grad()
    def finish(self) -> BoundedRatio:
        """Put the best average in place and fix the network."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])
        return self.ratio.eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """Weights, averages and the optimisers' moments, for :meth:`restore`."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"now.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average[name]
            tensors[f"best.{name}"] = self.best[name]
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was taken."""
        names = {parameter: name for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"now.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            self.best[name].copy_(tensors[f"best.{name}"])
        for optimizer in self.optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                name = names[parameter]
                moments: dict[str, Any] = {
                    key: tensors[f"optimizer.{key}.{name}"].clone().to(parameter.device)
                    for key in REMEMBERED[type(optimizer)]
                }
                optimizer.state[parameter] = moments
