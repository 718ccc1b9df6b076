"""A density estimator for scikit-learn (extra ``sklearn``): the ladder behind fit, score_samples and sample."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..density.prior import LatentPrior
from ..errors import needs_extra
from ..fitting.settings import StageSettings
from ..runtime.progress import Progress
from .tables import TableDensity, seed_from

with needs_extra("LatentDensity", "sklearn"):
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.utils.validation import check_is_fitted, validate_data

__all__ = ["LatentDensity"]

Array = NDArray[np.float64]

LEAST_ROWS_FOR_STAGES = 200
"""Rows from which stages are learned. Of fewer, less than 20 are held out by default, too few to judge a stage by."""


class LatentDensity(DensityMixin, BaseEstimator):  # type: ignore[misc]
    r"""Density estimation by a ladder of density ratios, :math:`\log p(x) = \log p_0(x) + \sum_k (f_k(x) - c_k)`.

    This is :func:`latentprior.fit` as a scikit-learn estimator: it can be cloned, searched over and put at the end of
    a pipeline. Columns are standardised inside. Log densities are in nats, normalised, in float64, and in X's own
    coordinates. A column that does not vary is scored as a narrow normal about its value. Fewer than 200 rows get the
    base alone: the few of them that can be held out could not tell a stage's gain from noise.

    Parameters
    ----------
    base : str
        ``"gmm"`` (components chosen on held-out rows), ``"gmm:K"``, ``"gmm-lowrank"``, ``"normal"``, ``"copula"`` or
        ``"flow"``.
    max_stages : int
        Most stages above the base; the ladder ends sooner where held-out rows no longer gain.
    whitening : {"full", "diagonal", "none"}, optional
        How rows are standardised before they are learned from; by default the base decides.
    validation : float
        Share of the distinct rows that are held out, between 0 and 1; copies of a row stay together.
    width, depth, bound, steps, batch_size, learning_rate : int or float
        Settings of a stage, see :class:`~latentprior.StageSettings`; ``set_params`` and a grid search reach each.
    time_budget : float, optional
        Seconds that a fit may take. With a budget, results depend on the machine; by default there is none.
    random_state : int, RandomState or Generator, optional
        Seed of the fit; by default every fit is different.
    device : str, optional
        Where to learn and score, by default ``"cpu"``.
    verbose : bool
        Whether progress is shown while fitting, on a terminal or in a notebook.

    Attributes
    ----------
    prior_ : LatentPrior
        The fitted density of the columns that vary, in their own coordinates.
    n_features_in_ : int
        Number of columns of X.
    feature_names_in_ : array of str
        Names of the columns, where X has names.

    Examples
    --------
    >>> from latentprior import LatentDensity
    >>> x = np.random.default_rng(0).standard_normal((150, 2))
    >>> LatentDensity(random_state=0).fit(x).score_samples(x).shape
    (150,)
    """

    def __init__(
        self,
        base: str = "gmm",
        max_stages: int = 20,
        whitening: Literal["full", "diagonal", "none"] | None = None,
        validation: float = 0.1,
        width: int = StageSettings.width,
        depth: int = StageSettings.depth,
        bound: float = StageSettings.bound,
        steps: int = StageSettings.steps,
        batch_size: int = StageSettings.batch_size,
        learning_rate: float = StageSettings.learning_rate,
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
        """Learn the density of rows.

        Parameters
        ----------
        X : array-like
            Finite numbers ``(n, d)``, n at least 2.
        y : None
            Ignored; pipelines pass it.

        Raises
        ------
        ValueError
            For input that scikit-learn refuses, and, as InvalidLatentsError, where all rows are equal.
        """
        x = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        names = ("width", "depth", "bound", "steps", "batch_size", "learning_rate")
        settings = StageSettings(**{name: getattr(self, name) for name in names})
        with Progress() as progress:
            self._density = TableDensity.fit(
                x,
                seed=seed_from(self.random_state),
                validation=self.validation,
                base=self.base,
                max_stages=self.max_stages if len(x) >= LEAST_ROWS_FOR_STAGES else 0,
                whitening=self.whitening,
                settings=settings,
                time_budget=self.time_budget,
                device=self.device,
                callbacks=(progress,) if self.verbose else (),
            )
        return self

    def score_samples(self, X: Any) -> Array:
        """Log density of every row in nats, ``(n,)``.

        Parameters
        ----------
        X : array-like
            Finite numbers ``(n, d)``.
        """
        check_is_fitted(self)
        return self._density.log_prob(validate_data(self, X, dtype=np.float64, reset=False))

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log density of rows in nats, as ``GaussianMixture.score`` has it; ``KernelDensity.score`` is the sum.

        Parameters
        ----------
        X : array-like
            Finite numbers ``(n, d)``.
        y : None
            Ignored; searches pass it.
        """
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Array:
        """Draw rows ``(n_samples, d)`` of the density.

        Parameters
        ----------
        n_samples : int
            Number of rows; fewer than 1 raises ValueError.
        random_state : int, RandomState or Generator, optional
            Seed of the draws; by default they are different every time.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(f"n_samples must be 1 or more, got {n_samples}")
        return self._density.sample(n_samples, seed_from(random_state))

    def __sklearn_is_fitted__(self) -> bool:
        """Whether :meth:`fit` has run."""
        return hasattr(self, "_density")
