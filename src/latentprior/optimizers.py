"""How a ratio network is optimised: orthogonalised momentum for its hidden layers, AdamW for the rest.

Or stochastic gradients with momentum for all, where a network is linear in its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

__all__ = ["REMEMBERED", "Muon", "build_optimizers", "orthogonalized"]

ITERATIONS = 3
MOMENTUM = 0.95
HIDDEN_RATE = 4.0
"""How much faster hidden layers learn than the rest."""


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
    in one batch, in their own precision: ``torch.optim.Muon`` takes them one by one in bfloat16, which few processors
    multiply natively.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = MOMENTUM) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

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
            directions = orthogonalized(torch.stack(ahead))
            size = rate * max(moved[0].shape) ** 0.5
            for p, direction in zip(moved, directions, strict=True):
                p.mul_(1 - size / 16 * group["weight_decay"]).add_(direction, alpha=-0.2 * size)


def build_optimizers(
    parameters: Iterable[Tensor], hidden: Sequence[Tensor], lr: float, weight_decay: float, *, adaptive: bool = True
) -> tuple[Optimizer, ...]:
    """AdamW for all parameters but the ``hidden`` matrices, which :class:`Muon` moves; or SGD, not ``adaptive``."""
    rest = [p for p in parameters if not any(p is matrix for matrix in hidden)]
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    first = AdamW(rest, fused=True, **settings) if adaptive else SGD(rest, momentum=MOMENTUM, **settings)
    return (first, Muon(hidden, **settings)) if hidden else (first,)


REMEMBERED: dict[type[Optimizer], tuple[str, ...]] = {
    AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
    SGD: ("momentum_buffer",),
}
"""What an optimiser keeps of each parameter."""
