import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

import latentprior as lp
from latentprior.fitting.stage import StageLearner

pytest.importorskip("pyod")

Array = NDArray[np.float64]

CONTAMINATION = 0.1


def table(n: int, seed: int, odd: float = CONTAMINATION) -> tuple[Array, NDArray[np.int64]]:
    """Rows along a bent line in columns of mixed scales, and a share of rows spread around it."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) < round(odd * n)).astype(np.int64)
    x = rng.standard_normal((n, 4))
    x[:, 1] = x[:, 0] ** 2 + 0.3 * x[:, 1]
    x[labels == 1] = rng.uniform(-6, 6, (labels.sum(), 4))
    return x * np.array([1.0, 1e5, 1e-6, 1.0]) + np.array([0.0, 3e5, 0.0, -1e3]), labels


TRAIN, LABELS = table(400, 0)
TEST, TEST_LABELS = table(200, 1)


@pytest.fixture(scope="module")
def detector() -> lp.RatioDetector:
    return lp.RatioDetector(contamination=CONTAMINATION, random_state=0).fit(TRAIN)


@pytest.mark.parametrize("verbose", [True, False])
def test_progress_is_drawn_on_request(verbose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    lp.RatioDetector(max_stages=0, random_state=0, verbose=verbose).fit(TRAIN)
    assert ("RatioDetector: scores" in terminal.getvalue()) == verbose


# What PyOD asks of every detector


def test_fitted_attributes_have_the_shapes_that_pyod_promises(detector: lp.RatioDetector) -> None:
    assert detector.decision_scores_.shape == detector.labels_.shape == (400,)
    assert isinstance(detector.threshold_, float)
    assert (detector._mu, detector._sigma) == (detector.decision_scores_.mean(), detector.decision_scores_.std())
    assert detector._classes == 2
    assert detector.n_features_in_ == 4
    assert detector.labels_.sum() == round(CONTAMINATION * 400)
    np.testing.assert_array_equal(detector.labels_, detector.decision_scores_ > detector.threshold_)


def test_training_scores_are_those_of_the_decision_function(detector: lp.RatioDetector) -> None:
    np.testing.assert_allclose(detector.decision_function(TRAIN), detector.decision_scores_, rtol=1e-9)


def test_scores_of_new_rows_tell_outliers(detector: lp.RatioDetector) -> None:
    scores = detector.decision_function(TEST)
    assert scores.shape == (200,)
    assert roc_auc_score(TEST_LABELS, scores) > 0.95


def test_predictions_are_zero_and_one(detector: lp.RatioDetector) -> None:
    found = detector.predict(TEST)
    np.testing.assert_array_equal(found, detector.decision_function(TEST) > detector.threshold_)
    labels, confidence = detector.predict(TEST, return_confidence=True)
    np.testing.assert_array_equal(labels, found)
    assert confidence.shape == (200,)
    assert ((confidence >= 0) & (confidence <= 1)).all()


@pytest.mark.parametrize("method", ["linear", "unify"])
def test_probabilities_lie_between_zero_and_one_and_rise_with_the_score(
    detector: lp.RatioDetector, method: str
) -> None:
    found, confidence = detector.predict_proba(TEST, method=method, return_confidence=True)
    assert found.shape == (200, 2)
    assert confidence.shape == (200,)
    np.testing.assert_allclose(found.sum(1), 1)
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found[np.argsort(detector.decision_function(TEST)), 1]) >= 0).all()


def test_an_unknown_probability_method_is_refused(detector: lp.RatioDetector) -> None:
    with pytest.raises(ValueError, match="something"):
        detector.predict_proba(TEST, method="something")


def test_rejection_marks_what_is_uncertain(detector: lp.RatioDetector) -> None:
    labels, stats = detector.predict_with_rejection(TEST, return_stats=True, c_r=CONTAMINATION)
    assert set(np.unique(labels)) <= {-2, 0, 1}
    assert len(stats) == 3


def test_fit_predict_is_fit_and_its_labels(detector: lp.RatioDetector) -> None:
    with pytest.warns(FutureWarning, match="fit_predict"):
        found = lp.RatioDetector(contamination=CONTAMINATION, random_state=0).fit_predict(TRAIN)
    np.testing.assert_array_equal(found, detector.labels_)


def test_ranks_among_training_rows_follow_the_score(detector: lp.RatioDetector) -> None:
    scores = detector.decision_function(TEST)
    for normalized, most in ((False, 400), (True, 1)):
        found = detector._predict_rank(TEST, normalized=normalized)
        assert ((found >= 0) & (found <= most)).all()
        assert (np.diff(found[np.argsort(scores)]) >= 0).all()


def test_fit_predict_score_measures_the_training_rows(capsys: pytest.CaptureFixture[str]) -> None:
    model = lp.RatioDetector(max_stages=0, random_state=0)
    for scoring, least in (("roc_auc_score", 0.95), ("prc_n_score", 0.7)):
        with pytest.warns(FutureWarning, match="fit_predict_score"):
            assert model.fit_predict_score(TRAIN, LABELS, scoring=scoring) > least
    with pytest.warns(FutureWarning, match="fit_predict_score"), pytest.raises(NotImplementedError):
        model.fit_predict_score(TRAIN, LABELS, scoring="something")
    assert "prc_n_score" in capsys.readouterr().out


def test_it_finds_the_outliers_that_pyod_makes_for_its_own_tests() -> None:
    data = pytest.importorskip("pyod.utils.data")
    train, test, _, odd = data.generate_data(n_train=200, n_test=100, contamination=0.1, random_state=42)
    # PyOD asks 0.8 of its own detectors there.
    assert roc_auc_score(odd, lp.RatioDetector(random_state=42).fit(train).decision_function(test)) > 0.99


# torch 2.4 and 2.5 warn of every pickle that holds a tensor, joblib's included.
@pytest.mark.filterwarnings("ignore:You are using `torch.load` with:FutureWarning")
def test_a_fitted_detector_survives_joblib(detector: lp.RatioDetector, tmp_path: Path) -> None:
    joblib.dump(detector, tmp_path / "detector.joblib")
    again = joblib.load(tmp_path / "detector.joblib")
    np.testing.assert_array_equal(again.decision_function(TEST), detector.decision_function(TEST))
    np.testing.assert_array_equal(again.p_value(TEST), detector.p_value(TEST))


def test_a_clone_has_the_settings_and_nothing_learned() -> None:
    model = lp.RatioDetector(contamination=0.2, base="gmm:2", max_stages=0, random_state=7).fit(TRAIN)
    twin = clone(model)
    assert twin.get_params() == model.get_params()
    assert not hasattr(twin, "prior_")
    np.testing.assert_array_equal(twin.fit(TRAIN).decision_scores_, model.decision_scores_)


@pytest.mark.parametrize("contamination", [0.0, 0.6, -0.1])
def test_contamination_is_a_share_of_a_half_at_most(contamination: float) -> None:
    with pytest.raises(ValueError, match="contamination"):
        lp.RatioDetector(contamination=contamination)


def test_another_number_of_columns_is_refused(detector: lp.RatioDetector) -> None:
    with pytest.raises(ValueError, match="features"):
        detector.decision_function(TEST[:, :3])


def test_it_must_be_fitted_first() -> None:
    for method in ("decision_function", "predict", "predict_proba", "p_value", "explain", "typical"):
        with pytest.raises(ValueError, match="not fitted"):
            getattr(lp.RatioDetector(), method)(TEST)


def test_it_detects_on_embeddings() -> None:
    # Newer than the oldest PyOD that is supported.
    embedding = pytest.importorskip("pyod.models.embedding")

    words = ["a" * (3 + i % 5) + "b" * (2 + i % 3) for i in range(100)]

    def encode(texts: Any) -> Array:
        counts = np.array([[t.count("a"), t.count("b"), len(t), t.count("z")] for t in texts], dtype=float)
        return counts + 0.1 * np.sin(np.arange(len(texts)))[:, None]

    inner = lp.RatioDetector(contamination=0.1, random_state=0)
    model = embedding.EmbeddingOD(encode, detector=inner, contamination=0.1, standardize=True).fit(words)
    assert model.decision_scores_.shape == model.labels_.shape == (100,)
    new = ["aaaabbb", "zzzzzzzzzzzzzzz"]
    scores = model.decision_function(new)
    assert scores[1] > model.decision_scores_.max() > scores[0]
    np.testing.assert_array_equal(model.predict(new), [0, 1])
    # The detector that was given is cloned, the one inside keeps what PyOD's own lack.
    assert not hasattr(inner, "prior_")
    p = model.detector_.p_value(model.scaler_.transform(encode(new)).astype(np.float32))
    assert p[1] == 1 / (1 + len(model.detector_.calibration_scores_)) < 0.05 < p[0]


# What it learns


def test_the_prior_is_normalised_and_scores_rank_by_it_up_to_the_ceiling(detector: lp.RatioDetector) -> None:
    prior = detector.prior_
    assert len(prior.stages) == 1
    assert prior.check_normalizer().passed
    u = torch.randn(500, *prior.event_shape, generator=torch.Generator().manual_seed(0)).double() * 2
    base = prior.base.log_prob(prior.whitening.whiten(u)) + prior.whitening.log_abs_det
    ratios = prior.log_prob(u) - base + prior.stages[0].log_normalizer
    below = (ratios < detector.ceiling_).numpy()
    x = detector._columns.restore(np.sinh(u.numpy()))
    offset = detector.decision_function(x) + prior.log_prob(u).numpy()
    assert 50 < below.sum() < 450
    assert np.ptp(offset[below]) < 1e-6
    # Above the ceiling a stage pardons no more: the score exceeds minus the log density.
    assert (offset[~below] > offset[below].mean()).all()


def test_a_stage_finds_what_the_margins_hide() -> None:
    # Outliers that are typical in each column and odd in the pair.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 2))
    x[:, 1] = x[:, 0] + 0.2 * x[:, 1]
    x[:30, 1] = -x[:30, 0]
    odd = np.arange(1000) < 30
    far = np.abs(x[:, 0]) > 0.5
    auc = [
        roc_auc_score(odd[far], lp.RatioDetector(max_stages=k, random_state=0).fit(x).decision_scores_[far])
        for k in (0, 1)
    ]
    assert auc[1] > 0.97 > 0.7 > auc[0]


def test_a_clump_of_outliers_does_not_pass_for_normal() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 5))
    x[:25] = 6 + 0.05 * rng.standard_normal((25, 5))
    scores = lp.RatioDetector(random_state=0).fit(x).decision_scores_
    assert roc_auc_score(np.arange(500) < 25, scores) > 0.99


def test_a_rare_value_costs_a_few_nats_and_a_new_one_more() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 2))
    x[:, 1] = np.arange(400) % 100 == 0
    model = lp.RatioDetector(max_stages=0, random_state=0).fit(x)
    common, rare, new = model.decision_function(np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 50.0]]))
    # Four rows of 400 are worth log 100 = 4.6 nats, and the spread of a kernel.
    assert 2 < rare - common < 10
    assert new > rare + 1


def test_units_do_not_matter() -> None:
    a, b = (lp.RatioDetector(max_stages=0, random_state=0).fit(k * TRAIN).decision_function(k * TEST) for k in (1, 256))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_copies_of_rows_change_nothing_that_is_learned() -> None:
    options = {"max_stages": 0, "calibration": 0.0, "random_state": 0}
    once = lp.RatioDetector(**options).fit(TRAIN)
    # Every row twice, so that quantiles stay.
    twice = lp.RatioDetector(**options).fit(np.repeat(TRAIN, 2, axis=0))
    np.testing.assert_allclose(rankdata(once.decision_function(TEST)), rankdata(twice.decision_function(TEST)), atol=3)


def test_small_tables_with_constant_copied_and_rounded_columns() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 3))
    x = np.column_stack([x, np.round(x[:, 0]), x[:, 1], np.full(80, 3.0), np.zeros(80), rng.random(80) < 0.02])
    x = np.concatenate([x, x[:40]])
    model = lp.RatioDetector(random_state=0).fit(x)
    assert np.isfinite(model.decision_scores_).all()
    odd = x[:1].copy()
    odd[0, 5] = 4.0
    assert model.decision_function(odd) > model.decision_scores_.max()
    assert np.isfinite(model.decision_function(1e30 * odd)).all()


@pytest.mark.parametrize("odd", [0.05, 0.1, 0.2])
def test_eighty_rows_that_hold_outliers_copies_and_mixed_scales_suffice(odd: float) -> None:
    areas = []
    for seed in range(5):
        x, labels = table(60, seed, odd)
        x, labels = np.concatenate([x, x[-20:]]), np.concatenate([labels, labels[-20:]])
        scores = lp.RatioDetector(contamination=odd, random_state=seed).fit(x).decision_scores_
        areas.append(roc_auc_score(labels, scores))
    assert np.mean(areas) > 0.93


@pytest.mark.parametrize("n", [4, 10])
def test_a_handful_of_rows_is_enough(n: int) -> None:
    model = lp.RatioDetector(random_state=0).fit(TRAIN[-n:])
    assert np.isfinite(model.decision_function(TEST)).all()


def test_equal_rows_are_a_named_error() -> None:
    with pytest.raises(lp.InvalidLatentsError, match="all rows are equal"):
        lp.RatioDetector().fit(np.ones((50, 3)))


@pytest.mark.parametrize(("option", "value"), [("calibration", 1.0), ("calibration", -0.1), ("smoothing", -1.0)])
def test_settings_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        lp.RatioDetector(**{option: value}).fit(TRAIN)


def test_a_seed_repeats_and_none_does_not() -> None:
    def scores(seed: Any) -> Array:
        return lp.RatioDetector(max_stages=0, random_state=seed).fit(TRAIN).decision_function(TEST)

    np.testing.assert_array_equal(scores(3), scores(3))
    np.testing.assert_array_equal(scores(np.random.RandomState(3)), scores(np.random.RandomState(3)))
    assert not np.array_equal(scores(None), scores(None))


def test_a_thousand_rows_of_twenty_columns_take_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((1000, 20))
    x[:, 10:] += x[:, :10]
    steps = []
    real = StageLearner.learn
    monkeypatch.setattr(StageLearner, "learn", lambda *args, **kw: steps.append(real(*args, **kw)) or steps[-1])
    lp.RatioDetector(random_state=0).fit(x)
    # At most one stage of 400 steps: about one second of one core.
    assert sum(learned.steps for learned in steps) <= 400


# Conformal p-values


@pytest.mark.parametrize(("stages", "fits"), [(0, 60), pytest.param(1, 16, marks=pytest.mark.slow)])
def test_p_values_raise_false_alarms_at_their_level(stages: int, fits: int) -> None:
    rows, m = 200, 99
    levels = np.array([0.01, 0.05, 0.1])
    rates, learned = [], 0
    for seed in range(fits):
        x, _ = table(4 * m + rows, seed, odd=0.0)
        model = lp.RatioDetector(max_stages=stages, steps=200, random_state=seed).fit(x[rows:])
        learned += len(model.prior_.stages)
        assert len(model.calibration_scores_) == m
        p = model.p_value(x[:rows])
        assert (p >= 1 / (m + 1)).all()
        rates.append((p[:, None] <= levels).mean(0))
    assert learned >= 0.75 * stages * fits
    # Given the calibration rows a rate is Beta distributed, and binomial on the test rows; both averaged over fits.
    stderr = np.sqrt(levels * (1 - levels) * (1 / (m + 2) + 1 / rows) / fits)
    # Four standard errors, three levels: a false alarm once in 5,000 seeds.
    np.testing.assert_array_less(np.abs(np.mean(rates, 0) - levels), 4 * stderr)


def test_outliers_have_the_least_p_values(detector: lp.RatioDetector) -> None:
    p = detector.p_value(TEST)
    assert p.shape == (200,)
    assert p[TEST_LABELS == 1].mean() < 0.1 < 0.4 < p[TEST_LABELS == 0].mean()
    order = np.argsort(detector.decision_function(TEST))
    assert (np.diff(p[order]) <= 0).all()


def test_p_values_count_ties_against_the_alarm() -> None:
    model = lp.RatioDetector(max_stages=0, random_state=0).fit(TRAIN)
    model.calibration_scores_ = np.full(9, model.decision_function(TEST[:1])[0])
    assert model.p_value(TEST[:1]) == pytest.approx(1.0)


def test_calibration_rows_train_nothing() -> None:
    # Which rows calibrate depends on seed and number alone: spoil them, and nothing learned may change.
    model = lp.RatioDetector(max_stages=0, random_state=0).fit(TRAIN)
    apart = np.isin(model.decision_scores_, model.calibration_scores_)
    assert apart.sum() == 100
    spoiled = TRAIN.copy()
    spoiled[apart] = 1e9
    again = lp.RatioDetector(max_stages=0, random_state=0).fit(spoiled)
    np.testing.assert_array_equal(again.decision_function(TEST), model.decision_function(TEST))
    assert (again.calibration_scores_ > model.decision_scores_.max()).all()


def test_p_values_without_calibration_rows_say_what_to_do() -> None:
    model = lp.RatioDetector(max_stages=0, calibration=0.0, random_state=0).fit(TRAIN)
    with pytest.raises(lp.LatentPriorError, match=r"calibration=0\.25"):
        model.p_value(TEST)


# Explanations


def test_contributions_sum_to_the_score_above_a_typical_row(detector: lp.RatioDetector) -> None:
    parts = detector.explain(TEST)
    assert parts.shape == TEST.shape
    excess = detector.decision_function(TEST) - detector.decision_function(detector.typical(TEST))
    np.testing.assert_allclose(parts.sum(1), excess, atol=0.02 * np.abs(excess).max())


def test_the_column_that_is_wrong_is_blamed() -> None:
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.standard_normal((500, 4)), np.full(500, 2.0)])
    model = lp.RatioDetector(random_state=0).fit(x)
    odd = np.zeros((5, 5))
    odd[:, 4] = 2.0
    odd[np.arange(5), np.arange(5)] += 8.0
    parts = model.explain(odd)
    np.testing.assert_array_equal(parts.argmax(1), np.arange(5))
    assert (np.diag(parts) > 0.8 * parts.sum(1)).all()
    assert parts[:4, 4] == pytest.approx(0)


def test_a_typical_row_is_a_training_row_of_the_denser_half(detector: lp.RatioDetector) -> None:
    found = detector.typical(TEST)
    assert {tuple(row) for row in found} <= {tuple(row) for row in TRAIN}
    assert detector.decision_function(found).max() <= np.median(detector.decision_scores_) + math.log(2)
    np.testing.assert_array_equal(detector.explain(found[:3]), 0.0)
    with pytest.raises(ValueError, match="nodes"):
        detector.explain(TEST, nodes=0)


# The optional dependency


def test_without_pyod_the_message_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "latentprior.integrations.pyod_detector", raising=False)
    monkeypatch.setitem(sys.modules, "pyod.models.base", None)
    with pytest.raises(lp.MissingExtraError, match=r"pip install 'latentprior\[pyod\]'"):
        _ = lp.RatioDetector


def test_the_package_does_not_import_pyod() -> None:
    module = "latentprior.integrations.pyod_detector"
    code = f"import sys, latentprior; sys.exit('pyod' in sys.modules or '{module}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lp.nonsense
