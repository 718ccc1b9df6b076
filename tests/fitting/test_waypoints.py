import math

import pytest
import torch
from torch import Tensor

import latentprior as lp
from latentprior import LatentPriorError, StageSettings
from latentprior.data.latents import Latents
from latentprior.density.bases import NormalBase
from latentprior.density.ladder import Ladder
from latentprior.density.whitening import Whitening
from latentprior.evaluation.known_densities import CorrelatedGaussian
from latentprior.fitting.rows import Target
from latentprior.fitting.waypoints import Waypoint, learn_waypoints

DIM = 8
TRUTH = CorrelatedGaussian(DIM, 0.9)
SETTINGS = StageSettings(
    ratio="quadratic", bound=30.0, waypoints=3, steps=400, batch_size=256, learning_rate=0.05, weight_decay=0.0,
    average=0.98,
)  # fmt: skip


def rows(n: int, seed: int = 0) -> Tensor:
    return TRUTH.sample((n,), torch.Generator().manual_seed(seed)).float()


def aim(n: int = 2000) -> Target:
    z = rows(n)
    return Target(Latents(z), torch.arange(n - 500), z[n - 500 :], Whitening.fit([z], "none").float())


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_waypoints_have_the_covariance_between(step: int) -> None:
    angle = 0.5 * math.pi * step / 3
    waypoint = Waypoint(aim(40_000), NormalBase(DIM).float(), angle)
    for draw, rows in ((waypoint.draw, 20_000), (waypoint.held_out, 500)):
        u = draw(20_000, torch.Generator().manual_seed(1))
        # Four pairs of 20,000 rows made of so many rows: six standard errors, by the variance 1 + c^2 < 2 of a product
        # and of the mean of two squares; a false alarm in fewer than 1 of 10^7.
        error = 6 * math.sqrt(2 / (4 * rows))
        assert abs((u[:, ::2] * u[:, 1::2]).mean() - 0.9 * math.sin(angle) ** 2) < error
        assert abs(u.square().mean() - 1) < error
    held_out = waypoint.held_out(500, torch.Generator().manual_seed(2))
    if step == 3:
        torch.testing.assert_close(held_out, waypoint.target.held_out, atol=1e-6, rtol=0)


def test_stages_between_waypoints_sum_to_the_log_ratio() -> None:
    target = aim(20_000)
    stages = learn_waypoints(target, Ladder(NormalBase(DIM).float()), SETTINGS, (DIM,), 0).stages
    assert len(stages) == 3
    test = rows(5000, 9)
    base = torch.distributions.Normal(0.0, 1.0)
    exact = TRUTH.log_prob(test) - base.log_prob(test).sum(1)
    with torch.no_grad():
        learned = sum(stage.network(test) for stage in stages)
    # Exact: 3.32 nats. No stage alone gives that much.
    assert abs(float(learned.mean() - exact.mean())) < 0.05 * TRUTH.mutual_information
    assert max(float(s.network(test).mean()) for s in stages) < 0.8 * TRUTH.mutual_information
    assert all(0 < s.gain < 1.2 for s in stages)
    # Each normaliser is near 1, as learned ratios of normalised densities have it.
    assert abs(sum(s.log_normalizer for s in stages)) < 0.2
    again = learn_waypoints(target, Ladder(NormalBase(DIM).float()), SETTINGS, (DIM,), 0).stages
    assert [s.log_normalizer for s in again] == [s.log_normalizer for s in stages]


def test_fit_starts_on_waypoints(tmp_path) -> None:
    z = rows(8000)
    seen = []
    options = {"base": "normal", "whitening": "none", "settings": SETTINGS, "max_stages": 3, "checkpoint_dir": tmp_path}
    prior = lp.fit(z, callbacks=[lambda event: seen.append(event.kind)], **options)
    assert seen.count("learned") == len(prior.stages) == 3
    assert prior.ladder.cover is None
    assert all(s.diagnostics["particles"] == "waypoints" for s in prior.stages)
    test = rows(5000, 9)
    rise = (prior.log_prob(test) - prior.ladder.base.log_prob(test)).mean()
    assert abs(float(rise) - TRUTH.mutual_information) < 0.1 * TRUTH.mutual_information
    again = lp.fit(z, resume=True, **options)
    assert torch.equal(prior.log_prob(test), again.log_prob(test))
    prior.save_pretrained(tmp_path / "saved")
    loaded = lp.LatentPrior.from_pretrained(tmp_path / "saved")
    assert torch.equal(prior.log_prob(test), loaded.log_prob(test))


def test_waypoints_need_stages() -> None:
    with pytest.raises(LatentPriorError, match="waypoints need as many stages"):
        lp.fit(rows(100), max_stages=2, settings=SETTINGS)
    with pytest.raises(LatentPriorError, match="waypoints must be"):
        StageSettings(waypoints=-1)
