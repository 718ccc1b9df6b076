"""The invertible affine map between the user's coordinates and the standardised ones that the ladder lives in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import InvalidLatentsError

__all__ = ["Whitening", "identity_whitening"]

Kind = Literal["full", "diagonal", "none"]


class Whitening(nn.Module):
    r"""Affine standardisation of flattened latents, :math:`u = W (z - \mu)`.

    ``full`` is the symmetric (ZCA) map :math:`W = \Sigma_\rho^{-1/2}` of the shrunk covariance: of all whitening
    maps it moves coordinates least, so that spatial latents stay spatial. The correlation matrix :math:`R` is
    shrunk towards the identity, :math:`R_\rho = (1 - \rho) R + \rho I`, with the oracle approximating
    intensity of Chen, Wiesel, Eldar and Hero (2010, eq. 23); scales are never shrunk, so that a change of units of
    any coordinate changes nothing but the log-determinant. ``diagonal`` divides by standard deviations only,
    ``none`` is the identity.

    Shapes: ``z`` and ``u`` are ``(n, d)``. :attr:`log_abs_det` is :math:`\log|\det W|` in nats, so that
    :math:`\log p(z) = \log p(u) + \log|\det W|`.
    """

    loc: Tensor
    matrix: Tensor
    inverse: Tensor
    log_abs_det: Tensor

    def __init__(self, loc: Tensor, matrix: Tensor, inverse: Tensor, log_abs_det: Tensor, kind: Kind) -> None:
        super().__init__()
        self.kind: Kind = kind
        for name, value in (("loc", loc), ("matrix", matrix), ("inverse", inverse), ("log_abs_det", log_abs_det)):
            self.register_buffer(name, value)

    @classmethod
    def fit(cls, blocks: Iterable[Tensor], kind: Kind = "full") -> Whitening:
        """Fit from blocks of rows ``(m, d)``, read once and never held together.

        Raises :class:`InvalidLatentsError` for fewer than two rows, non-finite numbers or a constant coordinate.
        """
        n, mean, scatter = 0, torch.zeros(0), torch.zeros(0)
        for block in blocks:
            x = block.double()
            m = len(x)
            if m == 0:
                continue
            centre = x.mean(0)
            centred = x - centre
            cross = centred.T @ centred
            if n == 0:
                n, mean, scatter = m, centre, cross
                continue
            shift = centre - mean
            scatter = scatter + cross + torch.outer(shift, shift) * (n * m / (n + m))
            mean = mean + shift * (m / (n + m))
            n += m
        if n < 2:
            raise InvalidLatentsError(f"need at least 2 rows to standardise latents, got {n}")
        if not torch.isfinite(scatter).all():
            raise InvalidLatentsError("latents overflow: rescale them, or remove NaN and infinite values")
        return cls._from_moments(n, mean, scatter / n, kind)

    @classmethod
    def _from_moments(cls, n: int, mean: Tensor, covariance: Tensor, kind: Kind) -> Whitening:
        d = len(mean)
        eye = torch.eye(d, dtype=torch.float64, device=mean.device)
        if kind == "none":
            return cls(torch.zeros_like(mean), eye, eye.clone(), mean.new_zeros(()), kind)
        scale = covariance.diagonal().clamp_min(0).sqrt()
        floor = 1e-10 * mean.abs() + torch.finfo(torch.float64).tiny
        constant = (scale <= floor).nonzero().flatten().tolist()
        if constant:
            shown = ", ".join(map(str, constant[:5])) + (", ..." if len(constant) > 5 else "")
            raise InvalidLatentsError(
                f"constant latent coordinate(s) {shown} have no density: drop them before fitting"
            )
        if kind == "diagonal":
            return cls(mean, torch.diag(1 / scale), torch.diag(scale), -scale.log().sum(), kind)
        correlation = covariance / torch.outer(scale, scale)
        rho = _oas_intensity(correlation, n)
        values, vectors = torch.linalg.eigh((1 - rho) * correlation + rho * eye)
        values = values.clamp_min(1e-8)
        root = (vectors * values.rsqrt()) @ vectors.T
        inverse_root = (vectors * values.sqrt()) @ vectors.T
        log_abs_det = -0.5 * values.log().sum() - scale.log().sum()
        return cls(mean, root / scale, inverse_root * scale[:, None], log_abs_det, kind)

    def whiten(self, z: Tensor) -> Tensor:
        """Map the user's flat coordinates ``(n, d)`` to standardised ones."""
        return (z - self.loc) @ self.matrix.T

    def unwhiten(self, u: Tensor) -> Tensor:
        """Map standardised coordinates ``(n, d)`` back to the user's flat ones."""
        return u @ self.inverse.T + self.loc

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], kind: Kind) -> Whitening:
        """Rebuild from :meth:`torch.nn.Module.state_dict` and the kind's name.

        Raises :class:`ValueError` for an unknown kind, or numbers that are no map of rows.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"unknown whitening {kind!r}")
        loc, matrix, inverse, log_abs_det = (tensors[k] for k in ("loc", "matrix", "inverse", "log_abs_det"))
        d = loc.numel()
        if [loc.shape, matrix.shape, inverse.shape, log_abs_det.shape] != [(d,), (d, d), (d, d), ()] or d < 1:
            raise ValueError("the whitening's shapes differ")
        if not all(v.is_floating_point() and v.isfinite().all() for v in (loc, matrix, inverse, log_abs_det)):
            raise ValueError("the whitening holds infinite numbers, or whole ones")
        return cls(loc, matrix, inverse, log_abs_det, kind)


def _oas_intensity(correlation: Tensor, n: int) -> float:
    """Shrinkage in [0, 1] towards the identity (Chen et al. 2010, eq. 23), for a matrix with unit diagonal."""
    p = len(correlation)
    if p == 1:
        return 0.0
    square = float((correlation**2).sum())
    trace2 = float(p) ** 2
    numerator = (1 - 2 / p) * square + trace2
    denominator = (n + 1 - 2 / p) * (square - trace2 / p)
    return 1.0 if denominator <= 0 else min(1.0, numerator / denominator)


def identity_whitening(dim: int) -> Whitening:
    """Coordinates left as they are."""
    eye = torch.eye(dim)
    return Whitening(torch.zeros(dim), eye, eye.clone(), torch.zeros(()), "none")
