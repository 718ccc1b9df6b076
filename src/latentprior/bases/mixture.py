"""The Gaussian mixture: its density, its draws, and its fit by EM."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import LatentPriorError
from .base import FIT_ROWS, LOG_2PI, Base, device_of, normal_noise
from .em import Mixture, expectation_maximisation

__all__ = ["GaussianMixtureBase"]

MOST_COMPONENTS = 64
"""Of one mixture: more take over what the stages learn better."""
WORK = int(2.4e10)
"""Multiplications in an iteration of EM, beyond which no more components are tried."""
ITERATIONS = 30
LEAST_RISE = 0.004
"""Nats an iteration below which EM ends."""
MEMBERS = 6
"""Most mixtures that are averaged."""


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
        redraw: Callable[[], Tensor] | None = None,
        deadline: float | None = None,
    ) -> GaussianMixtureBase:
        r"""Fit by EM: one mixture of ``n_components``, or an average of several whose size the held-out rows choose.

        The search doubles K until the held-out log density has twice not risen by 0.01 nats and two standard errors,
        K is 64, a component would have fewer than 16 (d + 1) rows, or an iteration of EM would pass a fixed amount of
        work. Mixtures of that size from other starts then join in equal shares, :math:`\frac1R \sum_r p^{(r)}(u)`,
        while the held-out log density rises by 0.05 nats and two standard errors: an average varies less with the
        rows than its members do (Ormoneit and Tresp 1998). EM itself stops after three iterations without a
        rise of 0.004 nats, since averaging and the ladder mend what a rough mixture leaves.

        ``redraw`` gives new draws of the rows, where the latents are posteriors; each iteration of EM sees others.
        No mixture is begun that would not be done by the ``deadline`` (:func:`time.monotonic`), by the last one's time.

        Raises :class:`LatentPriorError` for fewer rows than components.
        """
        if len(train) > FIT_ROWS:
            train = train[:FIT_ROWS]
        n, d = train.shape
        held_out = validation.double()
        rows = redraw or (lambda: train)

        def fitted(k: int) -> GaussianMixtureBase:
            if k > n:
                raise LatentPriorError(f"a mixture of {k} components needs at least {k} rows, got {n}")

            def log_terms(mixture: Mixture) -> Callable[[Tensor], Tensor]:
                return cls(*mixture).to(train.dtype).log_terms

            steps = expectation_maximisation(rows, k, log_terms, iterations=ITERATIONS, generator=generator)
            mixture, highest, waited = next(steps)[0], -math.inf, 0
            for mixture, density in steps:  # noqa: B007
                # Fresh draws make the density itself uncertain: one iteration that does not rise says little.
                waited = 0 if density > highest + LEAST_RISE else waited + 1
                highest = max(highest, density)
                if waited == 3:
                    break
            return cls(*mixture)

        def level(mixture: GaussianMixtureBase) -> Tensor:
            return mixture.log_prob(held_out)

        if n_components is not None:
            return fitted(n_components)
        if n < 2:
            one = torch.ones(1, dtype=torch.float64, device=train.device)
            return cls(one, one.new_zeros(1, d), torch.eye(d, dtype=one.dtype, device=one.device)[None])
        begun = time.monotonic()
        k, failed, best = 1, 0, fitted(1)
        here, took = level(best), time.monotonic() - begun

        def in_time(seconds: float) -> bool:
            return deadline is None or time.monotonic() + seconds <= deadline

        limit = min(MOST_COMPONENTS, n // (16 * (d + 1)), WORK // (n * (d * d + 60 * d)))
        while failed < 2 and 2 * k <= limit and in_time(2 * took):
            k, failed, begun = 2 * k, failed + 1, time.monotonic()
            candidate = fitted(k)
            there, took = level(candidate), time.monotonic() - begun
            if _rises(here, there, 0.01):
                best, here, failed = candidate, there, 0
        members, bag = [best], best
        while best.n_components > 1 and len(members) < MEMBERS and in_time(took):
            members.append(fitted(best.n_components))
            candidate = cls._average(members)
            there = level(candidate)
            if not _rises(here, there, 0.05):
                break
            bag, here = candidate, there
        return bag

    @classmethod
    def _average(cls, members: Sequence[GaussianMixtureBase]) -> GaussianMixtureBase:
        """Equal shares of several mixtures, as one."""
        parts = zip(*((m.log_weights.exp(), m.means, m.cholesky) for m in members), strict=True)
        weights, means, cholesky = map(torch.cat, parts)
        return cls(weights, means, cholesky)

    def widened(self, factors: tuple[float, ...]) -> GaussianMixtureBase:
        """Equal shares of this mixture with its components' scales multiplied by each factor: halos around modes."""
        m = len(factors)
        weights = self.log_weights.exp().repeat(m)
        cholesky = torch.cat([factor * self.cholesky for factor in factors])
        return GaussianMixtureBase(weights, self.means.repeat(m, 1), cholesky)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised residuals ``(n, d, K)`` and log terms ``(n, K)``; components last, so that sums are fast."""
        y = torch.addmm(-self.offset, u, self.projection).view(len(u), u.shape[1], self.n_components)
        return y, self.constant - 0.5 * y.square().sum(1)

    def pull_back(self, residuals: Tensor, by_term: Tensor) -> Tensor:
        """Gradient in u ``(n, d)`` of what has the slopes ``by_term`` ``(n, K)`` in the log terms."""
        return -(residuals * by_term[:, None]).flatten(1) @ self.projection.T

    def log_terms(self, u: Tensor) -> Tensor:
        r""":math:`\log \pi_k \mathcal N(u; m_k, \Sigma_k)` of every component, ``(n, d) -> (n, K)``."""
        return torch.cat([self.project(block)[1] for block in u.split(self._rows())])

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.logsumexp(self.log_terms(u), 1)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        for block in u.split(self._rows()):
            y, terms = self.project(block)
            value = torch.logsumexp(terms, 1)
            # Denormal numbers would slow the matrix product down many times.
            weight = (terms - value[:, None]).clamp_min(-60).exp()
            values.append(value)
            grads.append(self.pull_back(y, weight))
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


def _rises(before: Tensor, after: Tensor, least: float) -> bool:
    """Whether log densities of the same rows rise by ``least`` nats, and by two standard errors of their difference."""
    rise = after - before
    return float(rise.mean()) > max(least, 2 * float(rise.std(correction=0)) / math.sqrt(len(rise)))
