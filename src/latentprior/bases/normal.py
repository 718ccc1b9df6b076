"""The standard normal: the Gaussian of the same moments, in standardised coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LOG_2PI, Base, normal_noise

__all__ = ["NormalBase"]


class NormalBase(Base):
    r"""The standard normal :math:`\log p_0(u) = -\frac12 \|u\|^2 - \frac d2 \log 2\pi`: the fitted Gaussian."""

    name = "normal"
    zero: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(dim, dtype=torch.float64))

    def log_prob(self, u: Tensor) -> Tensor:
        return -0.5 * (u.square().sum(1) + u.shape[1] * LOG_2PI)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(u), -u

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return normal_noise((n, len(self.zero)), self.zero, generator)
