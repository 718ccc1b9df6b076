"""Properties of images read off their latents, and the log potentials that tilt a prior by them.

A tilt meets its potential thousands of times a second; decoding every particle would take minutes. So brightness and
class are read off the standardised latent u by small regressions on u and its products, whose accuracy is shown.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ..density.ladder import carried
from ..density.prior import LatentPrior
from ..density.sampling.resampling import LogMean
from ..errors import LatentPriorError
from ..runtime.seeding import derived_generator

__all__ = ["Brightness", "Classes", "Tilted", "Towards", "fit_brightness", "fit_classes", "tilted_draws"]

PAIRS_UP_TO = 32
ISLANDS, MOVES = 16, 6
LEVELS, SECONDS = 40, 60.0
LIMIT = 3.0


def features(u: Tensor) -> Tensor:
    """1, u and its products (squares alone past 32 dimensions), ``(n, d) -> (n, m)``."""
    d = u.shape[1]
    if d <= PAIRS_UP_TO:
        i, j = torch.triu_indices(d, d, device=u.device)
        products = u[:, i] * u[:, j]
    else:
        products = u.square()
    return torch.cat([torch.ones_like(u[:, :1]), u, products], 1)


class Towards(nn.Module):
    r"""The log potential :math:`-\tfrac{s}{2} \|u - u_0\|^2`: a Gaussian around one latent."""

    def __init__(self, centre: Tensor, strength: float) -> None:
        super().__init__()
        self.centre, self.strength = centre, strength

    def forward(self, u: Tensor) -> Tensor:
        """``(n, d) -> (n,)``."""
        return -0.5 * self.strength * (u - self.centre).square().sum(1)


class Brightness(nn.Module):
    r"""The log potential :math:`3 s \tanh(\hat b(u) / 3)`, :math:`\hat b` the brightness in standard deviations.

    The bound keeps the tilted density integrable: :math:`\hat b` is quadratic. ``r_squared`` is its share of the
    variance of brightness on draws that did not fit it.
    """

    def __init__(self, weights: Tensor, r_squared: float, strength: float = 0.0) -> None:
        super().__init__()
        self.weights, self.r_squared, self.strength = weights, r_squared, strength

    def at(self, strength: float) -> Brightness:
        """The same property at another strength."""
        return Brightness(self.weights, self.r_squared, strength)

    def forward(self, u: Tensor) -> Tensor:
        """``(n, d) -> (n,)``."""
        return self.strength * LIMIT * torch.tanh(features(u) @ self.weights / LIMIT)


class Classes(nn.Module):
    r"""The log potential :math:`s \log p(c \mid u)` of a softmax regression on the features of u.

    ``accuracy`` is that on a fifth of the labelled latents that did not fit it.
    """

    def __init__(self, weights: Tensor, names: list[int], accuracy: float, which: int = 0, strength: float = 0.0):
        super().__init__()
        self.weights, self.names, self.accuracy = weights, names, accuracy
        self.which, self.strength = which, strength

    def at(self, which: int, strength: float) -> Classes:
        """The same regression, tilting towards the class of one name."""
        return Classes(self.weights, self.names, self.accuracy, self.names.index(which), strength)

    def log_probability(self, u: Tensor) -> Tensor:
        """Log probability of the class, ``(n, d) -> (n,)``."""
        return torch.log_softmax(features(u) @ self.weights, 1)[:, self.which]

    def forward(self, u: Tensor) -> Tensor:
        """``(n, d) -> (n,)``."""
        return self.strength * self.log_probability(u)


class Tilted(NamedTuple):
    """Draws ``(n, d)`` of a tilted prior in standardised coordinates, and the log normaliser of the tilt in nats."""

    u: Tensor
    log_normalizer: LogMean


def fit_brightness(u: Tensor, brightness: Tensor) -> Brightness:
    """Ridge regression of standardised brightness ``(n,)`` on the features of ``u`` ``(n, d)``, by three quarters."""
    x, y = features(u.double()), brightness.to(u.device).double()
    y = (y - y.mean()) / y.std().clamp_min(1e-12)
    n = 3 * len(u) // 4
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(x[:n].T @ x[:n] + 1e-2 * n * eye, x[:n].T @ y[:n])
    missed = (x[n:] @ weights - y[n:]).square().mean() / y[n:].var(unbiased=False).clamp_min(1e-12)
    return Brightness(weights.to(u), 1 - float(missed))


def fit_classes(u: Tensor, labels: Tensor, seed: int = 0) -> Classes | None:
    """Softmax regression of ``labels`` ``(n,)`` on ``u`` ``(n, d)`` by four fifths; None for one class or too many."""
    names = sorted(set(labels.tolist()))
    if not 2 <= len(names) <= 100 or len(u) < 10 * len(names):
        return None
    order = torch.randperm(len(u), generator=derived_generator(torch.device("cpu"), seed, "explorer", "classes"))
    x = features(u.double()).cpu().numpy()[order]
    y = labels.numpy()[order]
    n = 4 * len(u) // 5
    if len(set(y[:n].tolist())) < len(names):
        return None
    found = LogisticRegression(C=0.1, max_iter=1000, fit_intercept=False).fit(x[:n], y[:n])
    rows = torch.from_numpy(found.coef_)
    # Of two classes scikit-learn keeps the second's weights alone.
    weights = torch.cat([torch.zeros_like(rows), rows]) if len(names) == 2 else rows
    return Classes(weights.T.to(u), names, float(found.score(x[n:], y[n:])))


def tilted_draws(prior: LatentPrior, start: Tensor, g: nn.Module, n: int, generator: torch.Generator) -> Tilted:
    r"""``n`` draws of :math:`p(u)\, e^{g(u)} / Z_g` from draws ``start`` ``(m, d)`` of the prior.

    What :meth:`LatentPrior.tilt` does, from draws that are known already, and kept: sequential Monte Carlo from the
    ladder's top to one stage above it. m must divide by 16. Raises :class:`LatentPriorError` where that takes more
    than 40 levels or 60 s, as towards a latent that the prior does not know.
    """
    late = time.monotonic() + SECONDS

    def on_level(levels: int) -> None:
        if time.monotonic() > late:
            raise LatentPriorError(f"this tilt took more than {SECONDS:g} s: use less strength")
        if levels >= LEVELS:
            raise LatentPriorError("this tilt leads too far from where the prior has mass: use less strength")

    position, passed = carried(
        prior.ladder, g, start, islands=ISLANDS, moves=MOVES, generator=generator, on_level=on_level
    )
    picked = torch.randperm(len(start), generator=generator, device=generator.device)[:n]
    return Tilted(position[picked.to(start.device)], passed.constant)
