"""The ladder in standardised coordinates: a base density times bounded ratios, its values, gradients and path."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bases import Base, BlendBase, MixtureBase
from .gradients import ValueAndGrad
from .ratios import BoundedRatio, Gain
from .sampling import LogDensity, smc
from .sampling.resampling import LogMean, log_mean_exp, systematic

__all__ = ["FreshParticles", "Ladder", "Pass", "Stage", "carried", "passed_afresh"]

BLOCK_ROWS = 2048
LEAST_EFFECTIVE_SHARE = 0.01
"""Effective share of base draws from which on they are resampled; below it, sequential Monte Carlo carries
particles."""
LEAST_RISE_NATS = 0.05
"""Rise of the held-out log density from which on a stage is worth its risk: one of 0.02 spoiled a VAE's samples."""
HELD_OUT_FRACTION = 8
"""One island in so many is held out whole: it judges a stage and never teaches it."""
COVER_WIDTHS = (1.0, 1.5, 2.5)
"""Factors on the scales of a cover's components: early stages, bounded as they are, put mass in halos around modes."""
PROBE_DRAWS = 16_384
MOST_DRAWN_NUMBERS = 1 << 26
"""Numbers in the base draws that are held at once: 256 MiB of float32."""


class FreshParticles(NamedTuple):
    """Rows of :math:`p_K` that no stage has seen, and how they were made."""

    position: Tensor
    source: str
    """``base``, ``importance`` or ``smc``."""
    log_normalizer: LogMean
    r""":math:`\log \hat Z_K` of this pass: no stage so far was trained on these rows."""
    ess: float
    """Effective share of the base draws, or the smallest one met at a level of SMC."""
    acceptance: float

    def split(self) -> tuple[Tensor, Tensor]:
        """Separate the rows of the last eighth of the islands, which judge a stage, from those that teach it."""
        cut = len(self.position) * (HELD_OUT_FRACTION - 1) // HELD_OUT_FRACTION
        return self.position[:cut], self.position[cut:]


@dataclass(frozen=True)
class Stage:
    r"""One rung: the log ratio :math:`f_k`, its log normaliser :math:`c_k`, and how well it told q from :math:`p_k`.

    Parameters
    ----------
    network : torch.nn.Module
        The log ratio :math:`f_k`, rows ``(n, d)`` of standardised coordinates to ``(n,)`` nats.
    log_normalizer, log_normalizer_stderr : float
        :math:`c_k` and its standard error, in nats; 0 while it is not known.
    gain, gain_stderr : float
        Held-out gain and its standard error, in nats: from 0 (no difference) to 1.386. NaN for a tilt.
    diagnostics : mapping
        What learning and measuring the stage has shown.
    """

    network: nn.Module
    log_normalizer: float = 0.0
    log_normalizer_stderr: float = 0.0
    gain: float = math.nan
    gain_stderr: float = math.nan
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_worthwhile(self) -> bool:
        """Whether the held-out log density rose by 0.05 nats and by two standard errors."""
        rise, stderr = self.diagnostics["log_prob_rise"], self.diagnostics["log_prob_rise_stderr"]
        return bool(rise > max(LEAST_RISE_NATS, 2 * stderr))


class Pass(NamedTuple):
    r"""How :math:`c_k = \log Z_{k+1} - \log Z_k` of a factor :math:`e^{f_k}` was found, by particles it never saw."""

    constant: LogMean
    ess: float
    acceptance: float
    source: str
    """How the particles of the ladder without the factor were made."""


def passed_afresh(before: FreshParticles, after: FreshParticles) -> Pass:
    """Compare log Z of two independent passes: of the ladder without the factor and with it."""
    (low, low_stderr, _), (high, high_stderr, ess) = before.log_normalizer, after.log_normalizer
    constant = LogMean(high - low, math.hypot(high_stderr, low_stderr), ess)
    return Pass(constant, after.ess, after.acceptance, before.source)


def carried(
    ladder: Ladder,
    factor: nn.Module,
    position: Tensor,
    *,
    islands: int = 16,
    moves: int = 6,
    generator: torch.Generator | None = None,
    on_level: Callable[[int], None] | None = None,
) -> tuple[Tensor, Pass]:
    """Carry particles of a ladder, ``(n, d)`` in equal islands, to the ladder times a factor by sequential Monte Carlo.

    ``on_level`` is called before each level with the number of those that are done. Returns the particles and the pass.
    Raises :class:`LearningDivergedError` where no weight is a number.
    """
    path, start = ladder.extended(Stage(factor)), float(ladder.length)
    result = smc.run(position, path, start=start, islands=islands, moves=moves, generator=generator, on_level=on_level)
    return result.position, Pass(result.log_normalizer, result.ess, result.acceptance, "smc")


class Ladder:
    r""":math:`\log \tilde p_K(u) = \log p_0(u) + \sum_{k<K} f_k(u)`, not normalised; rows ``(n, d)``.

    Implements :class:`latentprior.density.sampling.smc.TemperedPath`, in blocks of rows, so that memory does not grow
    with n beyond inputs and outputs. ``cover`` is a mixture close to the target, for a base that does not reach it
    (N(0, I) and narrow modes, say): importance sampling then draws from half base, half cover at three widths.
    """

    def __init__(self, base: Base, stages: Sequence[Stage] = (), cover: MixtureBase | None = None) -> None:
        self.base = base
        self.stages = tuple(stages)
        self.ratios = tuple(stage.network for stage in self.stages)
        self.cover = cover
        self.start: Base = base if cover is None else BlendBase(base, cover.widened(COVER_WIDTHS))

    def extended(self, stage: Stage) -> Ladder:
        """Add a stage."""
        return Ladder(self.base, (*self.stages, stage), self.cover)

    def first(self, k: int) -> Ladder:
        """The base and its first k stages."""
        return Ladder(self.base, self.stages[:k], self.cover)

    @torch.no_grad()
    def times(
        self, factor: nn.Module, passed: Pass, gain: Gain | None = None, held_out: Tensor | None = None, **notes: Any
    ) -> Ladder:
        r"""Multiply the density by :math:`e^{f - c}`: every stage, tilt and energy joins a ladder here.

        ``passed`` gives the constant c with its standard error, from particles that f has never seen. On ``held_out``
        rows ``(m, d)`` the rise of the mean log density, :math:`\frac1m \sum_i f(u_i) - c`, is measured. ``notes`` are
        further diagnostics of the stage.
        """
        constant, diagnostics = passed.constant, dict(notes)
        if held_out is not None:
            f = torch.cat([factor(block) for block in held_out.split(BLOCK_ROWS)]).double()
            own = float(f.std(correction=0)) / math.sqrt(len(f))
            diagnostics = {
                "ess": passed.ess,
                "acceptance": passed.acceptance,
                "particles": passed.source,
                "log_prob_rise": float(f.mean()) - constant.value,
                "log_prob_rise_stderr": math.hypot(constant.stderr, own),
                **diagnostics,
            }
        value, stderr = gain or (math.nan, math.nan)
        return self.extended(Stage(factor, constant.value, constant.stderr, value, stderr, diagnostics))

    def corrected(self, value: float, stderr: float) -> Ladder:
        """Let the last stage's constant absorb the difference to log Z of the whole ladder, known anew."""
        if not self.stages:
            return self
        *earlier, last = self.stages
        rest = value - sum(stage.log_normalizer for stage in earlier)
        error = math.hypot(stderr, *(stage.log_normalizer_stderr for stage in earlier))
        return Ladder(
            self.base, (*earlier, replace(last, log_normalizer=rest, log_normalizer_stderr=error)), self.cover
        )

    @property
    def log_normalizer(self) -> tuple[float, float]:
        """Sum of the stages' constants, and its standard error, in nats."""
        return (
            sum((stage.log_normalizer for stage in self.stages), 0.0),
            math.hypot(*(stage.log_normalizer_stderr for stage in self.stages)),
        )

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
        return torch.cat([torch.stack(_values(self.ratios, block), 1) for block in u.split(BLOCK_ROWS)])

    def log_potential(self, u: Tensor) -> Tensor:
        """Sum of all log ratios, ``(n, d) -> (n,)``: the log weight of a base draw."""
        total = u.new_zeros(len(u))
        if not self.ratios:
            return total
        return torch.cat([torch.stack(_values(self.ratios, block)).sum(0) for block in u.split(BLOCK_ROWS)])

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

    @torch.no_grad()
    def probe(self, n: int, generator: torch.Generator | None = None) -> LogMean:
        """Log Z by importance sampling with ``n`` draws that are not kept; its effective share says what they do."""
        return log_mean_exp(self.importance(n, generator)[1])

    def fresh_particles(
        self, n: int, generator: torch.Generator | None = None, *, draws: int | None = None, smc_particles: int = 32_768
    ) -> FreshParticles:
        """``n`` rows of the ladder never seen before, and an independent estimate of its log normaliser.

        ``draws`` (default ``2 n``) of the base are resampled while 1% of them or more are effective: exact, and no
        Markov chain. Below that share, sequential Monte Carlo carries at most ``smc_particles``. Raises
        :class:`LearningDivergedError` where its weights are not numbers.
        """
        if not self.ratios:
            return self.exact_particles(n, generator)
        if self.probe(PROBE_DRAWS, generator).ess >= LEAST_EFFECTIVE_SHARE:
            resampled = self.resampled_particles(n, generator, draws)
            if resampled.ess >= LEAST_EFFECTIVE_SHARE:
                return resampled
        return self.carried_particles(min(n, smc_particles), generator)

    @torch.no_grad()
    def exact_particles(self, n: int, generator: torch.Generator | None = None) -> FreshParticles:
        """``n`` draws of the base, for a ladder without stages."""
        return FreshParticles(self.base.sample(n, generator), "base", LogMean(0.0, 0.0, 1.0), 1.0, 1.0)

    @torch.no_grad()
    def resampled_particles(
        self, n: int, generator: torch.Generator | None = None, draws: int | None = None
    ) -> FreshParticles:
        """``n`` rows by resampling base draws, ``2 n`` by default."""
        most = max(n // 4, MOST_DRAWN_NUMBERS // self.base.dim)
        u, log_weights = self.importance(min(draws or 2 * n, most), generator)
        estimate = log_mean_exp(log_weights)
        index = systematic(log_weights, n, generator)
        return FreshParticles(u[index], "importance", estimate, estimate.ess, 1.0)

    @torch.no_grad()
    def carried_particles(
        self, n: int, generator: torch.Generator | None = None, *, islands: int = 16, moves: int = 8
    ) -> FreshParticles:
        """At most ``n`` rows by sequential Monte Carlo from the start of the ladder, in islands that stay whole."""
        start = self.start.sample(max(1, n // islands) * islands, generator)
        result = smc.run(start, self.path_from(self.start), islands=islands, moves=moves, generator=generator)
        return FreshParticles(result.position, "smc", result.log_normalizer, result.ess, result.acceptance)


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
