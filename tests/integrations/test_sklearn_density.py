import importlib
import inspect
import io
import math
import sys
from typing import Any
from unittest import SkipTest

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import latentprior as lp
from latentprior.integrations.tables import held_out_rows

QUICK = {"max_stages": 1, "width": 16, "depth": 1, "steps": 200, "batch_size": 64}


@parametrize_with_checks(
    [
        lp.LatentDensity(),
        lp.LatentDensity(base="normal", whitening="none", max_stages=0),
        lp.LatentDensity(base="copula", whitening="diagonal", **QUICK),
    ]
)
def test_scikit_learn_accepts_it(estimator: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without it scikit-learn skips its check of array dispatch.
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    state = np.random.get_state()  # noqa: NPY002
    try:
        check(estimator)
    except SkipTest as skipped:
        pytest.fail(f"scikit-learn skipped a check: {skipped}")
    finally:
        # One of scikit-learn's own checks shuffles by numpy's global state.
        np.random.set_state(state)  # noqa: NPY002


def crescent_rows(n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A bent density in two columns of very different scales."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n)
    return np.stack([1e4 + 1e3 * x, 1e-3 * (x**2 + 0.3 * rng.standard_normal(n))], 1)


@pytest.fixture(scope="module")
def bent() -> lp.LatentDensity:
    return lp.LatentDensity(base="normal", random_state=0, **QUICK).fit(crescent_rows(2000))


def test_log_densities_are_those_of_the_fitted_gaussian() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 3)) @ np.array([[1.0, 0.5, 0.0], [0.0, 100.0, 0.0], [0.0, 0.0, 1e-4]]) + 5.0
    found = lp.LatentDensity(base="normal", max_stages=0, random_state=0).fit(x).score_samples(x[:50])
    # Fitted to 90% of the rows, so compared with the distribution that made them: errors of the moments are 1/60.
    exact = torch.distributions.MultivariateNormal(torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T)))
    np.testing.assert_allclose(found, exact.log_prob(torch.from_numpy(x[:50])), atol=0.3)


def test_the_density_integrates_to_one_in_the_rows_own_coordinates(bent: lp.LatentDensity) -> None:
    assert len(bent.prior_.stages) == 1
    first, second = np.linspace(0.4e4, 1.6e4, 400), np.linspace(-8e-3, 20e-3, 400)
    grid = np.stack(np.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 2)
    cell = (first[1] - first[0]) * (second[1] - second[0])
    stderr = bent.prior_.log_prob_stderr
    assert np.exp(bent.score_samples(grid)).sum() * cell == pytest.approx(1, abs=4 * stderr + 0.01)


def test_a_change_of_units_shifts_the_log_density_by_its_logarithm() -> None:
    x = crescent_rows(300)
    model = lp.LatentDensity(random_state=0, **QUICK)
    before, after = (clone(model).fit(rows).score_samples(rows) for rows in (x, 1024 * x))
    np.testing.assert_allclose(after, before - 2 * math.log(1024), rtol=1e-9)


def test_stages_raise_the_held_out_density_of_a_bent_table(bent: lp.LatentDensity) -> None:
    train, test = crescent_rows(2000), crescent_rows(2000, 1)
    base = lp.LatentDensity(base="normal", max_stages=0, random_state=0).fit(train)
    assert bent.score(test) > base.score(test) + 0.3


@pytest.mark.parametrize(("rows", "stages"), [(199, 0), (400, 1)])
def test_few_rows_get_the_base_alone(rows: int, stages: int) -> None:
    model = lp.LatentDensity(base="normal", random_state=0, **QUICK).fit(crescent_rows(rows))
    assert len(model.prior_.stages) == stages


def test_score_is_the_mean_log_density_as_that_of_a_mixture() -> None:
    x = crescent_rows(150)
    model = lp.LatentDensity(base="normal", random_state=0).fit(x)
    assert model.score(x) == pytest.approx(model.score_samples(x).mean())
    assert model.score(x) == pytest.approx(GaussianMixture(random_state=0).fit(x).score(x), abs=0.1)


def test_constant_and_repeated_columns_keep_densities_finite() -> None:
    x = crescent_rows(300)
    table = np.column_stack([x, np.full(300, 7.0), x[:, 0], np.zeros(300), 2 * x[:, 1]])
    model = lp.LatentDensity(random_state=0, max_stages=0).fit(table)
    inside = model.score_samples(table)
    assert np.isfinite(inside).all()
    for column in (2, 4):
        odd = table[:1].copy()
        odd[0, column] += 1.0
        assert np.isfinite(model.score_samples(odd)).all()
        assert model.score_samples(odd)[0] < inside.min() - 1000
    drawn = model.sample(200, random_state=0)
    assert drawn.shape == (200, 6)
    np.testing.assert_allclose(drawn[:, 2], 7.0, atol=0.05)
    # The copy of a column is sampled as its copy.
    assert np.corrcoef(drawn[:, 0], drawn[:, 3])[0, 1] > 0.99


def test_equal_rows_are_a_named_error() -> None:
    with pytest.raises(lp.InvalidLatentsError, match="all rows are equal"):
        lp.LatentDensity().fit(np.ones((20, 3)))


def test_copies_of_a_row_are_never_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (500, 3)).astype(float)
    out = held_out_rows(x, 0.3, seed=1)
    sides = [{tuple(row) for row in rows} for rows in (x[out], x[~out])]
    assert not sides[0] & sides[1]
    assert len(sides[0]) == round(0.3 * 27)


def test_samples_follow_the_density_and_its_seed(bent: lp.LatentDensity) -> None:
    x = crescent_rows(2000)
    drawn = bent.sample(2000, random_state=3)
    np.testing.assert_array_equal(drawn, bent.sample(2000, random_state=3))
    assert not np.array_equal(bent.sample(5), bent.sample(5))
    # Six standard errors of two means of 2,000, and room for what the density misses.
    assert (np.abs(drawn.mean(0) - x.mean(0)) < (6 * math.sqrt(2 / 2000) + 0.1) * x.std(0)).all()
    with pytest.raises(ValueError, match="1 or more"):
        bent.sample(0)


def test_fits_repeat_by_seed_and_differ_without() -> None:
    x = crescent_rows(300)

    def scores(random_state: Any) -> Any:
        return lp.LatentDensity(base="gmm:8", max_stages=0, random_state=random_state).fit(x).score_samples(x)

    np.testing.assert_array_equal(scores(5), scores(5))
    np.testing.assert_array_equal(scores(np.random.RandomState(5)), scores(np.random.RandomState(5)))
    assert not np.array_equal(scores(None), scores(None))
    with pytest.raises(lp.LatentPriorError, match="random_state"):
        scores("five")


def test_a_grid_search_finds_the_better_base_at_the_end_of_a_pipeline() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((150, 2)) + 20.0 * rng.integers(0, 2, (150, 1))
    pipeline = make_pipeline(StandardScaler(), lp.LatentDensity(random_state=0))
    search = GridSearchCV(pipeline, {"latentdensity__base": ["normal", "gmm"]}, cv=3).fit(x)
    assert search.best_params_ == {"latentdensity__base": "gmm"}
    assert search.best_estimator_.score(x) == search.score(x)


def test_a_grid_search_reaches_the_settings_of_a_stage() -> None:
    search = GridSearchCV(
        lp.LatentDensity(base="normal", random_state=0, **QUICK), {"steps": [0, 200], "width": [16]}, cv=2, refit=False
    ).fit(crescent_rows(600))
    means = search.cv_results_["mean_test_score"]
    # A stage of no steps leaves the base, which the other case of this file beats by 0.3 nats.
    assert search.best_params_ == {"steps": 200, "width": 16}
    assert means[1] > means[0] + 0.1


def test_defaults_are_those_of_a_fit_and_of_a_stage() -> None:
    fitted = {name: parameter.default for name, parameter in inspect.signature(lp.fit).parameters.items()}
    staged = vars(lp.StageSettings())
    params = lp.LatentDensity().get_params()
    shared = set(params) & {*fitted, *staged}
    assert shared >= {"base", "max_stages", "validation", "steps", "width", "learning_rate", "time_budget"}
    assert {name: params[name] for name in shared} == {name: {**fitted, **staged}[name] for name in shared}


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "latentprior.integrations.sklearn_density", raising=False)
    with pytest.raises(lp.MissingExtraError, match=r"LatentDensity needs an extra: .*latentprior\[sklearn\]"):
        importlib.import_module("latentprior.integrations.sklearn_density")


def test_names_of_columns_are_kept() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(crescent_rows(60), columns=["far", "near"])
    model = lp.LatentDensity(random_state=0).fit(table)
    assert list(model.feature_names_in_) == ["far", "near"]
    with pytest.raises(ValueError, match="feature names"):
        model.score_samples(table[["near", "far"]])


@pytest.mark.parametrize("verbose", [True, False])
def test_progress_is_drawn_on_request(verbose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    lp.LatentDensity(base="normal", random_state=0, verbose=verbose, **QUICK).fit(crescent_rows(300))
    assert ("stage 0" in terminal.getvalue()) == verbose
