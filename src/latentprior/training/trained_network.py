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
    """A network that is being learned, its optimiser (Adam or AdamW) and the moving average of its weights.

    ``count`` is the number of updates that the first weights stand for in the average: 0 where they are random.
    """

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
