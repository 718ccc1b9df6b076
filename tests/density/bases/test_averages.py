"""Averages of mixtures: what stages read of them, how they are saved, and when they are made."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import latentprior as lp
from clocks import Clock
from latentprior.density.bases import GaussianMixtureBase, LowRankMixtureBase, MixtureBase
from latentprior.density.bases import mixture_base as mixtures
from latentprior.density.bases.em import Moments
from latentprior.density.bases.mixture_base import MixtureSearch
from latentprior.density.ladder import Ladder
from latentprior.density.ratios import MixtureFeatures, build_ratio
from latentprior.errors import CheckpointError
from latentprior.fitting.start import TRIAL_STEPS
from latentprior.storage.checkpoint import _checksum

DIM, K = 5, 3


def member(kind: type[MixtureBase], seed: int) -> MixtureBase:
    g = torch.Generator().manual_seed(seed)
    factors = 0.4 * torch.randn(K, DIM, DIM, generator=g, dtype=torch.float64)
    covariances = factors @ factors.mT + 0.3 * torch.eye(DIM, dtype=torch.float64)
    means = torch.randn(K, DIM, generator=g, dtype=torch.float64)
    weights = torch.rand(K, generator=g, dtype=torch.float64) + 0.2
    found = Moments(weights / weights.sum(), means, covariances)
    return LowRankMixtureBase.of(found, 2) if kind is LowRankMixtureBase else kind.of(found)


def ring(n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(n, generator=g)
    u = torch.stack([angle.cos(), angle.sin()], 1) * 3 + 0.3 * torch.randn(n, 2, generator=g)
    return torch.cat([u, torch.randn(n, 1, generator=g)], 1)


@pytest.mark.parametrize("kind", [GaussianMixtureBase, LowRankMixtureBase])
def test_stages_read_the_first_of_an_average(kind: type[MixtureBase]) -> None:
    members = [member(kind, seed) for seed in range(3)]
    average = kind.averaged(members)
    u = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([m.log_prob(u) for m in members]).exp().mean(0).log()
    torch.testing.assert_close(average.log_prob(u), expected)
    assert average.members == 3
    torch.testing.assert_close(average.first_member().log_prob(u), members[0].log_prob(u))
    features, alone = MixtureFeatures(average), MixtureFeatures(members[0])
    assert features.size == alone.size == 2 * K + 1
    torch.testing.assert_close(features(u), alone(u))
    from_all = features.of_terms(features.terms_read(average.log_terms(u)), DIM)
    torch.testing.assert_close(from_all, features(u), rtol=1e-12, atol=1e-12)


def test_one_mixture_is_its_own_first() -> None:
    alone = member(GaussianMixtureBase, 0)
    assert alone.first_member() is alone
    assert alone.config() == {"name": "gmm"}


def prior_on_an_average() -> lp.LatentPrior:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(400, DIM, generator=g)
    start = lp.fit(z, base="normal", max_stages=0)
    base = GaussianMixtureBase.averaged([member(GaussianMixtureBase, s) for s in range(2)]).float()
    spec = {"kind": "residual", "event_shape": [DIM], "width": 8, "depth": 1, "bound": 2.0, "features": True}
    ratio = build_ratio(spec, g, base).requires_grad_(False)
    return lp.LatentPrior(Ladder(base, [lp.Stage(ratio, 0.1, 0.0, 0.2, 0.0)]), start.whitening, (DIM,))


def test_a_saved_average_reads_the_same(tmp_path: Path) -> None:
    prior = prior_on_an_average()
    z = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1))
    prior.save_pretrained(tmp_path)
    again = lp.LatentPrior.from_pretrained(tmp_path)
    assert torch.equal(again.log_prob(z), prior.log_prob(z))
    assert again.base.members == 2
    one, other = (p.sample((20,), torch.Generator().manual_seed(0)) for p in (prior, again))
    assert torch.equal(one, other)
    wide = again.to(dtype=torch.float64)
    torch.testing.assert_close(wide.log_prob(z).float(), prior.log_prob(z), atol=1e-4, rtol=0)


@pytest.mark.parametrize("members", [0, 4, -1, 7, "three", None, [2]])
def test_a_saved_average_of_senseless_parts_is_refused(tmp_path: Path, members: object) -> None:
    prior_on_an_average().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["base"]["members"] = members
    file.write_text(json.dumps({**config, "checksum": _checksum(config)}))
    says = r"do not fit together \((6 components of -?\d mixtures|invalid literal for int|int\(\) argument)"
    with pytest.raises(CheckpointError, match=says) as caught:
        lp.LatentPrior.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_average_saved_without_a_word_of_it_is_read_whole(tmp_path: Path) -> None:
    """As priors of before were, whose stages learned from the features of all components."""
    prior = prior_on_an_average()
    config, tensors = prior.state()
    del config["base"]["members"]
    with pytest.raises(CheckpointError):
        lp.LatentPrior.from_state(config, tensors)  # a stage of fewer features is not of that prior
    whole = GaussianMixtureBase(prior.base.log_weights.exp(), prior.base.means, prior.base.cholesky)
    spec = prior.stages[0].network.spec
    ratio = build_ratio(spec, torch.Generator().manual_seed(0), whole).requires_grad_(False)
    stage = lp.Stage(ratio, 0.1, 0.0, 0.2, 0.0)
    older = lp.LatentPrior(Ladder(whole, [stage]), prior.whitening, (DIM,))
    z = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1))
    assert torch.equal(lp.LatentPrior.from_state(*older.state()).log_prob(z), older.log_prob(z))
    assert ratio.features is not None
    assert ratio.features.size == 4 * K + 1


def tailed(n: int, seed: int) -> Tensor:
    """Rows of 32 coordinates, each of a scale of its own, which components share out at random."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 32, generator=g) * torch.exp(0.6 * torch.randn(n, 32, generator=g))


def search(deadline: float | None) -> MixtureSearch[GaussianMixtureBase]:
    same = torch.Generator().manual_seed(0)
    return MixtureSearch(
        GaussianMixtureBase, tailed(4500, 0), tailed(2000, 1), generator=same, deadline=deadline, coarse=True
    )


def test_an_average_is_optional_where_it_costs_time_that_is_short(clock: Clock) -> None:
    with_time, in_a_hurry = search(None), search(time.monotonic() + 3600)
    single = with_time.find()
    assert torch.equal(single.means, in_a_hurry.find().means)
    assert not with_time.average_is_optional
    assert in_a_hurry.average_is_optional
    average = with_time.average()
    assert average.members > 1
    assert torch.equal(average.means, in_a_hurry.average().means)
    assert single.members == 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_average_keeps_to_its_share_of_the_time(clock: Clock, share: float) -> None:
    clock.pace = 0.01
    one = search(time.monotonic() + 3600)
    one.find()
    assert (one.average(share).members == 1) is (share == 0.0)


@pytest.mark.parametrize("gain", [-9.0, 9.0])
def test_time_goes_to_a_stage_that_gains(monkeypatch: pytest.MonkeyPatch, clock: Clock, gain: float) -> None:
    monkeypatch.setattr("latentprior.fitting.start.TRIAL_GAIN_NATS", gain)
    settings = lp.StageSettings(width=32, depth=1, steps=100, batch_size=256)
    prior = lp.fit(tailed(5000, 0), max_stages=1, settings=settings, time_budget=3600, validation=tailed(2000, 1))
    assert (prior.base.members == 1) is (gain < 0)


@pytest.mark.parametrize("name", ["ring", "normal"])
def test_first_steps_that_gain_are_kept(name: str) -> None:
    """A ring is more than four Gaussians say, a normal distribution is not."""
    z = ring(3000, 0) if name == "ring" else torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    events: list[lp.Event] = []
    settings = lp.StageSettings(
        width=32, depth=1, steps=600, batch_size=256, average=0.95, learning_rate=0.01, weight_decay=0.1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentprior.density.bases.full_mixture.MOST_COMPONENTS_COARSE", 4)
        patch.setattr("latentprior.fitting.start.TRIAL_GAIN_NATS", 0.02)
        prior = lp.fit(z, max_stages=1, settings=settings, time_budget=300, callbacks=[events.append])
    begun = [event.step for event in events if event.kind == "stage"]
    assert begun == ([TRIAL_STEPS] if name == "ring" else [0])
    steps = [event.step for event in events if event.kind == "step"]
    assert steps[0] == begun[0] + 1
    assert len(prior.stages) == (name == "ring")
    if name == "ring":
        test = ring(3000, 1)
        rise = prior.log_prob(test).mean() - (prior.base.log_prob(prior.whitening.whiten(test)).mean())
        assert float(rise - prior.whitening.log_abs_det) > 0.1
        assert prior.check_normalizer(draws=50_000).passed


def test_a_dear_size_is_left_out(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    clock.pace = 0.01
    g = torch.Generator().manual_seed(0)
    centres = 9 * torch.randn(40, 2, generator=g)
    rows, held_out = (centres[torch.arange(n) % 40] + 0.1 * torch.randn(n, 2, generator=g) for n in (2000, 1000))
    sizes = GaussianMixtureBase.plan(2000, 2, coarse=True).sizes
    real, tried = mixtures.MixtureSearch.fitted, []
    monkeypatch.setattr(mixtures.MixtureSearch, "fitted", lambda self, k: tried.append(k) or real(self, k))

    def sizes_tried(dear: float, deadline: float | None) -> list[int]:
        tried.clear()
        monkeypatch.setattr(mixtures, "DEAR_FACTOR", dear)
        mixtures.MixtureSearch(GaussianMixtureBase, rows, held_out, generator=g, deadline=deadline, coarse=True).find()
        return list(dict.fromkeys(tried))

    late = time.monotonic() + 3600
    assert sizes_tried(1e9, None) == sizes_tried(20, late) == list(sizes)
    assert sizes_tried(1e9, late) == [k for k in sizes if k != sizes[-2]]
