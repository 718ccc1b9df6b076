"""An outlier detector for PyOD: minus the log density of a ladder, conformal p-values, and what makes a row odd."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.latents import Latents
from ..density.bases import CopulaBase, fit_base
from ..density.ladder import LEAST_EFFECTIVE_SHARE, FreshParticles, Ladder, Pass, Stage, passed_afresh
from ..density.prior import LatentPrior
from ..density.whitening import Whitening
from ..errors import LatentPriorError, needs_extra
from ..fitting.climb import climb
from ..fitting.rows import Target
from ..fitting.run import FitRun
from ..fitting.settings import StageSettings
from ..fitting.stage import LearnedStage, StageLearner
from ..fitting.start import default_whitening
from ..runtime.processes import SingleProcess
from ..runtime.progress import work_bar
from ..runtime.seeding import derived_generator
from .tables import Columns, held_out_rows, seed_from

with needs_extra("RatioDetector", "pyod"):
    from pyod.models.base import BaseDetector
    from sklearn.utils.validation import check_is_fitted, validate_data

__all__ = ["RatioDetector"]

Array = NDArray[np.float64]

HELD_OUT = 0.2
BASE_DRAWS = 4096
NORMALIZER_DRAWS = 1 << 16
TYPICAL_ROWS = 2000


class RatioDetector(BaseDetector):  # type: ignore[misc]
    r"""Outliers as rows of low density under a short ladder, :math:`s(x) = -\log p_0(u) - \min\{f(u), m\}`.

    :math:`f(u) = \sum_k f_k(u)` is what the stages add to the log density of the base, and m its median over the
    training rows: how the columns of a row hang together may condemn it, but cannot pardon it further than the
    typical row. Otherwise a clump of outliers among the training rows, far out under every margin and yet learned by
    heart, would look normal. Outliers are fewer than half of the rows, so the median lies among the values of normal
    rows whatever the outliers are, as no other quantile is sure to (`benchmarks/RESULTS.md` has all of them).

    u are the columns of x, shifted and scaled by quantiles and squashed by arsinh, so that neither units nor single
    wild values rule. The target is a kernel estimate of the rows (``smoothing``); equal rows count once. Scores are in
    nats, higher for odder rows, up to the change of coordinates from x to u. It needs no labels and no clean training
    set, and lengths are counted in steps, never in seconds, so that a seed gives the same scores again.

    Parameters
    ----------
    contamination : float
        Share of outliers in the training rows, in (0, 0.5]: where ``threshold_`` is put, nothing else.
    base : str
        ``"copula"`` (product of marginals), ``"gmm"``, ``"gmm:K"``, ``"gmm-lowrank"``, ``"normal"`` or ``"flow"``.
    max_stages : int
        Most stages above the base; each must raise the held-out log density.
    smoothing : float
        Kernel width around every row, in scales of the columns (a standard deviation where normal).
    width, bound, steps : int or float
        Settings of a stage, see :class:`~latentprior.StageSettings`.
    calibration : float
        Share of the training rows that train nothing and calibrate :meth:`p_value`; 0 for none.
    random_state : int, RandomState or Generator, optional
        Seed of the fit; by default every fit is different.
    verbose : bool
        Whether progress is shown while fitting, on a terminal or in a notebook.

    Attributes
    ----------
    decision_scores_, threshold_, labels_ : array, float, array
        As in every PyOD detector, for all training rows.
    calibration_scores_ : array
        Sorted scores ``(m,)`` of the rows that trained nothing.
    prior_ : LatentPrior
        The density of the squashed columns that vary.
    ceiling_ : float
        m, in nats.
    n_features_in_ : int
        Number of columns.
    """

    def __init__(
        self,
        contamination: Any = 0.1,
        base: str = "copula",
        max_stages: int = 1,
        smoothing: float = 0.2,
        width: int = 64,
        bound: float = 5.0,
        steps: int = 400,
        calibration: float = 0.25,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(contamination=contamination)
        self.base = base
        self.max_stages = max_stages
        self.smoothing = smoothing
        self.width = width
        self.bound = bound
        self.steps = steps
        self.calibration = calibration
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> RatioDetector:
        """Learn the density of rows.

        Parameters
        ----------
        X : array-like
            Finite numbers ``(n, d)``, n at least 4.
        y : None
            Ignored; pipelines pass it.

        Raises
        ------
        ValueError
            For input that scikit-learn refuses, a share outside its range, and, as InvalidLatentsError, equal rows.
        """
        x = validate_data(self, X, dtype=np.float64, ensure_min_samples=4)
        if not 0 <= self.calibration < 1:
            raise ValueError(f"calibration must be a share in [0, 1), got {self.calibration}")
        if not self.smoothing >= 0:
            raise ValueError(f"smoothing must not be negative, got {self.smoothing}")
        self._set_n_classes(y)
        seed = seed_from(self.random_state)
        m = min(round(self.calibration * len(x)), len(x) - 3)
        order = np.random.default_rng(seed).permutation(len(x))
        train = x[order[m:]]
        self._columns = Columns.fit(train, robust=True)
        with work_bar("RatioDetector", 2, shown=bool(self.verbose)) as bar:
            bar.begin("density")
            self.prior_ = self._learn(np.unique(self._squash(train)[:, self._columns.varies], axis=0), seed)
            bar.begin("scores")
            self.ceiling_ = float(self._terms(self._squash(train))[1].median())
            self.decision_scores_ = self._score(x)
        self.calibration_scores_ = np.sort(self.decision_scores_[order[:m]])
        scores = self.decision_scores_[order[m:]]
        densest = np.argsort(scores, kind="stable")[: max(1, len(scores) // 2)]
        self._typical = train[np.sort(densest[:TYPICAL_ROWS])]
        self._process_decision_scores()
        return self

    def decision_function(self, X: Any) -> Array:
        """How odd every row is, in nats, ``(n,)``: higher is odder.

        Parameters
        ----------
        X : array-like
            Finite numbers ``(n, d)``.
        """
        check_is_fitted(self, ["decision_scores_", "threshold_", "labels_"])
        return self._score(validate_data(self, X, dtype=np.float64, reset=False))

    def p_value(self, X: Any) -> Array:
        r"""Split-conformal p-values, :math:`p(x) = (1 + \#\{i \le m : s_i \ge s(x)\}) / (m + 1)`, ``(n,)``.

        For a row drawn like the m calibration rows, :math:`P(p \le \alpha) \le \alpha` at any level, whatever was
        learned (Vovk, Gammerman and Shafer 2005; Bates et al. 2023); outliers among the calibration rows make it
        smaller still. No contamination is guessed. The least value is 1 / (m + 1).

        Parameters
        ----------
        X : array-like
            Finite numbers ``(n, d)``.

        Raises
        ------
        LatentPriorError
            Where no rows were set apart.
        """
        check_is_fitted(self, ["decision_scores_", "threshold_", "labels_"])
        m = len(self.calibration_scores_)
        if m == 0:
            raise LatentPriorError("no rows were set apart to calibrate p-values: fit with calibration=0.25, say")
        below = np.searchsorted(self.calibration_scores_, self.decision_function(X), side="left")
        return np.asarray((1.0 + m - below) / (m + 1.0))

    def explain(self, X: Any, nodes: int = 256) -> Array:
        r"""What each column adds to a row's score above that of a typical row near it, in nats, ``(n, d)``.

        Integrated gradients (Sundararajan, Taly and Yan 2017) on the squashed columns,
        :math:`a_j = (u_j - b_j) \int_0^1 \partial_j s(b + t (u - b))\,dt`, from the nearest row b of the denser
        half of the training rows, :meth:`typical`. The columns sum to :math:`s(x) - s(b)`, up to the error of a
        midpoint rule; a column in which x equals b gets 0.

        Parameters
        ----------
        X : array-like
            Finite numbers ``(n, d)``.
        nodes : int
            Nodes of the midpoint rule; fewer than 1 raise ValueError.
        """
        check_is_fitted(self, ["decision_scores_", "threshold_", "labels_"])
        x = validate_data(self, X, dtype=np.float64, reset=False)
        if nodes < 1:
            raise ValueError(f"nodes must be 1 or more, got {nodes}")
        u, b = self._squash(x), self._squash(self._nearest(x))
        varies, prior = self._columns.varies, self.prior_
        end, start = torch.from_numpy(u[:, varies]), torch.from_numpy(b[:, varies])
        slope = torch.zeros_like(end)
        base, whole = prior.ladder.density(0), prior.ladder.density(prior.ladder.length)
        for i in range(nodes):
            here = prior.whitening.whiten(start + (i + 0.5) / nodes * (end - start))
            (low, low_grad), (high, high_grad) = base(here), whole(here)
            grad = torch.where((high - low < self.ceiling_)[:, None], high_grad, low_grad)
            slope -= grad @ prior.whitening.matrix / nodes
        parts = 0.5 * (np.square(u) - np.square(b))
        parts[:, varies] = ((end - start) * slope).numpy()
        return np.asarray(parts)

    def typical(self, X: Any) -> Array:
        """The nearest row of the denser half of the training rows, ``(n, d)``, where :meth:`explain` begins.

        Nearest by Euclidean distance of squashed columns, among at most the 2,000 densest rows.

        Parameters
        ----------
        X : array-like
            Finite numbers ``(n, d)``.
        """
        check_is_fitted(self, ["decision_scores_", "threshold_", "labels_"])
        return self._nearest(validate_data(self, X, dtype=np.float64, reset=False))

    def _nearest(self, x: Array) -> Array:
        u, rows = (torch.from_numpy(self._squash(v)) for v in (x, self._typical))
        index = torch.cat([torch.cdist(block, rows).argmin(1) for block in u.split(1024)])
        return np.asarray(self._typical[index.numpy()])

    def _squash(self, x: Array) -> Array:
        return np.asarray(np.arcsinh(self._columns.standardise(x)))

    def _score(self, x: Array) -> Array:
        u = self._squash(x)
        base, ratios = self._terms(u)
        # A constant column: a normal in squashed units. Constants are left out.
        odd = 0.5 * np.square(u[:, ~self._columns.varies]).sum(1)
        return np.asarray(odd - (base + ratios.clamp_max(self.ceiling_)).numpy())

    def _terms(self, u: Array) -> tuple[Tensor, Tensor]:
        """Log density under the base and sum of log ratios at squashed rows, nats, ``(n,)`` each."""
        whitened = self.prior_.whitening.whiten(torch.from_numpy(u[:, self._columns.varies]))
        with torch.no_grad():
            return self.prior_.base.log_prob(whitened), self.prior_.ladder.log_potential(whitened)

    def _learn(self, u: Array, seed: int) -> LatentPrior:
        """Learn base and stages on distinct rows ``(n, d)`` by importance sampling alone, no Markov chain."""

        def stream(*keys: int | str) -> torch.Generator:
            return derived_generator(torch.device("cpu"), seed, "detector", *keys)

        mean = torch.from_numpy(u).float()
        latents = Latents(mean, torch.full_like(mean, self.smoothing))
        out = torch.from_numpy(held_out_rows(u, HELD_OUT, seed))
        train, held_out = (mask.nonzero().flatten() for mask in (~out, out))
        whitening = Whitening.fit(latents.blocks(stream("whitening")), default_whitening(self.base)).to(
            dtype=torch.float32
        )

        def draws(index: Tensor, rows: int, name: str) -> Tensor:
            repeats = math.ceil(rows / len(index)) if self.smoothing > 0 else 1
            return whitening.whiten(latents.draw(index.repeat(repeats), stream(name)))

        many, several = draws(train, BASE_DRAWS, "base"), draws(held_out, BASE_DRAWS // 4, "held-out base")
        base = fit_base(self.base, many, several, whitening, stream("fit base"))
        if isinstance(base, CopulaBase):
            base = _with_tails(base, many)
        target = Target(latents, train, draws(held_out, 1, "held-out"), whitening)
        # The loss and the optimiser that the detector's other defaults were chosen with.
        plain = StageSettings(batch_size=256, patience=2, odds=1.0, optimizer="adamw", weight_decay=0.1)
        settings = dataclasses.replace(plain, width=self.width, bound=self.bound, steps=self.steps)
        shape = (u.shape[1],)

        def begin_stage(ladder: Ladder) -> StageLearner:
            return StageLearner(target, ladder, settings, shape, seed)

        def measure(
            learner: StageLearner, learned: LearnedStage, before: FreshParticles, last: bool
        ) -> tuple[Pass, FreshParticles | None]:
            longer = learner.ladder.extended(Stage(learned.ratio))
            generator = stream("normalizer", learner.index)
            after = longer.resampled_particles(len(before.position), generator, NORMALIZER_DRAWS)
            return passed_afresh(before, after), None if after.ess < LEAST_EFFECTIVE_SHARE else after

        run = FitRun(None, (), None, SingleProcess())
        ladder, _ = climb(run, Ladder(base), begin_stage, self.max_stages, measure=measure)
        return LatentPrior(ladder, whitening, shape).to(dtype=torch.float64)


def _with_tails(base: CopulaBase, u: Tensor) -> CopulaBase:
    """Add to each margin one kernel half as wide as the range of ``u`` ``(n, d)``, in its middle.

    Kernels at quantiles overlook rare values: a value that one row in a hundred has would cost hundreds of nats.
    """
    low, high = u.amin(0).to(base.centers), u.amax(0).to(base.centers)
    centers = torch.cat([base.centers, 0.5 * (low + high)[:, None]], 1)
    widths = torch.cat([base.widths, (0.5 * (high - low)[:, None]).clamp_min(float(base.widths.min()))], 1)
    return CopulaBase(centers, widths)
