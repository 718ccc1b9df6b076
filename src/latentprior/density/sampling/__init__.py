"""Samplers, one algorithm a file: each takes a log density (value and gradient), never a prior."""

from collections.abc import Callable

from torch import Tensor

__all__ = ["LogDensity"]

LogDensity = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps rows ``(n, d)`` to log densities ``(n,)``, up to a constant, and their gradients ``(n, d)``."""
