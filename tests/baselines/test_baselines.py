"""Each rival on pictures of a blob on two broken rings: latents of two dimensions, and nothing like N(0, I)."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from latentprior.baselines import (
    RIVALS,
    LatentFlowConfig,
    LatentGMMConfig,
    LEBMConfig,
    NCPVAEConfig,
    RAEConfig,
    SRIConfig,
    TwoStageDistribution,
    TwoStageVAEConfig,
    VAEConfig,
    train_lebm,
    train_ncp_vae,
    train_rae,
    train_sri,
    train_two_stage_vae,
    train_vae,
    two_stage_vae,
)
from latentprior.baselines.lebm import contrastive_loss
from latentprior.data.images import Images
from latentprior.density.bases import GaussianMixtureBase
from latentprior.density.ratios import BoundedRatio
from latentprior.errors import CheckpointError, LatentPriorError, LearningDivergedError
from latentprior.models.inference import short_run
from latentprior.models.model import LatentVariableModel
from latentprior.models.networks import build_decoder, build_encoder, network_spec
from latentprior.runtime.events import Event
from latentprior.training import autoencoder as autoencoder_training
from latentprior.training import chains
from latentprior.training.chains import PosteriorChains, PriorChains

VAE = {"steps": 400, "batch_size": 64, "learning_rate": 5e-3, "average": 0.98}
CHAINS = {"steps": 150, "batch_size": 64, "learning_rate": 5e-3, "average": 0.98}
CHAINS |= {"posterior_steps": 15, "posterior_step_size": 0.2}
RATIO = replace(NCPVAEConfig().ratio, steps=300, width=32, depth=1)
CONFIGS: dict[str, Any] = {
    "vae": VAEConfig(**VAE),
    "two_stage_vae": TwoStageVAEConfig(**VAE, second_steps=300, width=32, depth=2),
    "rae": RAEConfig(**VAE),
    "sri": SRIConfig(**CHAINS),
    "ncp_vae": NCPVAEConfig(**VAE, ratio=RATIO),
    "lebm": LEBMConfig(**CHAINS, energy_learning_rate=2e-3, width=16, depth=1, prior_steps=15, held_out=60),
    "latent_gmm": LatentGMMConfig(**VAE, components=4),
    "latent_flow": LatentFlowConfig(**VAE),
}
SHARING = ("vae", "two_stage_vae", "ncp_vae", "latent_gmm", "latent_flow")


def pictures(n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    angle = 1.5 * math.pi * torch.rand(n, generator=g)
    radius = torch.where(torch.rand(n, generator=g) < 0.3, 1.2, 2.6) + 0.1 * torch.randn(n, generator=g)
    x, y = (3.5 + radius * part for part in (angle.cos(), angle.sin()))
    grid = torch.arange(8.0)
    square = (grid - x[:, None]).square()[:, None, :] + (grid - y[:, None]).square()[:, :, None]
    return (2 * (-square / 3).exp() - 1)[:, None]


def untrained(seed: int = 0, width: int = 32) -> LatentVariableModel:
    spec, g = network_spec("mlp", 2, width, (1, 8, 8)), torch.Generator().manual_seed(seed)
    return LatentVariableModel(build_decoder(spec, g), None, 0.3, build_encoder(spec, g))


@cache
def trained(name: str) -> LatentVariableModel:
    """Each rival is trained once; those on a VAE share one."""
    options = {"autoencoder": trained("vae")} if name in SHARING and name != "vae" else {}
    return RIVALS[name](untrained(), Images(pictures(600, 0)), CONFIGS[name], **options)


def draws(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(a: Tensor, b: Tensor) -> float:
    """How far pictures of either set are from the nearest one of the other, on average."""
    pairs = torch.cdist(a.flatten(1), b.flatten(1))
    return float(pairs.min(0).values.mean() + pairs.min(1).values.mean())


def integral(model: LatentVariableModel, reach: float = 12.0, points: int = 400) -> float:
    axis = torch.linspace(-reach, reach, points)
    grid = torch.cartesian_prod(axis, axis)
    return float(model.prior.log_prob(grid).double().exp().sum() * (axis[1] - axis[0]).double() ** 2)


@pytest.mark.parametrize("name", [pytest.param(r, marks=[pytest.mark.slow] * (r == "lebm")) for r in RIVALS])
def test_rival_generates_reconstructs_and_scores(name: str) -> None:
    model, real = trained(name), pictures(300, 1)
    images = model.generate(300, generator=draws(), **model.sampler)
    assert images.shape == (300, 1, 8, 8)
    # An untrained model stands at 14.7, real pictures against real ones at 0.36.
    assert distance(images, real) < 0.35 * distance(untrained().generate(300, generator=draws()), real)

    x = real[:60]
    error = (model.reconstruct(x, generator=draws()) - x).square().mean()
    spread = (x - pictures(600, 0).mean(0)).square().mean()
    # Without an encoder the search begins at random, and some end in a wrong mode.
    assert error < (0.2 if model.encoder is not None else 0.8) * spread

    z = model.prior.sample((50,), generator=draws())
    assert model.prior.log_prob(z).isfinite().all()
    scores = model.anomaly_score(x, z=model.infer(x, steps=10, generator=draws()))
    assert scores.shape == (60,)
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.filterwarnings("ignore::latentprior.errors.NormalizerBracketWarning")
def test_rival_is_a_function_of_its_seed_and_tells_every_step(name: str) -> None:
    config, x = replace(CONFIGS[name], steps=4), Images(pictures(120, 0))
    if name == "two_stage_vae":
        config = replace(config, second_steps=4)
    if name == "ncp_vae":
        config = replace(config, ratio=replace(RATIO, steps=20, batch_size=64))
    heard: list[Event] = []
    made = [
        RIVALS[name](untrained(), x, config, seed=seed, callbacks=told)
        for seed, told in ((1, [heard.append]), (1, ()), (2, ()))
    ]
    images = [model.generate(8, generator=draws()) for model in made]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    first = [event for event in heard if event.kind not in ("normalizer", "end", "prior")]
    assert [event.step for event in first] == [1, 2, 3, 4]
    assert all(event.losses["reconstruction"] > 0 and event.steps == 4 for event in first)
    assert not any(parameter.requires_grad for parameter in made[0].parameters())


class Halt(Exception):
    pass


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.filterwarnings("ignore::latentprior.errors.NormalizerBracketWarning")
def test_a_stopped_rival_goes_on_to_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder_training, "SAVE_STEPS", 4)
    monkeypatch.setattr(two_stage_vae, "SAVE_STEPS", 4)
    config, x = replace(CONFIGS[name], steps=10), Images(pictures(120, 0))
    if name == "two_stage_vae":
        config = replace(config, second_steps=10)
    if name == "ncp_vae":
        config = replace(config, ratio=replace(RATIO, steps=100, batch_size=64))
    if name in ("sri", "lebm"):
        training_of = type(config).training
        monkeypatch.setattr(type(config), "training", lambda self: replace(training_of(self), evaluate_every=4))

    def learned(callbacks: Any = (), **options: Any) -> LatentVariableModel:
        return RIVALS[name](untrained(), x, config, seed=1, callbacks=callbacks, **options)

    def stop_after(events: int) -> Any:
        seen: list[Event] = []

        def heard(event: Event) -> None:
            seen.append(event)
            if len(seen) == events:
                raise Halt

        return heard

    whole, options = learned(), {"checkpoint_dir": tmp_path, "resume": True}
    # From the start to step 6, from step 4 to 9, and of a second part from its start to a step past its first save.
    for events in (6, 5, 8 if name == "two_stage_vae" else 0):
        if events:
            with pytest.raises(Halt):
                learned([stop_after(events)], **options)
    heard: list[Event] = []
    again = learned([heard.append], **options)
    assert heard[0].step == (5 if name == "two_stage_vae" else 9)
    for one, other in zip(whole.state()[1].items(), again.state()[1].items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1]), one[0]
    z = torch.randn(20, 2, generator=draws())
    assert torch.equal(whole.prior.log_prob(z), again.prior.log_prob(z))
    # Once more from what is saved at the end, and nothing of another run's.
    assert torch.equal(learned(**options).prior.log_prob(z), whole.prior.log_prob(z))
    with pytest.raises(CheckpointError, match="another folder"):
        RIVALS[name](untrained(), x, replace(config, steps=11), seed=1, **options)


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "two_stage_vae"])
def test_rival_saves_and_loads(name: str, tmp_path: Path) -> None:
    model = trained(name)
    model.save_pretrained(tmp_path)
    again = LatentVariableModel.from_pretrained(tmp_path)
    z = model.prior.sample((20,), generator=draws())
    assert torch.equal(again.prior.log_prob(z), model.prior.log_prob(z))
    sampler = again.sampler
    assert sampler == model.sampler
    assert torch.equal(again.generate(9, generator=draws(), **sampler), model.generate(9, generator=draws(), **sampler))


def test_two_stage_vae_loads_with_its_distribution_and_says_so_without(tmp_path: Path) -> None:
    model = trained("two_stage_vae")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="torch Distribution of yours"):
        LatentVariableModel.from_pretrained(tmp_path)
    again = LatentVariableModel.from_pretrained(tmp_path, prior=model.prior.base.distribution)
    assert torch.equal(again.generate(9, generator=draws()), model.generate(9, generator=draws()))


# VAE ---------------------------------------------------------------------------------------------------------


def test_vae_learns_sigma_or_keeps_it() -> None:
    x = Images(pictures(200, 0))
    assert trained("vae").sigma < 0.2
    assert train_vae(untrained(), x, VAEConfig(steps=5, learn_sigma=False)).sigma == 0.3


def test_a_trained_autoencoder_is_shared_not_changed() -> None:
    vae = trained("vae")
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    model = train_vae(untrained(7), Images(pictures(50, 0)), autoencoder=vae)
    for shared in (model, trained("latent_gmm"), trained("ncp_vae")):
        assert shared.decoder is not vae.decoder
        assert shared.sigma == vae.sigma
        assert all(torch.equal(v, before[k]) for k, v in shared.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())


def test_autoencoders_that_do_not_fit_are_refused() -> None:
    x, without = Images(pictures(50, 0)), untrained()
    without.encoder = None
    with pytest.raises(LatentPriorError, match="needs a model with an encoder"):
        train_vae(without, x)
    with pytest.raises(LatentPriorError, match="no encoder"):
        train_vae(untrained(), x, autoencoder=without)
    with pytest.raises(LatentPriorError, match="other networks"):
        train_vae(untrained(), x, autoencoder=untrained(width=16))


# Two-stage VAE -----------------------------------------------------------------------------------------------


class Affine(nn.Module):
    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.matrix, self.offset = matrix, offset

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T + self.offset


def linear_two_stage(scale: float, samples: int) -> tuple[TwoStageDistribution, MultivariateNormal]:
    r"""g(u) = diag(a) u + b, whose posterior is diagonal and linear; q is that posterior, ``scale`` times as wide."""
    a, b, gamma = torch.tensor([2.0, -0.5]), torch.tensor([0.3, -1.0]), 0.7
    variance = 1 / (1 + a.square() / gamma**2)
    gain = variance * a / gamma**2
    log_scale = 0.5 * variance.log() + math.log(scale)
    encoder = Affine(torch.cat([gain.diag(), torch.zeros(2, 2)]), torch.cat([-gain * b, log_scale]))
    noise = torch.randn(samples, 2, generator=draws())
    exact = MultivariateNormal(b, (a.square() + gamma**2).diag())
    return TwoStageDistribution(encoder, Affine(a.diag(), b), gamma, noise, [2]), exact


def test_two_stage_log_prob_is_exact_under_the_exact_posterior() -> None:
    made, exact = linear_two_stage(1.0, 3)
    z = 2 * torch.randn(40, 2, generator=draws(1))
    torch.testing.assert_close(made.log_prob(z), exact.log_prob(z), atol=1e-5, rtol=1e-5)
    assert made.log_prob(z[:0]).shape == (0,)
    assert made.log_prob(z.reshape(4, 10, 2)).shape == (4, 10)
    assert torch.equal(made.log_prob(z[0]), made.log_prob(z)[0])


def test_two_stage_log_prob_is_a_bound_that_tightens_and_differentiates() -> None:
    z = 2 * torch.randn(40, 2, generator=draws(1))
    gaps = []
    for samples in (20, 4000):
        made, exact = linear_two_stage(0.5, samples)
        gaps.append(float((exact.log_prob(z) - made.log_prob(z)).mean()))
    # A q too narrow loses for certain: with 20 draws by a lot, with 4,000 by less.
    assert gaps[0] > gaps[1] > -0.02
    made, exact = linear_two_stage(1.0, 3)
    slopes = []
    for density in (made, exact):
        point = z.clone().requires_grad_(True)
        density.log_prob(point).sum().backward()
        assert point.grad is not None
        slopes.append(point.grad)
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-4, rtol=1e-4)


def test_two_stage_samples_are_ancestral() -> None:
    made, exact = linear_two_stage(1.0, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = made.sample((200, 100))
    assert z.shape == (200, 100, 2)
    rows = z.reshape(-1, 2)
    # 20,000 draws: five standard errors of means and variances, a false alarm in 400,000 runs.
    variance = exact.covariance_matrix.diagonal()
    assert ((rows.mean(0) - exact.mean).abs() < 5 * (variance / 20_000).sqrt()).all()
    assert ((rows.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / 20_000)).all()


def test_two_stage_density_of_latents_beats_the_normal() -> None:
    model = trained("two_stage_vae")
    z, _ = model.encode(pictures(300, 1))
    assert model.prior.log_prob(z).mean() > trained("vae").prior.log_prob(z).mean()
    # A lower bound of a normalised density.
    assert 0.9 < integral(model, points=150) < 1.02


def test_two_stage_state_gives_the_same_distribution_and_a_damaged_one_is_refused() -> None:
    distribution = trained("two_stage_vae").prior.base.distribution
    config, tensors = distribution.state()
    z = torch.randn(20, 2, generator=draws())
    again = TwoStageDistribution.from_state(json.loads(json.dumps(config)), tensors)
    assert torch.equal(again.log_prob(z), distribution.log_prob(z))
    assert (config["width"], config["depth"]) == (32, 2)
    for damaged in ({**config, "width": 31}, {**config, "depth": 10**9}, {**config, "gamma": 0.0}, {}):
        with pytest.raises(CheckpointError, match="do not fit together"):
            TwoStageDistribution.from_state(damaged, tensors)
    with pytest.raises(CheckpointError, match="do not fit together"):
        TwoStageDistribution.from_state(config, {k: v for k, v in tensors.items() if k != "noise"})


def test_two_stage_diverging_says_what_to_lower() -> None:
    config = TwoStageVAEConfig(second_learning_rate=1e20, second_steps=9, width=8)
    with pytest.raises(LearningDivergedError, match="second_learning_rate"):
        train_two_stage_vae(untrained(), Images(pictures(60, 0)), config, autoencoder=trained("vae"))
    with pytest.raises(LatentPriorError, match="samples must be 1 or more"):
        TwoStageVAEConfig(samples=0)


# RAE ---------------------------------------------------------------------------------------------------------


def test_rae_fits_a_mixture_of_ten_after_a_penalised_autoencoder() -> None:
    model, x = trained("rae"), Images(pictures(200, 0))
    assert isinstance(model.prior.base, GaussianMixtureBase)
    assert model.prior.base.n_components == 10
    norms, weights = [], []
    for penalty, decay in ((0.0, 0.0), (10.0, 5.0)):
        config = RAEConfig(**{**VAE, "steps": 60}, latent_penalty=penalty, weight_decay=decay, components=2)
        made = train_rae(untrained(), x, config)
        norms.append(float(made.encode(pictures(50, 1))[0].norm(dim=1).mean()))
        weights.append(sum(float(p.square().sum()) for p in made.decoder.parameters()))
    assert norms[1] < 0.5 * norms[0]
    assert weights[1] < 0.5 * weights[0]


# Short-run inference -----------------------------------------------------------------------------------------


def test_sri_has_neither_prior_stages_nor_an_encoder() -> None:
    model = trained("sri")
    assert model.prior.stages == ()
    assert model.prior.base.name == "normal"
    assert model.encoder is None
    assert model.sigma == 0.3


@pytest.mark.parametrize("persistent", [False, True])
def test_persistent_chains_start_where_they_were_left(persistent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, ends = [], []

    def watched(start: Tensor, *arguments: Any, **options: Any) -> Tensor:
        starts.append(start)
        ends.append(short_run(start, *arguments, **options))
        return ends[-1]

    monkeypatch.setattr(chains, "short_run", watched)
    # Every step sees all images that are not held out, in another order.
    config = replace(CONFIGS["sri"], steps=2, batch_size=30, persistent=persistent)
    train_sri(untrained(), Images(pictures(32, 0)), config)
    left, taken_up = (z[z[:, 0].argsort()] for z in (ends[0], starts[1]))
    assert torch.equal(left, taken_up) == persistent


# Noise contrastive prior -------------------------------------------------------------------------------------


def test_ncp_learns_exactly_one_ratio_in_the_models_own_coordinates() -> None:
    model = trained("ncp_vae")
    assert len(model.prior.stages) == 1
    ratio = model.prior.stages[0].network
    assert isinstance(ratio, BoundedRatio)
    assert ratio.bound == 50.0
    assert ratio.features is None
    assert model.prior.base.name == "normal"
    assert model.prior.whitening.kind == "none"
    # Proposals come from N(0, I) alone.
    assert model.prior.ladder.start is model.prior.base
    assert model.sampler == {"sampler": "sir", "candidates": 256}


def test_ncp_density_is_normalised_and_better_than_the_normal() -> None:
    model = trained("ncp_vae")
    # Three standard errors, and one percent for the grid.
    assert abs(integral(model) - 1) < 0.01 + 3 * model.prior.log_prob_stderr
    z, _ = model.encode(pictures(300, 1))
    assert model.prior.log_prob(z).mean() > trained("vae").prior.log_prob(z).mean() + 0.02


@pytest.mark.filterwarnings("ignore::latentprior.errors.NormalizerBracketWarning")
def test_ncp_stays_silent_where_its_single_stage_saturates() -> None:
    """Latents far from N(0, I): the gain nears its largest, and more stages are no advice for this method."""
    images, vae = Images(pictures(200, 0)), untrained()
    assert vae.encoder is not None
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(0.1)
        vae.encoder.layers[-1].bias[:2] = 2.5
        vae.encoder.layers[-1].bias[2:] = -2.0
    config = NCPVAEConfig(ratio=replace(RATIO, steps=100))
    model = train_ncp_vae(untrained(), images, config, autoencoder=vae)
    assert model.prior.stages[0].gain > 1.2


# Energy-based prior ------------------------------------------------------------------------------------------


def test_energy_gradient_is_the_contrastive_difference() -> None:
    """f(z) = w . z + v z_0^2: the gradient of minus log likelihood is E- of (z, z_0^2) less E+ of it."""
    w, v = torch.tensor([0.5, -2.0], requires_grad=True), torch.tensor(0.3, requires_grad=True)
    posterior = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    prior = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, -5.0]])
    contrastive_loss(*(z @ w + v * z[:, 0].square() for z in (posterior, prior))).backward()
    assert w.grad is not None
    assert v.grad is not None
    torch.testing.assert_close(w.grad, torch.tensor([1.0 - 2.0, -1.0 - 0.0]))
    torch.testing.assert_close(v.grad, torch.tensor(5 / 3 - 5.0))


def test_lebm_prior_is_one_normalised_unbounded_energy() -> None:
    model = trained("lebm")
    (stage,) = model.prior.stages
    assert model.encoder is None
    # Likelihood learning need not tell latents from N(0, I): in so short a run rounding decides the gain's sign.
    assert stage.gain < 2 * math.log(2)
    assert stage.gain_stderr > 0
    assert stage.log_normalizer == model.prior.normalizer.value
    # Far beyond any bound of a ladder's stage, the energy goes through unchanged.
    plain = stage.network.network(torch.full((1, 2), 200.0))
    torch.testing.assert_close(stage.network(torch.full((1, 2), 200.0)), plain)
    assert abs(integral(model) - 1) < 0.01 + 3 * model.prior.log_prob_stderr
    assert model.sampler == {"sampler": "langevin", "steps": 15, "step_size": 0.4}


def test_lebm_prior_raises_the_density_of_inferred_latents() -> None:
    model = trained("lebm")
    z = model.infer(pictures(200, 1), steps=40, generator=draws())
    normal = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    assert model.prior.log_prob(z).mean() > normal.mean() + 0.1


@pytest.mark.filterwarnings("ignore::latentprior.errors.NormalizerBracketWarning")
def test_lebm_chains_follow_the_energy_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, list[Tensor]]] = []

    def watch(chains: type, name: str) -> None:
        plain = chains.sample

        def watched(*arguments: Any, **options: Any) -> Tensor:
            z: Tensor = plain(*arguments, **options)
            seen[-1].setdefault(name, []).append(z)
            return z

        monkeypatch.setattr(chains, "sample", watched)

    watch(PosteriorChains, "posterior")
    watch(PriorChains, "prior")
    for rate in (1e-9, 0.1):
        seen.append({})
        config = replace(CONFIGS["lebm"], steps=2, learning_rate=1e-9, energy_learning_rate=rate, held_out=10)
        train_lebm(untrained(), Images(pictures(100, 0)), config)
    for name in ("posterior", "prior"):
        still, moving = (run[name] for run in seen)
        assert torch.equal(still[0], moving[0])
        assert (still[1] - moving[1]).abs().mean() > 1e-3
