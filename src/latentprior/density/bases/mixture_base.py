"""What mixtures of Gaussians have in common, and the search for their size."""

from __future__ import annotations

import abc
import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ...errors import LatentPriorError
from .base import (
    FIT_ROWS,
    Base,
    device_of,
    normal_noise,
)
from .em import Moments, Scatter, expectation_maximisation

__all__ = ["WORTH", "MixtureBase", "Plan", "responsibilities"]

LEAST_RISE = 0.004
"""Nats an iteration below which EM ends."""
CHOICE = 4
"""At which step of EM held-out rows choose how far covariances are shrunk."""
DEAR = 20
"""The last size but one is left out where so many times its own would not fit into the time left."""
MEMBERS = 6
"""Most mixtures that are averaged."""
SHARE_OF_TIME = 0.5
"""Of the time that a search has, what an average may take where stages follow."""
WORTH = 0.05
"""Nats by which one more must raise an average."""
NUMBERS = 1 << 18
"""Most residuals of a block of rows: what fits a core's cache."""


B = TypeVar("B", bound="MixtureBase")


class Plan(NamedTuple):
    """How the mixtures of a kind are fitted to so many rows, and their size is searched for."""

    sizes: Sequence[int]
    """Numbers of components to try, rising from 1."""
    iterations: int
    """Of EM at most."""
    prior_rows: Sequence[float]
    """By how many rows covariances may be shrunk, :meth:`~latentprior.density.bases.em.Scatter.shrunk`; by the first
    until held-out rows choose."""
    patience: int = 2
    """How many sizes in turn may bring nothing."""
    worth: float = WORTH
    """Nats by which one more mixture must raise the average."""
    ask: bool = False
    """Whether to ask, where time is short, if a stage would gain more than an average."""


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
    def plan(cls, n: int, d: int, below_stages: bool) -> Plan:
        """How to fit it to ``n`` rows of ``d`` coordinates."""

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
        stage_gains: Callable[[MixtureBase], bool] | None = None,
    ) -> B:
        r"""Fit by EM: one mixture of ``n_components``, or an average of several whose size the held-out rows choose.

        The search takes more components, as the kind's :meth:`plan` says, while they raise the held-out log density
        by 0.01 nats and two standard errors. Mixtures of that size from other starts then join in equal shares,
        :math:`\frac1R \sum_r p^{(r)}(u)`, while the held-out log density rises by two standard errors and what the plan
        asks for: an average varies less with the rows than its members do (Ormoneit and Tresp 1998), and makes every
        step of a stage slower. EM itself stops after three iterations without a rise of 0.004 nats, since averaging
        and the ladder mend what a rough mixture leaves. Where time is short and stages follow, an average takes no more
        than half of it, and where a stage would gain much on the single mixture, there is no average.

        Arguments
        ---------
        redraw : new draws of the rows, where the latents are posteriors; each iteration of EM sees others.
        deadline : no mixture is begun that would not be done by then (:func:`time.monotonic`), by the last one's time.
        stage_gains : given where stages follow: whether one would gain much on the mixture that it is called with.

        Raises :class:`LatentPriorError` for fewer rows than components.
        """
        train = train[:FIT_ROWS]
        n, d = train.shape
        if n_components is not None and n_components > n:
            raise LatentPriorError(
                f"a mixture of {n_components} components needs at least {n_components} rows, got {n}"
            )
        if n < 2 and n_components is None:
            one = torch.ones(1, dtype=torch.float64, device=train.device)
            return cls.of(Moments(one, one.new_zeros(1, d), torch.eye(d).to(one)[None]))  # type: ignore[no-any-return]
        plan = cls.plan(n, d, stage_gains is not None)
        ask = stage_gains if plan.ask and deadline is not None else None
        search = _Search(cls, plan, redraw or (lambda: train), validation.to(train), generator, deadline, ask)
        return search.best() if n_components is None else search.fitted(n_components)

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
        return max(64, NUMBERS // self.projection.shape[1])

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


class _Search(Generic[B]):
    """Mixtures of one kind by EM, and the size that held-out rows choose within a time."""

    def __init__(
        self,
        kind: type[B],
        plan: Plan,
        rows: Callable[[], Tensor],
        held_out: Tensor,
        generator: torch.Generator | None,
        deadline: float | None,
        stage_gains: Callable[[MixtureBase], bool] | None,
    ) -> None:
        self.kind, self.plan, self.rows, self.held_out = kind, plan, rows, held_out
        self.generator, self.deadline, self.stage_gains = generator, deadline, stage_gains
        self.begun = time.monotonic()

    def fitted(self, k: int) -> B:
        """A mixture of ``k`` components."""

        def log_terms(moments: Moments) -> Callable[[Tensor], Tensor]:
            return self.kind.of(moments).to(self.held_out.dtype).log_terms  # type: ignore[no-any-return]

        steps_done, prior_rows = 0, self.plan.prior_rows[0]

        def shrink(found: Scatter) -> Moments:
            nonlocal steps_done, prior_rows
            steps_done += 1
            if steps_done == CHOICE and k > 1 and len(self.plan.prior_rows) > 1:
                levels = {r: self._level(self.kind.of(found.shrunk(r))).mean() for r in self.plan.prior_rows}
                prior_rows = max(levels, key=lambda r: levels[r])
            return found.shrunk(prior_rows)

        steps = expectation_maximisation(
            self.rows, k, log_terms, iterations=self.plan.iterations, shrink=shrink, generator=self.generator
        )
        moments, highest, waited = next(steps)[0], -math.inf, 0
        for moments, density in steps:  # noqa: B007
            # Fresh draws make the density itself uncertain: one iteration that does not rise says little.
            waited = 0 if density > highest + LEAST_RISE else waited + 1
            highest = max(highest, density)
            if waited == 3:
                break
        return self.kind.of(moments)  # type: ignore[no-any-return]

    def best(self) -> B:
        """Take more components, then average."""
        begun, (last, *sizes) = time.monotonic(), self.plan.sizes
        failed, best = 0, self.fitted(last)
        here, took = self._level(best), time.monotonic() - begun
        for k in sizes:
            expected = took * k / last
            if len(sizes) > 3 and k == sizes[-2] and not self._in_time(DEAR * expected):
                continue
            if failed == self.plan.patience or not self._in_time(expected):
                break
            failed, begun, last = failed + 1, time.monotonic(), k
            candidate = self.fitted(k)
            there, took = self._level(candidate), time.monotonic() - begun
            if _rises(here, there, 0.01):
                best, here, failed = candidate, there, 0
        members, bag = [best], best
        if self.stage_gains is not None and best.n_components > 1 and self.stage_gains(best):
            return best
        if self.stage_gains is not None and self.deadline is not None:
            # Stages make more of the rest than further members would.
            self.deadline = self.begun + SHARE_OF_TIME * (self.deadline - self.begun)
        while best.n_components > 1 and len(members) < MEMBERS and self._in_time(took):
            members.append(self.fitted(best.n_components))
            candidate = self.kind.averaged(members)
            there = self._level(candidate)
            if not _rises(here, there, self.plan.worth):
                break
            bag, here = candidate, there
        return bag

    def _level(self, mixture: MixtureBase) -> Tensor:
        return copy.deepcopy(mixture).to(self.held_out.dtype).log_prob(self.held_out)

    def _in_time(self, seconds: float) -> bool:
        return self.deadline is None or time.monotonic() + seconds <= self.deadline


def responsibilities(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Log density ``(n,)`` and components' shares in it ``(n, K)``, from log terms ``(n, K)``."""
    value = torch.logsumexp(terms, 1)
    # Denormal numbers would slow the next matrix product down many times.
    return value, (terms - value[:, None]).clamp_min(-60).exp()


def _rises(before: Tensor, after: Tensor, least: float) -> bool:
    """Whether log densities of the same rows rise by ``least`` nats, and by two standard errors of their difference."""
    rise = (after - before).double()
    return float(rise.mean()) > max(least, 2 * float(rise.std(correction=0)) / math.sqrt(len(rise)))
