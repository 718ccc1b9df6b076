"""Tables as latents: columns of different scales, constant columns, repeated rows, and scikit-learn's seeds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.latents import Latents
from ..density.prior import LatentPrior
from ..density.whitening import Whitening
from ..errors import InvalidLatentsError, LatentPriorError
from ..fitting.fit import fit

__all__ = ["Columns", "TableDensity", "held_out_rows", "seed_from"]

Array = NDArray[np.float64]

LEAST_RELATIVE_SPREAD = 1e-10
"""A column whose standard deviation is below this share of its largest value is constant up to rounding."""
CONSTANT_WIDTH = 1e-3
"""Standard deviation of the normal that scores a constant column, as a share of its value."""
QUANTILES = (0.05, 0.95)
NORMAL_QUANTILE_DISTANCE = 3.29
"""Distance between these two quantiles of a standard normal."""


def seed_from(random_state: Any) -> int:
    """Return a seed: the int itself, one draw of a ``RandomState`` or ``Generator``, or a fresh one for None."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**31 - 1))
    if isinstance(random_state, (int, np.integer)):
        return int(random_state)
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31 - 1))
    raise LatentPriorError(f"random_state must be an int, a RandomState, a Generator or None, got {random_state!r}")


class Columns(NamedTuple):
    """Location and scale of every column, :math:`u_j = (x_j - m_j) / s_j`, and which columns vary at all.

    A column whose standard deviation is below 1e-10 of its largest value is constant: it has no density that could be
    learned. It is scored as a narrow normal about its value, whose standard deviation is a thousandth of that value
    (or of 1, for 0), so the log density of a row that departs from the value is still finite.
    """

    loc: Array
    scale: Array
    varies: NDArray[np.bool_]

    @classmethod
    def fit(cls, x: Array, *, robust: bool = False) -> Columns:
        """Fit to finite numbers ``(n, d)``; raises :class:`InvalidLatentsError` where no column varies.

        By default m and s are mean and standard deviation. ``robust`` takes the median, and the distance between the
        5% and 95% quantiles over 3.29, which outliers cannot inflate while they are less than a twentieth of the rows
        on either side. Where more than 90% of a column are equal, s is the standard deviation all the same.
        """
        size = np.abs(x).max(0)
        # Columns are divided by their size first, since squares of large numbers overflow.
        unit = np.where(size > 0, size, 1.0)
        loc = (x / unit).mean(0) * unit
        scale = ((x - loc) / unit).std(0) * unit
        varies = scale > LEAST_RELATIVE_SPREAD * size
        if not varies.any():
            raise InvalidLatentsError("all rows are equal: no column varies, so there is no density to learn")
        if robust:
            loc, (low, high) = np.median(x, axis=0), np.quantile(x, QUANTILES, axis=0)
            spread = high / NORMAL_QUANTILE_DISTANCE - low / NORMAL_QUANTILE_DISTANCE
            scale = np.where(spread > LEAST_RELATIVE_SPREAD * size, spread, scale)
        constant = np.where(size > 0, size, 1.0) * CONSTANT_WIDTH
        return cls(np.where(varies, loc, x[0]), np.where(varies, scale, constant), varies)

    def standardise(self, x: Array) -> Array:
        """Shift and scale the columns of ``(n, d)``."""
        return (x - self.loc) / self.scale

    def restore(self, u: Array) -> Array:
        """Undo :meth:`standardise`."""
        return u * self.scale + self.loc

    def constant_log_prob(self, u: Array) -> Array:
        """Log density of the constant columns in X's units, ``(n, d)`` standardised to ``(n,)`` nats."""
        is_constant = ~self.varies
        log_scale = np.log(self.scale[is_constant]).sum() + 0.5 * is_constant.sum() * math.log(2 * math.pi)
        return np.asarray(-0.5 * np.square(u[:, is_constant]).sum(1) - log_scale)


def held_out_rows(x: Array, share: float, seed: int) -> NDArray[np.bool_]:
    """Mark about ``share`` of the distinct rows, each with all its copies; at least one row stays on either side.

    If copies of a row were on both sides, a density that learns rows by heart would be rewarded.
    """
    _, group = np.unique(x, axis=0, return_inverse=True)
    group = group.reshape(-1)
    distinct = int(group.max()) + 1
    if distinct < 2:
        raise InvalidLatentsError("all rows are equal: there is no density to learn; give at least two different rows")
    m = max(1, min(distinct - 1, round(share * distinct)))
    chosen = np.zeros(distinct, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(distinct)[:m]] = True
    return np.asarray(chosen[group])


class TableDensity:
    """A prior learned on the columns of a table that vary, times a narrow normal for each that does not.

    ``prior`` scores in float64 and in the units of the varying columns: their scaling is part of its whitening.
    """

    def __init__(self, columns: Columns, prior: LatentPrior) -> None:
        self.columns, self.prior = columns, prior

    @classmethod
    def fit(cls, x: Array, *, seed: int, validation: float = 0.1, **options: Any) -> TableDensity:
        """Learn on ``(n, d)`` rows with :func:`latentprior.fit`, which takes ``options``."""
        if not 0 < validation < 1:
            raise InvalidLatentsError(f"validation must be a share between 0 and 1, got {validation}")
        columns = Columns.fit(x)
        is_held_out = torch.from_numpy(held_out_rows(x, validation, seed))
        u = torch.from_numpy(columns.standardise(x)[:, columns.varies])
        train, held_out = u[~is_held_out], u[is_held_out]
        if len(train) < 2:
            train = u
        prior = fit(Latents(train, name="X"), validation=Latents(held_out, name="X"), seed=seed, **options)
        return cls(columns, _in_units(prior, columns))

    def log_prob(self, x: Array) -> Array:
        """Log density in X's own units, nats, ``(n, d) -> (n,)``."""
        with torch.no_grad():
            value = self.prior.log_prob(torch.from_numpy(np.ascontiguousarray(x[:, self.columns.varies])))
        return value.cpu().numpy() + self.columns.constant_log_prob(self.columns.standardise(x))

    def sample(self, n: int, seed: int) -> Array:
        """Draw ``(n, d)`` rows in X's own units."""
        generator = torch.Generator(self.prior.device).manual_seed(seed)
        u = np.random.default_rng(seed).standard_normal((n, len(self.columns.varies)))
        x = self.columns.restore(u)
        x[:, self.columns.varies] = self.prior.sample((n,), generator=generator).cpu().numpy()
        return x


def _in_units(prior: LatentPrior, columns: Columns) -> LatentPrior:
    """Return the prior in float64 and in the units of the columns, whose scaling becomes part of its whitening."""
    exact = prior.to(dtype=torch.float64)
    inner = exact.whitening
    loc, scale = (torch.from_numpy(v[columns.varies]).to(inner.loc.device) for v in (columns.loc, columns.scale))
    whitening = Whitening(
        loc + scale * inner.loc,
        inner.matrix / scale,
        inner.inverse * scale[:, None],
        inner.log_abs_det - scale.log().sum(),
        inner.kind,
    )
    return LatentPrior(exact.ladder, whitening, exact.event_shape, exact.normalizer, exact.info)
