"""Properties of images that are read off their latents, and the log potentials that tilt a prior by them.

A tilt evaluates its potential thousands of times a second; decoding every particle would take minutes. Brightness and
class are therefore read off the standardised latent u by small regressions on u and its products. Their accuracy is
shown.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..density.ladder import carried
from ..density.prior import LatentPrior
from ..density.sampling.resampling import LogMean
from ..errors import LatentPriorError, MissingExtraError
from ..runtime.seeding import derived_generator

__all__ = ["Brightness", "Classes", "Tilted", "Towards", "fit_brightness", "fit_classes", "tilted_draws"]

# These values give answers within seconds; they were not measured against others.
MAX_DIM_OF_PAIRS = 32
"""The largest dimension in which all products of two coordinates are features: 561 of them."""
ISLANDS = 16
"""Independent populations of particles, which give the error of the normaliser."""
MOVES_PER_LEVEL = 6
MAX_LEVELS = 40
MAX_SECONDS = 60.0
BRIGHTNESS_BOUND = 3.0
"""Where the potential of brightness levels off, in standard deviations of brightness."""
RIDGE = 1e-2
"""The penalty of the regression on brightness, for each row."""
CLASSES_RANGE = (2, 100)
"""The fewest and the most classes that are told apart."""
ROWS_PER_CLASS = 10
"""The rows that a class needs on average."""


class Towards(nn.Module):
    r"""The log potential :math:`-\tfrac{s}{2} \|u - u_0\|^2`, a Gaussian around one latent ``(1, d)``."""

    def __init__(self, centre: Tensor, strength: float) -> None:
        super().__init__()
        self.centre, self.strength = centre, strength

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, d)`` to ``(n,)``."""
        return -0.5 * self.strength * (u - self.centre).square().sum(1)


class Brightness(nn.Module):
    r"""The log potential :math:`3 s \tanh(\hat b(u) / 3)`, :math:`\hat b` the brightness in standard deviations.

    The bound keeps the tilted density integrable, since :math:`\hat b` is quadratic. ``weights`` are those of the
    features of u, ``(m,)``; ``r_squared`` is the share of the variance of brightness that the regression explains on
    draws that did not fit it.
    """

    def __init__(self, weights: Tensor, r_squared: float, strength: float = 0.0) -> None:
        super().__init__()
        self.weights, self.r_squared, self.strength = weights, r_squared, strength

    def at(self, strength: float) -> Brightness:
        """Return the same property at another strength."""
        return Brightness(self.weights, self.r_squared, strength)

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, d)`` to ``(n,)``."""
        return self.strength * BRIGHTNESS_BOUND * torch.tanh(_features(u) @ self.weights / BRIGHTNESS_BOUND)


class Classes(nn.Module):
    r"""The log potential :math:`s \log p(c \mid u)` of a softmax regression on the features of u.

    ``weights`` are those of the features for each class, ``(m, k)``; ``names`` are the labels of the classes, in order,
    and c is at the place ``which`` among them. ``accuracy`` is the share of right answers on a fifth of the latents,
    which did not fit the regression.
    """

    def __init__(self, weights: Tensor, names: list[int], accuracy: float, which: int = 0, strength: float = 0.0):
        super().__init__()
        self.weights, self.names, self.accuracy = weights, names, accuracy
        self.which, self.strength = which, strength

    def at(self, name: int, strength: float) -> Classes:
        """Return the same regression, tilting towards the class of another name."""
        return Classes(self.weights, self.names, self.accuracy, self.names.index(name), strength)

    def log_probability(self, u: Tensor) -> Tensor:
        """Return the log probability of the class, ``(n, d) -> (n,)``."""
        return torch.log_softmax(_features(u) @ self.weights, 1)[:, self.which]

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, d)`` to ``(n,)``."""
        return self.strength * self.log_probability(u)


class Tilted(NamedTuple):
    """Draws ``(n, d)`` of a tilted prior in standardised coordinates, and the log normaliser of the tilt in nats."""

    u: Tensor
    log_normalizer: LogMean


def fit_brightness(u: Tensor, brightness: Tensor) -> Brightness:
    """Fit a ridge regression of brightness ``(n,)`` on latents by three quarters of the rows; the rest measure it."""
    x, y = _features(u.double()), brightness.to(u.device).double()
    y = (y - y.mean()) / y.std().clamp_min(1e-12)
    n = 3 * len(u) // 4
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(x[:n].T @ x[:n] + RIDGE * n * eye, x[:n].T @ y[:n])
    unexplained = (x[n:] @ weights - y[n:]).square().mean() / y[n:].var(unbiased=False).clamp_min(1e-12)
    return Brightness(weights.to(u), 1 - float(unexplained))


def fit_classes(u: Tensor, labels: Tensor, seed: int = 0) -> Classes | None:
    """Fit a softmax regression of labels ``(n,)`` on latents by four fifths of the rows, chosen by the seed.

    Returns None for a single class, or for too many classes for the rows.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtraError("tilting towards a class", "explore") from None
    names = sorted(set(labels.tolist()))
    if not CLASSES_RANGE[0] <= len(names) <= CLASSES_RANGE[1] or len(u) < ROWS_PER_CLASS * len(names):
        return None
    order = torch.randperm(len(u), generator=derived_generator(torch.device("cpu"), seed, "explorer", "classes"))
    x = _features(u.double()).cpu().numpy()[order]
    y = labels.numpy()[order]
    n = 4 * len(u) // 5
    if len(set(y[:n].tolist())) < len(names):
        return None
    regression = LogisticRegression(C=0.1, max_iter=1000, fit_intercept=False).fit(x[:n], y[:n])
    rows = torch.from_numpy(regression.coef_)
    # For two classes scikit-learn keeps the weights of the second alone.
    weights = torch.cat([torch.zeros_like(rows), rows]) if len(names) == 2 else rows
    return Classes(weights.T.to(u), names, float(regression.score(x[n:], y[n:])))


def tilted_draws(prior: LatentPrior, start: Tensor, g: nn.Module, n: int, generator: torch.Generator) -> Tilted:
    r"""Draw from the tilted prior :math:`p(u)\, e^{g(u)} / Z_g`.

    It does what :meth:`LatentPrior.tilt` does, but begins at draws ``(m, d)`` of the prior that are there already; 16
    divides m, and n is at most m. Raises :class:`LatentPriorError` where it takes more than 40 levels or 60 s, as
    towards a latent that the prior does not know.
    """
    latest = time.monotonic() + MAX_SECONDS

    def check_limits(levels: int) -> None:
        if time.monotonic() > latest:
            raise LatentPriorError(f"this tilt took more than {MAX_SECONDS:g} s: use less strength")
        if levels >= MAX_LEVELS:
            raise LatentPriorError("this tilt leads too far from where the prior has mass: use less strength")

    position, passed = carried(
        prior.ladder, g, start, islands=ISLANDS, moves=MOVES_PER_LEVEL, generator=generator, on_level=check_limits
    )
    rows = torch.randperm(len(start), generator=generator, device=generator.device)[:n]
    return Tilted(position[rows.to(start.device)], passed.constant)


def _features(u: Tensor) -> Tensor:
    """Return 1, u and its products (beyond 32 dimensions its squares alone), ``(n, d) -> (n, m)``."""
    d = u.shape[1]
    if d <= MAX_DIM_OF_PAIRS:
        i, j = torch.triu_indices(d, d, device=u.device)
        products = u[:, i] * u[:, j]
    else:
        products = u.square()
    return torch.cat([torch.ones_like(u[:, :1]), u, products], 1)
