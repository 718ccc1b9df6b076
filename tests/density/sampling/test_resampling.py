import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprior.density.sampling.resampling import (
    combine_islands,
    combine_parts,
    effective_sample_size,
    log_mean_exp,
    systematic,
    tail_shape,
)

logs = st.lists(st.floats(-30, 30), min_size=1, max_size=12)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(logs, st.integers(1, 60), st.integers(0, 2**32))
def test_systematic_counts_are_floor_or_ceiling(values: list[float], n: int, seed: int) -> None:
    log_weights = torch.tensor(values)
    index = systematic(log_weights, n, torch.Generator().manual_seed(seed))
    expected = n * torch.softmax(log_weights.double(), 0)
    counts = torch.bincount(index, minlength=len(values))
    assert index.shape == (n,)
    assert (counts >= (expected - 1e-6).floor()).all()
    assert (counts <= (expected + 1e-6).ceil()).all()


def test_systematic_is_unbiased(generator: torch.Generator) -> None:
    weights = torch.tensor([0.05, 0.31, 0.0001, 0.4, 0.2399])
    populations = 20_000
    index = systematic(weights.log().expand(populations, 5), 3, generator)
    assert index.shape == (populations, 3)
    counts = torch.nn.functional.one_hot(index, 5).sum(1).double()
    # Counts of independent populations: 4.5 standard errors, 1 in 150,000 a weight.
    stderr = counts.std(0) / math.sqrt(populations) + 1e-4
    assert ((counts.mean(0) - 3 * weights).abs() <= 4.5 * stderr).all()


def test_systematic_order_is_random(generator: torch.Generator) -> None:
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    first = systematic(weights.log().expand(20_000, 3), 10, generator)[:, 0]
    share = torch.bincount(first, minlength=3) / 20_000
    # Any one position follows the weights: binomial, 4.5 standard errors, 1 in 150,000.
    assert ((share - weights).abs() <= 4.5 * (weights * (1 - weights) / 20_000).sqrt()).all()


def test_systematic_ignores_scale_and_skips_zero_weights(generator: torch.Generator) -> None:
    log_weights = torch.tensor([-math.inf, 800.0, 801.0, -math.inf])
    index = systematic(log_weights, 1000, generator)
    assert set(index.tolist()) == {1, 2}
    assert abs(int((index == 1).sum()) - 1000 / (1 + math.e)) <= 1


def test_systematic_from_one_weight(generator: torch.Generator) -> None:
    assert systematic(torch.tensor([3.0]), 4, generator).tolist() == [0] * 4


@pytest.mark.parametrize("shift", [0.0, -900.0, 900.0])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_parts_say_together_what_all_weights_say(m: int, shift: float, generator: torch.Generator) -> None:
    weights = shift + torch.randn(m, 40, generator=generator, dtype=torch.float64) * torch.arange(1.0, m + 1)[:, None]
    parts = [log_mean_exp(part) for part in weights]
    assert tuple(combine_parts(parts, 40)) == pytest.approx(tuple(log_mean_exp(weights.flatten())), rel=1e-9)


def test_parts_without_any_weight_count_as_zeros() -> None:
    weights = torch.tensor([[0.3, -1.0, 2.0], [-math.inf, -math.inf, -math.inf]])
    found = combine_parts([log_mean_exp(part) for part in weights], 3)
    assert tuple(found) == pytest.approx(tuple(log_mean_exp(weights.flatten())), rel=1e-9)
    nothing = combine_parts([log_mean_exp(weights[1])] * 2, 3)
    assert nothing.value == -math.inf
    assert not nothing.ess >= 0


def test_effective_share_formula() -> None:
    w = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    assert effective_sample_size(w.log()) == pytest.approx(64 / (3 * 30))
    assert effective_sample_size(w.log() + 900) == pytest.approx(64 / (3 * 30))
    assert effective_sample_size(torch.zeros(7)) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([0.0, -math.inf, -math.inf, -math.inf])) == pytest.approx(0.25)


def test_log_mean_exp_formula() -> None:
    w = torch.tensor([1.0, 2.0, 5.0, 4.0], dtype=torch.float64)
    got = log_mean_exp(w.log() - 700)
    assert got.value == pytest.approx(math.log(3) - 700)
    assert got.stderr == pytest.approx(float(w.std()) / (3 * 2))
    assert got.ess == pytest.approx(144 / (4 * 46))
    assert log_mean_exp(torch.tensor([2.0])).stderr == math.inf
    assert combine_islands(w.log()) == log_mean_exp(w.log())


def test_log_mean_exp_stderr_covers(generator: torch.Generator) -> None:
    # Log-normal weights, log E w = 1/8. 400 z-scores: unit variance within 4.5 of its standard errors sqrt(2/400),
    # mean within 4.5/sqrt(400) and the bias of a log, -var(w)/2n, a 40th of a standard error.
    draws = 0.5 * torch.randn(400, 1000, generator=generator, dtype=torch.float64)
    scores = torch.tensor([(m.value - 0.125) / m.stderr for m in map(log_mean_exp, draws)])
    assert scores.mean().abs() < 4.5 / 20 + 0.03
    assert abs(float(scores.var()) - 1) < 4.5 * math.sqrt(2 / 400)


@pytest.mark.parametrize("shape", [0.2, 0.6, 0.9, 1.5])
def test_tail_shape_of_a_pareto_tail(shape: float) -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = (uniform.pow(-shape) - 1) / shape
    assert tail_shape(weights.log()) == pytest.approx(shape, abs=0.1)
    # Of their scale nothing depends.
    assert tail_shape(weights.log() - 700) == pytest.approx(tail_shape(weights.log()), abs=1e-9)


def test_tail_shape_is_that_of_maximum_likelihood() -> None:
    genpareto = pytest.importorskip("scipy.stats").genpareto
    log_weights = 1.3 * torch.randn(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = log_weights.exp().sort().values
    excess = (weights[-600:] - weights[-601]).numpy()
    fitted, _, _ = genpareto.fit(excess, floc=0)
    assert tail_shape(log_weights) == pytest.approx((600 * fitted + 5) / 610, abs=0.02)


def test_tail_shape_of_weights_without_a_tail() -> None:
    assert tail_shape(torch.zeros(1000)) == -math.inf
    assert math.isnan(tail_shape(torch.randn(24, generator=torch.Generator().manual_seed(0))))
    assert math.isnan(tail_shape(torch.full((1000,), math.nan)))
    # Bounded weights have a negative shape.
    even = torch.linspace(0.5, 1.5, 10_000, dtype=torch.float64)
    assert tail_shape(even.log()) < 0
