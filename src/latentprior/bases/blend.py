"""Two bases in equal shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Base, device_of

__all__ = ["BlendBase"]


class BlendBase(Base):
    r"""Half of one base and half of another, :math:`\log\frac12(p_a(u) + p_b(u))`: covers what either covers."""

    name = "blend"

    def __init__(self, first: Base, second: Base) -> None:
        super().__init__()
        self.first, self.second = first, second

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.logaddexp(self.first.log_prob(u), self.second.log_prob(u)) - math.log(2)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        (a, grad_a), (b, grad_b) = self.first.log_prob_and_grad(u), self.second.log_prob_and_grad(u)
        share = torch.sigmoid(a - b)[:, None]
        return torch.logaddexp(a, b) - math.log(2), share * grad_a + (1 - share) * grad_b

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        coin = torch.rand(n, generator=generator, device=device_of(generator)) < 0.5
        rows = torch.cat(
            [self.first.sample(int(coin.sum()), generator), self.second.sample(int((~coin).sum()), generator)]
        )
        return rows[torch.cat([coin.nonzero(), (~coin).nonzero()]).flatten().argsort().to(rows.device)]
