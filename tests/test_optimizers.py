"""Orthogonalised momentum against its definition, and which parameters it moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from latentprior.optimizers import HIDDEN_RATE, REMEMBERED, Muon, build_optimizers, orthogonalized
from latentprior.ratios import build_ratio


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


def test_matrices_without_a_gradient_stay() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    Muon([weight], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(3, 3))


@pytest.mark.parametrize(
    ("kind", "shape", "hidden"),
    [("residual", [8], 4), ("mlp", [8], 1), ("quadratic", [8], 0), ("conv", [3, 4, 4], 0)],
)
def test_hidden_layers_are_orthogonalized_and_all_parameters_move(kind: str, shape: list[int], hidden: int) -> None:
    # As wide as the latents are long: a first layer or a quadratic form that is square is no hidden layer.
    spec = {"kind": kind, "event_shape": shape, "width": 8, "depth": 2, "bound": 5.0}
    ratio = build_ratio(spec, torch.Generator().manual_seed(0))
    matrices = getattr(ratio.network, "hidden_matrices", list)()
    optimizers = build_optimizers(ratio.parameters(), matrices, 0.01, 0.1)
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
