"""A network that is being learned, with everything that its next step depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..runtime.moving_average import MovingAverage
from ..runtime.processes import ALONE, Processes
from ..runtime.run import State

__all__ = ["TrainedNetwork", "cosine_rate"]

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
"""What torch's Adam and AdamW remember of a parameter."""


class TrainedNetwork:
    """A network that is being learned, its optimiser and the moving average of its weights.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    optimizer : torch.optim.Adam or torch.optim.AdamW
        The optimiser of its parameters.
    decay : float
        Decay of the moving average, from 0 to 1.
    count : int
        Number of updates that the first weights stand for in the average: 0 where they are random.
    """

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, decay: float, count: int = 0) -> None:
        self.module, self.optimizer = module, optimizer
        self.average = MovingAverage(module, decay, count)

    def descend(self, loss: Tensor, rate: float, processes: Processes = ALONE) -> None:
        """Take one step down the gradient of a loss, and take the new weights into the average.

        Parameters
        ----------
        loss : Tensor
            A scalar.
        rate : float
            Learning rate of this step.
        processes : Processes
            Those that take the step together, each with a loss of its own: gradients are averaged over them.
        """
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
        """Stand where :meth:`state` was called.

        Parameters
        ----------
        document : mapping
            The first part of the state.
        tensors : mapping of str to Tensor
            The second part of the state.

        Raises
        ------
        KeyError, RuntimeError
            For the state of another network.
        """
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
    r"""Return the learning rate of a step on a cosine schedule, :math:`\frac r2 (1 + \cos(\pi t / T))`.

    Parameters
    ----------
    rate : float
        The rate r of the first step.
    step : int
        Number t of steps that have been taken.
    steps : int
        Number T of all steps.

    Returns
    -------
    float
        The rate; it falls to zero.
    """
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
