"""A density estimator for scikit-learn: the ladder behind fit, score_samples and sample."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from ..density.prior import LatentPrior
from ..fitting.settings import StageSettings
from ..runtime.progress import Progress
from .tables import TableDensity, seed_from

__all__ = ["LatentDensity"]

Array = NDArray[np.float64]

FEWEST_ROWS = 200


class LatentDensity(DensityMixin, BaseEstimator):  # type: ignore[misc]
    r"""Density estimation by a ladder of density ratios, :math:`\log p(x) = \log p_0(x) + \sum_k (f_k(x) - c_k)`.

    :func:`latentprior.fit` as a scikit-learn estimator: it can be cloned, searched over and put at the end of a
    pipeline. Columns are standardised inside; log densities are in nats, normalised, in float64, and in X's own
    coordinates. A column that does not vary is scored as a narrow normal about its value.

    On fewer than 200 rows the base alone is fitted: a stage's rise over it could not be told from noise on the few
    rows that can be held out.

    Arguments
    ---------
    base : ``"gmm"`` (components chosen on held-out rows), ``"gmm:K"``, ``"gmm-lowrank"``, ``"normal"``, ``"copula"``
        or ``"flow"``.
    max_stages : most stages above the base; the ladder ends sooner where held-out rows no longer gain.
    whitening : ``"full"``, ``"diagonal"``, ``"none"``, or None for the base's own.
    validation : share of distinct rows held out; copies of a row stay together.
    width, depth, bound, steps, batch_size, learning_rate : how a stage is learned, see
        :class:`~latentprior.StageSettings`.
    time_budget : seconds a fit may take, or None. With a budget, results depend on the machine.
    random_state : int, ``RandomState``, or None for a fit that differs every time.
    device : where to learn and score, ``"cpu"`` by default.
    verbose : draw progress bars while fitting, on a terminal or in a notebook.

    Attributes
    ----------
    prior_ : :class:`~latentprior.LatentPrior` over the columns that vary, in their own coordinates.
    n_features_in_, feature_names_in_ : as everywhere in scikit-learn.
    """

    def __init__(
        self,
        base: str = "gmm",
        max_stages: int = 20,
        whitening: Literal["full", "diagonal", "none"] | None = None,
        validation: float = 0.1,
        width: int = 256,
        depth: int = 2,
        bound: float = 5.0,
        steps: int = 2000,
        batch_size: int = 1024,
        learning_rate: float = 3e-3,
        time_budget: float | None = None,
        random_state: Any = None,
        device: str | None = None,
        verbose: bool = False,
    ) -> None:
        self.base = base
        self.max_stages = max_stages
        self.whitening = whitening
        self.validation = validation
        self.width = width
        self.depth = depth
        self.bound = bound
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.time_budget = time_budget
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    @property
    def prior_(self) -> LatentPrior:
        """The fitted prior over the columns that vary; raises ``AttributeError`` before :meth:`fit`."""
        return self._density.prior

    def fit(self, X: Any, y: Any = None) -> LatentDensity:
        """Learn the density of the rows of ``X`` ``(n, d)``, n at least 2; ``y`` is ignored.

        Raises ``ValueError`` for input that scikit-learn refuses, and its subclass
        :class:`~latentprior.InvalidLatentsError` where all rows are equal.
        """
        x = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        settings = StageSettings(
            width=self.width,
            depth=self.depth,
            bound=self.bound,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )
        with Progress() as progress:
            self._density = TableDensity.fit(
                x,
                seed=seed_from(self.random_state),
                validation=self.validation,
                base=self.base,
                max_stages=self.max_stages if len(x) >= FEWEST_ROWS else 0,
                whitening=self.whitening,
                settings=settings,
                time_budget=self.time_budget,
                device=self.device,
                callbacks=(progress,) if self.verbose else (),
            )
        return self

    def score_samples(self, X: Any) -> Array:
        """Log density of every row in nats, ``(n, d) -> (n,)``."""
        check_is_fitted(self)
        return self._density.log_prob(validate_data(self, X, dtype=np.float64, reset=False))

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log density of the rows in nats, as ``GaussianMixture.score``; ``KernelDensity.score`` is the sum."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Array:
        """Draw ``(n_samples, d)`` rows; ``random_state`` as in the constructor, None for new rows every time.

        Raises ``ValueError`` for fewer than one row.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(f"n_samples must be 1 or more, got {n_samples}")
        return self._density.sample(n_samples, seed_from(random_state))

    def __sklearn_is_fitted__(self) -> bool:
        """Whether :meth:`fit` has run."""
        return hasattr(self, "_density")
