"""Orthogonalised momentum against its definition, and which parameters it moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from latentprior.density.ratios import Quadratic, build_ratio, logistic_loss
from latentprior.fitting.optimizers import (
    FORM_RATE,
    HIDDEN_RATE,
    REMEMBERED,
    Muon,
    NaturalGradient,
    build_optimizers,
    orthogonalized,
)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (2, 9, 5)])
def test_orthogonalizing_keeps_singular_vectors(shape: tuple[int, ...], generator: torch.Generator) -> None:
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonalized(matrices, 5) @ v.mT
    moved = torch.diagonal(inner, dim1=1, dim2=2)
    torch.testing.assert_close(inner, torch.diag_embed(moved), atol=1e-12, rtol=0)
    # The coefficients' five iterations bring all that is above a hundredth of the norm to between 0.6 and 1.3.
    large = s > 0.01 * s.norm(dim=1, keepdim=True)
    assert large.sum() > 0.7 * s.numel()
    assert ((moved[large] > 0.6) & (moved[large] < 1.3)).all()


def test_nothing_to_orthogonalize_stays_nothing() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))


def test_a_step_is_the_equation(generator: torch.Generator) -> None:
    weights = [nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64)) for _ in range(2)]
    gradients = torch.randn(3, 2, 6, 6, generator=generator, dtype=torch.float64)
    optimizer = Muon(weights, lr=0.01, weight_decay=0.3, momentum=0.9)
    want, mean = torch.stack([w.detach().clone() for w in weights]), torch.zeros(2, 6, 6, dtype=torch.float64)
    rate = HIDDEN_RATE * 0.01
    for gradient in gradients:
        for weight, g in zip(weights, gradient, strict=True):
            weight.grad = g.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        direction = orthogonalized(0.1 * gradient + 0.9 * mean)
        want = (1 - rate * 0.3 * math.sqrt(6) / 16) * want - 0.2 * rate * math.sqrt(6) * direction
    torch.testing.assert_close(torch.stack([w.detach() for w in weights]), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("width", [8, 256])
def test_decay_bounds_the_singular_values_whatever_the_width(width: int, generator: torch.Generator) -> None:
    weight = nn.Parameter(torch.zeros(width, width))
    pull = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    optimizer = Muon([weight], lr=0.05, weight_decay=0.4)
    for _ in range(2000 if width == 8 else 300):
        weight.grad = -pull.clone()
        optimizer.step()
    # As far as three iterations bring singular values to 1.
    step = torch.linalg.matrix_norm(orthogonalized(pull[None]), ord=2)
    assert float(torch.linalg.matrix_norm(weight.detach(), ord=2)) == pytest.approx(float(3.2 / 0.4 * step), rel=0.02)


def test_half_precision_is_of_the_direction_alone(generator: torch.Generator) -> None:
    start = torch.randn(2, 32, 32, generator=generator)
    gradients = torch.randn(3, 2, 32, 32, generator=generator)

    def moved(halved: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        weights = [nn.Parameter(w.clone()) for w in start]
        optimizer = Muon(weights, lr=0.01, weight_decay=0.0, halved=halved)
        for gradient in gradients:
            for weight, g in zip(weights, gradient, strict=True):
                weight.grad = g.clone()
            optimizer.step()
        return torch.stack([w.detach() for w in weights]) - start, [optimizer.state[w]["momentum"] for w in weights]

    (whole, kept), (half, kept_by_half) = moved(False), moved(True)
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    assert float((half - whole).norm() / whole.norm()) < 0.02
    assert all(torch.equal(a, b) for a, b in zip(kept, kept_by_half, strict=True))


def test_matrices_without_a_gradient_stay() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    Muon([weight], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(3, 3))


@pytest.mark.parametrize(
    ("kind", "shape", "hidden"), [("residual", [8], 4), ("mlp", [8], 1), ("quadratic", [8], 0), ("conv", [3, 4, 4], 0)]
)
def test_hidden_layers_are_orthogonalized_and_all_parameters_move(kind: str, shape: list[int], hidden: int) -> None:
    # As wide as the latents are long: a first layer or a quadratic form that is square is no hidden layer.
    spec = {"kind": kind, "event_shape": shape, "width": 8, "depth": 2, "bound": 5.0}
    ratio = build_ratio(spec, torch.Generator().manual_seed(0))
    matrices = getattr(ratio.network, "hidden_matrices", list)()
    network = ratio.network
    form = network.form_parameters() if isinstance(network, Quadratic) else ()
    optimizers = build_optimizers(ratio.parameters(), matrices, form, 0.01, 0.1)
    moved = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(moved) == len(set(moved)) == len(list(ratio.parameters()))
    matrices = [p for o in optimizers if isinstance(o, Muon) for p in o.param_groups[0]["params"]]
    assert [tuple(p.shape) for p in matrices] == [(8, 8)] * hidden
    first = getattr(ratio.network, "first", None)
    assert first is None or not any(p is first.weight for p in matrices)
    ratio(torch.ones(4, math.prod(shape))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        for p in optimizer.param_groups[0]["params"]:
            assert tuple(optimizer.state[p]) == REMEMBERED[type(optimizer)]


def test_a_badly_scaled_problem_is_solved_sooner(generator: torch.Generator) -> None:
    # A linear map under inputs whose scales span 1 to 30: orthogonal steps do not follow the largest alone.
    wanted = torch.randn(16, 16, generator=generator)
    x = torch.randn(256, 16, generator=generator) * torch.logspace(0, -1.5, 16)

    def left(orthogonal: bool) -> float:
        weight = nn.Parameter(torch.zeros(16, 16))
        optimizer = Muon([weight], 0.05, 0.0) if orthogonal else torch.optim.SGD([weight], 1.0, momentum=0.95)
        for step in range(300):
            for group in optimizer.param_groups:
                group["lr"] = (0.05 if orthogonal else 1.0) * (1 - step / 300)
            optimizer.zero_grad()
            (x @ (weight - wanted).T).square().mean().backward()
            optimizer.step()
        return float((weight.detach() - wanted).square().mean())

    assert left(True) < 0.1 * left(False)


def a_natural_step(u: Tensor, positive: int) -> Quadratic:
    """A form that is zero, after one step whose rate is 1, on rows of which the first ones are the target's."""
    form = Quadratic(u.shape[1], torch.Generator().manual_seed(0)).to(u.dtype)
    with torch.no_grad():
        form.form.weight.zero_()
        form.form.bias.zero_()
    optimizer = NaturalGradient(form.form_parameters(), 1 / FORM_RATE, 0.0)
    optimizer.adapt(u.mean(0), u.T @ u / len(u))
    f = form(u)
    logistic_loss(f[:positive], f[positive:]).backward()
    optimizer.step()
    return form


def test_a_natural_step_finds_the_ratio_of_gaussians_close_by(generator: torch.Generator) -> None:
    # Narrow, broad, oblique and off centre; q is p shifted and stretched by a twentieth.
    n, dim = 200_000, 3
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.double) * torch.tensor([0.3, 1.0, 3.0])
    loc, shift = torch.tensor([2.0, -1.0, 0.5]).double(), torch.tensor([0.05, 0.0, 0.05]).double()
    e = torch.randn(2 * n, dim, generator=generator, dtype=torch.double)
    stretch = torch.tensor([1.05, 0.95, 1.0]).double()
    standard = torch.cat([shift + stretch * e[:n], e[n:]])
    f = a_natural_step(loc + standard @ mix.T, n)(loc + standard @ mix.T).detach()
    exact = (0.5 * standard.square() - 0.5 * ((standard - shift) / stretch).square() - stretch.log()).sum(1)
    # To first order in the difference; 200,000 rows leave an error of sqrt(2 * 10 / n) = 0.01.
    assert float((f - exact).square().mean().sqrt()) < 0.15 * float(exact.std())
    assert float(exact.std()) > 0.1


def test_natural_steps_are_the_same_in_all_coordinates(generator: torch.Generator) -> None:
    u = torch.randn(400, 4, generator=generator, dtype=torch.double)
    u[:200] *= 1.5
    mix = torch.randn(4, 4, generator=generator, dtype=torch.double) * torch.logspace(-1, 1, 4)
    v = 3 + u @ mix.T
    f, g = a_natural_step(u, 200)(u), a_natural_step(v, 200)(v)
    # But for what is added to each variance.
    assert float((f - g).detach().square().mean().sqrt()) < 0.02 * float(f.detach().std())


def test_a_form_without_gradients_stays() -> None:
    form = Quadratic(3, torch.Generator().manual_seed(0))
    before = form.form.weight.clone()
    NaturalGradient(form.form_parameters(), 0.1, 0.1).step()
    assert torch.equal(form.form.weight, before)
