"""Value and gradient of a base and weighted log ratios: one pass forward, one backward, both by hand and in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bases import Base, MixtureBase
from .bases.mixture_base import responsibilities
from .ratio_networks import MLP, Quadratic, ResidualMLP
from .ratios import BoundedRatio, MixtureFeatures

__all__ = ["ValueAndGrad"]

ROWS = 1024
"""Rows of a block. Fewer leave matrix products slower, more leave what lies between them outside a core's cache."""
RESIDUALS = 1 << 21
"""Most numbers that a mixture's residuals of a block may take: 8 MiB."""
AUTOGRAD_ROWS = 2048
"""Rows of a block of what only automatic differentiation knows."""


class ValueAndGrad:
    r""":math:`\log p_0(u) + \sum_k w_k f_k(u)` and its gradient, ``(n, d) -> (n,), (n, d)``.

    Of :class:`Quadratic` ratios one matrix product gives both. For :class:`ResidualMLP` and :class:`MLP` ratios
    :math:`\mathrm{silu}(x) = x\,\sigma(x)` and its derivative
    :math:`\sigma + \mathrm{silu}\,(1 - \sigma)` come from one sigmoid on the way forward, and all of a block is
    written into the same buffers. A mixture that is both the base and read by the ratios is evaluated once. Other
    ratios and bases are differentiated automatically.
    """

    def __init__(self, base: Base, ratios: Sequence[nn.Module], weights: Sequence[float]) -> None:
        self.base = base
        self.known: dict[int, tuple[MixtureFeatures | None, list[tuple[BoundedRatio, float]]]] = {}
        self.others: list[tuple[nn.Module, float]] = []
        for ratio, weight in zip(ratios, weights, strict=True):
            if type(ratio) is BoundedRatio and type(ratio.network) in (ResidualMLP, MLP, Quadratic):
                key = 0 if ratio.features is None else id(ratio.features.mixture)
                self.known.setdefault(key, (ratio.features, []))[1].append((ratio, weight))
            else:
                self.others.append((ratio, weight))
        self.base_is_read = id(base) in self.known

    @torch.no_grad()
    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate at rows ``(n, d)``, in nats; what is returned is not differentiable."""
        u = u.detach()
        value, grad = u.new_zeros(len(u)), torch.zeros_like(u, memory_format=torch.contiguous_format)
        for x, f, slope in zip(*(t.split(AUTOGRAD_ROWS) for t in (u, value, grad)), strict=True):
            if not self.base_is_read:
                _add((f, slope), self.base.log_prob_and_grad(x))
            if self.others:
                _add((f, slope), _by_autograd(self.others, x))
        scratch = _Scratch(u)
        for features, ratios in self.known.values():
            rows = ROWS
            if features is not None:
                rows = min(rows, max(128, RESIDUALS // features.mixture.projection.shape[1]))
            for x, f, slope in zip(*(t.split(rows) for t in (u, value, grad)), strict=True):
                if features is None:
                    for ratio, weight in ratios:
                        _forward_and_back(ratio, weight, x, None, f, slope, None, scratch)
                else:
                    self._with_features(features, ratios, x, f, slope, scratch)
        return value, grad

    def _with_features(
        self,
        features: MixtureFeatures,
        ratios: list[tuple[BoundedRatio, float]],
        x: Tensor,
        value: Tensor,
        grad: Tensor,
        scratch: _Scratch,
    ) -> None:
        mixture: MixtureBase = features.mixture
        residuals, all_terms = mixture.project(x)
        terms = features.terms_read(all_terms)
        read = features.of_terms(terms, x.shape[1])
        slope = torch.zeros_like(read)
        for ratio, weight in ratios:
            _forward_and_back(ratio, weight, x, read, value, grad, slope, scratch)
        by_term = features.pull_back(read, slope, terms, x.shape[1])
        if mixture.members > 1:
            by_term = torch.cat([by_term, by_term.new_zeros(len(x), mixture.n_components - by_term.shape[1])], 1)
        if mixture is self.base:
            level, shares = responsibilities(all_terms)
            value += level
            by_term += shares
        grad += mixture.pull_back(x, residuals, by_term)


def _add(to: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor]) -> None:
    for total, term in zip(to, more, strict=True):
        total += term


def _by_autograd(ratios: list[tuple[nn.Module, float]], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        value = sum((weight * ratio(x) for ratio, weight in ratios), x.new_zeros(()))
        # A tilt of steps, an indicator say, has no gradient: Metropolis corrects for what the moves then do not know.
        inclined = torch.autograd.grad(value.sum(), x, allow_unused=True) if value.requires_grad else (None,)
    return value.detach(), torch.zeros_like(x) if inclined[0] is None else inclined[0]


class _Scratch:
    """Buffers that all blocks and stages of a call share."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.flat: dict[str | int, Tensor] = {}
        self.one = like.new_ones(())

    def __call__(self, name: str | int, rows: int, width: int) -> Tensor:
        if name not in self.flat or len(self.flat[name]) < rows * width:
            self.flat[name] = self.like.new_empty(rows * width)
        return self.flat[name][: rows * width].view(rows, width)

    def silu(self, x: Tensor, layer: int, out: Tensor) -> Tensor:
        """Write silu(x) to ``out`` and its derivative to the buffer of ``layer``."""
        slope = torch.sigmoid(x, out=self(layer, *x.shape))
        torch.mul(x, slope, out=out)
        torch.lerp(slope, self.one, out, out=slope)
        return out


def _forward_and_back(
    ratio: BoundedRatio,
    weight: float,
    x: Tensor,
    features: Tensor | None,
    value: Tensor,
    grad: Tensor,
    feature_grad: Tensor | None,
    scratch: _Scratch,
) -> None:
    """Add a stage's weighted log ratio and its slopes to ``value``, ``grad`` and ``feature_grad``."""
    network = ratio.network
    if isinstance(network, Quadratic):
        _quadratic(ratio, network, weight, x, features, value, grad, feature_grad, scratch)
        return
    assert isinstance(network, ResidualMLP | MLP)
    first, beside = network.first, network.beside
    n, width = len(x), first.out_features
    h, t, a, g = (scratch(name, n, width) for name in "htag")
    torch.addmm(first.bias, x, first.weight.t(), out=h)
    if beside is not None:
        assert features is not None
        h.addmm_(features, beside.weight.t()).add_(beside.bias)
    if isinstance(network, ResidualMLP):
        last, blocks = network.last, network.pairs()
        for i, (inner, outer) in enumerate(blocks):
            scratch.silu(h, 2 * i, a)
            torch.addmm(inner.bias, a, inner.weight.t(), out=t)
            scratch.silu(t, 2 * i + 1, a)
            h.addmm_(a, outer.weight.t()).add_(outer.bias)
        end = 2 * len(blocks)
    else:
        *hidden, last = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(hidden):
            scratch.silu(h, i, a)
            torch.addmm(layer.bias, a, layer.weight.t(), out=h)
        end = len(hidden)
    scratch.silu(h, end, a)
    bounded = torch.tanh((torch.mv(a, last.weight[0]) + last.bias) / ratio.bound)
    value.add_(bounded, alpha=weight * ratio.bound)
    torch.mul(scratch(end, n, width), last.weight[0], out=g)
    if isinstance(network, ResidualMLP):
        for i, (inner, outer) in reversed(list(enumerate(blocks))):
            torch.mm(g, outer.weight, out=t).mul_(scratch(2 * i + 1, n, width))
            g.addcmul_(torch.mm(t, inner.weight, out=a), scratch(2 * i, n, width))
    else:
        for i, layer in reversed(list(enumerate(hidden))):
            torch.mm(g, layer.weight, out=t).mul_(scratch(i, n, width))
            g, t = t, g
    # Each row's gradient is proportional to the slope of its tanh: the narrowest tensors take it in.
    scale = (weight * (1 - bounded.square()))[:, None]
    grad.addcmul_(g @ first.weight, scale)
    if beside is not None and feature_grad is not None:
        feature_grad.addcmul_(g @ beside.weight, scale)


def _quadratic(
    ratio: BoundedRatio,
    network: Quadratic,
    weight: float,
    x: Tensor,
    features: Tensor | None,
    value: Tensor,
    grad: Tensor,
    feature_grad: Tensor | None,
    scratch: _Scratch,
) -> None:
    r"""The same for a quadratic form: :math:`W + W^\top` gives both the value and the slope."""
    slope = torch.mm(x, network.symmetric(), out=scratch("h", *x.shape))
    slope.add_(network.form.bias, alpha=2)
    h = (0.5 * slope * x).sum(1) + network.offset
    slope.sub_(network.form.bias)
    if network.beside is not None:
        assert features is not None
        h += network.beside(features).squeeze(1)
    bounded = torch.tanh(h / ratio.bound)
    value.add_(bounded, alpha=weight * ratio.bound)
    scale = (weight * (1 - bounded.square()))[:, None]
    grad.addcmul_(slope, scale)
    if network.beside is not None and feature_grad is not None:
        feature_grad.addcmul_(network.beside.weight, scale)
