"""The Gaussian mixture of low-rank covariances, for many coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import LOG_2PI
from .em import Moments
from .full_mixture import GaussianMixtureBase
from .mixture_base import MixtureBase, Plan, members_of

__all__ = ["LowRankMixtureBase"]

RANK = 64
MOST_COMPONENTS = 16
ITERATIONS = 10
SHRINKAGE_ROWS = 4
"""Covariances are shrunk by so many times d rows."""


class LowRankMixtureBase(MixtureBase):
    r"""A Gaussian mixture whose covariances differ from a multiple of the identity in r directions each.

    .. math:: \Sigma_k = \sigma_k^2 I + V_k (\Lambda_k - \sigma_k^2 I) V_k^\top,

    :math:`V_k` orthonormal ``(d, r)``. With :math:`q_k = V_k^\top (u - m_k)` the quadratic form is
    :math:`\|u - m_k\|^2 / \sigma_k^2 + \sum_j (\lambda_{kj}^{-1} - \sigma_k^{-2}) q_{kj}^2`, which takes r / d of the
    multiplications that full covariances take. Of mixtures of probabilistic principal component analysers (Tipping and
    Bishop 1999) it differs in that variances along :math:`V_k` may also lie below :math:`\sigma_k^2`: rows are
    standardised, so that a component is as often narrower than all of them as it is wider.

    Arguments
    ---------
    weights, means : ``(K,)`` and ``(K, d)``.
    vectors, values, noise : :math:`V_k` ``(K, d, r)``, :math:`\lambda_k` ``(K, r)`` and :math:`\sigma_k^2` ``(K,)``.
    members : of how many mixtures this is the average.
    """

    name = "gmm-lowrank"
    vectors: Tensor
    values: Tensor
    noise: Tensor
    excess: Tensor

    def __init__(
        self, weights: Tensor, means: Tensor, vectors: Tensor, values: Tensor, noise: Tensor, *, members: int = 1
    ) -> None:
        super().__init__()
        self.members = members
        _, d, r = vectors.shape
        log_weights = weights.log() - weights.sum().log()
        log_det = values.log().sum(1) + (d - r) * noise.log()
        self.register_buffer("means", means)
        self.register_buffer("vectors", vectors.contiguous())
        self.register_buffer("values", values)
        self.register_buffer("noise", noise)
        self.register_buffer("log_weights", log_weights)
        self.register_buffer("offset", torch.einsum("kdr,kd->rk", vectors, means).reshape(-1))
        self.register_buffer("excess", (1 / values - 1 / noise[:, None]).T.contiguous())
        self.register_buffer("constant", log_weights - 0.5 * (log_det + d * LOG_2PI))
        # A rearrangement of the vectors: nothing to save.
        arranged = vectors.permute(1, 2, 0).reshape(d, -1).contiguous()
        self.register_buffer("projection", arranged, persistent=False)

    @classmethod
    def of(cls, moments: Moments, rank: int = RANK) -> LowRankMixtureBase:
        r"""Covariances by their eigenvalues farthest from the rest, by :math:`\lambda / s - 1 - \log(\lambda / s)`."""
        values, vectors = (x.double() for x in torch.linalg.eigh(moments.covariances.float()))
        values = values.clamp_min(1e-6)
        share = values / values.mean(1, keepdim=True)
        order = (share - 1 - share.log()).argsort(1, descending=True)
        values = values.gather(1, order)
        vectors = vectors.gather(2, order[:, None, :rank].expand(-1, vectors.shape[1], -1))
        # float32 finds directions well enough and in half the time; the density needs them orthonormal to its own type.
        vectors = torch.linalg.qr(vectors).Q
        rest = values[:, rank:] if rank < values.shape[1] else values
        return cls(moments.weights, moments.means, vectors, values[:, :rank], rest.mean(1))

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LowRankMixtureBase:
        k, d, r = tensors["vectors"].shape
        shapes = {"means": (k, d), "log_weights": (k,), "values": (k, r), "noise": (k,)}
        if any(tensors[part].shape != shape for part, shape in shapes.items()):
            raise ValueError("the mixture's shapes differ")
        parts = (tensors[part] for part in ("means", "vectors", "values", "noise"))
        return cls(tensors["log_weights"].exp(), *parts, members=members_of(config, k))._filled(tensors)

    @classmethod
    def plan(cls, n: int, d: int, coarse: bool = False) -> Plan:
        """Try 8 components, then 16, of 10 d rows each at least; covariances are shrunk by 4 d rows."""
        limit = min(MOST_COMPONENTS, n // (10 * d))
        sizes = [1, *(k for k in (min(8, limit), 16) if 1 < k <= limit)]
        return Plan(sizes, ITERATIONS, prior_rows=(SHRINKAGE_ROWS * d,), patience=1)

    @classmethod
    def averaged(cls, members: Sequence[LowRankMixtureBase]) -> LowRankMixtureBase:
        parts = zip(*((m.log_weights.exp(), m.means, m.vectors, m.values, m.noise) for m in members), strict=True)
        return cls(*map(torch.cat, parts), members=len(members))

    def leading(self, k: int) -> LowRankMixtureBase:
        parts = (self.log_weights.exp(), self.means, self.vectors, self.values, self.noise)
        return LowRankMixtureBase(*(part[:k] for part in parts))

    def widened(self, factors: tuple[float, ...]) -> LowRankMixtureBase:
        m = len(factors)
        wider = torch.cat([f**2 * self.values for f in factors]), torch.cat([f**2 * self.noise for f in factors])
        weights = self.log_weights.exp().repeat(m)
        return LowRankMixtureBase(weights, self.means.repeat(m, 1), self.vectors.repeat(m, 1, 1), *wider)

    def full(self) -> GaussianMixtureBase:
        """The same mixture with full covariances."""
        eye = torch.eye(self.means.shape[1], dtype=self.means.dtype, device=self.means.device)
        along = (self.values - self.noise[:, None])[:, None] * self.vectors
        covariances = self.noise[:, None, None] * eye + along @ self.vectors.mT
        return GaussianMixtureBase(self.log_weights.exp(), self.means, torch.linalg.cholesky(covariances))

    def project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates :math:`q_k` ``(n, r, K)`` and log terms ``(n, K)``; components last, so that sums are fast."""
        q = torch.addmm(-self.offset, u, self.projection).view(u.shape[0], self.values.shape[1], self.n_components)
        distance = u.square().sum(1, keepdim=True) + torch.addmm(self.means.square().sum(1), u, self.means.T, alpha=-2)
        return q, self.constant - 0.5 * (distance / self.noise + (q.square() * self.excess).sum(1))

    def pull_back(self, u: Tensor, residuals: Tensor, by_term: Tensor) -> Tensor:
        by_noise = by_term / self.noise
        outside = u * by_noise.sum(1, keepdim=True) - by_noise @ self.means
        return -outside - (residuals * self.excess * by_term[:, None]).flatten(1) @ self.projection.T

    def coloured(self, k: int, noise: Tensor) -> Tensor:
        level = self.noise[k].sqrt()
        return level * noise + ((noise @ self.vectors[k]) * (self.values[k].sqrt() - level)) @ self.vectors[k].T
