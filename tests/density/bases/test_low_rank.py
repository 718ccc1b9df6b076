"""Mixtures of low-rank covariances, and the shrinkage of covariances."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

import latentprior as lp
from latentprior.density.bases import GaussianMixtureBase, LowRankMixtureBase, fit_base
from latentprior.density.bases.em import Moments, Scatter, expectation_maximisation
from latentprior.density.gradients import ValueAndGrad
from latentprior.density.ratios import build_ratio


def low_rank(k: int, d: int, r: int, seed: int = 0) -> LowRankMixtureBase:
    g = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(k, d, r, generator=g, dtype=torch.float64)).Q
    values = torch.rand(k, r, generator=g, dtype=torch.float64) * 3 + 0.1
    weights = torch.rand(k, generator=g, dtype=torch.float64) + 0.1
    means = torch.randn(k, d, generator=g, dtype=torch.float64)
    return LowRankMixtureBase(weights, means, vectors, values, 0.5 + torch.rand(k, generator=g, dtype=torch.float64))


def scale_mixture(n: int, d: int, seed: int) -> Tensor:
    """Rows of one direction a group that is wider, and of three scales."""
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(n, d, generator=g)
    group = torch.arange(n) % 3
    u[torch.arange(n), group] *= 4
    return u * torch.tensor([0.7, 1.0, 1.4])[group, None]


@pytest.mark.parametrize("r", [1, 3, 7])
def test_density_and_gradient_are_those_of_the_full_covariances(r: int) -> None:
    base = low_rank(4, 7, r)
    u = 2 * torch.randn(50, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, grad = base.log_prob_and_grad(u)
    expected, expected_grad = base.full().log_prob_and_grad(u)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_draws_have_the_components_covariances() -> None:
    base = low_rank(1, 5, 2)
    u = base.sample(200_000, torch.Generator().manual_seed(0))
    factor = base.full().cholesky[0]
    torch.testing.assert_close(torch.cov(u.T), factor @ factor.T, atol=0.03, rtol=0.03)
    torch.testing.assert_close(u.mean(0), base.means[0], atol=0.02, rtol=0)


def test_all_eigenvectors_give_the_moments_back() -> None:
    u = scale_mixture(2000, 4, 0)
    shares = torch.rand(3, 2000, generator=torch.Generator().manual_seed(0))
    moments = Scatter.of(u, shares / shares.sum(0), torch.eye(4, dtype=torch.float64)).shrunk(0.0)
    whole = LowRankMixtureBase.of(moments, 4)
    expected = GaussianMixtureBase.of(moments).log_prob(u.double())
    torch.testing.assert_close(whole.log_prob(u.double()), expected, atol=1e-4, rtol=0)


def test_few_directions_are_those_farthest_from_the_rest() -> None:
    variances = torch.tensor([1.0, 0.05, 1.1, 9.0, 0.9, 1.0], dtype=torch.float64)
    moments = Moments(torch.ones(1).double(), torch.zeros(1, 6).double(), torch.diag(variances)[None])
    base = LowRankMixtureBase.of(moments, 2)
    assert base.values[0].sort().values.tolist() == pytest.approx([0.05, 9.0], rel=1e-5)
    assert float(base.noise[0]) == pytest.approx(1.0)


def test_widening_multiplies_scales() -> None:
    base = low_rank(2, 5, 2)
    u = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(base.widened((1.0, 2.5)).log_prob(u), base.full().widened((1.0, 2.5)).log_prob(u))


@pytest.mark.parametrize("kind", ["residual", "conv"])
def test_stages_read_it_as_they_read_full_covariances(kind: str) -> None:
    base = low_rank(3, 16, 4).float()
    spec = {"kind": kind, "event_shape": [1, 4, 4], "width": 16, "depth": 1, "bound": 3.0, "features": True}
    u = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    both = []
    for mixture in (base, base.full()):
        ratio = build_ratio(spec, torch.Generator().manual_seed(0), mixture)
        both.append(ValueAndGrad(mixture, [ratio], [1.0])(u))
    torch.testing.assert_close(both[0][0], both[1][0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(both[0][1], both[1][1], atol=1e-3, rtol=1e-3)


def test_wide_latents_get_it_by_themselves_and_a_prior_on_it_loads(tmp_path: object) -> None:
    d = 200
    z, test = scale_mixture(8000, d, 0), scale_mixture(2000, d, 1)
    prior = lp.fit(z, max_stages=0)
    assert prior.base.name == "gmm-lowrank"
    gaussian = lp.fit(z, base="normal", max_stages=0)
    assert float((prior.log_prob(test) - gaussian.log_prob(test)).mean()) > 5
    prior.save_pretrained(tmp_path)
    again = lp.LatentPrior.from_pretrained(tmp_path)
    assert torch.equal(again.log_prob(test), prior.log_prob(test))
    one, other = (p.sample((5,), torch.Generator().manual_seed(0)) for p in (prior, again))
    assert torch.equal(one, other)


def test_few_rows_of_wide_latents_get_one_gaussian() -> None:
    z = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    prior = lp.fit(z, max_stages=0)
    assert math.isfinite(float(prior.log_prob(z).mean()))
    assert prior.base.n_components == 1


def test_asked_for_by_name(generator: torch.Generator) -> None:
    u = scale_mixture(1000, 6, 0)
    whitening = lp.fit(u, base="normal", max_stages=0).whitening
    assert fit_base("gmm-lowrank:3", u[:800], u[800:], whitening, generator).n_components == 3
    assert fit_base("gmm-lowrank:03", u[:800], u[800:], whitening, generator).name == "gmm-lowrank"
    with pytest.raises(lp.LatentPriorError, match="at least 900 rows"):
        fit_base("gmm-lowrank:900", u[:800], u[800:], whitening, generator)


def test_shrinkage_is_the_mode_of_the_posterior() -> None:
    u = scale_mixture(40, 3, 0).double()
    overall = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 0.5]], dtype=torch.float64)
    one = torch.ones(1, 40, dtype=torch.float64)
    plain = Scatter.of(u, one, overall).shrunk(0.0)
    ridge = 1e-4 * torch.eye(3, dtype=torch.float64)
    sample = torch.cov(u.T, correction=0)
    torch.testing.assert_close(plain.covariances[0], sample + ridge)
    scale = torch.trace(torch.linalg.inv(overall) @ sample) / 3
    shrunk = Scatter.of(u, one, overall).shrunk(20.0).covariances[0]
    torch.testing.assert_close(shrunk, (40 * sample + 20 * scale * overall) / 60 + ridge)


def test_shrunk_components_fit_other_rows_better() -> None:
    d = 24
    rows, test = scale_mixture(900, d, 0), scale_mixture(4000, d, 1)

    def level(prior_rows: float) -> float:
        steps = expectation_maximisation(
            lambda: rows, 8, lambda moments: GaussianMixtureBase.of(moments).float().log_terms,
            iterations=15, shrink=lambda found: found.shrunk(prior_rows), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        *_, (moments, _) = steps
        return float(GaussianMixtureBase.of(moments).float().log_prob(test).mean())

    assert level(d) > level(0.0) + 0.3


def test_iterations_raise_the_density() -> None:
    rows = scale_mixture(1500, 10, 0)
    made = functools.partial(LowRankMixtureBase.of, rank=4)
    steps = expectation_maximisation(
        lambda: rows, 3, lambda moments: made(moments).float().log_terms, iterations=8,
        shrink=lambda found: found.shrunk(0.0), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    levels = [density for _, density in steps][1:]
    assert levels[-1] > levels[0] + 0.2
    assert all(b > a - 0.05 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("flat", [True, False])
def test_held_out_rows_choose_how_far_covariances_are_shrunk(flat: bool) -> None:
    """Components that are flat in directions of their own lose by any shrinkage, few rows of round ones gain by it."""
    d, k = 32, 4

    def rows(n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        fixed = torch.Generator().manual_seed(99)
        u = torch.randn(k, n, d, generator=g)
        if flat:
            axes = torch.linalg.qr(torch.randn(k, d, d, generator=fixed)).Q
            u = (u * torch.logspace(-2, 0.3, d)) @ axes
        return (u + 6 * torch.randn(k, 1, d, generator=fixed)).flatten(0, 1)

    n = 2000 if flat else 70
    train, held_out, test = rows(n, 0), rows(500, 1), rows(1000, 2)

    def level(*prior_rows: float) -> float:
        with pytest.MonkeyPatch.context() as patch:
            plan = GaussianMixtureBase.plan(len(train), d)
            chosen = plan._replace(prior_rows=prior_rows or plan.prior_rows)
            patch.setattr(GaussianMixtureBase, "plan", classmethod(lambda *_: chosen))
            same = torch.Generator().manual_seed(0)
            mixture = GaussianMixtureBase.fit(train, held_out, n_components=k, generator=same)
        return float(mixture.float().log_prob(test).mean())

    # By d rows, as it was for all, or by none: the choice must be near the better, and far above the worse.
    shrunk, plain, chosen = level(d), level(0), level()
    assert (plain - shrunk if flat else shrunk - plain) > 1
    assert chosen > max(shrunk, plain) - 0.2
