"""How ratios are optimised: momentum orthogonalised in hidden layers, natural gradients of quadratic forms, AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

__all__ = ["REMEMBERED", "Muon", "NaturalGradient", "build_optimizers", "orthogonalized"]

ITERATIONS = 3
MOMENTUM = 0.95
HIDDEN_RATE = 4.0
"""How much faster hidden layers learn than the rest."""
FORM_RATE = 10.0
"""How much faster quadratic forms learn than the rest."""
DAMPING = 1e-6
"""Of each coordinate's variance, added to it."""


def orthogonalized(matrices: Tensor, iterations: int = ITERATIONS) -> Tensor:
    r"""Singular vectors kept, singular values moved towards 1: ``(k, n, m) -> (k, n, m)``.

    Each iteration is :math:`X \leftarrow a X + (b A + c A^2) X` with :math:`A = X X^\top`, from X of Frobenius norm 1.
    Source of the coefficients: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    x: Tensor = matrices / norm.clamp_min(torch.finfo(matrices.dtype).tiny)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(Optimizer):
    r"""Momentum of matrices of one shape, orthogonalised: a step is of the same length in all directions.

    :math:`M \leftarrow \mu M + (1 - \mu) G`, :math:`W \leftarrow (1 - \tfrac{1}{16} \eta\lambda s) W - 0.2\,\eta s\,
    \mathrm{orth}((1 - \mu) G + \mu M)`, with :math:`s = \sqrt{\max(n, m)}` and :math:`\eta` four times ``lr``. No
    singular value then grows far beyond :math:`3.2 / \lambda`, whatever the width. Sources: Jordan et al. 2024; the
    scale, which gives steps the size of AdamW's, Liu et al. 2025 (arXiv 2502.16982). All matrices are orthogonalised
    in one batch; ``torch.optim.Muon`` takes them one by one and always in bfloat16, which few processors multiply
    natively.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = MOMENTUM,
        *,
        halved: bool = False,
    ) -> None:
        """``halved``: orthogonalise in bfloat16; momentum and weights keep their precision."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.halved = halved

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all matrices that have a gradient."""
        for group in self.param_groups:
            rate, momentum = HIDDEN_RATE * group["lr"], group["momentum"]
            moved = [p for p in group["params"] if p.grad is not None]
            ahead = []
            for p in moved:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                mean = self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
                ahead.append(p.grad.lerp(mean, momentum))
            if not moved:
                continue
            stacked = torch.stack(ahead)
            directions = orthogonalized(stacked.bfloat16() if self.halved else stacked).to(stacked.dtype)
            size = rate * max(moved[0].shape) ** 0.5
            for p, direction in zip(moved, directions, strict=True):
                p.mul_(1 - size / 16 * group["weight_decay"]).add_(direction, alpha=-0.2 * size)


class NaturalGradient(Optimizer):
    r"""Natural gradients of :math:`f(u) = u^\top W u + b^\top u + c` in the metric of normal u.

    For :math:`u \sim N(m, C)` the features :math:`1`, :math:`u - m` and :math:`(u - m)(u - m)^\top - C` are
    uncorrelated, and the inverse of their Fisher information is :math:`1`, :math:`C^{-1} \cdot` and
    :math:`\tfrac12 C^{-1} \cdot\, C^{-1}`: a step is as long in narrow directions as in broad ones, whatever the
    coordinates. The logistic loss, whose curvature at f = 0 and odds of 1 is half of that, then falls alike in all
    directions, by a share of ``10 lr`` a step. Source: Amari, Neural Computation 10 (1998).
    """

    def __init__(self, form: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        """``form``: W, b and c. Standard normal u is taken for granted until :meth:`adapt` is called."""
        super().__init__(form, {"lr": lr, "weight_decay": weight_decay})
        mean = torch.zeros_like(form[1])
        self.adapt(mean, torch.eye(len(mean)).to(mean))

    @torch.no_grad()
    def adapt(self, mean: Tensor, second: Tensor) -> None:
        r"""Take the metric of u by its mean ``(d,)`` and second moment :math:`\mathbb E\,u u^\top` ``(d, d)``."""
        covariance = second.double() - torch.outer(mean, mean).double()
        covariance.diagonal().mul_(1 + DAMPING)
        like = self.param_groups[0]["params"][0]
        self.mean, self.covariance = mean.to(like), covariance.to(like)
        self.precision = torch.linalg.inv(covariance).to(like)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all three, if they have gradients."""
        mean = self.mean
        for group in self.param_groups:
            form, bias, offset = group["params"]
            if form.grad is None:
                continue
            # The gradients with respect to the uncorrelated features, steps along these, and back to W, b and c.
            linear = bias.grad - offset.grad * mean
            crossed = torch.outer(linear, mean)
            square = form.grad - crossed - crossed.T - offset.grad * (torch.outer(mean, mean) + self.covariance)
            square = self.precision @ square @ self.precision
            linear = 2 * (self.precision @ linear)
            constant = 2 * offset.grad - (self.covariance * square).sum() - linear @ mean + mean @ square @ mean
            linear = linear - (square + square.T) @ mean
            kept = 1 - group["lr"] * group["weight_decay"]
            for parameter, direction in ((form, square), (bias, linear), (offset, constant)):
                parameter.mul_(kept).sub_(direction, alpha=FORM_RATE * group["lr"])


def build_optimizers(
    parameters: Iterable[Tensor],
    hidden: Sequence[Tensor],
    form: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    *,
    halved: bool = False,
) -> tuple[Optimizer, ...]:
    """AdamW, but :class:`Muon` for the ``hidden`` matrices and :class:`NaturalGradient` for a quadratic ``form``."""
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    apart = [*hidden, *form]
    rest = [p for p in parameters if not any(p is other for other in apart)]
    found: list[Optimizer] = [AdamW(rest, fused=True, **settings)] if rest else []
    if hidden:
        found.append(Muon(hidden, halved=halved, **settings))
    if form:
        found.append(NaturalGradient(form, **settings))
    return tuple(found)


REMEMBERED: dict[type[Optimizer], tuple[str, ...]] = {
    AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
    NaturalGradient: (),
}
"""What an optimiser keeps of each parameter."""
