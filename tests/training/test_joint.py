import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from latentprior import (
    CheckpointError,
    InvalidImagesError,
    LatentPriorError,
    LearningDivergedError,
    LearningRetriedWarning,
)
from latentprior.data.images import Images
from latentprior.density.bases import NormalBase
from latentprior.density.ladder import Ladder
from latentprior.density.prior import LatentPrior
from latentprior.density.ratios import Gain, logistic_loss
from latentprior.density.sampling import langevin
from latentprior.density.whitening import Whitening
from latentprior.models.model import LatentVariableModel, standard_normal_prior
from latentprior.models.networks import build_decoder, build_encoder, network_spec
from latentprior.runtime.events import Event
from latentprior.runtime.processes import SingleProcess
from latentprior.training.config import TrainingConfig
from latentprior.training.decoder_learner import DecoderLearner
from latentprior.training.joint import joint_run, save, start, train
from latentprior.training.joint_learner import JointLearner
from linear_gaussian import PIXELS, LinearDecoder, posterior

# Short runs leave posterior samples off the ladder they are to follow, and so the two ends of log Z apart.
pytestmark = pytest.mark.filterwarnings("ignore::latentprior.NormalizerBracketWarning")

SIGMA = 0.1
SPEC = network_spec("mlp", 2, 8, PIXELS)
HURRIED = TrainingConfig(
    stages=1, steps=4, batch_size=16, posterior_steps=3, prior_steps=3, ratio_width=8, ratio_depth=1,
    ratio_learning_rate=1e-2, learning_rate=1e-3, average=0.9, evaluate_every=2, held_out=20, bound=2.0,
)  # fmt: skip


def clusters(n: int, g: torch.Generator) -> Tensor:
    """Latents ``(n, 2)``: 7 in 10 around (-1.2, 0.3), the others around (1.8, -0.5)."""
    left = torch.rand(n, generator=g) < 0.7
    middle = torch.where(left[:, None], torch.tensor([-1.2, 0.3]), torch.tensor([1.8, -0.5]))
    return middle + 0.35 * torch.randn(n, 2, generator=g)


def decoder() -> LinearDecoder:
    return LinearDecoder(2, scale=0.25).float()


def shown(z: Tensor, g: torch.Generator) -> Images:
    """What the true decoder makes of latents, with its noise."""
    x = decoder()(z).detach()
    return Images((x + SIGMA * torch.randn(x.shape, generator=g)).clamp(-1, 1))


@pytest.fixture(scope="module")
def images() -> Images:
    g = torch.Generator().manual_seed(0)
    return shown(clusters(600, g), g)


def perceptrons(encoder: bool = True) -> LatentVariableModel:
    g = torch.Generator().manual_seed(4)
    made = build_decoder(SPEC, g)
    return LatentVariableModel(made, sigma=0.2, encoder=build_encoder(SPEC, g) if encoder else None)


def learner(images: Images, model: LatentVariableModel | None = None, **changes: Any) -> JointLearner:
    model = model or LatentVariableModel(decoder(), sigma=SIGMA)
    return JointLearner(model, images, replace(HURRIED, **changes), 0, SingleProcess())


# What is learned


@pytest.fixture(scope="module")
def learned(images: Images) -> tuple[LatentVariableModel, list[Event]]:
    model, events = LatentVariableModel(decoder(), sigma=SIGMA), []
    config = TrainingConfig(
        stages=2, steps=160, batch_size=64, posterior_steps=10, prior_sampler="particles", ratio_width=24,
        ratio_depth=1, ratio_learning_rate=1e-2, learning_rate=1e-5, average=0.98, evaluate_every=40, held_out=150,
        bound=3.0,
    )  # fmt: skip
    train(model, images, config, callbacks=[events.append])
    return model, events


def test_stages_find_the_clusters(learned: tuple[LatentVariableModel, list[Event]], images: Images) -> None:
    model, _ = learned
    none = train(LatentVariableModel(decoder(), sigma=SIGMA), images, replace(HURRIED, stages=0))
    assert len(model.prior.stages) >= 1
    assert none.prior.stages == ()
    true = clusters(4000, torch.Generator().manual_seed(9))
    rise = model.prior.log_prob(true) - none.prior.log_prob(true)
    # The clusters' density stands 2.2 nats above the normal's here; the standard error of the rise is under 0.03.
    assert float(rise.mean()) > 0.9
    shares = {}
    for name, prior in (("learned", model.prior), ("none", none.prior)):
        z = prior.sample((4000,), torch.Generator().manual_seed(3))
        shares[name] = [float((z[:, 0] > 0.35).float().mean()), float(((z[:, 0] - 0.35).abs() < 0.25).float().mean())]
    # Of the data 0.3 and 0.0005; 600 images alone fix the first to 0.019.
    assert shares["learned"][0] == pytest.approx(0.3, abs=0.08)
    assert shares["learned"][1] < 0.06
    assert shares["none"][1] > 0.15


def test_images_of_the_learned_model_show_the_clusters(
    learned: tuple[LatentVariableModel, list[Event]], images: Images
) -> None:
    model, _ = learned
    x = model.generate(2000, generator=torch.Generator().manual_seed(2))
    real = images.batch(torch.arange(600))
    plain = decoder()(torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))).detach()
    # Means over pixels of the third moment's distance: the clusters are skewed, a normal is not.
    skew = [(y - y.mean(0)).flatten(1).pow(3).mean(0) for y in (x, real, plain)]
    assert float((skew[0] - skew[1]).norm()) < 0.6 * float((skew[2] - skew[1]).norm())


def test_gains_are_told_and_kept(learned: tuple[LatentVariableModel, list[Event]]) -> None:
    model, events = learned
    first = model.prior.stages[0]
    assert first.gain > 5 * first.gain_stderr
    assert 0 < first.gain < 2 * math.log(2)
    heard = [(e.gain, e.gain_stderr) for e in events if e.kind == "evaluate" and e.stage == 0]
    assert (first.gain, first.gain_stderr) == heard[-1]
    assert model.prior.info["training"]["steps"] == 160
    assert model.prior.normalizer.stderr < 0.05
    # Each stage's own normaliser, from other particles than the whole ladder's.
    stages = model.prior.stages
    assert len(stages) == 2
    error = math.hypot(model.prior.normalizer.stderr, *(s.log_normalizer_stderr for s in stages))
    assert sum(s.log_normalizer for s in stages) == pytest.approx(model.prior.normalizer.value, abs=5 * error)
    assert abs(stages[0].log_normalizer) > 10 * error
    # An integral over a wide grid, which no normaliser took part in.
    axis = torch.linspace(-7, 7, 281)
    total = model.prior.log_prob(torch.cartesian_prod(axis, axis)).double().exp().sum() * 0.05**2
    assert float(total) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("gains", "switch", "ended"),
    [
        # (value, standard error) at steps 10, 20, 30, ...; a stage has 30 steps, patience for 2 evaluations.
        ([(1.0, 0.01), (1.2, 0.01), (1.3, 0.01)], "adaptive", 30),
        ([(1.0, 0.01), (0.9, 0.01), (0.8, 0.01)], "adaptive", 30),
        ([(1.0, 0.01), (1.2, 0.01), (-3.0, 0.05), (0.7, 0.01)], "adaptive", 40),
        ([(1.2, 0.01), (0.1, 0.05), (0.2, 0.05), (0.4, 0.05), (0.5, 0.05), (0.55, 0.05)], "adaptive", 60),
        ([(0.02, 0.01), (0.005, 0.01), (0.004, 0.01)], "adaptive", 30),
        ([(1.0, 0.01), (1.2, 0.01), (-3.0, 0.05)], "schedule", 30),
    ],
    ids=["rises", "waits", "runs away", "stays behind", "noise", "schedule"],
)
def test_a_stage_that_the_posterior_ran_away_from_may_catch_up(
    images: Images, gains: list[tuple[float, float]], switch: str, ended: int
) -> None:
    one = learner(images, steps=30, evaluate_every=10, patience=2, switch=switch)
    for value, stderr in gains:
        assert not one.ratio.finished
        one.task.step += 10
        one.ratio.gain, one.ratio.waited = Gain(value, stderr), one.ratio.waited + 1
        if value > one.ratio.best_gain:
            one.ratio.best_gain, one.ratio.waited = value, 0
    assert one.ratio.finished
    assert one.task.step == ended


def test_nothing_to_learn_ends_the_ladder(generator: torch.Generator) -> None:
    images = shown(torch.randn(600, 2, generator=generator), generator)
    config = replace(
        HURRIED, stages=3, steps=60, batch_size=64, posterior_steps=40, evaluate_every=20, patience=1, held_out=200
    )
    model = train(LatentVariableModel(decoder(), sigma=SIGMA), images, replace(config, learning_rate=1e-6))
    assert model.prior.stages == ()
    assert model.prior.info["stopped"] == "no gain"
    assert model.prior.log_prob_stderr == 0


@pytest.mark.parametrize("encoder", [False, True])
def test_joint_learning_lowers_the_reconstruction_error(images: Images, encoder: bool) -> None:
    events: list[Event] = []
    config = replace(HURRIED, stages=0, settle_steps=80, batch_size=64, posterior_steps=15, learning_rate=1e-2)
    model = train(perceptrons(encoder), images, config, callbacks=[events.append])
    losses = [e.losses for e in events if e.kind == "settle"]
    assert sum(e["reconstruction"] for e in losses[-10:]) < 0.5 * sum(e["reconstruction"] for e in losses[:10])
    if encoder:
        # The encoder has learned the posterior's draws: its means beat draws of the prior as latents of images.
        x, z = images.batch(torch.arange(100)), torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
        found = model.infer(x, method="encoder")
        missed = [(model.decode(u) - x).square().mean() for u in (found, z)]
        assert missed[0] < missed[1]


@pytest.mark.parametrize("stages", [1, 3])
def test_a_schedule_gives_exactly_its_stages(images: Images, stages: int) -> None:
    model = LatentVariableModel(decoder(), sigma=SIGMA)
    train(model, images, replace(HURRIED, stages=stages, switch="schedule", steps=3))
    assert len(model.prior.stages) == stages
    assert all(s.diagnostics["steps"] == 3 for s in model.prior.stages)
    assert model.prior.normalizer.bracket is not None
    # Three steps, an evaluation at the second: the gain that is kept is that of the weights that are kept.
    assert all(math.isfinite(s.gain) for s in model.prior.stages)
    again = train(model, images, replace(HURRIED, stages=1, switch="schedule", steps=2))
    assert len(again.prior.stages) == stages + 1


# Its moves


def test_every_training_image_once_an_epoch(images: Images) -> None:
    one = learner(images, batch_size=20)
    seen = []
    for _ in range(2 * 580 // 20):
        x, index = one.task.batch()
        assert torch.equal(x, images.batch(index))
        seen.append(index)
        one.task.updates += 1
    held_out = set(one.task.held_out_rows.tolist())
    for epoch in (torch.cat(seen[:29]).tolist(), torch.cat(seen[29:]).tolist()):
        assert len(set(epoch)) == 580
        assert not held_out & set(epoch)
    assert seen[0].tolist() != seen[29].tolist()


def test_processes_share_a_batch(images: Images) -> None:
    whole = learner(images).task.batch()[1]
    parts = []
    for rank in range(2):
        process = SingleProcess()
        process.rank, process.count = rank, 2
        parts.append(JointLearner(perceptrons(), images, HURRIED, 0, process).task.batch()[1])
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    assert len(parts[0]) == len(parts[1])
    process = SingleProcess()
    process.count = 3
    with pytest.raises(LatentPriorError, match="16 is no multiple of 3 processes"):
        JointLearner(perceptrons(), images, HURRIED, 0, process)


def test_the_generator_climbs_the_likelihood(images: Images, generator: torch.Generator) -> None:
    one = learner(images)
    x, _ = one.task.batch()
    z = torch.randn(16, 2, generator=generator)
    network = one.task.model.decoder
    matrix, shift = network.matrix.detach().clone(), network.shift.detach().clone()
    miss = (z @ matrix.T + shift) - x.flatten(1)
    losses = one.decoder.update(x, z)
    torch.testing.assert_close(network.shift.grad, miss.mean(0) / SIGMA**2)
    torch.testing.assert_close(network.matrix.grad, miss.T @ z / (16 * SIGMA**2))
    assert losses["reconstruction"] == pytest.approx(float(miss.square().mean()), rel=1e-5)
    # Adam's first step has the size of the learning rate.
    torch.testing.assert_close(network.shift.detach(), shift - 1e-3 * network.shift.grad.sign(), atol=1e-6, rtol=0)


def test_the_ratio_descends_the_logistic_loss(images: Images, generator: torch.Generator) -> None:
    one = learner(images)
    high, low = torch.randn(2, 200, 2, generator=generator) + torch.tensor([[[1.0]], [[-1.0]]])
    exact = logistic_loss(one.ratio.ratio(high), one.ratio.ratio(low))
    losses = [one.ratio.update(high, low)["ratio"] for _ in range(50)]
    assert losses[0] == pytest.approx(float(exact.detach()), rel=1e-6)
    assert losses[-1] < 0.75 * losses[0]
    # A ratio of q to p_k, not of p_k to q.
    assert float((one.ratio.ratio(high).mean() - one.ratio.ratio(low).mean()).detach()) > 0.5


def test_posterior_chains_start_where_asked(images: Images) -> None:
    for origin in ("prior", "encoder", "persistent"):
        one = learner(images, perceptrons(), posterior_start=origin, posterior_steps=1, posterior_step_size=1e-6)
        x, index = one.task.batch()
        z = one.posterior.sample(x, index)
        draws = one.task.draws("posterior", 0, 0)
        if origin == "prior":
            begin = one.task.model.prior.base.sample(16, draws)
        elif origin == "persistent":
            assert one.posterior.latents is not None
            assert torch.equal(one.posterior.latents[index], z)
            begin = one.task.model.prior.base.sample(600, one.task.draws("latents"))[index]
        else:
            mean, scale = one.task.model.encoder(x)
            begin = mean + scale * torch.randn(16, 2, generator=draws)
        torch.testing.assert_close(z, begin.detach(), atol=1e-4, rtol=0)


def correlated(images: Images, **changes: Any) -> JointLearner:
    """A learner in standardised coordinates that mix the encoder's."""
    rows = torch.randn(500, 2, generator=torch.Generator().manual_seed(6)) @ torch.tensor([[1.0, 0.8], [0.0, 0.5]])
    prior = LatentPrior(Ladder(NormalBase(2)), Whitening.fit([rows], "full"), (2,)).to(dtype=torch.float32)
    encoder = build_encoder(SPEC, torch.Generator().manual_seed(4))
    return learner(images, LatentVariableModel(decoder(), prior, SIGMA, encoder), posterior_start="encoder", **changes)


def test_chains_start_at_the_encoders_draws_in_standardised_coordinates(images: Images) -> None:
    x = images.batch(torch.zeros(20_000, dtype=torch.long))
    one = correlated(images, posterior_steps=1, posterior_step_size=1e-6)
    z = one.task.model.prior.whitening.unwhiten(one.posterior.sample(x))
    mean, scale = one.task.model.encode(x[:1])
    # A mean of 20,000 errs by 0.7% of its scale, a scale by 0.5%, a correlation by 0.007.
    torch.testing.assert_close(z.mean(0), mean[0], atol=0.03 * float(scale.max()), rtol=0)
    torch.testing.assert_close(z.std(0), scale[0], atol=0, rtol=0.025)
    assert abs(float(torch.corrcoef(z.T)[0, 1])) < 0.03


def test_preconditioned_chains_reach_the_posterior(images: Images) -> None:
    x = images.batch(torch.tensor([3])).expand(4000, -1, -1, -1)
    one = correlated(images, posterior_steps=300, posterior_step_size=0.05, precondition=True)
    z = one.task.model.prior.whitening.unwhiten(one.posterior.sample(x))
    mean, covariance = posterior(one.task.model, x[:1])
    spread = covariance.diagonal().sqrt()
    torch.testing.assert_close(z.mean(0), mean[0], atol=0.08 * float(spread.max()), rtol=0)
    torch.testing.assert_close(z.std(0), spread, atol=0, rtol=0.06)


def exact_draws(model: LatentVariableModel, x: Tensor, g: torch.Generator) -> Tensor:
    mean, covariance = posterior(model, x)
    return mean + torch.randn(len(x), 2, generator=g) @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("precondition", [False, True])
def test_the_encoder_learns_marginals_from_chains_and_conditionals_by_the_bound(
    images: Images, precondition: bool, generator: torch.Generator
) -> None:
    one = correlated(images, precondition=precondition)
    with torch.no_grad():
        one.task.model.decoder.matrix.copy_(one.task.model.decoder.matrix @ torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    x = images.batch(torch.arange(200))
    optimizer = torch.optim.Adam(one.task.model.encoder.parameters(), 3e-3)
    for step in range(800):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 800)
        posterior_draws = one.task.model.prior.whitening.whiten(exact_draws(one.task.model, x, generator))
        loss = one.decoder.encoder_loss(x, posterior_draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        one.task.updates += 1
    # The generator takes no part in the bound, and goes on learning.
    assert all(p.requires_grad and p.grad is None for p in one.task.model.decoder.parameters())
    exact, covariance = posterior(one.task.model, x)
    marginal, conditional = covariance.diagonal().sqrt(), covariance.inverse().diagonal().rsqrt()
    assert float((marginal / conditional).min()) > 1.5
    mean, scale = one.task.model.encode(x)
    torch.testing.assert_close(scale.mean(0), conditional if precondition else marginal, atol=0, rtol=0.2)
    assert float((mean - exact).square().mean(0).sqrt().max()) < 0.7 * float(marginal.min())


def test_sigma_goes_to_the_noise_of_the_images(generator: torch.Generator) -> None:
    images = shown(torch.randn(600, 2, generator=generator), generator)
    for learn_sigma in (False, True):
        one = learner(images, LatentVariableModel(decoder(), sigma=0.2), learn_sigma=learn_sigma, learning_rate=1e-6)
        for _ in range(800):
            x, _ = one.task.batch()
            one.decoder.update(x, exact_draws(one.task.model, x, generator))
        # Its maximum of the likelihood; images are cut off at 1, which takes a little of the noise.
        assert one.task.model.sigma == (pytest.approx(SIGMA, rel=0.1) if learn_sigma else 0.2)


def test_an_encoder_is_needed_to_precondition() -> None:
    with pytest.raises(LatentPriorError, match="posterior_start to 'encoder'"):
        TrainingConfig(precondition=True)


def test_prior_chains_go_on_where_asked(images: Images) -> None:
    found = {}
    for sampler in ("langevin", "persistent", "particles"):
        model = train(LatentVariableModel(decoder(), sigma=SIGMA), images, replace(HURRIED, switch="schedule"))
        one = learner(images, model, prior_sampler=sampler)
        first = one.prior.sample(16)
        one.task.updates += 1
        found[sampler] = (first, one.prior.sample(16))
        density = one.task.ladder.density(1)
        begin = first if sampler == "persistent" else one.task.ladder.base.sample(16, one.task.draws("prior", 1, 0))
        if sampler != "particles":
            draws = one.task.draws("prior", 1, 0)
            if sampler == "langevin":
                begin = one.task.ladder.base.sample(16, draws)
            z = langevin.sample(begin, density, steps=3, step_size=0.4, generator=draws)
            torch.testing.assert_close(found[sampler][1], z)
        else:
            rows = torch.cat([one.prior.sample(16) for _ in range(60)])
            # Resampled particles repeat, but no row is handed out twice: most are different.
            assert len(torch.unique(rows, dim=0)) > 600
    assert torch.equal(found["langevin"][0], found["persistent"][0])


def test_held_out_rows_share_no_noise(images: Images) -> None:
    one = learner(images, posterior_steps=1, posterior_step_size=1e-6)
    with torch.no_grad():
        z = one.posterior.sample_held_out()
    assert z.shape == (20, 2)
    assert len(torch.unique(z.round(decimals=3), dim=0)) == 20
    trained = one.posterior.sample(one.task.batch()[0])
    assert not torch.isclose(z[0], trained, atol=1e-3).all(1).any()


def test_networks_end_with_the_average_of_their_weights(images: Images) -> None:
    model, path = perceptrons(), []

    def keep(event: Event) -> None:
        if event.kind in ("step", "settle"):
            path.append({k: v.detach().clone() for k, v in model.named_parameters()})

    begin = {k: v.detach().clone() for k, v in model.named_parameters()}
    train(model, images, replace(HURRIED, settle_steps=3, switch="schedule"), callbacks=[keep])
    assert len(path) == 7
    average = begin
    for i, now in enumerate(path, 1):
        decay = min(0.9, (i + 1) / (i + 10))
        average = {k: decay * average[k] + (1 - decay) * now[k] for k in average}
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), average[name], atol=1e-6, rtol=1e-5)
        assert not value.requires_grad
    assert not model.decoder.training


def test_learning_rates_fall_every_epoch(images: Images) -> None:
    one = learner(images, decay=0.5)
    x, _ = one.task.batch()
    for updates, rate in ((0, 1e-3), (36, 1e-3), (37, 5e-4), (73, 2.5e-4)):
        one.task.updates = updates
        one.decoder.update(x, torch.zeros(16, 2))
        assert one.decoder.networks.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


# Settings and errors


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"posterior_steps": -1}, "posterior_steps must be 1 or more"),
        ({"stages": -1}, "stages and settle_steps must be 0 or more"),
        ({"held_out": 1}, "held_out 2 or more"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"ratio_learning_rate": math.nan}, "ratio_learning_rate must be positive"),
        ({"posterior_step_size": -0.1}, "posterior_step_size must be positive"),
        ({"prior_step_size": math.inf}, "prior_step_size must be positive"),
        ({"bound": -5.0}, "bound must be positive"),
        ({"average": 1.5}, "average must be from 0 to 1"),
        ({"decay": -0.1}, "decay must be from 0 to 1"),
        ({"switch": "never"}, "unknown switch 'never': choose one of adaptive, schedule"),
        ({"posterior_start": "zero"}, "unknown posterior_start 'zero'"),
        ({"prior_sampler": "hmc"}, "unknown prior_sampler 'hmc'"),
    ],
)
def test_settings_that_learn_nothing_are_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(LatentPriorError, match=told):
        replace(HURRIED, **changes)


def test_too_few_images_are_named(images: Images) -> None:
    with pytest.raises(LatentPriorError, match="600 images are too few beside 599 held out"):
        learner(images, held_out=599)


def test_an_encoder_that_is_asked_for_must_be_there(images: Images) -> None:
    with pytest.raises(LatentPriorError, match="needs a model with an encoder"):
        learner(images, perceptrons(encoder=False), posterior_start="encoder")


def test_an_encoder_must_give_scales(images: Images) -> None:
    model = perceptrons(encoder=False)
    model.encoder = nn.Flatten()
    with pytest.raises(LatentPriorError, match=r"needs an encoder that returns \(mean, scale\)"):
        train(model, images, HURRIED)


def test_nan_images_are_refused() -> None:
    x = torch.zeros(100, *PIXELS) - 0.5
    x[7, 0, 0, 0] = math.nan
    with pytest.raises(InvalidImagesError, match="NaN"):
        train(perceptrons(), Images(x), HURRIED)


@pytest.mark.parametrize("changes", [{}, {"settle_steps": 1, "stages": 0}])
def test_divergence_is_retried_once_then_named(images: Images, changes: dict[str, Any]) -> None:
    config = replace(HURRIED, posterior_step_size=1e20, **changes)
    says = r"stage 0: 100% of the posterior chains have run away at step 0; lower"
    with (
        pytest.warns(LearningRetriedWarning, match=f"{says}.* gone back to step 0 of stage 0, to learn on"),
        pytest.raises(LearningDivergedError, match=says),
    ):
        train(LatentVariableModel(decoder(), sigma=SIGMA), images, config)


def test_divergence_is_mended_by_a_smaller_step(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DecoderLearner.update

    def poisoned(self: DecoderLearner, x: Tensor, posterior: Tensor) -> dict[str, float]:
        if (self.task.updates, self.task.pace) == (3, 1):
            next(self.networks.module.parameters()).data.fill_(math.nan)
        return real(self, x, posterior)

    monkeypatch.setattr(DecoderLearner, "update", poisoned)

    def call(**options: Any) -> LatentVariableModel:
        return train(perceptrons(encoder=False), images, HURRIED, **options)

    says = "not finite at step 3; .* gone back to step 2 of stage 0"
    with pytest.warns(LearningRetriedWarning, match=says) as caught:
        whole = call()
    assert caught[0].filename == __file__
    assert all(p.isfinite().all() for p in whole.decoder.parameters())
    seen: list[Event] = []

    def stop(event: Event) -> None:
        seen.extend([event] if event.kind == "evaluate" else [])
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.warns(LearningRetriedWarning), pytest.raises(KeyboardInterrupt):
        call(checkpoint_dir=tmp_path, callbacks=[stop])
    resumed = call(checkpoint_dir=tmp_path, resume=True)
    for a, b in zip(whole.state()[1].values(), resumed.state()[1].values(), strict=True):
        assert torch.equal(a, b)


def test_events_come_in_order(images: Images) -> None:
    first: list[Event] = []
    second: list[Event] = []
    model = perceptrons()
    config = replace(HURRIED, stages=2, steps=2, settle_steps=2, switch="schedule")
    train(model, images, config, callbacks=iter([first.append, second.append]))
    stage = ["step", "step", "evaluate", "learned"]
    assert [e.kind for e in first] == [*stage, *stage, "settle", "settle", "normalizer", "end"]
    assert first == second
    assert [e.step for e in first if e.kind == "step"] == [1, 2, 1, 2]
    assert [(e.stage, e.step) for e in first if e.kind == "learned"] == [(0, 2), (1, 2)]
    assert [(e.step, e.steps) for e in first if e.kind == "settle"] == [(1, 2), (2, 2)]
    assert [e.seconds for e in first] == sorted(e.seconds for e in first)
    assert all(set(e.losses) == {"ratio", "reconstruction", "encoder"} for e in first if e.kind == "step")
    assert all(e.model is model for e in first)


# Determinism and resuming


def outcome(model: LatentVariableModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Everything that is saved, but how long it took."""
    config, tensors = model.state()
    for stage in config["prior"]["stages"]:
        stage["diagnostics"] = {k: v for k, v in stage["diagnostics"].items() if k != "seconds"}
    config["prior"]["info"] = {k: v for k, v in config["prior"]["info"].items() if k != "total_seconds"}
    return config, tensors


def assert_same(a: LatentVariableModel, b: LatentVariableModel) -> None:
    (first, tensors), (second, others) = outcome(a), outcome(b)
    assert first == second
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[k], others[k]) for k in tensors)


class Stop(Exception):
    pass


def stopping(kind: str, step: int, stage: int = 0) -> Callable[[Event], None]:
    def callback(event: Event) -> None:
        if (event.kind, event.step, event.stage) == (kind, step, stage):
            raise Stop

    return callback


MOMENTS = [("step", 1, 0), ("evaluate", 2, 0), ("step", 3, 0), ("learned", 4, 0), ("settle", 3, 1), ("end", 0, 1)]
STATEFUL = replace(HURRIED, switch="schedule", settle_steps=4, posterior_start="persistent", prior_sampler="persistent")


@pytest.mark.parametrize(
    ("config", "moments"),
    [
        (STATEFUL, MOMENTS),
        (
            replace(STATEFUL, stages=2, prior_sampler="particles", posterior_start="encoder"),
            [("step", 3, 1), ("evaluate", 4, 1), ("learned", 4, 1), ("normalizer", 0, 2)],
        ),
        (replace(HURRIED, steps=40, patience=1), [("evaluate", 2, 0)]),
    ],
    ids=["persistent", "particles", "adaptive"],
)
def test_resumed_run_ends_with_the_same_bits(
    images: Images, tmp_path: Path, config: TrainingConfig, moments: list[tuple[str, int, int]]
) -> None:
    straight = train(perceptrons(), images, config, seed=3)
    for moment in moments:
        with pytest.raises(Stop):
            train(
                perceptrons(), images, config, seed=3, checkpoint_dir=tmp_path, resume=True,
                callbacks=[stopping(*moment)],
            )  # fmt: skip
    events: list[Event] = []
    resumed = train(
        perceptrons(), images, config, seed=3, checkpoint_dir=tmp_path, resume=True, callbacks=[events.append]
    )
    # It went on, and did not begin again.
    assert ("step", 1, 0) not in [(e.kind, e.step, e.stage) for e in events]
    assert_same(straight, resumed)
    assert_same(resumed, train(perceptrons(), images, config, seed=3, checkpoint_dir=tmp_path, resume=True))


@pytest.mark.parametrize(("best", "now"), [(0.25, Gain(0.2, 0.1)), (-math.inf, None)])
def test_counters_are_restored(images: Images, tmp_path: Path, best: float, now: Gain | None) -> None:
    one, two = learner(images), learner(images)
    one.task.step, one.task.updates, one.task.settled, one.arrived = 3, 7, 1, True
    one.ratio.waited, one.ratio.best_gain = 2, best
    one.ratio.gain = now or one.ratio.gain
    save(joint_run(one, tmp_path, ()), one)
    start(joint_run(two, tmp_path, ()), two, resume=True)
    assert (two.task.step, two.task.updates, two.task.settled, two.arrived) == (3, 7, 1, True)
    assert (two.ratio.waited, two.ratio.best_gain) == (2, best)
    assert two.ratio.gain == now if now else math.isnan(two.ratio.gain.value)


def test_another_seed_is_another_run(images: Images) -> None:
    a, b, c = (train(perceptrons(), images, HURRIED, seed=seed) for seed in (1, 1, 2))
    assert_same(a, b)
    assert not torch.equal(outcome(a)[1]["decoder.layers.0.weight"], outcome(c)[1]["decoder.layers.0.weight"])


def test_resume_needs_a_folder(images: Images) -> None:
    with pytest.raises(CheckpointError, match="needs the checkpoint_dir"):
        train(perceptrons(), images, HURRIED, resume=True)


def test_checkpoints_of_another_run_are_refused(images: Images, tmp_path: Path) -> None:
    plain = replace(HURRIED, stages=0)
    train(perceptrons(), images, plain, checkpoint_dir=tmp_path)
    others = Images(images.batch(torch.arange(600)).flip(0))
    for call in (
        lambda: train(perceptrons(), others, plain, checkpoint_dir=tmp_path, resume=True),
        lambda: train(perceptrons(), images, plain, seed=1, checkpoint_dir=tmp_path, resume=True),
        lambda: train(perceptrons(), images, replace(plain, batch_size=8), checkpoint_dir=tmp_path, resume=True),
        lambda: train(perceptrons(False), images, plain, checkpoint_dir=tmp_path, resume=True),
    ):
        with pytest.raises(CheckpointError, match="holds a run on other data or settings"):
            call()
    weights = next(tmp_path.glob("training-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        train(perceptrons(), images, plain, checkpoint_dir=tmp_path, resume=True)


def test_a_run_on_a_distribution_resumes(images: Images, tmp_path: Path) -> None:
    def model() -> LatentVariableModel:
        return LatentVariableModel(decoder(), Independent(Normal(torch.zeros(2), 1.0), 1), SIGMA)

    straight = train(model(), images, replace(HURRIED, switch="schedule"))
    with pytest.raises(Stop):
        train(
            model(), images, replace(HURRIED, switch="schedule"), checkpoint_dir=tmp_path,
            callbacks=[stopping("step", 3)],
        )  # fmt: skip
    resumed = train(model(), images, replace(HURRIED, switch="schedule"), checkpoint_dir=tmp_path, resume=True)
    assert_same(straight, resumed)


class Normed(nn.Module):
    """A decoder whose batch normalisation keeps statistics beside its weights."""

    latent_shape, image_shape = torch.Size([2]), torch.Size(PIXELS)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(2), decoder()

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(self.norm(z))


def test_buffers_of_networks_are_resumed(images: Images, tmp_path: Path) -> None:
    config = replace(HURRIED, stages=0, settle_steps=4)
    straight = train(LatentVariableModel(Normed(), sigma=SIGMA), images, config)
    with pytest.raises(Stop):
        train(
            LatentVariableModel(Normed(), sigma=SIGMA), images, config, checkpoint_dir=tmp_path,
            callbacks=[stopping("settle", 3)],
        )  # fmt: skip
    resumed = train(LatentVariableModel(Normed(), sigma=SIGMA), images, config, checkpoint_dir=tmp_path, resume=True)
    assert_same(straight, resumed)


def test_trained_models_are_saved_and_loaded(images: Images, tmp_path: Path) -> None:
    model = train(perceptrons(), images, replace(HURRIED, switch="schedule"))
    model.save_pretrained(tmp_path)
    loaded = LatentVariableModel.from_pretrained(tmp_path)
    assert_same(model, loaded)
    z = standard_normal_prior((2,)).sample((50,), torch.Generator().manual_seed(0))
    assert torch.equal(model.prior.log_prob(z), loaded.prior.log_prob(z))
