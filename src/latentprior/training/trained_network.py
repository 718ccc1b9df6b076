"""A network that is being learned, with everything that its next step depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..runtime.processes import ALONE, Processes
from ..runtime.run import State

__all__ = ["MovingAverage", "TrainedNetwork", "cosine_rate", "sigma_of", "warmed_up_decay"]

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
"""What torch's Adam and AdamW remember of a parameter."""
WARM_UP_UPDATES = 9
LEAST_SIGMA = 1e-3


class MovingAverage:
    r"""The moving average of the weights of a network, :math:`\bar w_i = d_i\,\bar w_{i-1} + (1 - d_i)\,w_i`.

    It begins with the weights of the network, which stand for ``count`` updates: 0 where they are random.
    """

    def __init__(self, module: torch.nn.Module, decay: float, count: int = 0) -> None:
        self.decay, self.count = decay, count
        self.weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Take the weights of the network into the average."""
        self.count += 1
        decay = warmed_up_decay(self.decay, self.count)
        for name, parameter in module.named_parameters():
            self.weights[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Replace the weights of the network by their average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.weights[name])


class TrainedNetwork:
    """A network that is being learned, its optimiser (Adam or AdamW) and the moving average of its weights."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, decay: float, count: int = 0) -> None:
        self.module, self.optimizer = module, optimizer
        self.average = MovingAverage(module, decay, count)

    def descend(self, loss: Tensor, rate: float, processes: Processes = ALONE) -> None:
        """Take one step down the gradient of a loss, averaged over the processes, and update the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        processes.average([p.grad for p in self.module.parameters() if p.grad is not None])
        self.optimizer.step()
        self.average.update(self.module)

    def finish(self) -> None:
        """Replace the weights by their average, and end the training mode."""
        self.average.copy_to(self.module)
        self.module.requires_grad_(False).eval()

    def state(self) -> State:
        """Return what :meth:`restore` needs."""
        tensors = {f"buffer.{name}": value for name, value in self.module.named_buffers()}
        for name, parameter in self.module.named_parameters():
            tensors[f"now.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average.weights[name]
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        return {"averaged": self.average.count}, tensors

    @torch.no_grad()
    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was called; raises KeyError or RuntimeError for another network."""
        self.average.count = int(document["averaged"])
        for name, buffer in self.module.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        for name, parameter in self.module.named_parameters():
            parameter.copy_(tensors[f"now.{name}"])
            self.average.weights[name].copy_(tensors[f"average.{name}"])
            keys = [key for key in ADAM_STATE if f"{key}.{name}" in tensors]
            self.optimizer.state.pop(parameter, None)
            if keys:
                # Adam counts its steps on the CPU.
                self.optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"].clone().to("cpu" if key == "step" else parameter.device)
                    for key in keys
                }


def cosine_rate(rate: float, step: int, steps: int) -> float:
    r"""Return the rate of step t of T on a cosine that falls to zero, :math:`\frac r2 (1 + \cos(\pi t / T))`."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmed_up_decay(decay: float, updates: int) -> float:
    r"""Return :math:`d_i = \min(d, i / (i + 9))`, so that an average forgets what it began with.

    It then spans a tenth of the i updates so far.
    """
    return min(decay, updates / (updates + WARM_UP_UPDATES))


def sigma_of(error: float) -> float:
    """Return the sigma at which the likelihood of pixels with this mean squared error is highest."""
    return max(LEAST_SIGMA, math.sqrt(error))
