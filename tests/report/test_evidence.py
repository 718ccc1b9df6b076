import itertools
import math

import pytest
import torch
from torch import nn

import latentprior as lp
from latentprior.density.bases import NormalBase
from latentprior.density.ladder import Ladder
from latentprior.density.whitening import Whitening
from latentprior.report import evidence
from latentprior.report.sources import Rows


class Slope(nn.Module):
    """log ratio a * u_0, which moves N(0, 1) to N(a, 1); its log normaliser is a^2 / 2."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, u):
        return self.a * u[:, 0]


def sloped(*slopes, d=1):
    stages, total = [], 0.0
    for a in slopes:
        c = 0.5 * ((total + a) ** 2 - total**2)
        stages.append(lp.Stage(Slope(a), c, 0.01, 0.5, 0.1))
        total += a
    eye = torch.eye(d)
    whitening = Whitening(torch.full((d,), 3.0), eye / 2, eye * 2, torch.tensor(-d * math.log(2.0)), "full")
    return lp.LatentPrior(Ladder(NormalBase(d).float(), stages), whitening, (d,))


def test_stages_are_drawn_from_their_own_densities():
    n = 1000
    prior = sloped(0.5, 0.5)
    draws = evidence.stage_draws(prior, n, seed=1)
    assert [draw.stage for draw in draws] == [0, 1, 2]
    assert all(draw.shared for draw in draws)
    for draw, mean in zip(draws, (0.0, 0.5, 1.0), strict=True):
        u = (draw.z - 3) / 2
        # Four standard errors of the mean and of the spread (one false alarm in 5,000), and the bias of order one over
        # the 32 candidates a slot.
        assert float(u.mean()) == pytest.approx(mean, abs=4 / math.sqrt(n) + 0.03)
        assert float(u.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * n) + 0.03)


def test_a_stage_that_changes_little_keeps_most_draws():
    same, moved = (
        [float((a.z == b.z).flatten(1).all(1).double().mean()) for a, b in itertools.pairwise(found)]
        for found in (evidence.stage_draws(sloped(slope, d=2), 64, seed=0) for slope in (0.02, 1.0))
    )
    assert same[0] > 0.9
    assert moved[0] < 0.7


def test_a_stage_out_of_reach_is_drawn_by_itself():
    base, far = evidence.stage_draws(sloped(3.0), 64, seed=0)
    assert base.shared
    assert not far.shared
    # A quarter of the draws' standard deviation: SMC finds its way.
    assert float(((far.z - 3) / 2).mean()) == pytest.approx(3.0, abs=0.5)


def test_many_stages_are_thinned_with_both_ends():
    assert evidence.shown_stages(3) == [0, 1, 2, 3]
    shown = evidence.shown_stages(40)
    assert (len(shown), shown[0], shown[-1]) == (12, 0, 40)
    assert len(set(shown)) == 12


def test_log_density_by_stage_ends_at_the_prior(learned, crescent):
    found = evidence.held_out_by_stage(learned, crescent[:200])
    values = learned.log_prob(crescent[:200]).double()
    assert len(found) == 3
    # The last stage's normaliser takes what log Z of the whole corrects: the sums agree.
    assert found[-1].value == pytest.approx(float(values.mean()), abs=1e-4)
    rows = float(values.std()) / math.sqrt(200)
    assert found[-1].stderr == pytest.approx(math.hypot(rows, learned.log_prob_stderr), rel=0.2)
    assert found[0].rise_stderr == 0
    assert 0 < found[-1].rise_stderr < found[-1].stderr


def test_nearest_rows_and_distances():
    reference = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]) + 1e4
    found = evidence.nearest(torch.tensor([[9.0, 0.0], [0.0, 10.0], [3.0, 4.0]]) + 1e4, reference)
    assert found.row.tolist() == [1, 2, 0]
    torch.testing.assert_close(found.distance, torch.tensor([1.0, 0.0, 5.0]) / math.sqrt(2), atol=1e-3, rtol=0)


def test_oddest_rows_come_first():
    prior = sloped(0.0, d=2)
    z = torch.full((50, 2), 3.0)
    z[17], z[4] = 30.0, -10.0
    rows = Rows(z, z, None, torch.arange(100, 150), "z")
    index, scores = evidence.oddest(prior, None, rows, 3)
    assert index[:2].tolist() == [17, 4]
    torch.testing.assert_close(scores, -prior.log_prob(z[index]).double())


def test_principal_axes_are_those_of_the_covariance(generator):
    scales = torch.tensor([0.1, 5.0, 1.0])
    mean, axes, shares = evidence.principal_axes(7 + scales * torch.randn(4000, 3, generator=generator), 2)
    torch.testing.assert_close(mean.float(), torch.full((3,), 7.0), atol=0.4, rtol=0)
    torch.testing.assert_close(axes.float(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), atol=0.05, rtol=0)
    assert shares[0] == pytest.approx(25 / 26.01, abs=0.01)


def test_limits_hold_nearly_all_points(generator):
    points = torch.randn(1000, 2, generator=generator)
    points[0] = 1e6
    low, high = evidence.plane_limits([points, points + 1])
    assert 0.98 < float(((points >= low) & (points <= high)).all(1).double().mean()) < 1
    assert float(high[0]) < 10


def test_too_few_rows_are_not_told_apart(generator):
    z = torch.randn(30, 2, generator=generator)
    assert evidence.two_sample(z, z[:10], 0) is None
    assert evidence.two_sample(z, z + 10, 0).auc > 0.95
