"""The ladder in standardised coordinates: a base density times bounded ratios, its values, gradients and path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..runtime.processes import ALONE, Processes
from .bases import Base, BlendBase, MixtureBase
from .gradients import ValueAndGrad
from .ratios import BoundedRatio, Gain
from .sampling import LogDensity, smc
from .sampling.resampling import (
    LogMean,
    combine_parts,
    log_mean_exp,
    systematic,
)

__all__ = ["FreshParticles", "Ladder", "Stage"]

BLOCK = 2048
MIN_ESS = 0.01
LEAST_RISE = 0.05
LEAST_ISLANDS = 8
"""Of a process: an eighth of them is held out whole."""
COVER_WIDTHS = (1.0, 1.5, 2.5)
"""Factors on the scales of a cover's components: early stages, bounded as they are, put mass in halos around modes."""


class FreshParticles(NamedTuple):
    """Rows of :math:`p_K` never seen before (of several processes, this one's), and how they were made."""

    position: Tensor
    source: str
    """``base``, ``importance`` or ``smc``."""
    log_normalizer: LogMean
    r""":math:`\log \hat Z_K` of this pass: no stage so far was trained on these rows."""
    ess: float
    """Effective share of the base draws, or the smallest one met at a level of SMC."""
    acceptance: float


@dataclass(frozen=True)
class Stage:
    r"""One rung: the log ratio :math:`f_k`, its log normaliser :math:`c_k`, and how well it told q from :math:`p_k`.

    All figures are in nats; ``gain`` is held out, from 0 (no difference) to 1.386.
    """

    network: nn.Module
    log_normalizer: float
    log_normalizer_stderr: float
    gain: float
    gain_stderr: float
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def measured(
        cls, ratio: nn.Module, gain: Gain, before: FreshParticles, after: FreshParticles, held_out: Tensor, **notes: Any
    ) -> Stage:
        r"""Measure a learned ratio on particles of the ladder before and after it and on held-out rows ``(m, d)``.

        :math:`c_k` is log Z of the pass after it less log Z of the pass before, and the rise of the held-out log
        density :math:`\frac1m \sum_i f_k(u_i) - c_k`, with the standard errors of both.
        """
        f = torch.cat([ratio(block) for block in held_out.split(BLOCK)]).double()
        c = after.log_normalizer.value - before.log_normalizer.value
        stderr = math.hypot(after.log_normalizer.stderr, before.log_normalizer.stderr)
        measured = {
            "ess": after.ess,
            "acceptance": after.acceptance,
            "particles": before.source,
            "log_prob_rise": float(f.mean()) - c,
            "log_prob_rise_stderr": math.hypot(stderr, float(f.std(correction=0)) / math.sqrt(len(f))),
        }
        return cls(ratio, c, stderr, gain.value, gain.stderr, {**measured, **notes})

    @property
    def is_worthwhile(self) -> bool:
        """Whether the held-out log density rose by 0.05 nats, and by two standard errors.

        A smaller rise is not worth its risk: in `benchmarks/RESULTS.md` stages that gave 0.02 spoiled the samples.
        """
        rise, stderr = self.diagnostics["log_prob_rise"], self.diagnostics["log_prob_rise_stderr"]
        return bool(rise > max(LEAST_RISE, 2 * stderr))


class Ladder:
    r""":math:`\log \tilde p_K(u) = \log p_0(u) + \sum_{k<K} f_k(u)`, not normalised; rows ``(n, d)``.

    Implements :class:`latentprior.density.sampling.smc.TemperedPath`. Everything is evaluated in blocks of rows, so
    that memory does not grow with n beyond inputs and outputs.

    ``cover`` is a mixture close to the target, for a base that does not reach it (N(0, I) and narrow modes, say).
    Importance sampling then draws from the proposal h, half base and half cover, the latter at three widths:
    early stages, bounded as they are, put mass in halos around the modes.
    """

    def __init__(self, base: Base, ratios: Sequence[nn.Module] = (), cover: MixtureBase | None = None) -> None:
        self.base = base
        self.ratios = tuple(ratios)
        self.cover = cover
        self.start: Base = base if cover is None else BlendBase(base, cover.widened(COVER_WIDTHS))

    def extended(self, ratio: nn.Module) -> Ladder:
        """Add a stage."""
        return Ladder(self.base, (*self.ratios, ratio), self.cover)

    def path_from(self, start: Base) -> smc.TemperedPath:
        """From ``start`` to the whole ladder: stage by stage from the base, straight from anything else."""
        return self if start is self.base else _Straight(self, start)

    def log_weight(self, u: Tensor) -> Tensor:
        r"""Log importance weight of a draw of ``start``, :math:`\log \tilde p_K(u) - \log h(u)`."""
        potential = self.log_potential(u)
        return potential if self.cover is None else potential + self.base.log_prob(u) - self.start.log_prob(u)

    @property
    def length(self) -> int:
        """Number K of stages."""
        return len(self.ratios)

    @property
    def mixture(self) -> MixtureBase | None:
        """The mixture that stages may read features of: the base if it is one, else the cover."""
        return self.base if isinstance(self.base, MixtureBase) else self.cover

    def log_ratios(self, u: Tensor) -> Tensor:
        """Every stage's log ratio, ``(n, d) -> (n, K)``."""
        if not self.ratios:
            return u.new_zeros(len(u), 0)
        return torch.cat([torch.stack(_values(self.ratios, block), 1) for block in u.split(BLOCK)])

    def log_potential(self, u: Tensor) -> Tensor:
        """Sum of all log ratios, ``(n, d) -> (n,)``: the log weight of a base draw."""
        total = u.new_zeros(len(u))
        if not self.ratios:
            return total
        return torch.cat([torch.stack(_values(self.ratios, block)).sum(0) for block in u.split(BLOCK)])

    def density(self, t: float) -> LogDensity:
        """Value and gradient of the density at ``t`` on the path from base (0) to ladder (K)."""
        weights = [min(1.0, t - j) for j in range(self.length) if t > j]
        active = self.ratios[: len(weights)]
        return ValueAndGrad(self.base, active, weights)

    @torch.no_grad()
    def importance(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``n`` draws of ``start`` ``(n, d)`` and their log weights ``(n,)`` under the ladder."""
        draws, weights = [], []
        for done in range(0, n, 1 << 16):
            u = self.start.sample(min(1 << 16, n - done), generator)
            draws.append(u)
            weights.append(self.log_weight(u))
        return torch.cat(draws), torch.cat(weights)

    def weighed(
        self, n: int, generator: torch.Generator | None = None, processes: Processes = ALONE
    ) -> tuple[Tensor, Tensor, LogMean]:
        """What :meth:`importance` gives, and log Z by the weights of all processes, ``n`` each."""
        u, log_weights = self.importance(n, generator)
        return u, log_weights, combine_parts(processes.gather(log_mean_exp(log_weights)), n)

    @torch.no_grad()
    def fresh_particles(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        draws: int | None = None,
        min_ess: float = MIN_ESS,
        smc_particles: int = 32_768,
        islands: int = 16,
        moves: int = 8,
        processes: Processes = ALONE,
    ) -> FreshParticles:
        """``n`` rows of the ladder never seen before, and an independent estimate of its log normaliser.

        ``draws`` (default ``2 n``) base draws (fewer where they would pass 256 MiB) are resampled while their
        effective share is ``min_ess`` or more: exact, and no Markov chain. Below it at most ``smc_particles`` rows
        are carried down the ladder in independent islands, which stay whole and in order.

        Of several processes each makes a share of the draws, rows and islands, from a generator of its own; log Z and
        the shares are those of all together. Raises :class:`LearningDivergedError` in all where one cannot go on.
        """
        rows, draws = processes.share(n), processes.share(draws or 2 * n)
        if not self.ratios:
            return FreshParticles(self.base.sample(rows, generator), "base", LogMean(0.0, 0.0, 1.0), 1.0, 1.0)
        probe, _, expected = self.weighed(processes.share(16_384), generator, processes)
        if expected.ess >= min_ess:
            draws = min(draws, max(rows // 4, (1 << 26) // probe.shape[1]))
            u, log_weights, estimate = self.weighed(draws, generator, processes)
            if estimate.ess >= min_ess:
                index = systematic(log_weights, rows, generator)
                return FreshParticles(u[index], "importance", estimate, estimate.ess, 1.0)
        if processes.count > 1:
            islands = max(processes.share(islands), LEAST_ISLANDS)
        m = max(1, min(rows, processes.share(smc_particles)) // islands) * islands
        start = self.start.sample(m, generator)
        result = smc.run(
            start, self.path_from(self.start), islands=islands, moves=moves, generator=generator, processes=processes
        )
        return FreshParticles(result.position, "smc", result.log_normalizer, result.ess, result.acceptance)

    def held_out_particles(
        self, n: int, draws: int, generator: torch.Generator, processes: Processes = ALONE
    ) -> FreshParticles:
        """``n`` rows that judge a stage and never teach it."""
        return self.fresh_particles(n, generator, draws=draws, processes=processes)


def _values(ratios: Sequence[nn.Module], u: Tensor) -> list[Tensor]:
    """Every log ratio at ``u``; features of one mixture are evaluated once for all stages that read them."""
    known: dict[int, Tensor] = {}
    values = []
    for ratio in ratios:
        features = ratio.features if isinstance(ratio, BoundedRatio) else None
        if features is None:
            values.append(ratio(u))
            continue
        key = id(features.mixture)
        if key not in known:
            known[key] = features(u)
        values.append(ratio(u, known[key]))
    return values


class _Straight:
    r"""The geometric path :math:`\log h + t\,(\log\tilde p_K - \log h)` from a proposal to a ladder, t in [0, 1]."""

    length = 1

    def __init__(self, ladder: Ladder, proposal: Base) -> None:
        self.ladder, self.proposal = ladder, proposal

    def log_ratios(self, u: Tensor) -> Tensor:
        end = self.ladder.base.log_prob(u) + self.ladder.log_potential(u)
        return (end - self.proposal.log_prob(u))[:, None]

    def density(self, t: float) -> LogDensity:
        whole = self.ladder.density(self.ladder.length)

        def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
            start, start_grad = self.proposal.log_prob_and_grad(u)
            if t == 0:
                return start, start_grad
            end, end_grad = whole(u)
            return (1 - t) * start + t * end, (1 - t) * start_grad + t * end_grad

        return evaluate
