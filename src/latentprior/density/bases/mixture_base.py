"""What mixtures of Gaussians have in common, and the search for their size."""

from __future__ import annotations

import abc
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ...errors import LatentPriorError
from .base import FIT_ROWS, Base, device_of, normal_noise
from .em import Moments, Scatter, expectation_maximisation

__all__ = ["MixtureBase", "MixtureSearch", "Plan", "members_of", "responsibilities"]

LEAST_RISE_NATS = 0.05
"""What one more mixture must add to the held-out log density of an average."""
LEAST_RISE_OF_SIZE_NATS = 0.01
"""What more components must add to the held-out log density."""
LEAST_RISE_OF_ITERATION_NATS = 0.004
"""Rise of the training rows' log density below which an iteration of EM counts as none: averaging mends the rest."""
IDLE_ITERATIONS = 3
"""Iterations without a rise after which EM ends: fresh draws make the density itself uncertain, so one says little."""
SHRINKAGE_STEP = 4
"""Iteration of EM at which held-out rows choose how far covariances are shrunk."""
DEAR_FACTOR = 20
"""The last size but one is left out where so many times its own seconds would not fit into the time left."""
MOST_MEMBERS = 6
"""Most mixtures that are averaged."""
BLOCK_NUMBERS = 1 << 18
"""Most residuals of a block of rows: what fits a core's cache."""


B = TypeVar("B", bound="MixtureBase")


class Plan(NamedTuple):
    """How the mixtures of a kind are fitted to so many rows, and how their size is searched for."""

    sizes: Sequence[int]
    """Numbers of components to try, rising from 1."""
    iterations: int
    """Most iterations of EM."""
    prior_rows: Sequence[float]
    """Numbers of rows by which covariances may be shrunk, :meth:`~latentprior.density.bases.em.Scatter.shrunk`. The
    first holds until held-out rows choose."""
    patience: int = 2
    """How many sizes in turn may bring nothing."""
    least_rise: float = LEAST_RISE_NATS
    """Nats by which one more mixture must raise the average."""
    average_is_dear: bool = False
    """Whether an average slows down what reads it so much that a caller should ask if it is wanted."""


class MixtureBase(Base, abc.ABC):
    r"""A Gaussian mixture, :math:`\log p_0(u) = \log \sum_k \pi_k \mathcal N(u; m_k, \Sigma_k)`.

    A kind says how covariances are held: :meth:`project` and :meth:`pull_back` are the way there and back from the
    residuals of all components, from one matrix product each.
    """

    means: Tensor
    log_weights: Tensor
    projection: Tensor
    """Of rows to the residuals of all components."""
    offset: Tensor
    """What residuals are less by."""
    constant: Tensor
    """Log terms where a row stands on its component's mean ``(K,)``."""
    members: int = 1
    """How many mixtures of as many components each this is the average of."""

    @classmethod
    @abc.abstractmethod
    def of(cls, moments: Moments) -> Any:
        """The mixture of these moments."""

    @classmethod
    @abc.abstractmethod
    def plan(cls, n: int, d: int, coarse: bool = False) -> Plan:
        """How to fit it to ``n`` rows of ``d`` coordinates; ``coarse`` where others refine it."""

    @classmethod
    @abc.abstractmethod
    def averaged(cls, members: Sequence[Any]) -> Any:
        """Equal shares of several mixtures of as many components, as one."""

    @abc.abstractmethod
    def leading(self, k: int) -> MixtureBase:
        """The mixture of the first ``k`` components, their weights rescaled."""

    @abc.abstractmethod
    def widened(self, factors: tuple[float, ...]) -> MixtureBase:
        """Equal shares of this mixture with its components' scales multiplied by each factor: halos around modes."""

    @abc.abstractmethod
    def project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals, which :meth:`pull_back` knows how to read, and log terms, ``(n, d) -> (n, ...), (n, K)``."""

    @abc.abstractmethod
    def pull_back(self, u: Tensor, residuals: Tensor, by_term: Tensor) -> Tensor:
        """Gradient in u ``(n, d)`` of what has the slopes ``by_term`` ``(n, K)`` in the log terms."""

    @abc.abstractmethod
    def coloured(self, k: int, noise: Tensor) -> Tensor:
        """Draws of component k about its mean from standard normal ``noise``, ``(n, d) -> (n, d)``."""

    @classmethod
    def fit(
        cls: type[B],
        train: Tensor,
        validation: Tensor,
        *,
        n_components: int | None = None,
        generator: torch.Generator | None = None,
        redraw: Callable[[], Tensor] | None = None,
        deadline: float | None = None,
    ) -> B:
        """Fit by EM: one mixture of ``n_components``, or what :class:`MixtureSearch` finds within the ``deadline``.

        Raises :class:`LatentPriorError` for fewer rows than components, or rows that no covariance fits.
        """
        search = MixtureSearch(cls, train, validation, generator=generator, redraw=redraw, deadline=deadline)
        if n_components is not None:
            return search.fitted(n_components)
        search.find()
        return search.average()

    def _filled(self: B, tensors: Mapping[str, Tensor]) -> B:
        """The same mixture with its derived buffers as they were saved, so that they agree to their last bits."""
        self.load_state_dict(dict(tensors))
        return self

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def n_components(self) -> int:
        """Number K of components."""
        return len(self.means)

    def config(self) -> dict[str, Any]:
        return super().config() | ({"members": self.members} if self.members > 1 else {})

    def first_member(self: B) -> B:
        """The first mixture of an average; the mixture itself where it is no average."""
        if self.members == 1:
            return self
        k, d = self.n_components // self.members, self.means.shape[1]
        first = cast(B, self.leading(k))
        # Parts of this one's, to their last bits.
        first.projection = self.projection.view(d, -1, self.n_components)[..., :k].reshape(d, -1)
        first.offset = self.offset.view(-1, self.n_components)[:, :k].reshape(-1)
        first.constant = self.constant[:k] + math.log(self.members)
        return first

    def log_terms(self, u: Tensor) -> Tensor:
        r""":math:`\log \pi_k \mathcal N(u; m_k, \Sigma_k)` of every component, ``(n, d) -> (n, K)``."""
        return torch.cat([self.project(block)[1] for block in u.split(self._rows())])

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.logsumexp(self.log_terms(u), 1)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        for block in u.split(self._rows()):
            residuals, terms = self.project(block)
            value, weight = responsibilities(terms)
            values.append(value)
            grads.append(self.pull_back(block, residuals, weight))
        return torch.cat(values), torch.cat(grads)

    def _rows(self) -> int:
        return max(64, BLOCK_NUMBERS // self.projection.shape[1])

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


class MixtureSearch(Generic[B]):
    r"""The search for the size of a mixture, and for how many mixtures to average, by held-out rows within a time.

    The search takes more components, as :meth:`MixtureBase.plan` says, while they raise the held-out log density by
    0.01 nats and two standard errors. Mixtures of that size from other starts then join in equal shares, :math:`\frac1R
    \sum_r p^{(r)}(u)`, while it rises by two standard errors and by what the plan asks for: an average varies less with
    the rows than its members do (Ormoneit and Tresp 1998). EM itself stops after three iterations without a rise of
    0.004 nats. ``redraw`` gives new draws of the rows for each iteration, ``deadline`` is by :func:`time.monotonic`,
    and ``coarse`` says that others will refine the mixture.
    """

    def __init__(
        self,
        kind: type[B],
        train: Tensor,
        held_out: Tensor,
        *,
        generator: torch.Generator | None = None,
        redraw: Callable[[], Tensor] | None = None,
        deadline: float | None = None,
        coarse: bool = False,
    ) -> None:
        train = train[:FIT_ROWS]
        self.kind, self.train, self.held_out = kind, train, held_out.to(train)
        self.rows = redraw or (lambda: train)
        self.generator, self.deadline = generator, deadline
        self.plan = kind.plan(max(2, len(train)), train.shape[1], coarse)
        self.begin = time.monotonic()
        self.single: B | None = None
        self.single_seconds = 0.0

    @property
    def average_is_optional(self) -> bool:
        """Whether the average of several mixtures is dear, and time is short, so that the caller may leave it out."""
        several = self.single is not None and self.single.n_components > 1
        return several and self.plan.average_is_dear and self.deadline is not None

    def fitted(self, k: int) -> B:
        """Fit one mixture of ``k`` components."""
        n, d = self.train.shape
        if k > n:
            raise LatentPriorError(f"a mixture of {k} components needs at least {k} rows, got {n}")
        if n < 2 and k == 1:
            one = torch.ones(1, dtype=torch.float64, device=self.train.device)
            return self.kind.of(Moments(one, one.new_zeros(1, d), torch.eye(d).to(one)[None]))  # type: ignore[no-any-return]

        def log_terms(moments: Moments) -> Callable[[Tensor], Tensor]:
            return self.kind.of(moments).to(self.held_out.dtype).log_terms  # type: ignore[no-any-return]

        iteration, prior_rows = 0, self.plan.prior_rows[0]

        def shrink(scatter: Scatter) -> Moments:
            nonlocal iteration, prior_rows
            iteration += 1
            if iteration == SHRINKAGE_STEP and k > 1 and len(self.plan.prior_rows) > 1:
                levels = {r: self._level(self.kind.of(scatter.shrunk(r))).mean() for r in self.plan.prior_rows}
                prior_rows = max(levels, key=lambda r: levels[r])
            return scatter.shrunk(prior_rows)

        steps = expectation_maximisation(
            self.rows, k, log_terms, iterations=self.plan.iterations, shrink=shrink, generator=self.generator
        )
        moments, highest, idle = next(steps)[0], -math.inf, 0
        for moments, density in steps:  # noqa: B007
            idle = 0 if density > highest + LEAST_RISE_OF_ITERATION_NATS else idle + 1
            highest = max(highest, density)
            if idle == IDLE_ITERATIONS:
                break
        return self.kind.of(moments)  # type: ignore[no-any-return]

    def find(self) -> B:
        """Fit mixtures of more and more components, and return the best one by held-out rows."""
        begin, (last, *sizes) = time.monotonic(), self.plan.sizes
        idle, best = 0, self.fitted(last)
        level, seconds = self._level(best), time.monotonic() - begin
        for k in sizes:
            expected = seconds * k / last
            if len(sizes) > 3 and k == sizes[-2] and not self._in_time(DEAR_FACTOR * expected):
                continue
            if idle == self.plan.patience or not self._in_time(expected):
                break
            idle, begin, last = idle + 1, time.monotonic(), k
            candidate = self.fitted(k)
            candidate_level, seconds = self._level(candidate), time.monotonic() - begin
            if _rises(level, candidate_level, LEAST_RISE_OF_SIZE_NATS):
                best, level, idle = candidate, candidate_level, 0
        self.single, self.single_seconds = best, seconds
        return best

    def average(self, share_of_time: float = 1.0) -> B:
        """Let further mixtures of the size found join, within a share of the time that the whole search has."""
        assert self.single is not None
        best = self.single
        if self.deadline is not None:
            self.deadline = self.begin + share_of_time * (self.deadline - self.begin)
        members, average, level = [best], best, self._level(best)
        while best.n_components > 1 and len(members) < MOST_MEMBERS and self._in_time(self.single_seconds):
            members.append(self.fitted(best.n_components))
            candidate = self.kind.averaged(members)
            candidate_level = self._level(candidate)
            if not _rises(level, candidate_level, self.plan.least_rise):
                break
            average, level = candidate, candidate_level
        return average

    def _level(self, mixture: MixtureBase) -> Tensor:
        """Log density of every held-out row."""
        return copy.deepcopy(mixture).to(self.held_out.dtype).log_prob(self.held_out)

    def _in_time(self, seconds: float) -> bool:
        return self.deadline is None or time.monotonic() + seconds <= self.deadline


def members_of(config: Mapping[str, Any], components: int) -> int:
    """How many mixtures the saved one is the average of; files older than this entry hold a single mixture."""
    members = int(config.get("members", 1))
    if not 1 <= members <= components or components % members:
        raise ValueError(f"{components} components of {members} mixtures")
    return members


def responsibilities(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Log density ``(n,)`` and components' shares in it ``(n, K)``, from log terms ``(n, K)``."""
    value = torch.logsumexp(terms, 1)
    # Denormal numbers would slow the next matrix product down many times.
    return value, (terms - value[:, None]).clamp_min(-60).exp()


def _rises(before: Tensor, after: Tensor, least: float) -> bool:
    """Whether log densities of the same rows rise by ``least`` nats, and by two standard errors of their difference."""
    rise = (after - before).double()
    return float(rise.mean()) > max(least, 2 * float(rise.std(correction=0)) / math.sqrt(len(rise)))
