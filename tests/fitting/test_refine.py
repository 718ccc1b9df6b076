"""Stages that see latents as their decoder shows them."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

import latentprior as lp
from latentprior.density.bases import NormalBase
from latentprior.density.ladder import FreshParticles, Ladder
from latentprior.density.ratios import Gain
from latentprior.density.sampling.resampling import LogMean
from latentprior.fitting.refine import SETTINGS, reweighed

SMALL = dataclasses.replace(SETTINGS, width=64, steps=400, batch_size=128, learning_rate=3e-3)


class Waves(nn.Module):
    """Pictures in which two coordinates make stripes, and their sum a third set of them."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, z: Tensor) -> Tensor:
        across = torch.sin(3 * z[:, :1, None] + 2 * self.grid[None, :, None])
        down = torch.sin(3 * z[:, 1:, None] + 2 * self.grid[None, None, :])
        return torch.stack([across + 0 * down, across * down], 1)


def tilted(z: Tensor) -> Tensor:
    """What the target's log density is more than that of N(0, I), up to a constant."""
    return 1.5 * torch.sin(3 * z[:, 0]) * torch.sin(3 * z[:, 1])


@pytest.fixture(scope="module")
def latents() -> Tensor:
    """Exact draws of N(0, I) tilted, by rejection."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40_000, 2, generator=generator)
    kept = torch.rand(len(z), generator=generator).log() < tilted(z) - 1.5
    return z[kept][:6000]


@pytest.fixture(scope="module")
def prior(latents: Tensor) -> lp.LatentPrior:
    return lp.fit(latents, base="gmm:1", max_stages=0, whitening="none")


@pytest.fixture(scope="module")
def refined(prior: lp.LatentPrior, latents: Tensor) -> lp.LatentPrior:
    return lp.refine(prior, latents, Waves(), settings=SMALL)


def square(side: float = 5.0, n: int = 400) -> tuple[Tensor, float]:
    line = torch.linspace(-side, side, n)
    return torch.cartesian_prod(line, line), (2 * side / (n - 1)) ** 2


def test_the_density_is_that_of_the_target_and_integrates_to_one(
    prior: lp.LatentPrior, refined: lp.LatentPrior
) -> None:
    points, cell = square()
    truth = -0.5 * points.square().sum(1) + tilted(points)
    truth = truth - torch.logsumexp(truth, 0) - math.log(cell)
    with torch.no_grad():
        before, after = prior.log_prob(points), refined.log_prob(points)
    assert float(after.exp().sum() * cell) == pytest.approx(1.0, abs=0.005 + 3 * refined.log_prob_stderr)
    p = truth.exp() * cell
    missed = [float((p * (truth - found)).sum()) for found in (before, after)]
    assert missed[0] > 0.15
    assert missed[1] < 0.25 * missed[0]


def test_samples_follow_the_density(refined: lp.LatentPrior) -> None:
    points, cell = square()
    with torch.no_grad():
        weights = refined.log_prob(points).exp() * cell
    z = refined.sample((4000,), generator=torch.Generator().manual_seed(1))
    wanted, found = (weights * tilted(points)).sum(), tilted(z)
    assert abs(found.mean() - wanted) < 4 * found.std() / 4000**0.5
    assert refined.check_normalizer(draws=20_000).passed


def test_the_stage_tells_what_it_added(prior: lp.LatentPrior, refined: lp.LatentPrior, latents: Tensor) -> None:
    (stage,) = refined.stages
    rise = refined.info["log_prob_held_out"] - prior.info["log_prob_held_out"]
    assert rise > 0.1
    assert stage.diagnostics["log_prob_rise"] == pytest.approx(rise, abs=4 * stage.diagnostics["log_prob_rise_stderr"])
    assert stage.log_normalizer == pytest.approx(refined.normalizer.value - prior.normalizer.value)
    assert len(prior.stages) == 0
    assert refined.info["stopped"] == "refined"


def test_its_result_can_be_refined_again(prior: lp.LatentPrior, latents: Tensor) -> None:
    """A first stage that may say little leaves the rest to a second one."""
    heard, short = [], dataclasses.replace(SMALL, steps=100, bound=0.3)
    first = lp.refine(prior, latents, Waves(), settings=short, callbacks=[heard.append])
    second = lp.refine(first, latents, Waves(), settings=SMALL, callbacks=[heard.append])
    assert [len(first.stages), len(second.stages)] == [1, 2]
    assert second.info["log_prob_held_out"] > first.info["log_prob_held_out"] + 0.05
    points, cell = square()
    with torch.no_grad():
        density = second.log_prob(points).exp() * cell
    assert float(density.sum()) == pytest.approx(1.0, abs=0.005 + 3 * second.log_prob_stderr)
    assert second.normalizer.value == pytest.approx(sum(stage.log_normalizer for stage in second.stages))
    told = [event.kind for event in heard if event.kind not in ("step", "evaluate")]
    assert told == 2 * ["stage", "learned", "normalizer", "end"]


class First(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return u[:, 0]


def test_a_stage_learned_on_chains_is_measured_on_particles_held_out(generator: torch.Generator) -> None:
    """f = u of rows of N(1, 1) and particles of N(0, 1): log Z is 1/2, the rise 1 - 1/2."""
    position = torch.randn(64_000, 1, generator=generator)
    position[: 64_000 * 7 // 8] = 9.0  # what has been learned from does not count
    before = FreshParticles(position, "smc", LogMean(0.3, 0.1, 0.9), 0.5, 0.6)
    rows = 1 + torch.randn(4000, 1, generator=generator)
    (stage,) = Ladder(NormalBase(1)).times(First(), reweighed(First(), before), Gain(0.3, 0.01), rows).stages
    assert stage.log_normalizer == pytest.approx(0.5, abs=4 * stage.log_normalizer_stderr)
    assert stage.log_normalizer_stderr < 0.03
    assert stage.diagnostics["log_prob_rise"] == pytest.approx(0.5, abs=0.1)
    assert stage.is_worthwhile


def test_a_saved_one_needs_its_decoder(refined: lp.LatentPrior, latents: Tensor, tmp_path) -> None:
    refined.save_pretrained(tmp_path / "prior")
    loaded = lp.LatentPrior.from_pretrained(tmp_path / "prior", decoder=Waves())
    torch.testing.assert_close(loaded.log_prob(latents[:50]), refined.log_prob(latents[:50]))
    with pytest.raises(lp.CheckpointError, match="decoder="):
        lp.LatentPrior.from_pretrained(tmp_path / "prior")
    other = Waves()
    with torch.no_grad():
        other.grid.mul_(1.2)
    with pytest.raises(lp.CheckpointError, match="not the decoder"):
        lp.LatentPrior.from_pretrained(tmp_path / "prior", decoder=other)
    with pytest.raises(lp.CheckpointError, match="maps"):
        lp.LatentPrior.from_pretrained(tmp_path / "prior", decoder=lambda z: z)


def test_a_model_saves_the_decoder_with_it(refined: lp.LatentPrior, latents: Tensor, tmp_path) -> None:
    decoder = Waves()
    with torch.no_grad():
        decoder.grid.copy_(torch.linspace(-1, 1, 8))
    lp.LatentVariableModel(decoder, refined).save_pretrained(tmp_path / "model")
    empty = Waves()
    with torch.no_grad():
        empty.grid.zero_()
    loaded = lp.LatentVariableModel.from_pretrained(tmp_path / "model", decoder=empty)
    torch.testing.assert_close(loaded.prior.log_prob(latents[:20]), refined.log_prob(latents[:20]))


def test_it_is_written_as_an_onnx_graph(refined: lp.LatentPrior, latents: Tensor, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    path = tmp_path / "density.onnx"
    lp.export_onnx(refined, path)
    session = runtime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: latents[:30].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), refined.log_prob(latents[:30]), atol=1e-3, rtol=0)


def test_the_weights_of_the_decoder_are_not_saved(refined: lp.LatentPrior) -> None:
    _, tensors = refined.state()
    assert not [name for name in tensors if "decoder" in name]
    assert [name for name in tensors if name.startswith("stages.0.network.convs")]


def test_the_decoder_is_left_as_it_was(prior: lp.LatentPrior, latents: Tensor) -> None:
    decoder = nn.Sequential(Waves(), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    before = copy.deepcopy(decoder.state_dict())
    lp.refine(prior, latents[:500], decoder, settings=dataclasses.replace(SMALL, steps=50))
    assert decoder.training
    assert all(p.requires_grad for p in decoder.parameters())
    torch.testing.assert_close(decoder.state_dict(), before)


def test_a_function_will_do_and_moves_with_the_prior(refined: lp.LatentPrior, latents: Tensor) -> None:
    wide = refined.to(dtype=torch.float64)
    torch.testing.assert_close(
        wide.log_prob(latents[:20].double()).float(), refined.log_prob(latents[:20]), atol=1e-4, rtol=0
    )
    waves = Waves().requires_grad_(False)
    settings = dataclasses.replace(SMALL, steps=200)
    plain = lp.fit(latents, base="gmm:1", max_stages=0)
    by_function = lp.refine(plain, latents, waves.forward, settings=settings)
    assert len(by_function.stages) == 1


def test_nothing_to_learn_leaves_the_prior_itself() -> None:
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    prior = lp.fit(z, base="gmm:1", max_stages=0)
    heard = []
    same = lp.refine(prior, z, Waves(), settings=dataclasses.replace(SMALL, steps=100), callbacks=[heard.append])
    assert same is prior
    assert heard[-1].message in ("no gain", "no rise")


def test_no_time_leaves_the_prior_itself(prior: lp.LatentPrior, latents: Tensor) -> None:
    heard = []
    assert lp.refine(prior, latents, Waves(), settings=SMALL, time_budget=0.0, callbacks=[heard.append]) is prior
    assert heard[-1].message == "time_budget"


def _without_gradient(z: Tensor) -> Tensor:
    with torch.no_grad():
        return Waves()(z)


@pytest.mark.parametrize(
    ("decoder", "told"),
    [
        (_without_gradient, "no gradient"),
        (lambda z: z, "maps"),
        (lambda z: Waves()(z)[:1].log() * math.nan, "maps|finite"),
        (lambda z: Waves()(z) * math.inf, "finite"),
        (lambda z: None, "NoneType"),
    ],
)
def test_decoders_of_no_use_are_named(prior: lp.LatentPrior, latents: Tensor, decoder, told: str) -> None:
    with pytest.raises(lp.LatentPriorError, match=told):
        lp.refine(prior, latents, decoder, settings=SMALL)


def test_senseless_calls_are_named(prior: lp.LatentPrior, latents: Tensor) -> None:
    with pytest.raises(lp.InvalidLatentsError, match="shape"):
        lp.refine(prior, torch.ones(100, 3), Waves())
    with pytest.raises(lp.LatentPriorError, match="decoded"):
        lp.refine(prior, latents, Waves(), settings=lp.StageSettings(ratio="mlp"))
    with pytest.raises(lp.LatentPriorError, match="time_budget"):
        lp.refine(prior, latents, Waves(), time_budget=-1.0)
    with pytest.raises(lp.LatentPriorError, match="refine"):
        lp.fit(latents, settings=lp.StageSettings(ratio="decoded"))
