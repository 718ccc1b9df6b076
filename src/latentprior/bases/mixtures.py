"""What mixtures of Gaussians have in common, and the search for their size."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import LatentPriorError
from .base import Base, device_of, normal_noise
from .em import Moments, expectation_maximisation

__all__ = ["WORTH", "WORTH_BELOW_STAGES", "MixtureBase", "Search", "checked_components"]

LEAST_RISE = 0.004
"""Nats an iteration below which EM ends."""
MEMBERS = 6
"""Most mixtures that are averaged."""
WORTH, WORTH_BELOW_STAGES = 0.05, 0.2
"""Nats by which one more must raise an average; and below stages that learn the same sooner, each of whose steps a
larger mixture slows."""
NUMBERS = 1 << 18
"""Most residuals of a block of rows: what fits a core's cache."""


class MixtureBase(Base):
    r"""A Gaussian mixture, :math:`\log p_0(u) = \log \sum_k \pi_k \mathcal N(u; m_k, \Sigma_k)`.

    A kind says how covariances are held: :meth:`project` and :meth:`pull_back` are the way there and back from the
    residuals of all components, from one matrix product each.
    """

    means: Tensor
    log_weights: Tensor
    constant: Tensor
    """Log terms where a row stands on its component's mean ``(K,)``."""

    @property
    def n_components(self) -> int:
        """Number K of components."""
        return len(self.means)

    @property
    def residuals_per_row(self) -> int:
        """Numbers that :meth:`project` makes of a row."""
        raise NotImplementedError

    def project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals, which :meth:`pull_back` knows how to read, and log terms, ``(n, d) -> (n, ...), (n, K)``."""
        raise NotImplementedError

    def pull_back(self, u: Tensor, residuals: Tensor, by_term: Tensor) -> Tensor:
        """Gradient in u ``(n, d)`` of what has the slopes ``by_term`` ``(n, K)`` in the log terms."""
        raise NotImplementedError

    def coloured(self, k: int, noise: Tensor) -> Tensor:
        """Draws of component k about its mean from standard normal ``noise``, ``(n, d) -> (n, d)``."""
        raise NotImplementedError

    def widened(self, factors: tuple[float, ...]) -> MixtureBase:
        """Equal shares of this mixture with its components' scales multiplied by each factor: halos around modes."""
        raise NotImplementedError

    @classmethod
    def averaged(cls, members: Sequence[Any]) -> Any:
        """Equal shares of several mixtures, as one."""
        raise NotImplementedError

    def log_terms(self, u: Tensor) -> Tensor:
        r""":math:`\log \pi_k \mathcal N(u; m_k, \Sigma_k)` of every component, ``(n, d) -> (n, K)``."""
        return torch.cat([self.project(block)[1] for block in u.split(self._rows())])

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.logsumexp(self.log_terms(u), 1)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        for block in u.split(self._rows()):
            residuals, terms = self.project(block)
            value = torch.logsumexp(terms, 1)
            # Denormal numbers would slow the matrix product down many times.
            weight = (terms - value[:, None]).clamp_min(-60).exp()
            values.append(value)
            grads.append(self.pull_back(block, residuals, weight))
        return torch.cat(values), torch.cat(grads)

    def _rows(self) -> int:
        return max(64, NUMBERS // self.residuals_per_row)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        device = device_of(generator)
        if n == 0:
            return self.means.new_zeros(0, self.means.shape[1])
        weights = self.log_weights.exp().to(device)
        which = torch.multinomial(weights, n, replacement=True, generator=generator).to(self.means.device)
        noise = normal_noise((n, self.means.shape[1]), self.means, generator)
        order = which.argsort(stable=True)
        parts = noise[order].split(torch.bincount(which, minlength=self.n_components).tolist())
        rows = torch.cat([m + self.coloured(k, e) for k, (m, e) in enumerate(zip(self.means, parts, strict=True))])
        return torch.empty_like(rows).index_copy_(0, order, rows)


B = TypeVar("B", bound=MixtureBase)


class Search:
    """Mixtures by EM and the size that held-out rows choose, within a time.

    Arguments
    ---------
    rows : rows ``(n, d)``, called once an iteration of EM.
    held_out : ``(m, d)``.
    prior_rows : by how many rows covariances are shrunk, :meth:`~latentprior.bases.em.Moments.of`.
    iterations : of EM at most.
    deadline : in seconds of :func:`time.monotonic`; nothing is begun that would not be done by then.
    """

    def __init__(
        self,
        rows: Callable[[], Tensor],
        held_out: Tensor,
        prior_rows: float,
        iterations: int,
        generator: torch.Generator | None = None,
        deadline: float | None = None,
    ) -> None:
        self.rows, self.held_out, self.prior_rows, self.iterations = rows, held_out, prior_rows, iterations
        self.generator, self.deadline = generator, deadline

    def fitted(self, k: int, made: Callable[[Moments], B]) -> B:
        """A mixture of ``k`` components; EM ends after three iterations without a rise of 0.004 nats."""

        def log_terms(moments: Moments) -> Callable[[Tensor], Tensor]:
            return made(moments).to(self.held_out.dtype).log_terms

        steps = expectation_maximisation(
            self.rows, k, log_terms, iterations=self.iterations, prior_rows=self.prior_rows, generator=self.generator
        )
        moments, highest, waited = next(steps)[0], -math.inf, 0
        for moments, density in steps:  # noqa: B007
            # Fresh draws make the density itself uncertain: one iteration that does not rise says little.
            waited = 0 if density > highest + LEAST_RISE else waited + 1
            highest = max(highest, density)
            if waited == 3:
                break
        return made(moments)

    def best(self, made: Callable[[Moments], B], sizes: Sequence[int], patience: int, worth: float = WORTH) -> B:
        """Take more components, then average; see :meth:`GaussianMixtureBase.fit`.

        ``sizes`` rise from 1; ``patience`` is how many of them in turn may bring nothing; one more mixture must raise
        the average by ``worth`` nats.
        """
        begun = time.monotonic()
        failed, best = 0, self.fitted(sizes[0], made)
        here, took = self._level(best), time.monotonic() - begun
        for before, k in itertools.pairwise(sizes):
            if failed == patience or not self._in_time(took * k / before):
                break
            failed, begun = failed + 1, time.monotonic()
            candidate = self.fitted(k, made)
            there, took = self._level(candidate), time.monotonic() - begun
            if _rises(here, there, 0.01):
                best, here, failed = candidate, there, 0
        members, bag = [best], best
        while best.n_components > 1 and len(members) < MEMBERS and self._in_time(took):
            members.append(self.fitted(best.n_components, made))
            candidate = best.averaged(members)
            there = self._level(candidate)
            if not _rises(here, there, worth):
                break
            bag, here = candidate, there
        return bag

    def _level(self, mixture: MixtureBase) -> Tensor:
        return copy.deepcopy(mixture).to(self.held_out.dtype).log_prob(self.held_out)

    def _in_time(self, seconds: float) -> bool:
        return self.deadline is None or time.monotonic() + seconds <= self.deadline


def checked_components(k: int, n: int) -> int:
    """``k``; raises :class:`LatentPriorError` for fewer rows than components."""
    if k > n:
        raise LatentPriorError(f"a mixture of {k} components needs at least {k} rows, got {n}")
    return k


def _rises(before: Tensor, after: Tensor, least: float) -> bool:
    """Whether log densities of the same rows rise by ``least`` nats, and by two standard errors of their difference."""
    rise = (after - before).double()
    return float(rise.mean()) > max(least, 2 * float(rise.std(correction=0)) / math.sqrt(len(rise)))
