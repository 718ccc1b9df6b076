"""Independent marginals, each a kernel estimate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import LatentPriorError
from .base import FIT_ROWS, LOG_2PI, Base, device_of, normal_noise

__all__ = ["CopulaBase"]


class CopulaBase(Base):
    r"""Independent smooth marginals, :math:`p_0(u) = \prod_j p_j(u_j)`: the ladder then learns the copula.

    Each marginal is an equal mixture of normals at its quantiles, each as wide as the gap to its neighbours:
    a kernel estimate whose bandwidth follows the data.

    Arguments
    ---------
    centers, widths : ``(d, M)``.
    """

    name = "copula"
    centers: Tensor
    widths: Tensor

    def __init__(self, centers: Tensor, widths: Tensor) -> None:
        super().__init__()
        self.register_buffer("centers", centers)
        self.register_buffer("widths", widths)

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CopulaBase:
        if tensors["centers"].shape != tensors["widths"].shape:
            raise ValueError("the copula's shapes differ")
        return cls(tensors["centers"], tensors["widths"])

    @property
    def dim(self) -> int:
        return len(self.centers)

    @classmethod
    def fit(cls, train: Tensor, *, quantiles: int = 64) -> CopulaBase:
        """Place the kernels of every coordinate at the mid-quantiles of ``train`` ``(n, d)``.

        Raises :class:`LatentPriorError` for a single row, which has no spread.
        """
        x = train[:FIT_ROWS].cpu().double()
        if len(x) < 2:
            raise LatentPriorError(
                f"marginals need at least 2 rows to learn from, got {len(x)}: give more latents or use base='normal'"
            )
        m = max(1, min(quantiles, len(x) // 4))
        levels = (torch.arange(m, dtype=torch.float64) + 0.5) / m
        centers = torch.quantile(x, levels, dim=0).T.contiguous()
        spread = x.std(0, correction=0).clamp_min(1e-6)[:, None]
        if m == 1:
            return cls(centers, spread)
        gaps = centers.diff(dim=1)
        near = torch.cat([gaps[:, :1], torch.maximum(gaps[:, 1:], gaps[:, :-1]), gaps[:, -1:]], 1)
        return cls(centers, torch.maximum(near, 0.02 * spread))

    def _terms(self, u: Tensor) -> tuple[Tensor, Tensor]:
        y = (u[:, :, None] - self.centers) / self.widths
        return y, -0.5 * y.square() - self.widths.log() - 0.5 * LOG_2PI - math.log(self.centers.shape[1])

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.cat([torch.logsumexp(self._terms(b)[1], 2).sum(1) for b in u.split(self._rows())])

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        for block in u.split(self._rows()):
            y, terms = self._terms(block)
            marginal = torch.logsumexp(terms, 2)
            values.append(marginal.sum(1))
            grads.append(-((terms - marginal[:, :, None]).exp() * y / self.widths).sum(2))
        return torch.cat(values), torch.cat(grads)

    def _rows(self) -> int:
        return max(64, (1 << 22) // self.centers.numel())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        d, m = self.centers.shape
        pick = torch.randint(m, (n, d), generator=generator, device=device_of(generator)).to(self.centers.device)
        coordinate = torch.arange(d, device=self.centers.device)
        noise = normal_noise((n, d), self.centers, generator)
        return self.centers[coordinate, pick] + self.widths[coordinate, pick] * noise
