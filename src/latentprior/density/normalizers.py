"""Log normalisers with error bars: importance sampling, a bracket from both ends, independent checks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LowESSWarning, NormalizerBracketWarning, warn
from ..runtime.processes import ALONE, Processes
from .bases import Base
from .ladder import MIN_ESS, Ladder
from .sampling import mala, smc
from .sampling.resampling import (
    LogMean,
    combine_parts,
    log_mean_exp,
    tail_shape,
)

__all__ = ["Bracket", "Normalizer", "NormalizerCheck", "affordable", "check", "check_from", "estimate"]

WIDE = 0.1
ROUND, PARTS = 1 << 18, 4
PARTICLES, LEAST_PARTICLES, MOVES = 8192, 1024, 6
FEW, UNCERTAIN, HEAVY = 100, 0.5, 0.7
"""Effective draws below which an average of weights says little; shapes of their tail above which its error bar does
not hold, since their variance is infinite, and above which it is low itself nearly always (Vehtari et al. 2024)."""


class Bracket(NamedTuple):
    r"""log Z seen from both ends of the ladder, in nats.

    ``forward``: SMC from the base (or the ladder's cover), :math:`\mathbb E \hat Z = Z`, so that its log is low
    on average and lower still where a mode is missed. ``reverse``: SMC from held-out data down to the base,
    :math:`\mathbb E\,\widehat{1/Z} = 1/Z` if the data follow the ladder, so that minus its log is high on
    average (Grosse, Ancha and Roy 2016, bidirectional Monte Carlo). The distance is the honest uncertainty.
    """

    forward: LogMean
    reverse: LogMean

    @property
    def width(self) -> float:
        """How far the data's end stands above the base's end; negative where the ends cross."""
        return self.reverse.value - self.forward.value

    @property
    def stderr(self) -> float:
        """Standard error of the width."""
        return math.hypot(self.forward.stderr, self.reverse.stderr)

    @property
    def is_wide(self) -> bool:
        """Whether the ends stand more than 0.1 nats apart, or cross by as much, and noise does not explain it."""
        return self.width > max(WIDE, 2 * self.stderr) or self.width < -WIDE - 2 * self.stderr

    @property
    def middle(self) -> LogMean:
        """The mean of both ends; half their distance is part of its error."""
        value = 0.5 * (self.forward.value + self.reverse.value)
        return LogMean(value, 0.5 * math.hypot(self.stderr, self.width), min(self.forward.ess, self.reverse.ess))


class Normalizer(NamedTuple):
    """The log normaliser of a whole ladder: value, standard error, how it was found, and its bracket."""

    value: float
    stderr: float
    ess: float
    source: str
    bracket: Bracket | None


class NormalizerCheck(NamedTuple):
    """Estimate of a density's integral from another one: ``value`` must be 1 within a few ``stderr``."""

    value: float
    stderr: float
    ess: float
    reference: str
    method: str = "importance"
    """``importance``, or ``annealing`` where the tail of the weights is too heavy for their average."""
    tail_shape: float = math.nan
    """Of importance weights, :func:`~latentprior.density.sampling.resampling.tail_shape`."""

    @property
    def passed(self) -> bool:
        """Whether 1 lies within three standard errors (or half a percent, where the error is smaller still)."""
        return math.isfinite(self.stderr) and abs(self.value - 1) <= max(3 * self.stderr, 0.005)


def estimate(
    ladder: Ladder,
    held_out: Tensor,
    generator: torch.Generator | None = None,
    *,
    draws: int = 1 << 21,
    tolerance: float = 0.005,
    deadline: float | None = None,
    particles: int = PARTICLES,
    islands: int = 16,
    moves: int = MOVES,
    processes: Processes = ALONE,
) -> Normalizer:
    """Estimate log Z from particles that trained nothing, and bracket it from both ends.

    Importance sampling goes on, 262,144 draws at a time, until its standard
    error is below ``tolerance`` nats, or ``draws`` or the ``deadline`` (:func:`time.monotonic`) is reached. The value
    is that of importance sampling where its effective share is half a percent or more, and what the bracket's width
    exceeds two of its standard errors by joins the standard error; otherwise the middle of the bracket, and half the
    bracket's width joins the standard error.

    Warns :class:`NormalizerBracketWarning` when the bracket is wider than 0.1 nats and two standard errors of its
    width, or its ends cross by more than both together. An end that hangs on a single island (a held-out row in the
    base's far tail) has no error bar to speak of: it crosses nothing where importance sampling gives the value.

    With a ``deadline`` the bracket takes about half of the time left, with 1,024 ``particles`` at least. Without
    ``draws`` it is all that there is.

    Of several processes each makes a share of draws and islands, from a generator of its own.
    """
    if ladder.length == 0:
        return Normalizer(0.0, 0.0, 1.0, "base", None)
    islands = processes.count * processes.share(islands)
    if deadline is not None:
        left = 0.5 * (deadline - time.monotonic())
        particles = processes.first(affordable(ladder, held_out, left * processes.count, moves, particles))
    ends = bracket(ladder, held_out, generator, particles=particles, islands=islands, moves=moves, processes=processes)
    direct = LogMean(math.nan, math.inf, 0.0)
    if draws:
        direct = _direct(ladder, held_out.shape[1], generator, draws, tolerance, deadline, processes)
    if direct.ess >= MIN_ESS / 2:
        # What the data's end shows beyond doubt, draws of the base may have missed.
        missed = max(0.0, ends.width - 2 * ends.stderr)
        result = Normalizer(direct.value, math.hypot(direct.stderr, missed), direct.ess, "importance", ends)
    else:
        result = Normalizer(ends.middle.value, ends.middle.stderr, ends.forward.ess, "smc", ends)
    alone = result.source == "importance" and ends.reverse.ess < 2 / islands
    if ends.is_wide and not (alone and ends.width < 0):
        warn(
            f"log Z is {ends.forward.value:.3f} from the base and {ends.reverse.value:.3f} from the data: the bracket "
            f"is {abs(ends.width):.2f} nats wide; use a better base (base='gmm') or read log_prob up to that constant",
            NormalizerBracketWarning,
        )
    return result


def expected_seconds(ladder: Ladder, held_out: Tensor, processes: Processes = ALONE) -> float:
    """About what :func:`estimate` takes with all its particles and one round of draws, none of which are made."""
    # A draw and its value take about half of the time of a value and its gradient; the rest is room for error.
    return 1.25 * _bracket_seconds(ladder, held_out, PARTICLES, MOVES, also=ROUND // 2) / processes.count


def affordable(ladder: Ladder, held_out: Tensor, seconds: float, moves: int, most: int) -> int:
    """Particles of a :func:`bracket` that takes about ``seconds``; 1,024 to ``most``."""
    each = _bracket_seconds(ladder, held_out, 1, moves)
    return int(min(most, max(LEAST_PARTICLES, seconds / max(each, 1e-9))))


@torch.no_grad()
def _bracket_seconds(ladder: Ladder, held_out: Tensor, particles: int, moves: int, also: int = 0) -> float:
    """By the time of one evaluation of density and gradient, of which ``also`` are added."""
    rows, density, times = held_out[:LEAST_PARTICLES], ladder.density(ladder.length), []
    for _ in range(4):
        begun = time.monotonic()
        density(rows)
        times.append(time.monotonic() - begun)
    # Two levels a stage each way, and the moves that settle the held-out rows.
    evaluations = (4 * ladder.length + 2) * moves * particles + also
    return sorted(times)[1] / len(rows) * evaluations


@torch.no_grad()
def _direct(
    ladder: Ladder,
    dim: int,
    generator: torch.Generator | None,
    draws: int,
    tolerance: float,
    deadline: float | None,
    processes: Processes,
) -> LogMean:
    weights: list[Tensor] = []
    rows = min(draws, ROUND, (1 << 26) // dim)
    # In parts, lest a deadline be overrun by a whole round.
    own = processes.share(-(-rows // PARTS))
    while True:
        # Only the weights are kept: a part's draws are gone when the next begins.
        weights.append(ladder.importance(own, generator)[1])
        late = deadline is not None and processes.first(time.monotonic() >= deadline)
        rounds, within = divmod(len(weights), PARTS)
        if within and not late:
            continue
        found = combine_parts(processes.gather(log_mean_exp(torch.cat(weights))), own * len(weights))
        if found.stderr < tolerance or found.ess < MIN_ESS / 2 or late or rounds * rows >= draws:
            return found


@torch.no_grad()
def bracket(
    ladder: Ladder,
    held_out: Tensor,
    generator: torch.Generator | None = None,
    *,
    particles: int = PARTICLES,
    islands: int = 16,
    moves: int = MOVES,
    processes: Processes = ALONE,
) -> Bracket:
    """Run SMC from the base upwards and from ``held_out`` rows ``(m, d)`` downwards, on the ladder's path.

    The held-out rows first take ``2 * moves`` steps that leave the ladder invariant, since they follow q, not
    quite :math:`p_K`. Of several processes each carries a share of the islands, from rows that no other starts from.
    """
    held_out, particles, islands = processes.stripe(held_out), processes.share(particles), processes.share(islands)
    source = ladder.cover or ladder.base
    path = ladder.path_from(source)
    start = source.sample(particles // islands * islands, generator)
    forward = smc.run(start, path, islands=islands, moves=moves, generator=generator, processes=processes)
    wanted = min(particles, len(held_out) * 4)
    rows = max(1, wanted // islands) * islands
    repeats = -(-rows // len(held_out))
    order = torch.randperm(len(held_out), generator=generator, device=_device(generator)).to(held_out.device)
    data = held_out[order].repeat_interleave(repeats, 0)[:rows]
    density = ladder.density(ladder.length)
    settled, _ = mala.sample(data, density, steps=2 * moves, generator=generator)
    backward = smc.run(
        settled, path, start=float(path.length), end=0.0, islands=islands, moves=moves, generator=generator,
        processes=processes,
    )  # fmt: skip
    value, stderr, ess = backward.log_normalizer
    return Bracket(forward.log_normalizer, LogMean(-value, stderr, ess))


@torch.no_grad()
def check(
    log_prob: Callable[[Tensor], Tensor],
    reference_log_prob: Callable[[Tensor], Tensor],
    draws: Tensor,
    name: str,
) -> NormalizerCheck:
    r""":math:`\hat Z = \frac1n \sum_i p(u_i)/h(u_i)`, :math:`u_i \sim h`, for a normalised reference density h.

    Warns :class:`LowESSWarning` where fewer than 100 effective draws carry the estimate, or where their tail is heavy
    (:func:`~latentprior.density.sampling.resampling.tail_shape` above 0.7).
    """
    weights = _weights(log_prob, reference_log_prob, draws)
    found = _by_importance(weights, name)
    effective = found.ess * len(weights)
    if effective < FEW:
        told = f"only {effective:.0f} effective draws of the reference {name!r} reach the prior"
    elif found.tail_shape > HEAVY:
        told = (
            f"the largest weights of {name!r} follow a tail of shape {found.tail_shape:.2f}, so that Z may come out low"
        )
    else:
        return found
    warn(
        f"{told}: the check says little; try another reference (gmm, base, a Distribution of yours) or more draws",
        LowESSWarning,
    )
    return found


@torch.no_grad()
def check_from(
    ladder: Ladder,
    reference: Base,
    draws: Tensor,
    name: str,
    generator: torch.Generator | None = None,
    *,
    log_normalizer: float,
    own: Callable[[int], Tensor],
    particles: int = 8192,
    islands: int = 16,
    moves: int = 6,
) -> NormalizerCheck:
    r"""What :func:`check` says of a ladder, and by annealing where its error bar would not hold.

    Where the tail's shape is above 1/2, or fewer than 100 draws are effective, ``particles`` of the ``reference`` h are
    carried along :math:`\log h + t\,(\log p_K - \log h)` by sequential Monte Carlo in ``islands``, whose estimate is
    unbiased as well and whose weights are even (Neal 2001; Del Moral, Doucet and Jasra 2006), and as many of the
    ladder's ``own`` samples the other way. What h does not reach leaves the first estimate low and not the second, so
    that the two are a :class:`Bracket`: the value is its middle, and half its width part of the standard error.
    """
    weights = _weights(lambda u: ladder.base.log_prob(u) + ladder.log_potential(u), reference.log_prob, draws)
    found = _by_importance(weights - log_normalizer, name)
    if found.ess * len(draws) >= FEW and not found.tail_shape > UNCERTAIN:
        return found
    path, rows = ladder.path_from(reference), particles // islands * islands
    there = smc.run(reference.sample(rows, generator), path, islands=islands, moves=moves, generator=generator)
    back = smc.run(
        own(rows), path, start=float(path.length), end=0.0, islands=islands, moves=moves, generator=generator
    )
    value, stderr, ess = back.log_normalizer
    middle = Bracket(there.log_normalizer, LogMean(-value, stderr, ess)).middle
    z = math.exp(middle.value - log_normalizer)
    return NormalizerCheck(z, z * middle.stderr, middle.ess, name, "annealing", found.tail_shape)


def _weights(log_prob: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    return torch.cat([log_prob(b).double() - reference(b).double() for b in draws.split(1 << 16)])


def _by_importance(log_weights: Tensor, name: str) -> NormalizerCheck:
    value = log_mean_exp(log_weights)
    z = math.exp(value.value)
    return NormalizerCheck(z, z * value.stderr, value.ess, name, "importance", tail_shape(log_weights))


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
