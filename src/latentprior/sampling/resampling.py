"""Weighted populations: effective sample size, log means with error bars, systematic resampling."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LogMean", "combine_islands", "effective_sample_size", "log_mean_exp", "systematic"]


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
