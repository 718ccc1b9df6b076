import math

import pytest
import torch
from torch import Tensor

from ladders import ladder_of
from latentprior.density import ladder as module
from latentprior.density.bases import GaussianMixtureBase, NormalBase
from latentprior.density.ladder import Ladder
from latentprior.density.ratios import build_ratio
from quadrature import integral, moments

SPEC = {"kind": "mlp", "event_shape": [2], "width": 8, "depth": 1, "bound": 3.0}


class Slope(torch.nn.Module):
    """An asymmetric bounded ratio."""

    def forward(self, u: Tensor) -> Tensor:
        return 2 * torch.tanh(1.5 * u[:, 0] + u[:, 1] - 1)


@pytest.fixture
def ladder() -> Ladder:
    ratios = [build_ratio(SPEC, torch.Generator().manual_seed(s)).requires_grad_(False) for s in range(2)]
    return ladder_of(NormalBase(2).float(), [*ratios, Slope()])


@pytest.fixture
def u(generator: torch.Generator) -> Tensor:
    return torch.randn(50, 2, generator=generator)


def test_potential_is_the_sum_of_log_ratios(ladder: Ladder, u: Tensor) -> None:
    assert ladder.length == 3
    assert ladder.log_ratios(u).shape == (50, 3)
    torch.testing.assert_close(ladder.log_potential(u), ladder.log_ratios(u).sum(1))
    torch.testing.assert_close(ladder.log_ratios(u)[:, 2], Slope()(u))


def test_no_stages(u: Tensor) -> None:
    empty = ladder_of(NormalBase(2).float())
    assert empty.log_ratios(u).shape == (50, 0)
    assert (empty.log_potential(u) == 0).all()
    value, grad = empty.density(0)(u)
    torch.testing.assert_close(value, empty.base.log_prob(u))
    torch.testing.assert_close(grad, -u)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5, 2.999, 3.0])
def test_density_on_the_path(ladder: Ladder, u: Tensor, t: float) -> None:
    x = u.clone().requires_grad_(True)
    weights = [min(1, max(0, t - j)) for j in range(3)]
    expected = ladder.base.log_prob(x) + (ladder.log_ratios(x) * torch.tensor(weights)).sum(1)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            value, grad = ladder.density(t)(u)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(grad, slope)
        assert not value.requires_grad
        assert not grad.requires_grad


def test_blocks_change_nothing(ladder: Ladder, u: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ladder.log_ratios(u), ladder.log_potential(u), *ladder.density(2.5)(u)
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    parts = ladder.log_ratios(u), ladder.log_potential(u), *ladder.density(2.5)(u)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(ladder: Ladder, n: int) -> None:
    u = torch.zeros(n, 2)
    assert ladder.log_ratios(u).shape == (n, 3)
    assert ladder.log_potential(u).shape == (n,)
    assert [v.shape for v in ladder.density(3.0)(u)] == [(n,), (n, 2)]


def test_potential_is_differentiable(ladder: Ladder, u: Tensor) -> None:
    x = u.double().requires_grad_(True)
    ladder = ladder_of(NormalBase(2), [r.double() for r in ladder.ratios])
    assert torch.autograd.gradcheck(ladder.log_potential, x[:3].detach().requires_grad_(True))


@pytest.mark.parametrize("source", ["importance", "smc"])
def test_fresh_particles_and_their_normaliser(ladder: Ladder, source: str) -> None:
    def log_density(nodes: Tensor) -> Tensor:
        return ladder.base.log_prob(nodes.float()) + ladder.log_potential(nodes.float())

    log_z = math.log(integral(log_density, -8, 8, 2))
    mean, variance = moments(log_density, -8, 8, 2)
    scores, means = [], []
    for seed in range(10):
        make = ladder.fresh_particles if source == "importance" else ladder.carried_particles
        fresh = make(8192, torch.Generator().manual_seed(seed))
        assert fresh.source == source
        assert fresh.position.shape == (8192, 2)
        scores.append((fresh.log_normalizer.value - log_z) / fresh.log_normalizer.stderr)
        means.append(fresh.position.double().mean(0))
    # Ten independent z-scores (t with 15 degrees of freedom for smc): |mean| < 1.4 is 4.4 standard errors; the
    # largest is below 5 but for a chance of 0.002 (t) or 6e-6 (normal).
    assert abs(sum(scores)) / 10 < 1.4
    assert max(map(abs, scores)) < 5
    # |t_9| > 6 has chance 0.0002 a coordinate.
    m = torch.stack(means)
    assert ((m.mean(0) - mean).abs() < 6 * m.std(0) / math.sqrt(10)).all()
    assert m.std(0).max() < 8 * float(variance.max().sqrt()) / math.sqrt(8192)


def test_particles_of_the_base_need_no_normaliser(generator: torch.Generator) -> None:
    fresh = ladder_of(NormalBase(2).float()).fresh_particles(10, generator)
    assert fresh.source == "base"
    assert fresh.log_normalizer == (0, 0, 1)


def test_poor_overlap_turns_to_smc(generator: torch.Generator) -> None:
    class Far(torch.nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return 5 * torch.tanh(4 * (u[:, 0] - 3.2))

    fresh = ladder_of(NormalBase(1).float(), [Far(), Far()]).fresh_particles(512, generator)
    assert fresh.source == "smc"
    assert len(fresh.position) == 512
    assert fresh.acceptance > 0.3


@pytest.mark.parametrize("n", [1, 15, 17, 100])
def test_any_number_of_particles(ladder: Ladder, n: int, generator: torch.Generator) -> None:
    assert len(ladder.fresh_particles(n, generator).position) == n


def test_importance_pairs_draws_with_their_weights(ladder: Ladder, generator: torch.Generator) -> None:
    u, log_weights = ladder.importance(70_000, generator)
    assert u.shape == (70_000, 2)
    torch.testing.assert_close(log_weights, ladder.log_potential(u))


def test_particles_are_a_function_of_the_generator(ladder: Ladder) -> None:
    a, b, c = (ladder.fresh_particles(200, torch.Generator().manual_seed(s)).position for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_double_precision_stays(generator: torch.Generator) -> None:
    means, cholesky = torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[None]
    base = GaussianMixtureBase(torch.ones(1, dtype=torch.float64), means, cholesky)
    assert ladder_of(base, [Slope()]).fresh_particles(20, generator).position.dtype == torch.float64


@pytest.fixture
def covered(ladder: Ladder) -> Ladder:
    means = torch.tensor([[0.5, 0.5], [2.0, -1.0]])
    cover = GaussianMixtureBase(torch.tensor([0.7, 0.3]), means, 0.6 * torch.eye(2).expand(2, 2, 2))
    return ladder_of(ladder.base, ladder.ratios, cover)


def test_cover_changes_neither_density_nor_normaliser(ladder: Ladder, covered: Ladder, u: Tensor) -> None:
    for a, b in zip(covered.density(3.0)(u), ladder.density(3.0)(u), strict=True):
        torch.testing.assert_close(a, b)
    expected = ladder.density(3.0)(u)[0] - covered.start.log_prob(u)
    torch.testing.assert_close(covered.log_weight(u), expected, atol=1e-5, rtol=1e-5)
    log_z = math.log(integral(lambda x: ladder.density(3.0)(x.float())[0], -8, 8, 2))
    for make in (covered.fresh_particles, covered.carried_particles):
        fresh = make(8192, torch.Generator().manual_seed(0))
        # |t_15| > 5 has chance 0.0002.
        assert abs(fresh.log_normalizer.value - log_z) < 5 * fresh.log_normalizer.stderr


def test_proposal_of_a_cover_is_normalised_and_sampled_as_it_says(covered: Ladder, generator: torch.Generator) -> None:
    start = covered.start
    assert integral(lambda x: start.log_prob(x.float()), -14, 14, 2) == pytest.approx(1, abs=1e-4)
    mean, variance = moments(lambda x: start.log_prob(x.float()), -14, 14, 2)
    z = start.sample(40_000, generator).double()
    # 4.5 standard errors: 1 in 150,000 a coordinate.
    assert ((z.mean(0) - mean).abs() < 4.5 * (variance / len(z)).sqrt()).all()
    square = (z - mean).square()
    assert ((square.mean(0) - variance).abs() < 4.5 * square.std(0) / math.sqrt(len(z))).all()
    halves = z[:20_000].mean(0) - z[20_000:].mean(0)
    assert (halves.abs() < 4.5 * (variance / 10_000).sqrt()).all()
    for n in range(4):
        assert start.sample(n, generator).shape == (n, 2)


@pytest.mark.parametrize("extra", [1, 2])
def test_importance_takes_any_number_of_draws(covered: Ladder, extra: int) -> None:
    # The last block may hold one row: all of it from one half of the proposal.
    for seed in range(3):
        assert len(covered.importance((1 << 16) + extra, torch.Generator().manual_seed(seed))[0]) == (1 << 16) + extra


def test_path_from_a_proposal(ladder: Ladder, covered: Ladder, u: Tensor) -> None:
    assert ladder.path_from(ladder.base) is ladder
    path = covered.path_from(covered.start)
    assert path.length == 1
    ends = covered.start.log_prob_and_grad(u), ladder.density(3.0)(u)
    for t in (0.0, 0.4, 1.0):
        value, grad = path.density(t)(u)
        torch.testing.assert_close(value, (1 - t) * ends[0][0] + t * ends[1][0])
        torch.testing.assert_close(grad, (1 - t) * ends[0][1] + t * ends[1][1])
    torch.testing.assert_close(path.log_ratios(u)[:, 0], ends[1][0] - ends[0][0], atol=1e-5, rtol=1e-5)


def test_extended_adds_a_stage_and_keeps_the_cover(covered: Ladder, u: Tensor) -> None:
    longer = ladder_of(covered.base, covered.ratios[:2], covered.cover).extended(covered.stages[2])
    assert longer.cover is covered.cover
    torch.testing.assert_close(longer.log_weight(u), covered.log_weight(u))


def test_stages_share_the_features_of_their_mixture(u: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = GaussianMixtureBase(
        torch.ones(2) / 2, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.eye(2).repeat(2, 1, 1)
    )
    spec = {**SPEC, "features": True}
    ratios = [build_ratio(spec, torch.Generator().manual_seed(s), mixture).requires_grad_(False) for s in range(3)]
    shared = ladder_of(mixture, ratios)
    torch.testing.assert_close(shared.log_ratios(u), torch.stack([f(u) for f in ratios], 1))
    torch.testing.assert_close(shared.log_potential(u), sum(f(u) for f in ratios))
    calls = []
    plain = GaussianMixtureBase.log_terms
    monkeypatch.setattr(GaussianMixtureBase, "log_terms", lambda self, x: calls.append(len(x)) or plain(self, x))
    shared.log_potential(u)
    assert calls == [len(u)]
    _, grad = shared.density(3.0)(u)
    x = u.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad((mixture.log_prob(x) + shared.log_potential(x)).sum(), x)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-5)
