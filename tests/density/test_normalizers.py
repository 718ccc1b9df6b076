import itertools
import math
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from clocks import Clock
from ladders import ladder_of
from latentprior import LowESSWarning, NormalizerBracketWarning, NormalizerCheck
from latentprior.density.bases import GaussianMixtureBase, NormalBase
from latentprior.density.ladder import Ladder
from latentprior.density.normalizer_check import check, check_from
from latentprior.density.normalizers import PARTS_A_ROUND, bracket, estimate, expected_seconds, importance_estimate
from latentprior.density.sampling import mala, smc
from latentprior.density.sampling.resampling import LogMean, systematic
from quadrature import integral


class Slope(torch.nn.Module):
    def __init__(self, steepness: float, shift: float) -> None:
        super().__init__()
        self.steepness, self.shift = steepness, shift

    def forward(self, u: Tensor) -> Tensor:
        return 3 * torch.tanh(self.steepness * (u[:, 0] - self.shift) - 0.5 * u[:, -1])


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return ladder_of(NormalBase(2).float(), [Slope(1.0, 0.5), Slope(0.7, 1.0)])


@pytest.fixture(scope="module")
def log_z(ladder: Ladder) -> float:
    return math.log(integral(lambda u: ladder.base.log_prob(u) + ladder.log_potential(u), -9, 9, 2))


@pytest.fixture(scope="module")
def held_out(ladder: Ladder) -> Tensor:
    return ladder.fresh_particles(2000, torch.Generator().manual_seed(99)).position


def test_no_stages_need_no_estimate() -> None:
    got = estimate(ladder_of(NormalBase(2)), torch.zeros(3, 2))
    assert (got.value, got.stderr, got.source, got.bracket) == (0, 0, "base", None)


def test_estimate_agrees_with_quadrature(ladder: Ladder, held_out: Tensor, log_z: float) -> None:
    for seed in range(3):
        got = estimate(
            ladder, held_out, torch.Generator().manual_seed(seed), draws=1 << 16, particles=1024, islands=16, moves=4
        )
        assert got.source == "importance"
        # 4.5 standard errors, of many draws: 1 in 150,000.
        assert abs(got.value - log_z) < 4.5 * got.stderr
        assert got.stderr < 0.02


def test_bracket_holds_the_truth(ladder: Ladder, held_out: Tensor, log_z: float) -> None:
    forward, reverse = [], []
    for seed in range(10):
        ends = bracket(ladder, held_out, torch.Generator().manual_seed(seed), particles=1024, islands=16, moves=4)
        assert ends.width == pytest.approx(ends.reverse.value - ends.forward.value)
        forward.append(ends.forward.value - log_z)
        reverse.append(ends.reverse.value - log_z)
    # Means over seeds: |t_9| > 6 has chance 0.0002; the reverse end shares its 2000 held-out rows between seeds, which
    # moves all of them by sd(1/w) / sqrt(2000), under 0.03.
    for values, shared in ((torch.tensor(forward), 0.0), (torch.tensor(reverse), 0.03)):
        assert abs(float(values.mean())) < 6 * float(values.std()) / math.sqrt(10) + 4 * shared


def test_poor_overlap_gives_the_middle_of_the_bracket_and_warns() -> None:
    steep = ladder_of(NormalBase(2).float(), [Slope(8.0, 3.0), Slope(8.0, 4.0), Slope(8.0, 5.0)])
    data = torch.tensor([5.5, 0.0]) + 0.2 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    with pytest.warns(
        NormalizerBracketWarning, match=r"from the base and .* from the data: the bracket is .* wide; use a better base"
    ):
        got = estimate(steep, data, torch.Generator().manual_seed(0), draws=1 << 15, particles=64, islands=16, moves=1)
    assert got.source == "smc"
    assert got.bracket is not None
    assert got.value == pytest.approx(0.5 * (got.bracket.forward.value + got.bracket.reverse.value))
    assert got.stderr >= 0.5 * got.bracket.width


def test_without_draws_the_bracket_is_all(ladder: Ladder, held_out: Tensor, log_z: float) -> None:
    got = estimate(ladder, held_out, torch.Generator().manual_seed(0), draws=0, particles=4096)
    assert got.source == "smc"
    assert got.bracket is not None
    assert got.value == got.bracket.middle.value
    assert abs(got.value - log_z) < 4 * got.stderr


@pytest.mark.filterwarnings("ignore::latentprior.NormalizerBracketWarning")
def test_late_estimates_take_fewer_particles(
    ladder: Ladder, held_out: Tensor, log_z: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def spied(*args: Any, particles: int, **options: Any) -> Any:
        taken.append(particles)
        return bracket(*args, particles=particles, **options)

    monkeypatch.setattr("latentprior.density.normalizers.bracket", spied)
    for seconds in (-1.0, 1e6):
        late = time.monotonic() + seconds
        got = estimate(ladder, held_out, torch.Generator().manual_seed(0), draws=1 << 14, particles=4096, deadline=late)
        # 5 standard errors: 1 in 1.7 million.
        assert abs(got.value - log_z) < 5 * got.stderr
    assert taken == [1024, 4096]


def test_draws_go_on_until_the_error_is_small_or_they_are_used_up(
    ladder: Ladder, log_z: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentprior.density.normalizers.DRAWS_A_ROUND", 2048)
    real, taken = Ladder.importance, []
    monkeypatch.setattr(Ladder, "importance", lambda self, n, g: taken.append(n) or real(self, n, g))

    def rounds(tolerance: float, deadline: float | None = None) -> tuple[int, LogMean]:
        taken.clear()
        found = importance_estimate(
            ladder, torch.Generator().manual_seed(0), draws=4 * 2048, tolerance=tolerance, deadline=deadline
        )
        # 4.5 standard errors: 1 in 150,000.
        assert abs(found.value - log_z) < 4.5 * found.stderr
        assert set(taken) == {2048 // PARTS_A_ROUND}
        return len(taken), found

    one, first = rounds(1.0)
    # Two rounds have an error of 0.71, four of 0.5 of the first's, or nearly so.
    two, second = rounds(0.85 * first.stderr)
    four, all_of_them = rounds(0.0)
    assert (one, two, four) == (PARTS_A_ROUND, 2 * PARTS_A_ROUND, 4 * PARTS_A_ROUND)
    assert second.stderr < 0.85 * first.stderr
    assert all_of_them.stderr == pytest.approx(0.5 * first.stderr, rel=0.15)
    # A deadline is overrun by a part of a round at most.
    assert rounds(0.0, time.monotonic() - 1)[0] == 1


@pytest.mark.parametrize("rows", [1, 2, 17, 5000])
def test_any_number_of_held_out_rows(ladder: Ladder, rows: int, generator: torch.Generator) -> None:
    data = 0.3 * torch.randn(rows, 2, generator=generator) + 1
    ends = bracket(ladder, data, generator, particles=256, islands=16, moves=2)
    assert math.isfinite(ends.forward.value)
    assert math.isfinite(ends.reverse.value)
    assert math.isfinite(ends.reverse.stderr)


def test_estimate_leaves_grad_mode_and_inputs_alone(
    ladder: Ladder, held_out: Tensor, generator: torch.Generator
) -> None:
    before = held_out.clone()
    estimate(ladder, held_out, generator, draws=1 << 15, particles=1024, islands=16, moves=4)
    assert torch.equal(held_out, before)


def test_check_integrates(generator: torch.Generator) -> None:
    draws = torch.randn(20_000, 1, generator=generator)

    def reference(u: Tensor) -> Tensor:
        return -0.5 * u[:, 0].square() - 0.5 * math.log(2 * math.pi)

    def shifted(u: Tensor) -> Tensor:
        return -0.5 * (u[:, 0] - 0.4).square() - 0.5 * math.log(2 * math.pi)

    right = check(shifted, reference, draws, "n")
    # 4.5 standard errors: 1 in 150,000.
    assert abs(right.value - 1) < 4.5 * right.stderr
    assert right.stderr == pytest.approx(math.sqrt(math.expm1(0.16) / 20_000), rel=0.05)
    assert right.ess == pytest.approx(math.exp(-0.16), rel=0.05)
    assert right.reference == "n"
    wrong = check(lambda u: shifted(u) + 0.2, reference, draws, "n")
    assert wrong.value == pytest.approx(right.value * math.exp(0.2))
    assert not wrong.passed


def test_check_warns_where_the_reference_misses(generator: torch.Generator) -> None:
    draws = torch.randn(2000, 1, generator=generator)
    with pytest.warns(LowESSWarning, match=r"only \d+ effective draws of the reference 'n'"):
        check(lambda u: 8 * u[:, 0] - 40, lambda u: torch.zeros(len(u)), draws, "n")


@pytest.mark.parametrize(
    ("value", "stderr", "passed"),
    [
        (1.0, 0.0, True),
        (1.004, 0.0, True),
        (1.006, 0.0, False),
        (0.9, 0.034, True),
        (0.9, 0.03, False),
        (1.22, 0.05, False),
    ],
)
def test_passed(value: float, stderr: float, passed: bool) -> None:
    assert NormalizerCheck(value, stderr, 0.5, "n").passed is passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_check_does_not_pass(value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not NormalizerCheck(value, math.nan, 0.5, "n").passed
        assert not NormalizerCheck(value, math.inf, 0.5, "n").passed


class Narrower(NormalBase):
    """A normal of a smaller scale in all of its coordinates: weights against it vary without bound."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__(dim)
        self.scale = scale

    def log_prob(self, u: Tensor) -> Tensor:
        return super().log_prob(u / self.scale) - u.shape[1] * math.log(self.scale)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(u), -u / self.scale**2

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.scale * super().sample(n, generator)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_weights_of_a_heavy_tail_are_annealed(shift: float) -> None:
    """Averaged, they make this normal of 64 coordinates weigh a part of what it does."""
    ladder, narrow = ladder_of(NormalBase(64).float()), Narrower(64, 0.7).float()
    generator = torch.Generator().manual_seed(0)
    draws = narrow.sample(20_000, generator)
    with pytest.warns(LowESSWarning, match="the check says little"):
        plain = check(ladder.base.log_prob, narrow.log_prob, draws, "narrow")
    assert plain.tail_shape > 0.7
    assert plain.value < 0.8
    found = check_from(
        ladder, narrow, draws, "narrow", generator, log_normalizer=shift, own=lambda n: ladder.base.sample(n, generator)
    )
    assert (found.method, found.tail_shape) == ("annealing", plain.tail_shape)
    assert found.stderr < 0.1
    assert abs(found.value - math.exp(-shift)) < 3 * found.stderr
    assert found.passed is (shift == 0)


def test_weights_of_a_light_tail_are_averaged(ladder: Ladder, log_z: float, generator: torch.Generator) -> None:
    draws = ladder.base.sample(20_000, generator)

    def own(n: int) -> Tensor:
        u, log_weights = ladder.importance(8 * n, generator)
        return u[systematic(log_weights, n, generator)]

    found = check_from(ladder, ladder.base, draws, "base", generator, log_normalizer=log_z, own=own)
    plain = check(
        ladder.base.log_prob, lambda u: ladder.base.log_prob(u) + log_z - ladder.log_potential(u), draws, "base"
    )
    assert found.value == pytest.approx(plain.value, abs=1e-6)
    assert found.tail_shape == pytest.approx(plain.tail_shape, abs=1e-5)
    assert found.tail_shape < 0.5
    assert (found.method, found.passed) == ("importance", True)
    # So few draws say nothing.
    few = check_from(ladder, ladder.base, draws[:50], "base", generator, log_normalizer=log_z, own=own)
    assert (few.method, few.passed) == ("annealing", True)


def test_what_the_reference_does_not_reach_widens_the_bar(generator: torch.Generator) -> None:
    """A reference on one of two distant modes: carried up it finds half of the integral, with hardly any spread."""
    means = torch.tensor([[-20.0, 0.0], [20.0, 0.0]])
    both = GaussianMixtureBase(torch.tensor([0.5, 0.5]), means, torch.eye(2).repeat(2, 1, 1))
    ladder, one = Ladder(both), GaussianMixtureBase(torch.ones(1), means[:1], 1.1 * torch.eye(2)[None])
    start = one.sample(8192, generator)
    there = smc.run(start, ladder.path_from(one), islands=16, moves=6, generator=generator).log_normalizer
    assert there.value == pytest.approx(math.log(0.5), abs=0.05)
    assert there.stderr < 0.02
    found = check_from(
        ladder, one, start[:50], "one", generator, log_normalizer=0.0, own=lambda n: both.sample(n, generator)
    )
    assert found.method == "annealing"
    assert found.value < 0.9
    assert abs(found.value - 1) < 3 * found.stderr


class Spike(torch.nn.Module):
    """A narrow mode that draws of the base never meet, as heavy as all the rest."""

    def forward(self, u: Tensor) -> Tensor:
        return 41.0 * torch.exp(-0.5 * (u - 6.0).square().sum(1) / 0.25)


def test_a_mode_hidden_from_the_sampler_is_seen_from_the_data(generator: torch.Generator) -> None:
    ladder = ladder_of(NormalBase(2).float(), [Spike()])
    near = torch.randn(1000, 2, generator=generator)
    there, _ = mala.sample(torch.full((1000, 2), 6.0), ladder.density(1.0), steps=100, generator=generator)
    with pytest.warns(NormalizerBracketWarning, match="use a better base"):
        found = estimate(ladder, torch.cat([near, there]), generator, draws=1 << 15)
    # By the base's draws alone nothing is amiss; the data know better.
    assert abs(found.value) < 0.01
    assert found.stderr > 0.5
    assert found.bracket is not None
    assert found.bracket.width > 0.5


def test_what_an_estimate_takes_is_foreseen(
    ladder: Ladder, held_out: Tensor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock by which every row takes a microsecond to be evaluated, and nothing else any time.
    real = Slope.forward
    monkeypatch.setattr(Slope, "forward", lambda self, u: clock.advance(1e-6 * len(u)) or real(self, u))
    begun = clock.now
    foreseen = expected_seconds(ladder, held_out)
    begun, foreseeing = clock.now, clock.now - begun
    estimate(ladder, held_out, torch.Generator().manual_seed(0), tolerance=1.0)
    # Nothing is drawn for it, and a handful of evaluations are enough to say.
    assert foreseeing < 0.2 * foreseen
    assert 0.1 * foreseen < clock.now - begun < 10 * foreseen


def test_more_stages_are_foreseen_to_take_longer(
    ladder: Ladder, held_out: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock by which every evaluation takes as long, whatever the machine does.
    ticks = itertools.count()
    monkeypatch.setattr("latentprior.density.normalizers.time.monotonic", lambda: 0.01 * next(ticks))
    one, two = (expected_seconds(ladder.first(k), held_out) for k in (1, 2))
    # Two levels a stage each way and those that settle the rows, beside the draws of importance sampling.
    moved, draws = 6 * 8192, (1 << 18) / 2
    assert two / one == pytest.approx((10 * moved + draws) / (6 * moved + draws))
