"""The Gaussian mixture of full covariances."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import FIT_ROWS, LOG_2PI
from .em import Moments
from .mixtures import WORTH, WORTH_BELOW_STAGES, MixtureBase, Search, checked_components

__all__ = ["GaussianMixtureBase"]

MOST_COMPONENTS = 64
"""Of one mixture: more take over what the stages learn better."""
WORK = int(2.4e10)
"""Multiplications in an iteration of EM, beyond which no more components are tried."""
FEW = 32
"""Coordinates below which covariances need no shrinkage, and stages learn what an average gains sooner."""
ITERATIONS = 30
"""Of EM at most."""


class GaussianMixtureBase(MixtureBase):
    r"""A Gaussian mixture, :math:`\log p_0(u) = \log \sum_k \pi_k \mathcal N(u; m_k, \Sigma_k)`.

    With :math:`y_k = L_k^{-1}(u - m_k)` for all k from one matrix product, the gradient is
    :math:`-\sum_k r_k(u) L_k^{-\top} y_k`, r the responsibilities.

    Arguments
    ---------
    weights, means, cholesky : ``(K,)``, ``(K, d)``, ``(K, d, d)`` lower factors of the covariances.
    """

    name = "gmm"
    cholesky: Tensor
    projection: Tensor
    offset: Tensor

    def __init__(self, weights: Tensor, means: Tensor, cholesky: Tensor) -> None:
        super().__init__()
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
    def most_components(cls, n: int, d: int) -> int:
        """How many components the search may come to on ``n`` rows."""
        return min(MOST_COMPONENTS, n // (16 * (d + 1)), WORK // (n * (d * d + 60 * d)))

    @classmethod
    def fit(
        cls,
        train: Tensor,
        validation: Tensor,
        *,
        n_components: int | None = None,
        generator: torch.Generator | None = None,
        redraw: Callable[[], Tensor] | None = None,
        deadline: float | None = None,
        below_stages: bool = False,
    ) -> GaussianMixtureBase:
        r"""Fit by EM: one mixture of ``n_components``, or an average of several whose size the held-out rows choose.

        From 32 coordinates on covariances are shrunk by d rows, :meth:`~latentprior.bases.em.Moments.of`.
        The search doubles K until the held-out log density has twice not risen by 0.01 nats and two standard errors,
        K is 64, a component would have fewer than 16 (d + 1) rows, or an iteration of EM would pass a fixed amount of
        work. Mixtures of that size from other starts then join in equal shares, :math:`\frac1R \sum_r p^{(r)}(u)`,
        while the held-out log density rises by two standard errors and 0.05 nats, or 0.2 nats ``below_stages`` of
        fewer than 32 coordinates: an average varies less with the rows than its members do (Ormoneit and Tresp 1998),
        and makes every step of a stage slower. EM itself stops after three iterations without a
        rise of 0.004 nats, since averaging and the ladder mend what a rough mixture leaves.

        ``redraw`` gives new draws of the rows, where the latents are posteriors; each iteration of EM sees others.
        No mixture is begun that would not be done by the ``deadline`` (:func:`time.monotonic`), by the last one's time.

        Raises :class:`LatentPriorError` for fewer rows than components.
        """
        train = train[:FIT_ROWS]
        n, d = train.shape
        held_out, prior_rows = validation.to(train), d if d >= FEW else 0
        search = Search(redraw or (lambda: train), held_out, prior_rows, ITERATIONS, generator, deadline)
        if n_components is not None:
            return search.fitted(checked_components(n_components, n), cls.of)
        if n < 2:
            one = torch.ones(1, dtype=torch.float64, device=train.device)
            return cls(one, one.new_zeros(1, d), torch.eye(d, dtype=one.dtype, device=one.device)[None])
        sizes = [2**i for i in range(max(1, cls.most_components(n, d)).bit_length())]
        worth = WORTH_BELOW_STAGES if below_stages and d < FEW else WORTH
        return search.best(cls.of, sizes, patience=2, worth=worth)

    @classmethod
    def averaged(cls, members: Sequence[GaussianMixtureBase]) -> GaussianMixtureBase:
        parts = zip(*((m.log_weights.exp(), m.means, m.cholesky) for m in members), strict=True)
        weights, means, cholesky = map(torch.cat, parts)
        return cls(weights, means, cholesky)

    def widened(self, factors: tuple[float, ...]) -> GaussianMixtureBase:
        m = len(factors)
        weights = self.log_weights.exp().repeat(m)
        cholesky = torch.cat([factor * self.cholesky for factor in factors])
        return GaussianMixtureBase(weights, self.means.repeat(m, 1), cholesky)

    @property
    def residuals_per_row(self) -> int:
        return self.projection.shape[1]

    def project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised residuals ``(n, d, K)`` and log terms ``(n, K)``; components last, so that sums are fast."""
        y = torch.addmm(-self.offset, u, self.projection).view(u.shape[0], u.shape[1], self.n_components)
        return y, self.constant - 0.5 * y.square().sum(1)

    def pull_back(self, u: Tensor, residuals: Tensor, by_term: Tensor) -> Tensor:
        return -(residuals * by_term[:, None]).flatten(1) @ self.projection.T

    def coloured(self, k: int, noise: Tensor) -> Tensor:
        return noise @ self.cholesky[k].T
