import pytest
import torch
from torch import Tensor

from latentprior.density import gradients as engine
from latentprior.density.bases import Base, GaussianMixtureBase, NormalBase
from latentprior.density.gradients import ValueAndGrad
from latentprior.density.ratios import BoundedRatio, build_ratio
from latentprior.density.sampling import mala

DIM = 3


def mixture(components: int = 4, seed: int = 0) -> GaussianMixtureBase:
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(components, DIM, generator=g, dtype=torch.float64)
    lower = 0.3 * torch.randn(components, DIM, DIM, generator=g, dtype=torch.float64)
    cholesky = lower.tril(-1) + torch.diag_embed(0.5 + lower.diagonal(dim1=1, dim2=2).abs())
    return GaussianMixtureBase(torch.rand(components, generator=g, dtype=torch.float64) + 0.1, means, cholesky)


def ratio(seed: int, read: GaussianMixtureBase | None = None, **spec: object) -> BoundedRatio:
    """All weights random, those that start at zero too."""
    g = torch.Generator().manual_seed(seed)
    told = {
        "kind": "residual",
        "event_shape": [DIM],
        "width": 7,
        "depth": 2,
        "bound": 1.5,
        "features": read is not None,
    }
    made = build_ratio({**told, **spec}, g, read).double()
    for p in made.network.parameters():
        torch.nn.init.normal_(p, std=0.6, generator=g)
    return made.requires_grad_(False)


class Foreign(torch.nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return torch.sin(u[:, 0]) * u[:, 1]


def ladders() -> dict[str, tuple[Base, list[torch.nn.Module]]]:
    m, other = mixture(), mixture(3, 1)
    average = GaussianMixtureBase.averaged([mixture(3, seed) for seed in range(2)])
    return {
        "residual": (NormalBase(DIM), [ratio(1), ratio(2, width=5, depth=1), ratio(3, depth=0)]),
        "mlp": (NormalBase(DIM), [ratio(1, kind="mlp"), ratio(2, kind="mlp", depth=1), ratio(3, kind="mlp", depth=3)]),
        "quadratic": (NormalBase(DIM), [ratio(1, kind="quadratic"), ratio(2), ratio(3, kind="quadratic")]),
        "quadratic, features of the base": (m, [ratio(1, m, kind="quadratic"), ratio(2, m)]),
        "features of the base": (m, [ratio(1, m), ratio(2, m, kind="mlp"), ratio(3)]),
        "features of the first of an average": (average, [ratio(1, average), ratio(2, average, kind="quadratic")]),
        "features of an average that is no base": (NormalBase(DIM), [ratio(1, average), ratio(2, m)]),
        "features of another mixture": (NormalBase(DIM), [ratio(1, m), ratio(2, m)]),
        "features of two mixtures": (m, [ratio(1, m), ratio(2, other)]),
        "mixture, features unread": (m, [ratio(1), ratio(2)]),
        "foreign": (m, [Foreign(), ratio(2, m), ratio(3)]),
        "none": (m, []),
    }


@pytest.mark.parametrize("name", list(ladders()))
def test_value_and_gradient_are_those_of_autograd(
    name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ratios = ladders()[name]
    weights = [1.0, 0.3, 0.7][: len(ratios)]
    u = torch.randn(21, DIM, generator=generator, dtype=torch.float64)
    x = u.clone().requires_grad_(True)
    expected = base.log_prob(x) + sum(w * f(x) for w, f in zip(weights, ratios, strict=True))
    (slope,) = torch.autograd.grad(expected.sum(), x)
    for rows in (1024, 4):
        monkeypatch.setattr(engine, "MOST_ROWS", rows)
        # Rows that do not lie one after the other in memory, and rows that someone differentiates, are rows too.
        for given in (u, u.t().contiguous().t(), x):
            value, grad = ValueAndGrad(base, ratios, weights)(given)
            torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-10)
            assert not value.requires_grad


def test_a_mixture_that_is_base_and_read_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, ratios = ladders()["features of the base"]
    plain, calls = GaussianMixtureBase.project, []
    monkeypatch.setattr(GaussianMixtureBase, "project", lambda self, u: calls.append(len(u)) or plain(self, u))
    ValueAndGrad(base, ratios, [1.0, 1.0, 1.0])(torch.zeros(9, DIM, dtype=torch.float64))
    assert calls == [9]


def test_results_do_not_share_memory_with_later_calls(generator: torch.Generator) -> None:
    base, ratios = ladders()["residual"]
    density = ValueAndGrad(base, ratios, [1.0, 1.0, 1.0])
    u = torch.randn(2, 30, DIM, generator=generator, dtype=torch.float64)
    first = density(u[0])
    kept = [t.clone() for t in first]
    density(u[1])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_weights_that_change_are_seen(generator: torch.Generator) -> None:
    learning = ratio(1)
    density = ValueAndGrad(NormalBase(DIM), [learning], [1.0])
    u = torch.randn(5, DIM, generator=generator, dtype=torch.float64)
    before = density(u)[0]
    learning.network.last.bias += 0.5
    torch.testing.assert_close(density(u)[0], NormalBase(DIM).log_prob(u) + learning(u))
    assert (density(u)[0] > before).all()


def test_far_rows_stay_finite() -> None:
    base, ratios = ladders()["features of the base"]
    base, ratios = base.float(), [r.float() for r in ratios]
    u = torch.tensor([[1e4, -1e4, 0.0], [300.0, 0.0, 0.0]])
    value, grad = ValueAndGrad(base, ratios, [1.0, 1.0, 1.0])(u)
    assert torch.isfinite(value).all()
    assert torch.isfinite(grad).all()
    assert (grad[0] * u[0]).sum() < 0


def test_a_step_of_mala_evaluates_once() -> None:
    calls = []

    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(z))
        return -0.5 * z.square().sum(1), -z

    mala.sample(torch.zeros(6, 2), density, steps=5, generator=torch.Generator().manual_seed(0))
    assert calls == [6] * (1 + 5)
