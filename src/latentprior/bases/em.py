"""Expectation maximisation for Gaussian mixtures of full covariances, on fresh draws of the rows where there are any.

Dempster, Laird and Rubin (1977). scikit-learn's takes one fixed set of rows on the CPU; here each iteration may see new
draws of posteriors, which keeps components from shrinking onto single draws, on the device where the rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Mixture", "expectation_maximisation"]

RIDGE = 1e-4
"""What is added to variances, in the rows' own units."""
BLOCK = 8192


class Mixture(NamedTuple):
    """Weights ``(K,)``, means ``(K, d)`` and lower Cholesky factors of the covariances ``(K, d, d)``; float64."""

    weights: Tensor
    means: Tensor
    cholesky: Tensor


class _Sums(NamedTuple):
    """Responsibilities summed ``(K,)``, and the rows' first and second moments under them."""

    rows: Tensor
    first: Tensor
    second: Tensor

    def mixture(self) -> Mixture:
        """The maximising step. A component of less than one row keeps the moments of all rows."""
        n, d = self.rows.double().sum(), self.first.shape[1]
        rows, first, second = (x.double() for x in self)
        overall = first.sum(0) / n
        spread = second.sum(0) / n - torch.outer(overall, overall)
        empty = rows < 1
        means = torch.where(empty[:, None], overall, first / rows.clamp_min(1)[:, None])
        covariances = second / rows.clamp_min(1)[:, None, None] - means[:, :, None] * means[:, None, :]
        covariances = torch.where(empty[:, None, None], spread, covariances)
        ridge = RIDGE * torch.eye(d, dtype=means.dtype, device=means.device)
        weights = rows.clamp_min(1e-12)
        while True:
            # Rounding of the rows' type can leave a flat component less than semidefinite.
            cholesky, failed = torch.linalg.cholesky_ex(covariances + ridge)
            if not failed.any():
                return Mixture(weights / weights.sum(), means, cholesky)
            ridge = 10 * ridge


def expectation_maximisation(
    draw: Callable[[], Tensor],
    n_components: int,
    log_terms: Callable[[Mixture], Callable[[Tensor], Tensor]],
    *,
    iterations: int,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Mixture, float]]:
    r"""Mixtures after each iteration, with the mean log density that the one before gave its rows, in nats.

    Starts from k-means++ seeds (Arthur and Vassilvitskii 2007) among a part of the rows, and three rounds of k-means.

    Arguments
    ---------
    draw : rows ``(n, d)``, called once an iteration.
    log_terms : of a mixture, the map ``(n, d) -> (n, K)`` to :math:`\log \pi_k \mathcal N(u; m_k, \Sigma_k)`.
    """
    rows = draw()
    sums = _sums(rows, n_components, _nearest(_centres(rows, n_components, generator)))
    density = float("nan")
    for _ in range(iterations):
        mixture = sums.mixture()
        yield mixture, density
        terms = log_terms(mixture)
        total = 0.0

        def responsibilities(block: Tensor, terms: Callable[[Tensor], Tensor] = terms) -> Tensor:
            nonlocal total
            value = terms(block)
            highest = value.amax(1, keepdim=True)
            shares = value.sub_(highest).exp_()
            mass = shares.sum(1, keepdim=True)
            total += float((highest + mass.log()).double().sum())
            return shares.div_(mass)

        rows = draw()
        sums = _sums(rows, n_components, responsibilities)
        density = total / len(rows)
    yield sums.mixture(), density


def _sums(rows: Tensor, k: int, shares: Callable[[Tensor], Tensor]) -> _Sums:
    """Moments of ``rows`` under ``shares(block)`` ``(n, K)``."""
    d = rows.shape[1]
    sums = _Sums(rows.new_zeros(k), rows.new_zeros(k, d), rows.new_zeros(k, d, d))
    for block in rows.split(BLOCK):
        r = shares(block)
        sums.rows.add_(r.sum(0))
        sums.first.add_(r.T @ block)
        for j in range(k):
            sums.second[j].addmm_((block * r[:, j : j + 1]).T, block)
    return sums


def _nearest(centres: Tensor) -> Callable[[Tensor], Tensor]:
    def shares(block: Tensor) -> Tensor:
        nearest = torch.cdist(block, centres).argmin(1)
        return torch.nn.functional.one_hot(nearest, len(centres)).to(block)

    return shares


def _centres(rows: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Centres ``(K, d)`` by k-means++ among a part of the rows, moved three times to the mean of theirs."""
    device = torch.device("cpu") if generator is None else generator.device
    order = torch.randperm(len(rows), generator=generator, device=device)[: max(20 * k, 2000)].to(rows.device)
    some = rows[order]
    picked = [0]
    distance = (some - some[0]).square().sum(1)
    for _ in range(k - 1):
        # Where all rows are picked or alike, any will do.
        weights = distance if bool(distance.sum() > 0) else torch.ones_like(distance)
        picked.append(int(torch.multinomial(weights.to(device), 1, generator=generator)))
        distance = torch.minimum(distance, (some - some[picked[-1]]).square().sum(1))
    centres = some[picked]
    for _ in range(3):
        nearest = torch.cat([torch.cdist(block, centres).argmin(1) for block in rows.split(BLOCK)])
        count = torch.bincount(nearest, minlength=k)[:, None]
        moved = torch.zeros_like(centres).index_add_(0, nearest, rows) / count.clamp_min(1)
        centres = torch.where(count > 0, moved, centres)
    return centres
