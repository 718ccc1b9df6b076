"""Expectation maximisation for Gaussian mixtures, on fresh draws of the rows where there are any.

Dempster, Laird and Rubin (1977). scikit-learn's takes one fixed set of rows on the CPU; here each iteration may see new
draws of posteriors, which keeps components from shrinking onto single draws, on the device where the rows are, and
covariances are shrunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import LatentPriorError

__all__ = ["Moments", "Scatter", "expectation_maximisation"]

RIDGE = 1e-4
"""What is added to variances, in the rows' own units."""
LEAST_SHARE = 1e-4
"""Responsibilities below it are left out of moments: with many components nearly all of them are."""
CHOLESKY_RETRIES = 10
"""How often more is added to a covariance before it is given up: the last time 10^5 rows' own units."""
BLOCK_ROWS = 8192


class Moments(NamedTuple):
    """Weights ``(K,)``, means ``(K, d)`` and covariances ``(K, d, d)`` of a mixture's components; float64."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def cholesky(self) -> Tensor:
        """Lower factors of the covariances ``(K, d, d)``, with more on their diagonals where rounding asks for it."""
        more = 0.0
        factors: Tensor
        for _ in range(CHOLESKY_RETRIES):
            # Rounding of the rows' type can leave a flat component less than semidefinite.
            factors, failed = torch.linalg.cholesky_ex(self.covariances + more * _ridge(self.means))
            if not failed.any():
                return factors
            more = 10 * more + 1
        raise LatentPriorError(
            "a mixture's covariances are not finite or not positive: look for extreme, missing or too few rows, or use "
            "base='normal'"
        )


class Scatter(NamedTuple):
    """What rows scatter about the components' means under responsibilities, before any shrinkage; float64.

    A component of less than one row has the moments of all rows.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    """Of each component's own rows, :math:`S_k` ``(K, d, d)``."""
    rows: Tensor
    """How many they are, :math:`n_k` ``(K,)``."""
    overall: Tensor
    """Covariance of all rows ``(d, d)``."""

    @classmethod
    def of(cls, rows: Tensor, shares: Tensor, overall: Tensor) -> Scatter:
        """Of rows ``(n, d)`` under shares ``(K, n)``."""
        weights = shares.sum(1, dtype=torch.float64)
        means, covariances, own = rows.new_zeros(len(shares), rows.shape[1]), [], []
        for j, share in enumerate(shares):
            index = (share > LEAST_SHARE).nonzero().squeeze(1)
            some, weight = (rows[index], share[index]) if weights[j] >= 1 else (rows, torch.ones_like(rows[:, 0]))
            total = weight.sum()
            means[j] = weight @ some / total
            centred = some - means[j]
            covariances.append(((centred * weight[:, None]).T @ centred / total).double())
            own.append(total.double())
        weights = weights.clamp_min(1e-12)
        return cls(weights / weights.sum(), means.double(), torch.stack(covariances), torch.stack(own), overall)

    def shrunk(self, prior_rows: float) -> Moments:
        r"""The maximising step: covariances :math:`(n_k S_k + \nu s_k \Sigma) / (n_k + \nu)`.

        :math:`\Sigma` is the overall covariance, :math:`s_k = \mathrm{tr}(\Sigma^{-1} S_k) / d` and :math:`\nu` the
        number of ``prior_rows``: the mode under an inverse Wishart prior of that weight (Fraley and Raftery 2007),
        which keeps small components from following single rows.
        """
        precision, d = torch.linalg.inv(self.overall), len(self.overall)
        scale = torch.einsum("ij,kji->k", precision, self.covariances) / d
        own, shape = self.rows[:, None, None], scale[:, None, None] * self.overall
        covariances = (own * self.covariances + prior_rows * shape) / (own + prior_rows)
        return Moments(self.weights, self.means, covariances + _ridge(self.overall))


def expectation_maximisation(
    draw: Callable[[], Tensor],
    n_components: int,
    log_terms: Callable[[Moments], Callable[[Tensor], Tensor]],
    *,
    iterations: int,
    shrink: Callable[[Scatter], Moments],
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Moments, float]]:
    r"""Moments after each iteration, with the mean log density that the ones before gave their rows, in nats.

    Starts from k-means++ seeds (Arthur and Vassilvitskii 2007) among a part of the rows, and three rounds of k-means.

    Arguments
    ---------
    draw : rows ``(n, d)``, called once an iteration.
    log_terms : of moments, the map ``(n, d) -> (n, K)`` to :math:`\log \pi_k \mathcal N(u; m_k, \Sigma_k)`.
    shrink : of what rows scatter, the moments to go on from, :meth:`Scatter.shrunk`.
    """
    rows = draw()
    overall = torch.cov(rows.T).double().reshape(rows.shape[1], -1) + _ridge(rows)
    centres = _centres(rows, n_components, generator)
    shares = rows.new_zeros(n_components, len(rows))
    for block, part in zip(rows.split(BLOCK_ROWS), shares.split(BLOCK_ROWS, 1), strict=True):
        part.scatter_(0, torch.cdist(block, centres).argmin(1)[None], 1.0)
    found, density = shrink(Scatter.of(rows, shares, overall)), float("nan")
    for _ in range(iterations):
        yield found, density
        rows, total, evaluate = draw(), 0.0, log_terms(found)
        if len(rows) != shares.shape[1]:
            shares = rows.new_zeros(n_components, len(rows))
        for block, part in zip(rows.split(BLOCK_ROWS), shares.split(BLOCK_ROWS, 1), strict=True):
            terms = evaluate(block)
            highest = terms.amax(1, keepdim=True)
            terms = terms.sub_(highest).exp_()
            mass = terms.sum(1, keepdim=True)
            total += float((highest + mass.log()).double().sum())
            part.copy_(terms.div_(mass).T)
        found, density = shrink(Scatter.of(rows, shares, overall)), total / len(rows)
    yield found, density


def _ridge(like: Tensor) -> Tensor:
    return RIDGE * torch.eye(like.shape[1], dtype=torch.float64, device=like.device)


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
        nearest = torch.cat([torch.cdist(block, centres).argmin(1) for block in rows.split(BLOCK_ROWS)])
        count = torch.bincount(nearest, minlength=k)[:, None]
        moved = torch.zeros_like(centres).index_add_(0, nearest, rows) / count.clamp_min(1)
        centres = torch.where(count > 0, moved, centres)
    return centres
