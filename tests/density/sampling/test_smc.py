"""Sequential Monte Carlo against exact normalisers and moments of an asymmetric path."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ladders import ladder_of
from latentprior.density.bases import NormalBase
from latentprior.density.ladder import Ladder
from latentprior.density.sampling import smc

A, C = torch.tensor([1.8, -0.6]), 0.5


class Shift(torch.nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return u @ A.to(u)


class Squeeze(torch.nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return -0.5 * C * u[:, 1].square()


# N(0, I) tilted by a.u is N(a, I) with Z = exp(|a|^2 / 2). Squeezing the second coordinate by c multiplies
# Z by (1 + c)^(-1/2) exp(-c m^2 / (2 (1 + c))) and leaves N(m / (1 + c), 1 / (1 + c)), m = a_2. Backwards
# the weights exp(c u^2 / 2) under precision 1 + c have a variance, since c < 1.
LOG_Z = float(A.square().sum()) / 2 - 0.5 * math.log(1 + C) - C * float(A[1]) ** 2 / (2 * (1 + C))
MEAN = torch.tensor([1.8, -0.6 / (1 + C)])
DEVIATION = torch.tensor([1.0, (1 + C) ** -0.5])
SEEDS = 40


@pytest.fixture(scope="module")
def path() -> Ladder:
    return ladder_of(NormalBase(2).float(), [Shift(), Squeeze()])


def forward(path: Ladder, seed: int, n: int = 512, islands: int = 16, **options: float) -> smc.SMCResult:
    g = torch.Generator().manual_seed(seed)
    return smc.run(path.base.sample(n, g), path, islands=islands, generator=g, **options)


def backward(path: Ladder, seed: int, n: int = 512, islands: int = 16) -> smc.SMCResult:
    g = torch.Generator().manual_seed(seed)
    start = MEAN + DEVIATION * torch.randn(n, 2, generator=g)
    return smc.run(start, path, start=2.0, end=0.0, islands=islands, generator=g)


@pytest.fixture(scope="module")
def runs(path: Ladder) -> dict[str, list[smc.SMCResult]]:
    return {
        "forward": [forward(path, seed) for seed in range(SEEDS)],
        "backward": [backward(path, seed) for seed in range(SEEDS)],
    }


@pytest.mark.parametrize(("direction", "sign"), [("forward", 1), ("backward", -1)])
def test_normaliser_is_unbiased(runs: dict[str, list[smc.SMCResult]], direction: str, sign: int) -> None:
    relative = torch.tensor([math.exp(r.log_normalizer.value - sign * LOG_Z) for r in runs[direction]])
    # Mean of 40 seeds against 1 with the standard error of their spread; |t_39| > 4 has chance 0.0003.
    assert abs(float(relative.mean()) - 1) < 4 * float(relative.std()) / math.sqrt(SEEDS)
    assert relative.std() < 0.5


@pytest.mark.parametrize(("direction", "sign"), [("forward", 1), ("backward", -1)])
def test_stderr_covers(runs: dict[str, list[smc.SMCResult]], direction: str, sign: int) -> None:
    scores = [(r.log_normalizer.value - sign * LOG_Z) / r.log_normalizer.stderr for r in runs[direction]]
    # With 16 islands 2 standard errors cover 93.6%; 32 or fewer of 40 then has chance 0.4%.
    assert sum(abs(s) <= 2 for s in scores) > 32
    # And the stated errors are not idly wide: they match the spread of the values within a factor.
    spread = torch.tensor([r.log_normalizer.value for r in runs[direction]]).std()
    stated = torch.tensor([r.log_normalizer.stderr for r in runs[direction]]).mean()
    assert 0.6 < stated / spread < 1.6


def test_particles_follow_the_end_of_the_path(runs: dict[str, list[smc.SMCResult]]) -> None:
    for direction, mean, deviation in (("forward", MEAN, DEVIATION), ("backward", torch.zeros(2), torch.ones(2))):
        means = torch.stack([r.position.mean(0) for r in runs[direction]])
        squares = torch.stack([(r.position - mean).square().mean(0) for r in runs[direction]])
        # Seeds are independent: |t_39| > 4 has chance 0.0003 a number. Populations of 512 are biased by
        # O(1/512), allowed as 0.01.
        for values, exact in ((means, mean), (squares, deviation.square())):
            assert ((values.mean(0) - exact).abs() < 4 * values.std(0) / math.sqrt(SEEDS) + 0.01).all()


def test_diagnostics(runs: dict[str, list[smc.SMCResult]]) -> None:
    for result in (*runs["forward"], *runs["backward"]):
        assert 0.45 <= result.ess <= 1
        assert 0.3 < result.acceptance < 0.95
        assert result.position.shape == (512, 2)


def levels(path: Ladder, **options: float) -> int:
    passed: list[int] = []
    forward(path, 0, on_level=passed.append, **options)
    assert passed == list(range(len(passed)))
    return len(passed)


def test_longer_paths_take_more_levels(path: Ladder) -> None:
    assert 2 <= levels(path) < 40
    assert levels(ladder_of(NormalBase(2).float(), [Shift(), Shift(), Shift()])) > levels(path)


def test_fewer_effective_weights_take_fewer_levels(path: Ladder) -> None:
    assert levels(path, ess=0.2) < levels(path, ess=0.9)


def test_islands_do_not_mix(path: Ladder) -> None:
    # Rows of an island descend from rows of the same island.
    g = torch.Generator().manual_seed(0)
    start = path.base.sample(64, g)
    state = smc.init(start, 0.0, islands=4)
    while state.t < 2:
        state, _ = smc.step(state, path, 2.0, moves=0, generator=g)
    ancestor = (state.position[:, None] == start).all(2).double().argmax(1)
    assert torch.equal(start[ancestor], state.position)
    assert torch.equal(ancestor // 16, torch.arange(64) // 16)
    assert len(ancestor.unique()) < 64


def test_steps_can_be_saved_and_resumed(path: Ladder, seeded: Callable[[int], torch.Generator]) -> None:
    def go(state: smc.SMCState, g: torch.Generator, steps: int) -> smc.SMCState:
        for _ in range(steps):
            state, _ = smc.step(state, path, 2.0, generator=g)
        return state

    g = seeded(0)
    start = smc.init(path.base.sample(64, g), 0.0, 4)
    half = go(start, g, 1)
    saved = g.get_state()
    whole = go(half, g, 1)
    again = torch.Generator()
    again.set_state(saved)
    assert torch.equal(go(half, again, 1).position, whole.position)


def test_no_path_is_no_work(path: Ladder) -> None:
    g = torch.Generator().manual_seed(0)
    start = path.base.sample(32, g)
    result = smc.run(start, path, start=1.0, end=1.0, islands=2, generator=g)
    assert torch.equal(result.position, start)
    assert result.log_normalizer.value == 0


def test_levels_rise_and_meet_the_end_exactly(path: Ladder) -> None:
    g = torch.Generator().manual_seed(0)
    state = smc.init(path.base.sample(256, g), 0.0, 4)
    seen = []
    while state.t != 1.3:
        state, _ = smc.step(state, path, 1.3, generator=g)
        seen.append(state.t)
    assert seen == sorted(seen)
    assert seen[-1] == 1.3


@pytest.mark.parametrize(("start", "end", "next_level"), [(0.0, 1.0, 1e-3), (1.0, 0.0, 0.999), (0.9998, 1.0, 1.0)])
def test_a_path_too_steep_for_any_level_is_still_walked(start: float, end: float, next_level: float) -> None:
    class Cliff(torch.nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return 1e6 * u[:, 0]

    g = torch.Generator().manual_seed(0)
    state = smc.init(torch.randn(64, 1, generator=g), start, 1)
    state, info = smc.step(state, ladder_of(NormalBase(1).float(), [Cliff()]), end, moves=0, generator=g)
    assert state.t == pytest.approx(next_level, abs=1e-12)
    assert info.ess < 0.1


def test_population_must_divide(path: Ladder) -> None:
    with pytest.raises(ValueError, match="10 particles do not divide into 4 islands"):
        smc.init(torch.zeros(10, 2), 0.0, 4)


def test_bounded_asymmetric_ratio_in_one_dimension() -> None:
    class Bump(torch.nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return 4 * torch.tanh(2 * u[:, 0] - 1.5)

    ladder = ladder_of(NormalBase(1).float(), [Bump()])
    u = torch.linspace(-10, 10, 8001, dtype=torch.float64)[:, None]
    weight = torch.exp(-0.5 * u[:, 0] ** 2 + Bump()(u))
    exact = math.log(float(weight.sum()) * 20 / 8000 / math.sqrt(2 * math.pi))
    relative = torch.tensor([math.exp(forward(ladder, s, 256, 8).log_normalizer.value - exact) for s in range(SEEDS)])
    # |t_39| > 4 has chance 0.0003.
    assert abs(float(relative.mean()) - 1) < 4 * float(relative.std()) / math.sqrt(SEEDS)
