"""The Gaussian mixture of full covariances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import LOG_2PI
from .em import Moments
from .mixture_base import LEAST_RISE_NATS, MixtureBase, Plan, members_of

__all__ = ["GaussianMixtureBase"]

MOST_COMPONENTS = 64
MOST_COMPONENTS_COARSE = 32
"""Most components of a coarse mixture of few coordinates: stages read each of them, and more would slow their steps."""
MOST_PRODUCTS = int(2.4e10)
"""Multiplications in an iteration of EM, beyond which no more components are tried."""
SHRUNK_COORDINATES = 32
"""Coordinates from which on covariances are shrunk, since rows are few for the parameters they have."""
LEAST_RISE_COARSE_NATS = 0.2
"""What one more mixture must add to the average of a coarse base of few coordinates: stages learn the rest sooner."""
ITERATIONS = 30
"""Most iterations of EM."""


class GaussianMixtureBase(MixtureBase):
    r"""A Gaussian mixture, :math:`\log p_0(u) = \log \sum_k \pi_k \mathcal N(u; m_k, \Sigma_k)`.

    With :math:`y_k = L_k^{-1}(u - m_k)` for all k from one matrix product, the gradient is
    :math:`-\sum_k r_k(u) L_k^{-\top} y_k`, r the responsibilities.

    Arguments
    ---------
    weights, means, cholesky : ``(K,)``, ``(K, d)``, ``(K, d, d)`` lower factors of the covariances.
    members : of how many mixtures this is the average.
    """

    name = "gmm"
    cholesky: Tensor

    def __init__(self, weights: Tensor, means: Tensor, cholesky: Tensor, *, members: int = 1) -> None:
        super().__init__()
        self.members = members
        k, d = means.shape
        eye = torch.eye(d, dtype=means.dtype, device=means.device).expand(k, d, d)
        inverse = torch.linalg.solve_triangular(cholesky, eye, upper=False)
        log_weights = weights.log() - weights.sum().log()
        log_det = cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        self.register_buffer("means", means)
        self.register_buffer("cholesky", cholesky.contiguous())
        self.register_buffer("log_weights", log_weights)
        self.register_buffer("projection", inverse.permute(2, 1, 0).reshape(d, d * k).contiguous())
        self.register_buffer("offset", torch.einsum("kij,kj->ik", inverse, means).reshape(-1))
        self.register_buffer("constant", log_weights - log_det - 0.5 * d * LOG_2PI)

    @classmethod
    def of(cls, moments: Moments) -> GaussianMixtureBase:
        """The mixture of these moments."""
        return cls(moments.weights, moments.means, moments.cholesky())

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GaussianMixtureBase:
        k, d = tensors["means"].shape
        if tensors["cholesky"].shape != (k, d, d) or tensors["log_weights"].shape != (k,):
            raise ValueError("the mixture's shapes differ")
        weights = tensors["log_weights"].exp()
        return cls(weights, tensors["means"], tensors["cholesky"], members=members_of(config, k))._filled(tensors)

    @classmethod
    def plan(cls, n: int, d: int, coarse: bool = False) -> Plan:
        """Double K up to 64, 16 (d + 1) rows a component, or a fixed amount of work an iteration of EM.

        From 32 coordinates on covariances are shrunk, by d rows or by less. Below, a coarse mixture has at most 32
        components, and one more mixture must raise the average by 0.2 nats.
        """
        coarse = coarse and d < SHRUNK_COORDINATES
        limit = MOST_COMPONENTS_COARSE if coarse else MOST_COMPONENTS
        most = max(1, min(limit, n // (16 * (d + 1)), MOST_PRODUCTS // (n * (d * d + 60 * d))))
        sizes = [2**i for i in range(most.bit_length())]
        rise = LEAST_RISE_COARSE_NATS if coarse else LEAST_RISE_NATS
        prior_rows = (d, d / 4, d / 16, 0) if d >= SHRUNK_COORDINATES else (0,)
        return Plan(sizes, ITERATIONS, prior_rows, least_rise=rise, average_is_dear=True)

    @classmethod
    def averaged(cls, members: Sequence[GaussianMixtureBase]) -> GaussianMixtureBase:
        parts = zip(*((m.log_weights.exp(), m.means, m.cholesky) for m in members), strict=True)
        weights, means, cholesky = map(torch.cat, parts)
        return cls(weights, means, cholesky, members=len(members))

    def leading(self, k: int) -> GaussianMixtureBase:
        return GaussianMixtureBase(self.log_weights[:k].exp(), self.means[:k], self.cholesky[:k])

    def widened(self, factors: tuple[float, ...]) -> GaussianMixtureBase:
        m = len(factors)
        weights = self.log_weights.exp().repeat(m)
        cholesky = torch.cat([factor * self.cholesky for factor in factors])
        return GaussianMixtureBase(weights, self.means.repeat(m, 1), cholesky)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised residuals ``(n, d, K)`` and log terms ``(n, K)``; components last, so that sums are fast."""
        y = torch.addmm(-self.offset, u, self.projection).view(u.shape[0], u.shape[1], self.n_components)
        return y, self.constant - 0.5 * y.square().sum(1)

    def pull_back(self, u: Tensor, residuals: Tensor, by_term: Tensor) -> Tensor:
        return -(residuals * by_term[:, None]).flatten(1) @ self.projection.T

    def coloured(self, k: int, noise: Tensor) -> Tensor:
        return noise @ self.cholesky[k].T
