import math

import pytest
import torch

from latentprior import InvalidLatentsError
from latentprior.evaluation.known_densities import (
    Banana,
    BoundedCube,
    CorrelatedGaussian,
    Funnel,
    GaussianMixture,
    Rings,
    SkewedProduct,
    Spikes,
    StudentT,
    Target,
    ten_component_mixture,
    two_component_mixture,
)
from quadrature import grid, integral

# Target, half-width of a box that holds all but 1e-7 of its mass, and grid points an axis.
ONE = {
    "mixture": (two_component_mixture(1, ratio=20.0), 12.0, 2001),
    "student": (StudentT(1, df=9), 60.0, 8001),
    "cube": (BoundedCube(1), 2.0, 4000),
    "skewed": (SkewedProduct(1, scale=0.7), 25.0, 4001),
    "spikes": (Spikes(1), 3.0, 6001),
}
TWO = {
    "correlated": (CorrelatedGaussian(2, rho=-0.9), 8.0, 801),
    "near": (two_component_mixture(2, distance=2.0), 9.0, 401),
    "far, 20:1": (two_component_mixture(2, distance=12.0, ratio=20.0), 14.0, 601),
    "unequal": (GaussianMixture(torch.tensor([[0.0, 1.0], [3.0, -2.0]]), torch.tensor([0.5, 1.5])), 14.0, 801),
    "funnel": (Funnel(2, scale=0.7), 14.0, 1201),
    "banana": (Banana(), 30.0, 1201),
    "rings": (Rings(), 5.0, 800),
    "student": (StudentT(2, df=11), 40.0, 801),
    "cube": (BoundedCube(2, a=3, b=2), 2.0, 2000),
    "uniform": (BoundedCube(2, a=1, b=1), 2.0, 400),
    "skewed": (SkewedProduct(2), 22.0, 801),
    "spikes": (Spikes(2, scale=0.05), 3.0, 1001),
}
HIGH = {
    "correlated": CorrelatedGaussian(8, rho=0.8),
    "ten": ten_component_mixture(),
    "funnel": Funnel(5),
    "student": StudentT(6, df=7),
    "cube": BoundedCube(4, a=2, b=3),
    "skewed": SkewedProduct(5, scale=2.0),
    "spikes": Spikes(3),
}
ALL = [*(v[0] for v in ONE.values()), *(v[0] for v in TWO.values()), *HIGH.values()]
NAMES = [f"{k}-{d}" for d, group in (("1", ONE), ("2", TWO), ("high", HIGH)) for k in group]


@pytest.mark.parametrize(("target", "half", "points"), [*ONE.values(), *TWO.values()], ids=NAMES[: len(ONE) + len(TWO)])
def test_density_integrates_to_one(target: Target, half: float, points: int) -> None:
    # Where a density jumps, at the edges of the cube, cells end.
    assert integral(target.log_prob, -half, half, target.dim, points) == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("target", ALL, ids=NAMES)
def test_importance_sampling_finds_the_same_volume(target: Target, generator: torch.Generator) -> None:
    # E_p[1{z in B} / p(z)] is the volume of a box B where p > 0: ties draws to the density without moments. The box
    # is a small cube around a point where p is high, so that weights within it hardly vary.
    z = target.sample((50_000,), generator=generator)
    centre = z[target.log_prob(z).argmax()]
    away = (z - centre).norm(dim=1, p=math.inf)
    half = away.kthvalue(1000).values
    weights = torch.where(away < half, (-target.log_prob(z)).exp(), 0.0)
    low, high = centre - half, centre + half
    if isinstance(target, BoundedCube):
        low, high = low.clamp(0, 1), high.clamp(0, 1)
    volume = float((high - low).prod())
    stderr = float(weights.std()) / math.sqrt(len(z))
    # 4.5 standard errors: a false alarm in 1 of 150,000.
    assert float(weights.mean()) == pytest.approx(volume, abs=4.5 * stderr)


@pytest.mark.parametrize("target", ALL, ids=NAMES)
def test_moments_of_draws_are_the_stated_ones(target: Target, generator: torch.Generator) -> None:
    z = target.sample((100_000,), generator=generator)
    n = len(z)
    centred = (z - target.mean).square()
    # 4.5 standard errors, estimated from the draws: a false alarm in 1 of 150,000 a coordinate.
    assert ((z.mean(0) - target.mean).abs() <= 4.5 * z.std(0) / math.sqrt(n)).all()
    assert ((centred.mean(0) - target.variance).abs() <= 4.5 * centred.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("name", list(TWO))
def test_stated_moments_are_those_of_the_density(name: str) -> None:
    target, half, points = TWO[name]
    nodes, cell = grid(-half, half, 2, points)
    weight = target.log_prob(nodes).exp() * cell
    torch.testing.assert_close(weight @ nodes, target.mean, atol=3e-4, rtol=0)
    torch.testing.assert_close(weight @ (nodes - target.mean).square(), target.variance, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("target", ALL, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_types_and_generators(target: Target, dtype: torch.dtype) -> None:
    a, b = (target.sample((3, 4), generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert a.shape == (3, 4, target.dim)
    assert torch.equal(a, b)
    assert not torch.equal(a, target.sample((3, 4), generator=torch.Generator().manual_seed(2)))
    value = target.log_prob(a.to(dtype))
    assert value.shape == (3, 4)
    assert value.dtype == dtype
    assert target.log_prob(a[0, 0]).shape == ()
    assert target.sample((0,), generator=torch.Generator()).shape == (0, target.dim)
    with pytest.raises(InvalidLatentsError, match="expected"):
        target.log_prob(torch.zeros(2, target.dim + 1))


def test_ten_component_mixture_is_case_c(generator: torch.Generator) -> None:
    target = ten_component_mixture()
    z = target.sample((50_000,), generator=generator)
    value = target.log_prob(z)
    exact = -math.log(10) - 8 * math.log(2 * math.pi * math.e * 0.09)
    assert exact == pytest.approx(-5.742, abs=5e-4)
    # 4.5 standard errors: a false alarm in 1 of 150,000.
    assert float(value.mean()) == pytest.approx(exact, abs=4.5 * float(value.std()) / math.sqrt(len(z)))
    assert exact + 0.5 * float(target.variance.log().sum()) == pytest.approx(-5.506, abs=5e-4)
    assert torch.pdist(target.means).min() > 12 * 0.3


def test_entropy_and_mutual_information() -> None:
    skewed, half, points = TWO["skewed"]
    nodes, cell = grid(-half, half, 2, points)
    value = skewed.log_prob(nodes)
    assert float(-(value.exp() * value).nansum()) * cell == pytest.approx(float(skewed.entropy()), abs=1e-4)
    assert CorrelatedGaussian(80, rho=0.8).mutual_information == pytest.approx(-20 * math.log(0.36))
