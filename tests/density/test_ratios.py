import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprior import CheckpointError, LatentPriorError
from latentprior.density.bases import GaussianMixtureBase
from latentprior.density.ratios import (
    MLP,
    BoundedRatio,
    ConvNet,
    Gain,
    MixtureFeatures,
    Quadratic,
    ResidualMLP,
    build_ratio,
    gain,
    logistic_loss,
)

SPECS = [
    {"kind": "mlp", "event_shape": [3], "width": 8, "depth": 1, "bound": 5.0},
    {"kind": "mlp", "event_shape": [2, 3], "width": 8, "depth": 3, "bound": 3.0},
    {"kind": "residual", "event_shape": [3], "width": 8, "depth": 2, "bound": 5.0},
    {"kind": "residual", "event_shape": [1], "width": 8, "depth": 0, "bound": 5.0},
    {"kind": "quadratic", "event_shape": [3], "width": 8, "depth": 2, "bound": 5.0},
    {"kind": "conv", "event_shape": [4, 8, 8], "width": 4, "depth": 2, "bound": 5.0},
    {"kind": "conv", "event_shape": [1, 5, 7], "width": 4, "depth": 4, "bound": 5.0},
    {"kind": "conv", "event_shape": [2, 1, 1], "width": 4, "depth": 2, "bound": 5.0},
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s['kind']}-{s['event_shape']}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_type_and_bound(spec: dict, dtype: torch.dtype, generator: torch.Generator) -> None:
    ratio = build_ratio(spec, generator).to(dtype=dtype)
    dim = math.prod(spec["event_shape"])
    u = torch.randn(50, dim, generator=generator, dtype=dtype)
    for scale in (0.0, 1.0, 1e6):
        f = ratio(scale * u)
        assert f.shape == (50,)
        assert f.dtype == dtype
        assert f.abs().max() <= spec["bound"]
    assert ratio(u[:0]).shape == (0,)
    assert ratio(u).std() > 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s['kind']}-{s['event_shape']}")
def test_weights_are_a_function_of_the_generator(spec: dict) -> None:
    a, b, c = (build_ratio(spec, torch.Generator().manual_seed(s)).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s['kind']}-{s['event_shape']}")
def test_rows_do_not_mix_and_every_coordinate_counts(spec: dict, generator: torch.Generator) -> None:
    ratio = build_ratio(spec, generator).double()
    dim = math.prod(spec["event_shape"])
    u = torch.randn(6, dim, generator=generator, dtype=torch.float64).requires_grad_(True)
    torch.testing.assert_close(ratio(u)[2:3], ratio(u[2:3]))
    (grad,) = torch.autograd.grad(ratio(u)[0], u)
    assert (grad[0] != 0).all()
    assert (grad[1:] == 0).all()


def test_bounded_ratio_is_the_scaled_tanh() -> None:
    ratio = BoundedRatio(torch.nn.Flatten(0), bound=3.0)
    h = torch.tensor([[0.0], [1.0], [-2.0], [100.0]])
    torch.testing.assert_close(ratio(h), 3 * torch.tanh(h[:, 0] / 3))
    assert ratio.is_saturated(ratio(h)).tolist() == [False, False, False, True]
    assert ratio.is_saturated(-ratio(h)).tolist() == [False, False, False, True]


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_bound_must_be_positive_and_finite(bound: float) -> None:
    with pytest.raises(LatentPriorError, match="bound"):
        BoundedRatio(torch.nn.Flatten(0), bound=bound)


def test_residual_blocks_are_the_identity_at_first(generator: torch.Generator) -> None:
    net = ResidualMLP(3, 16, 4, generator)
    u = torch.randn(5, 3, generator=generator)
    torch.testing.assert_close(net.blocks(net.first(u)), net.first(u))


def test_conv_needs_maps() -> None:
    with pytest.raises(LatentPriorError, match=r"needs latents \(C, H, W\), got \(3,\)"):
        ConvNet((3,))


def test_conv_sees_the_map_in_its_own_layout(generator: torch.Generator) -> None:
    # A shift of the map by one pixel changes the answer unlike a shift of the flat vector across rows.
    net = ConvNet((2, 6, 6), 4, 1, generator)
    u = torch.randn(3, 2, 6, 6, generator=generator)
    torch.testing.assert_close(net(u.flatten(1)), net(u.reshape(3, -1)))
    (grad,) = torch.autograd.grad(net.convs[0](x := u.clone().requires_grad_(True))[0, 0, 0, 0], x)
    assert grad[0, :, :2, :2].abs().min() > 0
    assert grad[0, :, 2:].abs().max() == 0


def test_quadratic_is_the_log_ratio_of_gaussians(generator: torch.Generator) -> None:
    net = Quadratic(2, generator).double()
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]]).double()
    mean = torch.tensor([0.5, -1.0]).double()
    precision = torch.linalg.inv(covariance)
    with torch.no_grad():
        net.form.weight.copy_(0.5 * (torch.eye(2) - precision))
        net.form.bias.copy_(precision @ mean)
        net.offset.copy_(-0.5 * (mean @ precision @ mean + torch.logdet(covariance)))
    u = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    wide = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    narrow = torch.distributions.MultivariateNormal(mean, covariance)
    torch.testing.assert_close(net(u), narrow.log_prob(u) - wide.log_prob(u))


def test_depth_of_a_perceptron() -> None:
    assert sum(isinstance(m, torch.nn.Linear) for m in MLP(3, 8, 4, torch.Generator()).modules()) == 5


@pytest.mark.parametrize(("key", "value"), [("kind", "x"), ("kind", None)])
def test_unknown_networks(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match="unknown ratio network"):
        build_ratio({**SPECS[0], key: value})


def test_loss_at_zero_and_at_its_minimiser() -> None:
    zero = torch.zeros(7)
    assert float(logistic_loss(zero, zero[:3])) == pytest.approx(2 * math.log(2))
    # Two states, q = (.8, .2), p = (.5, .5): f* = log q/p minimises and gives 2 log 2 - 2 JS(q, p).
    q, p = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])

    def loss(f: torch.Tensor) -> float:
        target = f.repeat_interleave(torch.tensor([8, 2]))
        particles = f.repeat_interleave(torch.tensor([5, 5]))
        return float(logistic_loss(target, particles))

    best = loss((q / p).log())
    assert all(loss((q / p).log() + torch.tensor(s)) > best for s in ([0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.1, -0.1]))
    m = (p + q) / 2
    js = float(0.5 * (q * (q / m).log()).sum() + 0.5 * (p * (p / m).log()).sum())
    assert best == pytest.approx(2 * math.log(2) - 2 * js, abs=1e-6)


def test_loss_survives_huge_ratios() -> None:
    big = torch.tensor([1e4])
    assert float(logistic_loss(big, -big)) == 0
    assert float(logistic_loss(-big, big)) == pytest.approx(2e4)


def test_gain_formula() -> None:
    a, b = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([-1.0, 0.3])
    losses = [[math.log1p(math.exp(-x)) for x in a.tolist()], [math.log1p(math.exp(x)) for x in b.tolist()]]
    value = 2 * math.log(2) - sum(sum(v) / len(v) for v in losses)
    variance = [sum((x - sum(v) / len(v)) ** 2 for x in v) / (len(v) - 1) for v in losses]
    got = gain(a, b)
    assert got == pytest.approx(Gain(value, math.sqrt(variance[0] / 3 + variance[1] / 2)), rel=1e-5)
    # Two particles that count as one and a half: their term's divisor shrinks from n - 1 to 1.5 - 1.
    assert gain(a, b, 100).stderr < got.stderr


@pytest.mark.parametrize("odds", [0.25, 1.0, 16.0])
def test_the_log_ratio_minimises_the_loss_at_any_odds(odds: float, generator: torch.Generator) -> None:
    # Log ratio of N(1, 1) to N(0, 1). One sample serves all: the differences have errors of 0.002 at most.
    q, p = (torch.randn(200_000, generator=generator, dtype=torch.float64) + loc for loc in (1.0, 0.0))

    def loss(shift: float = 0.0, slope: float = 1.0) -> float:
        return float(logistic_loss(slope * q - 0.5 + shift, slope * p - 0.5 + shift, odds))

    exact = loss()
    assert all(loss(*other) > exact for other in ((0.3,), (-0.3,), (0.0, 0.7), (0.0, 1.4)))


def test_loss_at_odds_is_that_of_so_many_particles(generator: torch.Generator) -> None:
    q, p = torch.randn(50, generator=generator), torch.randn(200, generator=generator)
    # Cross entropy of 50 rows among 250 where the prior odds of a particle are 4.
    logits = torch.cat([q, p]) - math.log(4)
    labels = torch.cat([torch.ones(50), torch.zeros(200)])
    whole = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / 50
    assert float(logistic_loss(q, p, 4.0)) == pytest.approx(float(whole), rel=1e-6)
    nothing = float(logistic_loss(torch.zeros(1), torch.zeros(1), 4.0))
    assert gain(q, p, odds=4.0).value == pytest.approx(nothing - float(whole), rel=1e-6)


def test_gain_tends_to_the_divergence(generator: torch.Generator) -> None:
    # KL(N(1, 1), N(0, 1)) = 1/2; at odds of 1000 the gain is below it by 0.0009 (quadrature).
    q, p = (torch.randn(400_000, generator=generator, dtype=torch.float64) + loc for loc in (1.0, 0.0))
    got = gain(q - 0.5, p - 0.5, odds=1000.0)
    assert abs(got.value - 0.5) < 0.001 + 4 * got.stderr
    assert got.stderr < 0.004
    assert gain(q - 0.5, p - 0.5).value < 0.3


def test_gain_stderr_covers(generator: torch.Generator) -> None:
    # 300 repetitions of a known gain: z-scores have unit variance, within 4.5 of its standard error
    # sqrt(2/300): a false alarm in 1 of 150,000.
    nodes = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * (nodes - 1) ** 2) / math.sqrt(2 * math.pi)
    base = torch.exp(-0.5 * nodes**2) / math.sqrt(2 * math.pi)
    f = nodes - 0.5
    step = float(nodes[1] - nodes[0])
    exact = 2 * math.log(2) - step * float(
        (density * torch.nn.functional.softplus(-f) + base * torch.nn.functional.softplus(f)).sum()
    )
    scores = []
    for _ in range(300):
        q = torch.randn(400, generator=generator) + 1
        p = torch.randn(200, generator=generator)
        g = gain(q - 0.5, p - 0.5)
        scores.append((g.value - exact) / g.stderr)
    z = torch.tensor(scores)
    assert z.mean().abs() < 4.5 / math.sqrt(300)
    assert abs(float(z.var()) - 1) < 4.5 * math.sqrt(2 / 300)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_gain_is_bounded_and_its_error_finite(a: list[float], b: list[float]) -> None:
    got = gain(torch.tensor(a), torch.tensor(b))
    assert got.value <= 2 * math.log(2)
    assert math.isfinite(got.stderr)
    assert got.stderr >= 0


def mixture(dim: int = 3) -> GaussianMixtureBase:
    g = torch.Generator().manual_seed(3)
    root = torch.randn(2, dim, dim, generator=g, dtype=torch.float64) * 0.2 + torch.eye(dim, dtype=torch.float64)
    means = torch.stack([torch.full((dim,), 20.0), torch.full((dim,), -20.0)]).double()
    return GaussianMixtureBase(torch.tensor([0.75, 0.25]).double(), means, torch.linalg.cholesky(root @ root.mT))


def test_mixture_features_are_standardised_under_the_mixture(generator: torch.Generator) -> None:
    source = mixture()
    features = MixtureFeatures(source)
    rows = source.sample(20_000, generator)
    share, radius, level = features(rows).split([2, 2, 1], 1)
    mine = (rows.sum(1) > 0).double()
    torch.testing.assert_close(share, torch.stack([mine, 1 - mine], 1))
    # Twenty thousand rows: five standard errors of a mean and of a variance with kurtosis 15 (chi-square of 3).
    own = radius.sum(1)
    assert abs(own.mean()) < 5 / 20_000**0.5
    assert abs(own.var() - 1) < 5 * (7 / 20_000) ** 0.5
    assert abs(level.mean()) < 5 / 20_000**0.5
    assert abs(level.var() - 1) < 5 * (7 / 20_000) ** 0.5


def test_mixture_features_at_a_component_mean() -> None:
    source = mixture()
    found = MixtureFeatures(source)(source.means)
    dim = 3
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    torch.testing.assert_close(found[:, :2], expected)
    torch.testing.assert_close(found[:, 2:4], -expected * dim / math.sqrt(2 * dim))


@pytest.mark.parametrize("kind", ["mlp", "residual", "quadratic", "conv"])
def test_ratio_reads_features_and_saves_without_the_mixture(kind: str, generator: torch.Generator) -> None:
    source = mixture(4)
    shape = [1, 2, 2] if kind == "conv" else [4]
    spec = {"kind": kind, "event_shape": shape, "width": 8, "depth": 2, "bound": 5.0, "features": True}
    ratio = build_ratio(spec, generator, source).double()
    u = source.sample(5, generator)
    given = ratio.features(u)
    torch.testing.assert_close(ratio(u), ratio(u, given))
    assert (ratio(u) - ratio(u, given + 1)).abs().min() > 1e-6
    assert torch.autograd.gradcheck(ratio, u.clone().requires_grad_(True))
    again = build_ratio(spec, torch.Generator().manual_seed(99), source).double()
    assert not any("mixture" in name for name in ratio.weights())
    again.load_weights(ratio.weights())
    assert torch.equal(ratio(u), again(u))
    with pytest.raises(RuntimeError, match="do not fit"):
        again.load_weights({**ratio.weights(), "stranger": u})
    with pytest.raises(RuntimeError, match="do not fit"):
        again.load_weights({})
    with pytest.raises(CheckpointError, match="mixture"):
        build_ratio(spec, generator)
