import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from latentprior.errors import InvalidImagesError, InvalidLatentsError, MissingExtraError
from latentprior.evaluation.metrics import (
    average_precision,
    feature_report,
    features,
    frechet_distance,
    image_frechet_distance,
    image_report,
    kernel_distance,
    mean_squared_error,
    two_sample_auc,
)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(n: int, mean: torch.Tensor, covariance: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows whose sample mean and covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(torch.cov(x.T))
    whitened = torch.linalg.solve_triangular(factor, x.T, upper=False).T
    return mean + whitened @ torch.linalg.cholesky(covariance).T


class TestFrechetDistance:
    def test_is_the_closed_form_of_two_gaussians(self):
        mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        first = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
        second = torch.diag(torch.tensor([4.0, 1.0, 9.0], dtype=torch.float64))
        a = with_moments(500, torch.zeros(3, dtype=torch.float64), first, seed=0)
        b = with_moments(300, mean, second, seed=1)
        # |m|^2 + sum_j (s_j - t_j)^2 = 5.25 + 1 + 1; the sample moments are exact, so rounding is all that is left.
        assert frechet_distance(a, b) == pytest.approx(7.25, abs=1e-8)

    def test_with_covariances_that_do_not_commute(self):
        first = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
        second = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
        zero = torch.zeros(2, dtype=torch.float64)
        # In two dimensions tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det(A B))).
        product = first @ second
        root = math.sqrt(product.trace() + 2 * math.sqrt(torch.det(product)))
        expected = float(first.trace() + second.trace()) - 2 * root
        found = frechet_distance(with_moments(200, zero, first, seed=2), with_moments(200, zero, second, seed=3))
        assert found == pytest.approx(expected, abs=1e-8)

    def test_of_samples_within_their_error(self):
        # E = 3^2 + bias; the mean's part has sd 2 * 3 * sqrt(2 / 4000) = 0.13, the rest is below 0.02.
        found = frechet_distance(normal(4000, 4, seed=4) + torch.tensor([3.0, 0, 0, 0]), normal(4000, 4, seed=5))
        assert found == pytest.approx(9, abs=0.7)  # five standard errors: a false alarm in two million

    def test_keeps_its_digits_far_from_the_origin(self):
        a, b = normal(300, 3, seed=6), 2 * normal(300, 3, seed=7)
        assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(frechet_distance(a, b), rel=1e-6)

    def test_of_equal_sets_is_zero_also_with_fewer_rows_than_features(self):
        a = normal(10, 30, seed=8)
        assert frechet_distance(a, a.float().numpy()) == pytest.approx(0, abs=1e-4)

    def test_on_images_uses_the_network_in_eval_mode_and_restores_it(self):
        with torch.random.fork_rng():
            network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout(0.5))
        real, fake = normal(50, 1, 4, 4, seed=9).float(), normal(70, 1, 4, 4, seed=10).float()
        expected = frechet_distance(network[:2](real).detach(), network[:2](fake).detach())
        assert image_frechet_distance(real, fake, network, batch_size=16) == pytest.approx(expected, rel=1e-4)
        assert network.training
        assert features(network, real.numpy(), batch_size=7).shape == (50, 3)

    def test_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
        with pytest.raises(MissingExtraError, match=r"latentprior\[metrics\]"):
            frechet_distance(normal(5, 2, seed=0), normal(5, 2, seed=1))

    @pytest.mark.parametrize(
        ("a", "b", "message"),
        [
            (torch.zeros(5, 2), torch.zeros(5, 3), "shapes"),
            (torch.zeros(5), torch.zeros(5), "shapes"),
            (torch.zeros(1, 2), torch.zeros(5, 2), "at least 2 rows"),
            (torch.full((5, 2), math.nan), torch.zeros(5, 2), "NaN"),
        ],
    )
    def test_says_what_is_wrong(self, a, b, message):
        for distance in (frechet_distance, kernel_distance, two_sample_auc):
            with pytest.raises(InvalidLatentsError, match=message):
                distance(a, b)


class TestKernelDistance:
    def test_is_the_estimator_written_out(self):
        a, b = normal(4, 3, seed=0), normal(5, 3, seed=1) + 1

        def value(x, y):
            def kernel(u, v):
                return (u @ v.T / 3 + 1) ** 3

            own = kernel(x, x).fill_diagonal_(0).sum() + kernel(y, y).fill_diagonal_(0).sum()
            return float(own / 2 - 2 * kernel(x, y).mean())  # pairs of two rows: 2 * 1 ordered ones each

        every = [
            value(a[i], b[j]) for i in torch.combinations(torch.arange(4)) for j in torch.combinations(torch.arange(5))
        ]
        found = kernel_distance(a, b, subsets=4000, subset_size=2)
        # The mean over subsets nears the mean over all 60 pairs of subsets; five standard errors: once in two million.
        assert found.value == pytest.approx(np.mean(every), abs=5 * np.std(every) / math.sqrt(4000))
        assert found.stderr == pytest.approx(np.std(every) * math.sqrt(2 / (4 - 2) + 1 / 4000), rel=0.1)

    def test_is_unbiased_for_equal_laws_at_every_size_of_subset(self):
        for size in (5, 1_000):
            pairs = [(normal(40, 4, seed=s), normal(40, 4, seed=1000 + s)) for s in range(100)]
            values = [kernel_distance(a, b, subsets=10, subset_size=size).value for a, b in pairs]
            # Mean zero within 4.5 standard errors: a false alarm once in 150,000.
            assert abs(np.mean(values)) < 4.5 * np.std(values) / 10
            assert min(values) < 0

    def test_standard_error_is_the_spread_over_samples(self):
        shift = torch.tensor([2.0, 0, 0, 0])
        found = [
            kernel_distance(normal(100, 4, seed=s) + shift, normal(100, 4, seed=1000 + s), subsets=20)
            for s in range(100)
        ]
        # A standard deviation of 100 values has a relative error of 7%, five of which fit (heavy tails counted in).
        ratio = np.std([k.value for k in found]) / np.mean([k.stderr for k in found])
        assert 0.6 < ratio < 1.4

    def test_same_seed_same_answer_and_no_other(self):
        a, b = normal(60, 2, seed=0), normal(50, 2, seed=1)
        first = kernel_distance(a, b, subsets=5, seed=3)
        assert kernel_distance(a.numpy(), b.numpy(), subsets=5, seed=3) == first
        assert kernel_distance(a, b, subsets=5, seed=4) != first

    def test_orders_what_is_near_and_far(self):
        a, b = normal(200, 3, seed=0), normal(200, 3, seed=1)
        near, far = (kernel_distance(a, b + shift, subsets=20) for shift in (0.3, 2.0))
        assert far.value - near.value > 5 * math.hypot(near.stderr, far.stderr)

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [(3, {}, "4 rows"), (9, {"subsets": 1}, "2 subsets"), (9, {"subset_size": 1}, "2 rows")],
    )
    def test_refuses_too_little(self, rows, options, message):
        with pytest.raises(InvalidLatentsError, match=message):
            kernel_distance(normal(rows, 2, seed=0), normal(9, 2, seed=1), **options)

    def test_refuses_a_constant_network_but_not_a_collapsed_generator(self):
        a, constant = normal(9, 2, seed=0), torch.ones(9, 2, dtype=torch.float64)
        with pytest.raises(InvalidLatentsError, match="constant"):
            kernel_distance(constant, a)
        assert math.isfinite(kernel_distance(a, constant).value)

    def test_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
        with pytest.raises(MissingExtraError, match=r"latentprior\[metrics\]"):
            kernel_distance(normal(5, 2, seed=0), normal(5, 2, seed=1))


def pictures(n: int, seed: int, size: int = 4) -> torch.Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TestMeanSquaredError:
    def test_is_per_pixel_over_images(self):
        x = torch.zeros(4, 3, 2, 2)
        y = x.clone()
        y[0], y[1, :, 0] = 1.0, -0.5
        # Errors of the images: 1, 1/8, 0, 0.
        found = mean_squared_error(x, y)
        assert found.value == pytest.approx(1.125 / 4)
        assert found.stderr == pytest.approx(np.std([1, 0.125, 0, 0], ddof=1) / 2)

    def test_over_blocks(self):
        x, y = pictures(2100, 0, 1), pictures(2100, 1, 1)
        assert mean_squared_error(x, y).value == pytest.approx(float((x - y).square().mean()), rel=1e-5)

    @pytest.mark.parametrize(
        ("x", "y", "message"),
        [
            (torch.zeros(3, 1, 2, 2), torch.zeros(3, 3, 2, 2), "one shape"),
            (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), "at least 2"),
            (torch.zeros(3, 1, 2, 2), torch.full((3, 1, 2, 2), 255.0), "rescale"),
            (torch.zeros(3, 1, 2, 2).byte(), torch.zeros(3, 1, 2, 2), "8-bit"),
        ],
    )
    def test_says_what_is_wrong(self, x, y, message):
        with pytest.raises(InvalidImagesError, match=message):
            mean_squared_error(x, y)


class TestReports:
    def test_features_against_test_at_equal_n(self):
        train, test, fake, decoded = (normal(30, 3, seed=s) for s in range(4))
        report = feature_report(train, test, fake + 1, decoded, subsets=3)
        assert (report["images"], report["features"]) == (30, 3)
        for name, rows in {"real": train, "generated": fake + 1, "reconstructions": decoded}.items():
            kernel = kernel_distance(test, rows, subsets=3)
            assert report[name] == {
                "frechet": frechet_distance(test, rows),
                "kernel": kernel.value,
                "kernel_stderr": kernel.stderr,
            }
        with pytest.raises(InvalidLatentsError, match="equal n"):
            feature_report(train[:20], test, fake, decoded)

    def test_images_stand_beside_both_floors(self):
        train, test, fake = pictures(50, 0), pictures(40, 1), pictures(30, 2) / 4
        decoded = (test + 0.1 * pictures(40, 3)).clamp(-1, 1)
        report = image_report(train, test.numpy(), fake, decoded, "pixels", subsets=5)
        assert report["feature_network"] == "pixels-16px"
        assert report["images"] == 30
        assert report["reconstructions"]["frechet"] < report["real"]["frechet"] < report["generated"]["frechet"]
        # Pairs stay pairs through the subsampling: unpaired images would give 2/3.
        assert report["reconstructions"]["mean_squared_error"] < 0.01
        assert report == json.loads(json.dumps(report))
        assert report == image_report(train, test, fake, decoded, "pixels", subsets=5)

    def test_subsamples_instead_of_taking_the_first(self):
        # Sorted training images: the first 20 are dark, as files sorted by class would be.
        train = torch.cat([pictures(20, 0) / 4 - 0.7, pictures(60, 1)])
        test, fake = pictures(20, 2), pictures(20, 3)
        report = image_report(train, test, fake, test, nn.Flatten(), subsets=2)
        first = image_report(train[:20], test, fake, test, nn.Flatten(), subsets=2)
        assert report["real"]["frechet"] < first["real"]["frechet"] / 2
        assert report["feature_network"] == "Flatten"

    def test_takes_any_function_under_a_name_of_ones_own(self):
        x = pictures(20, 0)
        report = image_report(x, x, x, x, lambda v: v.flatten(1), network_name="raw", subsets=2)
        assert report["feature_network"] == "raw"
        assert report["generated"]["frechet"] == pytest.approx(0, abs=1e-5)

    def test_refuses_reconstructions_of_other_images(self):
        x = pictures(20, 0)
        with pytest.raises(InvalidImagesError, match="in its order"):
            image_report(x, x, x, x[:10], "pixels")


class TestTwoSampleAUC:
    @pytest.mark.slow
    def test_is_half_for_equal_laws(self):
        z = []
        for seed in range(6):
            auc, stderr = two_sample_auc(normal(300, 3, seed=seed), normal(500, 3, seed=100 + seed), seed=seed)
            # At n = 300 each, DeLong's error of an uninformative score is sqrt(1 / (6 * 300)).
            assert stderr == pytest.approx(math.sqrt(1 / 1800), rel=0.15)
            z.append((auc - 0.5) / stderr)
        # The mean of six standard normals leaves +-4 / sqrt(6) once in 16,000; folds share rows, hence the half more.
        assert abs(np.mean(z)) < 6 / math.sqrt(6)

    def test_is_one_for_separated_samples(self):
        auc, stderr = two_sample_auc(normal(200, 2, seed=0), normal(200, 2, seed=1) + 20)
        assert auc > 0.999
        assert stderr < 0.001

    def test_reaches_but_does_not_pass_the_best_possible_classifier(self):
        # N(0, 1) against N(1, 1): no score passes Phi(1 / sqrt 2) = 0.760, held out.
        auc, stderr = two_sample_auc(normal(2000, 1, seed=2) + 1, normal(2000, 1, seed=3))
        assert 0.70 < auc < 0.7602 + 4 * stderr  # four standard errors: once in 30,000

    def test_same_seed_same_answer(self):
        a, b = normal(80, 2, seed=4), normal(120, 2, seed=5)
        assert two_sample_auc(a, b, seed=3) == two_sample_auc(a, b, seed=3)

    def test_refuses_more_folds_than_rows(self):
        with pytest.raises(InvalidLatentsError, match="folds"):
            two_sample_auc(normal(4, 2, seed=0), normal(9, 2, seed=1))


class TestAveragePrecision:
    def test_of_a_ranking_known_by_hand(self):
        # Positives at ranks 1 and 3: (1/1 + 2/3) / 2.
        found = average_precision(torch.tensor([1, 0, 1, 0]), np.array([4.0, 3.0, 2.0, 1.0]))
        assert found.auprc == pytest.approx(5 / 6)
        assert found.prevalence == 0.5

    def test_constant_scores_give_the_prevalence(self):
        labels = np.arange(10) < 3
        assert average_precision(labels, np.zeros(10)) == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize("metric", [two_sample_auc, average_precision])
def test_metrics_of_scikit_learn_name_the_extra(metric, monkeypatch):
    for module in ("ensemble", "model_selection", "metrics"):
        monkeypatch.setitem(sys.modules, f"sklearn.{module}", None)
    with pytest.raises(MissingExtraError, match=r"latentprior\[metrics\]"):
        metric(normal(5, 2, seed=0), normal(5, 2, seed=1))
