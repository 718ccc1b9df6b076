"""Value and gradient of a base and weighted log ratios, with one evaluation of the mixture that they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bases import Base, MixtureBase
from .bases.mixture_base import responsibilities
from .ratios import BoundedRatio, MixtureFeatures

__all__ = ["ValueAndGrad"]

MOST_ROWS, LEAST_ROWS = 1024, 128
"""Rows of a block: fewer leave matrix products slower, more leave what lies between them outside a core's cache."""
MOST_RESIDUALS = 1 << 21
"""Numbers that a mixture's residuals of a block may take: 8 MiB of float32."""

Weighted = list[tuple[nn.Module, float]]
"""Log ratios and their weights."""


class ValueAndGrad:
    r""":math:`\log p_0(u) + \sum_k w_k f_k(u)` and its gradient, ``(n, d) -> (n,), (n, d)``.

    A mixture that several ratios read features of is evaluated once for all of them, and once with the base where it is
    the base. Its derivatives are closed forms; those of the networks are automatic.
    """

    def __init__(self, base: Base, ratios: Sequence[nn.Module], weights: Sequence[float]) -> None:
        self.base = base
        self.plain: Weighted = []
        self.reading: dict[int, tuple[MixtureFeatures, Weighted]] = {}
        for ratio, weight in zip(ratios, weights, strict=True):
            features = ratio.features if isinstance(ratio, BoundedRatio) else None
            if features is None:
                self.plain.append((ratio, weight))
            else:
                self.reading.setdefault(id(features.mixture), (features, []))[1].append((ratio, weight))
        self.base_is_read = id(base) in self.reading

    @torch.no_grad()
    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate at rows ``(n, d)``, in nats; what is returned is not differentiable."""
        values, grads = [], []
        for x in u.detach().split(self._rows()):
            value, grad = (x.new_zeros(len(x)), torch.zeros_like(x)) if self.base_is_read else self._base(x)
            if self.plain:
                value, (grad,) = _added(value, (grad,), _by_autograd(self.plain, (x,)))
            for features, ratios in self.reading.values():
                value, grad = self._with_features(features, ratios, x, value, grad)
            values.append(value)
            grads.append(grad)
        return torch.cat(values), torch.cat(grads)

    def _rows(self) -> int:
        sizes = [features.mixture.projection.shape[1] for features, _ in self.reading.values()]
        return min(MOST_ROWS, max(LEAST_ROWS, MOST_RESIDUALS // max(sizes, default=1)))

    def _base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.log_prob_and_grad(x)

    def _with_features(
        self, features: MixtureFeatures, ratios: Weighted, x: Tensor, value: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the ratios that read one mixture, and the mixture itself where it is the base."""
        mixture: MixtureBase = features.mixture
        residuals, all_terms = mixture.project(x)
        terms = features.terms_read(all_terms)
        read = features.of_terms(terms, x.shape[1])
        slope = torch.zeros_like(read)
        value, (grad, slope) = _added(value, (grad, slope), _by_autograd(ratios, (x, read)))
        by_term = features.pull_back(read, slope, terms, x.shape[1])
        if mixture.members > 1:
            by_term = torch.cat([by_term, by_term.new_zeros(len(x), mixture.n_components - by_term.shape[1])], 1)
        if mixture is self.base:
            level, shares = responsibilities(all_terms)
            value, by_term = value + level, by_term + shares
        return value, grad + mixture.pull_back(x, residuals, by_term)


def _added(
    value: Tensor, grads: tuple[Tensor, ...], more: tuple[Tensor, tuple[Tensor, ...]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return value + more[0], tuple(total + term for total, term in zip(grads, more[1], strict=True))


def _by_autograd(ratios: Weighted, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Sum of weighted log ratios ``(n,)``, and its gradients in every input."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = tuple(x.detach().clone().requires_grad_(True) for x in inputs)
        value = sum((weight * ratio(*inputs) for ratio, weight in ratios), inputs[0].new_zeros(()))
        if not value.requires_grad:
            # A tilt of steps, an indicator say, has no gradient: Metropolis corrects moves that know nothing of it.
            return value, tuple(torch.zeros_like(x) for x in inputs)
        grads = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    found = (torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True))
    return value.detach(), tuple(found)
