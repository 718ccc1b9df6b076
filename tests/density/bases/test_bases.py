import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
)

from latentprior import CheckpointError, LatentPriorError, MissingExtraError
from latentprior.density.bases import (
    Base,
    CopulaBase,
    DistributionBase,
    FlowBase,
    GaussianMixtureBase,
    LowRankMixtureBase,
    NormalBase,
    base_from_state,
    fit_base,
)
from latentprior.density.whitening import Whitening
from latentprior.evaluation.known_densities import Banana, SkewedProduct
from quadrature import grid, integral

NAMES = ("normal", "gmm", "gmm-lowrank", "copula", "flow", "distribution")


def identity(dim: int) -> Whitening:
    return Whitening.fit([torch.randn(4, dim, generator=torch.Generator().manual_seed(0))], "none").float()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return SkewedProduct(2, scale=0.7).sample((2000,), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture(scope="module")
def bases(rows: Tensor) -> dict[str, Base]:
    g = torch.Generator().manual_seed(0)
    whitening = Whitening.fit([rows], "full").float()
    mixture = MultivariateNormal(torch.tensor([0.5, 0.2]), torch.tensor([[1.0, 0.6], [0.6, 2.0]]))
    return {
        "normal": NormalBase(2).float(),
        "gmm": GaussianMixtureBase.fit(rows[:1500], rows[1500:], n_components=3, generator=g).float(),
        "gmm-lowrank": LowRankMixtureBase.fit(rows[:1500], rows[1500:], n_components=3, generator=g).float(),
        "copula": CopulaBase.fit(rows).float(),
        "flow": FlowBase.fit(rows[:1500], rows[1500:], max_epochs=3, generator=g),
        "distribution": DistributionBase(mixture, whitening),
    }


@pytest.mark.parametrize("name", NAMES)
def test_integrates_to_one(bases: dict[str, Base], name: str) -> None:
    with torch.no_grad():
        total = integral(lambda u: bases[name].log_prob(u.float()), -16, 16, 2, 800 if name == "copula" else 400)
    assert total == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_autograd(bases: dict[str, Base], name: str, generator: torch.Generator) -> None:
    base = bases[name]
    u = (2 * torch.randn(300, 2, generator=generator)).requires_grad_(True)
    value = base.log_prob(u)
    (grad,) = torch.autograd.grad(value.sum(), u)
    with torch.no_grad():
        both = base.log_prob_and_grad(u.detach())
    torch.testing.assert_close(both[0], value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1], grad, rtol=1e-3, atol=2e-4)
    assert not both[0].requires_grad
    assert not both[1].requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_the_density(bases: dict[str, Base], name: str, generator: torch.Generator) -> None:
    base = bases[name]
    u = base.sample(40_000, generator).double()
    nodes, cell = grid(-16, 16, 2, 800 if name == "copula" else 400)
    with torch.no_grad():
        weight = base.log_prob(nodes.float()).double().exp() * cell
    # Mean, square, product and an asymmetric bounded function, against the same integrals of the density: 4.5
    # standard errors, a false alarm in 1 of 150,000 a number.
    for f in (
        lambda x: x,
        lambda x: x.square().clamp_max(9),
        lambda x: (x[:, :1] * x[:, 1:]).tanh(),
        lambda x: (2 * x - 1).sigmoid(),
    ):
        exact, values = weight @ f(nodes), f(u)
        assert ((values.mean(0) - exact).abs() <= 4.5 * values.std(0) / math.sqrt(len(u)) + 1e-3).all()


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_a_function_of_the_generator(
    bases: dict[str, Base], name: str, seeded: Callable[[int], torch.Generator]
) -> None:
    base = bases[name]
    assert torch.equal(base.sample(50, seeded(3)), base.sample(50, seeded(3)))
    assert not torch.equal(base.sample(50, seeded(3)), base.sample(50, seeded(4)))
    assert base.sample(50, seeded(3)).unique(dim=0).shape == (50, 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [0, 1, 7])
def test_shapes_for_any_number_of_rows(bases: dict[str, Base], name: str, n: int, generator: torch.Generator) -> None:
    u = bases[name].sample(n, generator)
    assert u.shape == (n, 2)
    assert u.dtype == torch.float32
    value, grad = bases[name].log_prob_and_grad(u)
    assert value.shape == (n,)
    assert grad.shape == (n, 2)


@pytest.mark.parametrize("name", NAMES)
def test_one_coordinate(rows: Tensor, name: str, generator: torch.Generator) -> None:
    one = rows[:, :1]
    kind: str | Distribution = Normal(0.3, 1.5) if name == "distribution" else name
    if name == "flow":
        base: Base = FlowBase.fit(one[:1500], one[1500:], max_epochs=2, generator=generator)
    else:
        base = fit_base(kind, one[:1500], one[1500:], identity(1), generator)
    u = base.sample(10, generator)
    assert u.shape == (10, 1)
    with torch.no_grad():
        assert integral(lambda x: base.log_prob(x.float()), -30, 30, 1, 60_000) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("name", ["normal", "gmm", "copula", "flow"])
def test_saved_state_rebuilds_the_same_bits(bases: dict[str, Base], name: str, rows: Tensor) -> None:
    base = bases[name]
    back = base_from_state(base.config(), {k: v.clone() for k, v in base.state_dict().items()})
    for key, value in base.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(back.log_prob(rows), base.log_prob(rows))
        g = [torch.Generator().manual_seed(0) for _ in range(2)]
        assert torch.equal(back.sample(20, g[0]), base.sample(20, g[1]))


def test_unknown_saved_bases() -> None:
    with pytest.raises(CheckpointError, match="pass it again"):
        base_from_state({"name": "distribution"}, {})
    with pytest.raises(CheckpointError, match="unknown base 'x'"):
        base_from_state({"name": "x"}, {})


@pytest.mark.parametrize("bad", ["nope", "gmm:", "gmm:0", "gmm:-1", "gmm:x", "", "GMM"])
def test_unknown_names_list_the_choices(rows: Tensor, bad: str) -> None:
    with pytest.raises(LatentPriorError, match="choose normal, gmm, gmm:K, copula, flow"):
        fit_base(bad, rows, rows, identity(2))


def test_mixture_equals_scikit_learn(generator: torch.Generator) -> None:
    x = Banana().sample((1000,), generator=generator).numpy()
    sk = GaussianMixture(4, random_state=0).fit(x)
    cholesky = torch.linalg.cholesky(torch.as_tensor(sk.covariances_))
    ours = GaussianMixtureBase(torch.as_tensor(sk.weights_), torch.as_tensor(sk.means_), cholesky)
    far = np.concatenate([x, 100 * x])
    np.testing.assert_allclose(ours.log_prob(torch.as_tensor(far)), sk.score_samples(far), rtol=1e-9, atol=1e-9)


def test_mixture_weights_need_not_be_normalised() -> None:
    means, cholesky = torch.zeros(2, 1), torch.ones(2, 1, 1)
    ours = GaussianMixtureBase(torch.tensor([2.0, 6.0]), means, cholesky)
    torch.testing.assert_close(ours.log_prob(torch.zeros(1, 1)), torch.tensor([-0.5 * math.log(2 * math.pi)]))


def test_mixture_draws_visit_components_by_weight(generator: torch.Generator) -> None:
    weights = torch.tensor([1.0, 20.0, 0.5]) / 21.5
    base = GaussianMixtureBase(weights, torch.tensor([[-9.0], [0.0], [9.0]]), torch.full((3, 1, 1), 0.1))
    u = base.sample(50_000, generator)
    share = torch.stack([(u + 9).abs() < 4, u.abs() < 4, (u - 9).abs() < 4]).float().mean((1, 2))
    # Binomial, 4.5 standard errors: 1 in 150,000.
    assert ((share - weights).abs() <= 4.5 * (weights * (1 - weights) / len(u)).sqrt()).all()
    # Exchangeable: a slice is not one component.
    assert (u[:100].abs() < 4).float().mean() > 0.8
    assert len(u[:200][(u[:200] + 9).abs() < 4]) > 0


def test_mixture_chooses_its_size_on_held_out_rows(generator: torch.Generator) -> None:
    centres = torch.tensor([[-6.0, 0.0], [6.0, 0.0], [0.0, 6.0], [0.0, -6.0]])
    x = centres[torch.arange(4000) % 4] + torch.randn(4000, 2, generator=generator)
    assert GaussianMixtureBase.fit(x[:3000], x[3000:], generator=generator).n_components == 4
    normal = torch.randn(2000, 2, generator=generator)
    # A second component may win a thousandth of a nat on 500 rows by chance, and is kept then; four must not.
    assert GaussianMixtureBase.fit(normal[:1500], normal[1500:], generator=generator).n_components <= 2


def test_late_mixtures_stay_small_and_time_enough_changes_nothing(generator: torch.Generator) -> None:
    centres = torch.tensor([[-6.0, 0.0], [6.0, 0.0], [0.0, 6.0], [0.0, -6.0]])
    x = centres[torch.arange(2000) % 4] + torch.randn(2000, 2, generator=generator)

    def means(deadline: float | None) -> Tensor:
        same = torch.Generator().manual_seed(1)
        return GaussianMixtureBase.fit(x[:1500], x[1500:], generator=same, deadline=deadline).means

    now = time.monotonic()
    assert len(means(now - 1)) == 1
    assert torch.equal(means(now + 3600), means(None))
    assert len(means(None)) >= 4


def test_mixture_needs_rows(rows: Tensor, generator: torch.Generator) -> None:
    with pytest.raises(LatentPriorError, match="a mixture of 9 components needs at least 9 rows, got 5"):
        fit_base("gmm:9", rows[:5], rows[5:10], identity(2), generator)
    assert fit_base("gmm:2", rows[:50], rows[50:60], identity(2), generator).n_components == 2


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", ["normal", "gmm", "copula"])
def test_very_few_rows_give_a_base(rows: Tensor, name: str, n: int, generator: torch.Generator) -> None:
    def fitted() -> Base:
        return fit_base(name, rows[:n], rows[n : n + 1], identity(2), generator)

    if name == "copula" and n == 1:
        # One row has no spread, and a spike is no density.
        with pytest.raises(LatentPriorError, match="marginals need at least 2 rows to learn from, got 1: give more"):
            fitted()
        return
    base = fitted()
    assert torch.isfinite(base.log_prob(rows[: n + 1])).all()
    assert (base.log_prob(rows[:n]) > base.log_prob(rows[:n] + 100)).all()
    assert torch.isfinite(base.sample(50, generator)).all()


def test_copula_marginals_are_those_of_the_data(rows: Tensor, generator: torch.Generator) -> None:
    u = CopulaBase.fit(rows).sample(20_000, generator).double()
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    gap = (u.quantile(levels, dim=0) - rows.double().quantile(levels, dim=0)).abs()
    assert gap.max() < 0.12
    # Independent: the correlation of 20,000 rows has standard error 0.007; 4.5 of them.
    assert torch.corrcoef(u.T)[0, 1].abs() < 0.032


def test_copula_of_many_coordinates() -> None:
    # torch.quantile has refused more than 2**24 numbers; 100,000 rows of 200 coordinates are more.
    assert CopulaBase.fit(torch.zeros(1, 1).expand(85_000, 200).clone()).centers.shape == (200, 64)


def test_flow_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zuko", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'latentprior\[flow\]'"):
        FlowBase(2)


def test_flow_learns(rows: Tensor, bases: dict[str, Base]) -> None:
    with torch.no_grad():
        flow, normal = bases["flow"].log_prob(rows).mean(), NormalBase(2).log_prob(rows).mean()
    exact = SkewedProduct(2, scale=0.7).log_prob(rows).mean()
    assert normal + 0.2 < flow < exact + 0.05
    assert not any(p.requires_grad for p in bases["flow"].parameters())


DISTRIBUTIONS = {
    "scalar": (lambda t: Normal(t(0.5), t(2.0)), 1),
    "batch": (lambda t: Normal(t([0.0, 1.0]), t([1.0, 2.0])), 2),
    "independent": (lambda t: Independent(StudentT(t([5.0, 9.0])), 1), 2),
    "joint": (lambda t: MultivariateNormal(t([0.0, 1.0]), t([[1.0, 0.5], [0.5, 2.0]])), 2),
    "mixture": (
        lambda t: MixtureSameFamily(
            Categorical(t([0.3, 0.7])), Independent(Normal(t([[0.0, 1.0], [2.0, 3.0]]), t(1.0)), 1)
        ),
        2,
    ),
    "image": (lambda t: Independent(Normal(t([[0.0, 1.0], [2.0, 3.0]]), t(1.0)), 2), 4),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("theirs", [torch.float32, torch.float64])
@pytest.mark.parametrize("ours", [torch.float32, torch.float64])
def test_distributions_of_the_user(
    name: str, theirs: torch.dtype, ours: torch.dtype, generator: torch.Generator
) -> None:
    make, dim = DISTRIBUTIONS[name]
    distribution = make(lambda v: torch.tensor(v, dtype=theirs))
    z = torch.randn(50, dim, generator=generator, dtype=ours)
    whitening = Whitening.fit([3 * z + 1], "full").to(dtype=ours)
    base = fit_base(distribution, z, z, whitening, generator)
    u = base.sample(6, generator)
    assert u.shape == (6, dim)
    assert u.dtype == ours
    value, grad = base.log_prob_and_grad(u)
    assert value.dtype == ours
    assert grad.dtype == ours
    points = whitening.unwhiten(u).to(theirs).reshape(6, *distribution.batch_shape, *distribution.event_shape)
    expected = distribution.log_prob(points).reshape(6, -1).sum(1).to(ours) - whitening.log_abs_det
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_distribution_of_another_size_is_refused(rows: Tensor) -> None:
    for wrong in (Normal(torch.zeros(1), torch.ones(1)), Normal(torch.zeros(3), torch.ones(3)), Normal(0.0, 1.0)):
        with pytest.raises(LatentPriorError, match=r"shape|coordinates"):
            fit_base(wrong, rows, rows, identity(2))


@pytest.mark.parametrize(
    "distribution", [LogNormal(torch.zeros(2), torch.ones(2)), Uniform(torch.zeros(2), torch.ones(2))]
)
def test_distribution_with_a_boundary_is_minus_infinity_outside(distribution: Distribution) -> None:
    # Samplers propose points beyond the support: they must be refused by their density, not by an exception.
    base = DistributionBase(distribution, identity(2))
    value, grad = base.log_prob_and_grad(torch.tensor([[-1.0, 0.5], [0.5, 0.5]]))
    assert value[0] == -math.inf
    assert torch.isfinite(value[1])
    assert torch.isfinite(grad[1]).all()


def test_users_base_is_not_changed(rows: Tensor) -> None:
    mine = NormalBase(2)
    mine.scale = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    fit_base(mine, rows, rows, identity(2))
    assert mine.scale.requires_grad
    assert mine.scale.dtype == torch.float64


def test_base_is_abstract() -> None:
    with pytest.raises(LatentPriorError, match="has no log_prob"):
        Base().log_prob(torch.zeros(1, 1))
    with pytest.raises(LatentPriorError, match="cannot be sampled"):
        Base().sample(1)


def test_a_flow_of_other_splines_is_refused(bases: dict[str, Base]) -> None:
    flow = bases["flow"]
    config, tensors = flow.config(), dict(flow.state_dict())
    # Constants of N(0, I) that another release of zuko has named otherwise do no harm.
    renamed = {
        k.replace("flow.base.loc", "flow.base._0").replace("flow.base.scale", "flow.base._1"): v
        for k, v in tensors.items()
    }
    again = base_from_state(config, renamed)
    assert torch.equal(again.log_prob(torch.ones(3, 2)), flow.log_prob(torch.ones(3, 2)))
    with pytest.raises(CheckpointError, match="splines are those of another release of zuko"):
        base_from_state({**config, "log_prob_at_zero": config["log_prob_at_zero"] + 0.04}, tensors)
