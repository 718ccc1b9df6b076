"""The Gaussian mixture: its density, its draws, and its fit by EM."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..errors import LatentPriorError
from .base import FIT_ROWS, LOG_2PI, Base, device_of, normal_noise

__all__ = ["GaussianMixtureBase"]

MIXTURE_WORK = 6e9
"""Multiplications in an iteration of EM, beyond which no more components are tried."""


class GaussianMixtureBase(Base):
    r"""A Gaussian mixture, :math:`\log p_0(u) = \log \sum_k \pi_k \mathcal N(u; m_k, \Sigma_k)`.

    With :math:`y_k = L_k^{-1}(u - m_k)` for all k from one matrix product, the gradient is
    :math:`-\sum_k r_k(u) L_k^{-\top} y_k`, r the responsibilities.

    Arguments
    ---------
    weights, means, cholesky : ``(K,)``, ``(K, d)``, ``(K, d, d)`` lower factors of the covariances.
    """

    name = "gmm"
    means: Tensor
    cholesky: Tensor
    log_weights: Tensor
    projection: Tensor
    offset: Tensor
    constant: Tensor

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

    @property
    def n_components(self) -> int:
        """Number K of components."""
        return len(self.means)

    @classmethod
    def fit(
        cls,
        train: Tensor,
        validation: Tensor,
        *,
        n_components: int | None = None,
        generator: torch.Generator | None = None,
    ) -> GaussianMixtureBase:
        """Fit by scikit-learn's EM; ``n_components`` is chosen by held-out log density unless given.

        The search multiplies K by 4 (1, 4, 16, ...) until the held-out log density stops rising by 0.01 nats, and
        then tries the K between; or until an iteration of EM would pass a fixed amount of work. EM itself stops
        at 0.003 nats an iteration, since the ladder mends what a rough mixture leaves.
        """
        from sklearn import config_context
        from sklearn.mixture import GaussianMixture

        n, d = train.shape
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device_of(generator)))
        if n > FIT_ROWS:
            train, n = train[:FIT_ROWS], FIT_ROWS
        x = train.cpu().float().numpy()

        def fitted(k: int) -> tuple[float, GaussianMixtureBase]:
            if k > n:
                raise LatentPriorError(f"a mixture of {k} components needs at least {k} rows, got {n}")
            mixture = GaussianMixture(k, tol=3e-3, max_iter=60, reg_covar=1e-4, random_state=seed)
            # Under a caller's array dispatch, scikit-learn refuses to start EM from k-means.
            with warnings.catch_warnings(), config_context(array_api_dispatch=False):
                warnings.simplefilter("ignore")
                mixture.fit(x)
            weights, means, covariances = (
                torch.as_tensor(v, dtype=torch.float64)
                for v in (mixture.weights_, mixture.means_, mixture.covariances_)
            )
            made = cls(weights.clamp_min(1e-12), means, torch.linalg.cholesky(covariances))
            return float(made.log_prob(validation.cpu().double()).mean()), made

        if n_components is not None:
            return fitted(n_components)[1]
        if n < 2:
            one = torch.ones(1, dtype=torch.float64)
            return cls(one, torch.zeros(1, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)[None])
        k, best = 1, fitted(1)
        while 4 * k * n * (d * d + 60 * d) <= MIXTURE_WORK and 8 * k * (d + 1) <= n:
            k *= 4
            candidate = fitted(k)
            if candidate[0] < best[0] + 0.01:
                middle = fitted(k // 2)
                return max(best, candidate, middle, key=lambda pair: pair[0])[1]
            best = candidate
        return best[1]

    def widened(self, factors: tuple[float, ...]) -> GaussianMixtureBase:
        """Equal shares of this mixture with its components' scales multiplied by each factor: halos around modes."""
        m = len(factors)
        weights = self.log_weights.exp().repeat(m)
        cholesky = torch.cat([factor * self.cholesky for factor in factors])
        return GaussianMixtureBase(weights, self.means.repeat(m, 1), cholesky)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised residuals ``(n, d, K)`` and log terms ``(n, K)``; components last, so that sums are fast."""
        y = torch.addmm(-self.offset, u, self.projection).view(len(u), u.shape[1], self.n_components)
        return y, self.constant - 0.5 * y.square().sum(1)

    def log_terms(self, u: Tensor) -> Tensor:
        r""":math:`\log \pi_k \mathcal N(u; m_k, \Sigma_k)` of every component, ``(n, d) -> (n, K)``."""
        return torch.cat([self._project(block)[1] for block in u.split(self._rows())])

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.logsumexp(self.log_terms(u), 1)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        for block in u.split(self._rows()):
            y, terms = self._project(block)
            value = torch.logsumexp(terms, 1)
            # Denormal numbers would slow the matrix product down many times.
            weight = (terms - value[:, None]).clamp_min(-60).exp()
            values.append(value)
            grads.append(-(y * weight[:, None]).flatten(1) @ self.projection.T)
        return torch.cat(values), torch.cat(grads)

    def _rows(self) -> int:
        # What fits a core's cache.
        return max(64, (1 << 18) // self.projection.shape[1])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        device = device_of(generator)
        if n == 0:
            return self.means.new_zeros(0, self.means.shape[1])
        weights = self.log_weights.exp().to(device)
        which = torch.multinomial(weights, n, replacement=True, generator=generator).to(self.means.device)
        noise = normal_noise((n, self.means.shape[1]), self.means, generator)
        order = which.argsort(stable=True)
        parts = noise[order].split(torch.bincount(which, minlength=self.n_components).tolist())
        rows = torch.cat([m + e @ c.T for m, c, e in zip(self.means, self.cholesky, parts, strict=True)])
        return torch.empty_like(rows).index_copy_(0, order, rows)
