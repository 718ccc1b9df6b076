"""Log normalisers with error bars: importance sampling, and a bracket from both ends."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NormalizerBracketWarning, warn
from .bases.base import device_of
from .ladder import LEAST_EFFECTIVE_SHARE, MOST_DRAWN_NUMBERS, Ladder
from .sampling import mala, smc
from .sampling.resampling import LogMean, log_mean_exp

__all__ = [
    "Bracket",
    "Normalizer",
    "affordable",
    "backwards",
    "bracket",
    "concluded",
    "estimate",
    "expected_seconds",
    "importance_estimate",
    "warn_of_bracket",
]

WIDE_BRACKET_NATS = 0.1
"""Width of a bracket from which on a density is not known up to noise."""
DRAWS_A_ROUND, PARTS_A_ROUND = 1 << 18, 4
MOST_DRAWS = 1 << 21
TOLERANCE_NATS = 0.005
BRACKET_PARTICLES, LEAST_BRACKET_PARTICLES, BRACKET_ISLANDS, BRACKET_MOVES = 8192, 1024, 16, 6
BRACKET_SHARE = 0.5
"""Share of the time left that a bracket takes; importance sampling has the rest."""
UNKNOWN_MEAN = LogMean(math.nan, math.inf, 0.0)


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
        """Whether the data's end stands above the base's by more than 0.1 nats and two standard errors."""
        return self.width > max(WIDE_BRACKET_NATS, 2 * self.stderr)

    @property
    def is_crossed(self) -> bool:
        """Whether the data's end stands below the base's by more than 0.1 nats and two standard errors together."""
        return self.width < -WIDE_BRACKET_NATS - 2 * self.stderr

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


@torch.no_grad()
def estimate(
    ladder: Ladder,
    held_out: Tensor,
    generator: torch.Generator | None = None,
    *,
    draws: int = MOST_DRAWS,
    tolerance: float = TOLERANCE_NATS,
    deadline: float | None = None,
    particles: int = BRACKET_PARTICLES,
    islands: int = BRACKET_ISLANDS,
    moves: int = BRACKET_MOVES,
) -> Normalizer:
    """Estimate log Z from particles that trained nothing, and bracket it from both ends.

    :func:`concluded` says which of the two gives the value. Importance sampling ends at a standard error of
    ``tolerance`` nats or after ``draws`` of the base; with 0 draws the bracket is all that there is. With a
    ``deadline`` (:func:`time.monotonic`) the bracket takes about half of the time that is left, with 1,024
    ``particles`` at least. Warns with :class:`NormalizerBracketWarning` where the bracket is wider than 0.1 nats beyond
    noise.
    """
    if ladder.length == 0:
        return Normalizer(0.0, 0.0, 1.0, "base", None)
    if deadline is not None:
        half = BRACKET_SHARE * (deadline - time.monotonic())
        particles = affordable(ladder, held_out, half, moves, particles)
    ends = bracket(ladder, held_out, generator, particles=particles, islands=islands, moves=moves)
    direct = UNKNOWN_MEAN
    if draws:
        direct = importance_estimate(ladder, generator, draws=draws, tolerance=tolerance, deadline=deadline)
    result = concluded(direct, ends, islands)
    warn_of_bracket(result, islands)
    return result


def concluded(direct: LogMean, ends: Bracket, islands: int) -> Normalizer:
    """Choose between importance sampling and the bracket.

    The value is that of importance sampling where its effective share is half a percent or more. Its standard error is
    then ``hypot(se_direct, max(0, width - 2 se_width))``: what the data's end shows beyond doubt, draws of the base may
    have missed. Otherwise the value is the middle of the bracket.
    """
    if direct.ess >= LEAST_EFFECTIVE_SHARE / 2:
        missed = max(0.0, ends.width - 2 * ends.stderr)
        return Normalizer(direct.value, math.hypot(direct.stderr, missed), direct.ess, "importance", ends)
    return Normalizer(ends.middle.value, ends.middle.stderr, ends.forward.ess, "smc", ends)


def warn_of_bracket(found: Normalizer, islands: int = BRACKET_ISLANDS) -> None:
    """Warn with :class:`NormalizerBracketWarning` where the ends of the bracket disagree beyond noise.

    An end that hangs on a single island (a held-out row in the base's far tail) has no error bar to speak of: it
    crosses nothing where importance sampling gives the value.
    """
    ends = found.bracket
    if ends is None:
        return
    one_island = found.source == "importance" and ends.reverse.ess < 2 / islands
    if ends.is_wide or (ends.is_crossed and not one_island):
        warn(
            f"log Z is {ends.forward.value:.3f} from the base and {ends.reverse.value:.3f} from the data: the bracket "
            f"is {abs(ends.width):.2f} nats wide; use a better base (base='gmm') or read log_prob up to that constant",
            NormalizerBracketWarning,
        )


def expected_seconds(ladder: Ladder, held_out: Tensor) -> float:
    """About what :func:`estimate` takes with all its particles and one round of draws, none of which are made."""
    # A draw and its value take about half of the time of a value and its gradient; the rest is room for error.
    return 1.25 * _bracket_seconds(ladder, held_out, BRACKET_PARTICLES, BRACKET_MOVES, also=DRAWS_A_ROUND // 2)


def affordable(ladder: Ladder, held_out: Tensor, seconds: float, moves: int, most: int) -> int:
    """Particles of a :func:`bracket` that takes about ``seconds``; 1,024 to ``most``."""
    each = _bracket_seconds(ladder, held_out, 1, moves)
    return int(min(most, max(LEAST_BRACKET_PARTICLES, seconds / max(each, 1e-9))))


@torch.no_grad()
def _bracket_seconds(ladder: Ladder, held_out: Tensor, particles: int, moves: int, also: int = 0) -> float:
    """Time of a bracket, by that of one evaluation of density and gradient, of which ``also`` are added."""
    rows, density, times = held_out[:LEAST_BRACKET_PARTICLES], ladder.density(ladder.length), []
    for _ in range(4):
        begin = time.monotonic()
        density(rows)
        times.append(time.monotonic() - begin)
    # Two levels a stage each way, and the moves that settle the held-out rows.
    evaluations = (4 * ladder.length + 2) * moves * particles + also
    return sorted(times)[1] / len(rows) * evaluations


@torch.no_grad()
def importance_estimate(
    ladder: Ladder,
    generator: torch.Generator | None = None,
    *,
    draws: int = MOST_DRAWS,
    tolerance: float = TOLERANCE_NATS,
    deadline: float | None = None,
) -> LogMean:
    """Estimate log Z by base draws, 262,144 a round, until the error is below ``tolerance`` or ``draws`` are made.

    It ends early at the ``deadline``, and where the effective share is so low that the value will not be used.
    """
    log_weights: list[Tensor] = []
    rows = min(draws, DRAWS_A_ROUND, MOST_DRAWN_NUMBERS // ladder.base.dim)
    # In parts, so that a deadline is not overrun by a whole round.
    part = -(-rows // PARTS_A_ROUND)
    while True:
        # Only the weights are kept: a part's draws are gone when the next begins.
        log_weights.append(ladder.importance(part, generator)[1])
        late = deadline is not None and time.monotonic() >= deadline
        rounds, within = divmod(len(log_weights), PARTS_A_ROUND)
        if within and not late:
            continue
        direct = log_mean_exp(torch.cat(log_weights))
        if direct.stderr < tolerance or direct.ess < LEAST_EFFECTIVE_SHARE / 2 or late or rounds * rows >= draws:
            return direct


@torch.no_grad()
def bracket(
    ladder: Ladder,
    held_out: Tensor,
    generator: torch.Generator | None = None,
    *,
    particles: int = BRACKET_PARTICLES,
    islands: int = BRACKET_ISLANDS,
    moves: int = BRACKET_MOVES,
) -> Bracket:
    """Run SMC from the base upwards and from ``held_out`` rows ``(m, d)`` downwards, on the ladder's path.

    The held-out rows first take ``2 * moves`` steps that leave the ladder invariant, since they follow q, not
    quite :math:`p_K`.
    """
    source = ladder.cover or ladder.base
    path = ladder.path_from(source)
    start = source.sample(particles // islands * islands, generator)
    forward = smc.run(start, path, islands=islands, moves=moves, generator=generator)
    wanted = min(particles, len(held_out) * 4)
    rows = max(1, wanted // islands) * islands
    repeats = -(-rows // len(held_out))
    order = torch.randperm(len(held_out), generator=generator, device=device_of(generator)).to(held_out.device)
    data = held_out[order].repeat_interleave(repeats, 0)[:rows]
    density = ladder.density(ladder.length)
    settled, _ = mala.sample(data, density, steps=2 * moves, generator=generator)
    return Bracket(forward.log_normalizer, backwards(settled, path, islands, moves, generator))


def backwards(
    position: Tensor, path: smc.TemperedPath, islands: int, moves: int, generator: torch.Generator | None
) -> LogMean:
    """Log Z from particles of the path's end, carried to its start."""
    result = smc.run(
        position, path, start=float(path.length), end=0.0, islands=islands, moves=moves, generator=generator
    )
    value, stderr, ess = result.log_normalizer
    return LogMean(-value, stderr, ess)
