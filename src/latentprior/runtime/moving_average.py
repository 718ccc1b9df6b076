"""The moving average of a network's weights."""

from __future__ import annotations

import torch

__all__ = ["MovingAverage"]

WARM_UP_UPDATES = 9
"""At update i the decay is at most i / (i + 9): the average then spans a tenth of the updates so far, and forgets the
weights that it began with."""


class MovingAverage:
    r"""The exponential moving average of the weights of a network.

    .. math:: \bar w_i = d_i\,\bar w_{i-1} + (1 - d_i)\,w_i, \qquad d_i = \min\left(d, \frac{i}{i + 9}\right)

    Parameters
    ----------
    module : torch.nn.Module
        The network; the average begins with its weights.
    decay : float
        The decay d, from 0 to 1.
    count : int
        Number of updates that the first weights stand for: 0 where they are random.
    """

    def __init__(self, module: torch.nn.Module, decay: float, count: int = 0) -> None:
        self.decay, self.count = decay, count
        self.weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Take the weights of the network into the average.

        Parameters
        ----------
        module : torch.nn.Module
            The network.
        """
        self.count += 1
        decay = min(self.decay, self.count / (self.count + WARM_UP_UPDATES))
        for name, parameter in module.named_parameters():
            self.weights[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Replace the weights of the network by their average.

        Parameters
        ----------
        module : torch.nn.Module
            The network.
        """
        for name, parameter in module.named_parameters():
            parameter.copy_(self.weights[name])
