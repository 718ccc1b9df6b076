"""Weighted populations: effective sample size, log means with error bars, systematic resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LogMean",
    "combine_islands",
    "combine_parts",
    "effective_sample_size",
    "log_mean_exp",
    "systematic",
    "tail_shape",
]


class LogMean(NamedTuple):
    """The log of an average of weights, its standard error (delta method), and the share of effective weights."""

    value: float
    stderr: float
    ess: float


def effective_sample_size(log_weights: Tensor) -> float:
    r"""Share in (0, 1] of effective weights, :math:`(\sum w)^2 / (n \sum w^2)` (Kish). Shape ``(n,)``."""
    log_weights = log_weights.double()
    total, square = torch.logsumexp(log_weights, 0), torch.logsumexp(2 * log_weights, 0)
    return float((2 * total - square).exp() / len(log_weights))


def log_mean_exp(log_weights: Tensor) -> LogMean:
    r""":math:`\log \frac1n\sum_i w_i` of independent weights.

    The standard error is :math:`\mathrm{sd}(w) / (\bar w \sqrt n)` (delta method). Shape ``(n,)``; nats.
    """
    log_weights = log_weights.double()
    n = len(log_weights)
    value = torch.logsumexp(log_weights, 0) - math.log(n)
    relative = (log_weights - value).exp()
    stderr = float(relative.std() / math.sqrt(n)) if n > 1 else math.inf
    return LogMean(float(value), stderr, effective_sample_size(log_weights))


def combine_islands(log_estimates: Tensor) -> LogMean:
    """Average independent estimates of one normaliser, ``(islands,)`` logs; the spread gives the standard error."""
    return log_mean_exp(log_estimates)


def combine_parts(parts: Sequence[LogMean], rows: int) -> LogMean:
    r"""What :func:`log_mean_exp` says of all weights, from what it says of parts of ``rows`` weights each.

    With :math:`v_i = \hat Z_i / \hat Z` of part i of m, of n weights: :math:`\sum_i v_i = m`, the squares of all
    weights sum to :math:`n \hat Z^2 \sum_i v_i^2 / \mathrm{ESS}_i`, and from these follow effective share and spread.
    """
    if len(parts) == 1:
        return parts[0]
    m, top = len(parts), max(part.value for part in parts)
    if not math.isfinite(top):
        return LogMean(top, math.nan, math.nan)
    value = top + math.log(sum(math.exp(part.value - top) for part in parts) / m)
    shares = [math.exp(part.value - value) for part in parts]
    # A part without any weight has neither effective share nor spread.
    weighty = [(v, part) for v, part in zip(shares, parts, strict=True) if v > 0]
    squares = sum(v * v / part.ess for v, part in weighty)
    within = sum((rows - 1) * rows * (v * part.stderr) ** 2 for v, part in weighty) if rows > 1 else 0.0
    between = rows * sum((v - 1) ** 2 for v in shares)
    n = m * rows
    return LogMean(value, math.sqrt((within + between) / (n - 1) / n), m / squares)


def tail_shape(log_weights: Tensor) -> float:
    r"""Shape k of the generalised Pareto distribution that the largest of ``(n,)`` weights follow.

    Moments of order 1/k and above are infinite; at k > 0.7 the average of any practical number of weights is low
    nearly always and its standard error with it (Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance
    sampling", JMLR 2024). Estimated on the largest :math:`\min(n/5, 3\sqrt n)` by Zhang and Stephens (Technometrics
    2009), shrunk towards 1/2 by ten weights. NaN for fewer than 25 weights.
    """
    n = len(log_weights)
    tail = min(n // 5, math.ceil(3 * math.sqrt(n)))
    if tail < 5:
        return math.nan
    top = log_weights.double().topk(tail + 1).values.flip(0)
    if not bool(top.isfinite().all()):
        return math.nan
    x = (top[1:] - top[-1]).exp() - (top[0] - top[-1]).exp()
    if not x[0] > 0:
        # Equal weights have no tail.
        x = x[x > 0]
        if len(x) < 5:
            return -math.inf
    tail, tries = len(x), 30 + int(math.sqrt(len(x)))
    grid = torch.arange(1, tries + 1, dtype=x.dtype, device=x.device) - 0.5
    theta = 1 / x[-1] + (1 - (tries / grid).sqrt()) / (3 * x[int(tail / 4 + 0.5) - 1])
    k = torch.log1p(-theta[:, None] * x).mean(1)
    fit = tail * ((-theta / k).log() - k - 1)
    best = (torch.softmax(fit, 0) * theta).sum()
    shape = torch.log1p(-best * x).mean()
    return float((tail * shape + 5) / (tail + 10))


def systematic(log_weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Indices ``(..., n)`` drawn with probability proportional to weights ``(..., m)``, in random order.

    Systematic resampling (Carpenter, Clifford and Fearnhead 1999): one uniform a population, each index drawn
    :math:`\lfloor n w_i\rfloor` or :math:`\lceil n w_i\rceil` times. The result is shuffled, so that any slice
    of it is exchangeable.
    """
    weights = torch.softmax(log_weights.double(), -1)
    cumulative = weights.cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    shape = (*weights.shape[:-1], 1)
    device = torch.device("cpu") if generator is None else generator.device
    offset = torch.rand(shape, generator=generator, device=device, dtype=torch.float64).to(weights.device)
    grid = (torch.arange(n, device=weights.device, dtype=torch.float64) + offset) / n
    index = torch.searchsorted(cumulative, grid).clamp_max(weights.shape[-1] - 1)
    order = torch.rand(index.shape, generator=generator, device=device).to(weights.device).argsort(-1)
    return index.gather(-1, order)
