import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from latentprior import CheckpointError, InvalidImagesError, InvalidLatentsError, LatentPriorError
from latentprior.density.bases import NormalBase
from latentprior.density.ladder import Ladder, Stage
from latentprior.density.prior import LatentPrior
from latentprior.density.whitening import identity_whitening
from latentprior.evaluation.known_densities import Banana, Rings
from latentprior.models.model import LatentVariableModel, standard_normal_prior
from latentprior.models.networks import build_decoder, build_encoder, network_spec
from linear_gaussian import (
    PIXELS,
    LinearDecoder,
    assert_standard_normal,
    correlated_prior,
    images,
    log_evidence,
    posterior,
    residuals,
)

SPEC = network_spec("mlp", 3, 8, PIXELS)


def linear(prior: str = "normal", event_shape: tuple[int, ...] = (3,), sigma: float = 0.5) -> LatentVariableModel:
    made = standard_normal_prior(event_shape) if prior == "normal" else correlated_prior(event_shape)
    return LatentVariableModel(LinearDecoder(math.prod(event_shape)), made, sigma)


PRIORS = [("normal", (3,)), ("correlated", (3,)), ("correlated", (3, 1, 1)), ("correlated", (2, 1, 2))]
every_prior = pytest.mark.parametrize(("prior", "event_shape"), PRIORS)


class Encoder(nn.Module):
    """The exact posterior's means of :func:`linear`, with or without its standard deviations."""

    def __init__(self, model: LatentVariableModel, scales: bool = True) -> None:
        super().__init__()
        self.model, self.scales = [model], scales

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mean, covariance = posterior(self.model[0], x)
        return (mean, covariance.diagonal().sqrt().expand_as(mean)) if self.scales else mean


# Construction


def test_prior_defaults_to_the_generators_normal(generator: torch.Generator) -> None:
    model = LatentVariableModel(build_decoder(SPEC, generator))
    assert model.event_shape == (3,)
    z = torch.zeros(1, 3)
    assert float(model.prior.log_prob(z)) == pytest.approx(-1.5 * math.log(2 * math.pi))


def test_a_generator_of_unknown_latents_needs_a_prior() -> None:
    with pytest.raises(LatentPriorError, match="give a prior"):
        LatentVariableModel(nn.Flatten())


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_sigma_must_be_positive(sigma: float, generator: torch.Generator) -> None:
    with pytest.raises(LatentPriorError, match="sigma must be positive"):
        LatentVariableModel(build_decoder(SPEC, generator), sigma=sigma)


def test_any_distribution_serves_as_prior(generator: torch.Generator) -> None:
    batch = Normal(torch.zeros(3, 1, 1), 2.0)
    model = LatentVariableModel(LinearDecoder(), batch)
    assert model.event_shape == (3, 1, 1)
    z = model.prior.sample((5,), generator)
    torch.testing.assert_close(model.prior.log_prob(z), Independent(batch, 3).log_prob(z), check_dtype=False)
    assert model.generate(2, generator=generator).shape == (2, *PIXELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prior_takes_the_networks_floating_type(generator: torch.Generator, dtype: torch.dtype) -> None:
    for prior in (standard_normal_prior((3,)), correlated_prior()):
        model = LatentVariableModel(LinearDecoder().to(dtype), prior)
        assert model.generate(2, generator=generator).dtype == dtype
        assert model.infer(torch.zeros(2, *PIXELS), steps=2, generator=generator).dtype == dtype


# Generating


def test_generate_is_a_function_of_the_generator() -> None:
    model = linear("correlated")
    first, again, other = (model.generate(4, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    z = model.prior.sample((4,), torch.Generator().manual_seed(1))
    torch.testing.assert_close(first, model.decoder(z).detach())
    assert model.generate(0).shape == (0, *PIXELS)


def test_decode_of_many_rows_is_that_of_each(generator: torch.Generator) -> None:
    model = linear()
    z = torch.randn(700, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(model.decode(z), model.decoder(z))
    assert torch.autograd.grad(model.decode(z).sum(), z)[0].shape == z.shape


# Inferring


@every_prior
def test_mala_draws_the_posterior(prior: str, event_shape: tuple[int, ...], generator: torch.Generator) -> None:
    model = linear(prior, event_shape)
    x = images(model, 1200)
    z = model.infer(x, generator=generator)
    assert z.shape == (1200, *event_shape)
    assert_standard_normal(residuals(z, *posterior(model, x)))


@pytest.mark.parametrize(("prior", "event_shape"), PRIORS[:3:2])
def test_tilt_draws_the_posterior(prior: str, event_shape: tuple[int, ...], generator: torch.Generator) -> None:
    model = linear(prior, event_shape)
    x = images(model, 12)
    z = model.infer(x, method="tilt", generator=generator)
    assert z.shape == (12, *event_shape)
    assert_standard_normal(residuals(z, *posterior(model, x)))


@every_prior
def test_map_is_the_posterior_mean(prior: str, event_shape: tuple[int, ...], generator: torch.Generator) -> None:
    model = linear(prior, event_shape)
    x = images(model, 20)
    z = model.infer(x, method="map", steps=200, generator=generator)
    # In units of the posterior's standard deviations.
    assert float(residuals(z, *posterior(model, x)).abs().max()) < 0.02


def test_langevin_steps_in_standardised_coordinates() -> None:
    model = linear("correlated")
    x, start = images(model, 4), torch.ones(4, 3, dtype=torch.float64)
    g = torch.Generator().manual_seed(3)
    moved = model.infer(x, method="langevin", steps=1, step_size=0.3, start=start, generator=g)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whitening, matrix = model.prior.whitening, model.decoder.matrix.detach()
    u = whitening.whiten(start)
    miss = (x - model.decode(start).detach()).flatten(1)
    drift = -u + miss @ (matrix @ whitening.inverse) / model.sigma**2
    torch.testing.assert_close(moved, whitening.unwhiten(u + 0.045 * drift + 0.3 * noise))


def test_no_steps_return_the_start() -> None:
    model, start = linear("correlated"), torch.ones(4, 3, dtype=torch.float64)
    for method in ("langevin", "mala", "map"):
        torch.testing.assert_close(model.infer(images(model, 4), method=method, steps=0, start=start), start)


def test_chains_start_at_the_encoders_mean() -> None:
    model = linear("correlated")
    model.encoder = Encoder(model)
    x = images(model, 4)
    torch.testing.assert_close(model.infer(x, method="langevin", steps=0), posterior(model, x)[0])
    torch.testing.assert_close(model.infer(x, method="encoder"), posterior(model, x)[0])
    # Unseen pixels would mislead the encoder.
    masked = model.infer(x, method="langevin", steps=0, mask=torch.ones(1), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(masked, model.prior.sample((4,), torch.Generator().manual_seed(1)))


HALF = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize("method", ["mala", "tilt"])
def test_masked_draws_know_seen_pixels_only(method: str, generator: torch.Generator) -> None:
    model = linear("correlated")
    x = images(model, 1200 if method == "mala" else 10)
    z = model.infer(x, method=method, mask=HALF, generator=generator)
    assert_standard_normal(residuals(z, *posterior(model, x, HALF)))
    other = torch.where(HALF.bool(), x, torch.full_like(x, 0.9))
    again = model.infer(other[:3], method=method, mask=HALF, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        again, model.infer(x[:3], method=method, mask=HALF, generator=torch.Generator().manual_seed(2))
    )


def test_every_image_has_its_own_mask(generator: torch.Generator) -> None:
    model = linear("correlated")
    x = images(model, 300)
    mask = (torch.rand(x.shape, generator=generator) < 0.5).double()
    z = model.infer(x, method="map", steps=200, mask=mask, generator=generator)
    for i in (0, 1, 255, 256, 299):
        exact = posterior(model, x[i : i + 1], mask[i])
        assert float(residuals(z[i : i + 1], *exact).abs().max()) < 0.02
    tilted = model.infer(x[:8], method="tilt", mask=mask[:8].bool(), generator=generator)
    rows = [residuals(tilted[i : i + 1], *posterior(model, x[i : i + 1], mask[i])) for i in range(8)]
    assert_standard_normal(torch.cat(rows))


@pytest.mark.parametrize(
    "given", [lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x.numpy().astype(">f8"), lambda x: x.numpy()[::-1]]
)
def test_arrays_serve_as_images_everywhere(given: Any) -> None:
    model = linear()
    x = images(model, 2)
    flipped = isinstance(given(x), np.ndarray) and given(x).strides[0] < 0
    expected = x.flip(0) if flipped else x
    z = torch.zeros(2, 3, dtype=model.prior.dtype)
    assert torch.equal(model.anomaly_score(given(x), z=z), model.anomaly_score(expected, z=z))
    mask = np.ones(PIXELS)
    torch.testing.assert_close(
        model.inpaint(given(x), mask, steps=1, generator=torch.Generator().manual_seed(0)), expected
    )


@pytest.mark.parametrize("x", [None, "pixels", [[1.0], [1.0, 2.0]], torch.zeros(1, *PIXELS, device="meta"), 1j])
def test_what_are_no_images_is_named(x: Any) -> None:
    for call in (linear().infer, lambda x: linear().inpaint(x, torch.ones(1)), linear().anomaly_score):
        with pytest.raises(InvalidImagesError, match=r"images (are|have type|must be)"):
            call(x)


@pytest.mark.parametrize("mask", [None, torch.ones(7, 7), torch.full((1,), math.nan), 2 * torch.ones(1)])
def test_what_is_no_mask_is_named(mask: Any) -> None:
    with pytest.raises(InvalidImagesError, match="mask"):
        linear().inpaint(images(linear(), 2), mask)


@pytest.mark.parametrize("z", [torch.zeros(1, 3), torch.zeros(2, 5), torch.full((2, 3), math.nan), None])
def test_latents_given_must_fit(z: Any) -> None:
    model = linear()
    x = images(model, 2)
    if z is not None:
        with pytest.raises(InvalidLatentsError):
            model.infer(x, start=z)
        with pytest.raises(InvalidLatentsError):
            model.anomaly_score(x, z=z)
    with pytest.raises(InvalidLatentsError):
        model.interpolate(torch.zeros(3), torch.zeros(4) if z is None else z)


@pytest.mark.parametrize("options", [{"steps": -1}, {"steps": 1.5}, {"step_size": math.nan}, {"step_size": 0}])
def test_chains_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LatentPriorError, match=r"steps must be a whole|step_size must be positive"):
        linear().infer(images(linear(), 2), **options)


def test_a_mask_must_fit() -> None:
    model = linear()
    with pytest.raises(InvalidImagesError, match="does not fit images"):
        model.infer(torch.zeros(4, *PIXELS), mask=torch.ones(2, 2))


def test_no_images_give_no_latents() -> None:
    model = linear("correlated", (3, 1, 1))
    model.encoder = Encoder(model)
    for method in ("langevin", "mala", "map", "encoder", "tilt"):
        assert model.infer(torch.zeros(0, *PIXELS), method=method).shape == (0, 3, 1, 1)


def test_unknown_methods_are_named() -> None:
    model, x = linear(), torch.zeros(2, *PIXELS)
    with pytest.raises(LatentPriorError, match="unknown method 'guess': choose langevin"):
        model.infer(x, method="guess")
    with pytest.raises(LatentPriorError, match="unknown method 'guess': choose importance"):
        model.log_likelihood(x, method="guess")
    with pytest.raises(LatentPriorError, match="unknown score 'guess'"):
        model.anomaly_score(x, kind="guess")
    with pytest.raises(LatentPriorError, match="no encoder: infer with"):
        model.infer(x, method="encoder")


@pytest.mark.parametrize("scales", [True, False])
def test_encode_splits_and_shapes(scales: bool) -> None:
    model = linear("correlated", (3, 1, 1))
    model.encoder = Encoder(model, scales)
    x = images(model, 300)
    mean, scale = model.encode(x)
    exact, covariance = posterior(model, x)
    torch.testing.assert_close(mean, exact.reshape(300, 3, 1, 1))
    if scales:
        torch.testing.assert_close(scale, covariance.diagonal().sqrt().expand(300, 3).reshape(300, 3, 1, 1))
    else:
        assert scale is None


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(2, 1, 3, 2), r"shape \(1, 3, 2\), the decoder makes \(1, 2, 3\)"),
        (torch.zeros(2, 6), r"got torch.float32 \(2, 6\)"),
        (torch.zeros(2, *PIXELS, dtype=torch.uint8), "got torch.uint8"),
        (torch.full((2, *PIXELS), math.nan), "NaN or infinite"),
        (torch.full((2, *PIXELS), math.inf), "NaN or infinite"),
    ],
)
def test_bad_images_are_named_everywhere(x: Tensor, told: str) -> None:
    model = linear()
    for use in (model.infer, model.reconstruct, model.anomaly_score, model.log_likelihood):
        with pytest.raises(InvalidImagesError, match=told):
            use(x)


# Scoring


@pytest.mark.parametrize("method", ["importance", "annealed"])
@every_prior
def test_log_likelihood_is_the_evidence(
    method: str, prior: str, event_shape: tuple[int, ...], generator: torch.Generator
) -> None:
    model = linear(prior, event_shape)
    x = images(model, 20)
    options = {"samples": 64, "temperatures": 150} if method == "annealed" else {}
    value, stderr = model.log_likelihood(x, method=method, generator=generator, **options)
    z = (value - log_evidence(model, x)) / stderr
    # The error is near normal: a z of 4.5 among twenty is one run in 7000; their mean square has a standard
    # error of 0.32, and drawing a fixed share of wide rows makes importance sampling a little surer than it says.
    assert float(z.abs().max()) < 4.5
    assert 0.1 < float(z.square().mean()) < 2.4
    assert 0 < float(stderr.max()) < 0.2


class ToMixture(nn.Module):
    """The log ratio that makes a standard normal the mixture."""

    def __init__(self, mixture: MixtureSameFamily) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, u: Tensor) -> Tensor:
        return self.mixture.log_prob(u) - Normal(0.0, 1.0).log_prob(u).sum(1)


def mixture_model() -> tuple[LatentVariableModel, MixtureSameFamily]:
    weights = Categorical(torch.tensor([0.7, 0.3], dtype=torch.float64))
    means = torch.tensor([[-1.0, 0.2], [1.2, 0.5]], dtype=torch.float64)
    mixture = MixtureSameFamily(weights, Independent(Normal(means, 0.4 * torch.ones_like(means)), 1))
    stage = Stage(ToMixture(mixture), 0.0, 0.0, 0.5, 0.01)
    prior = LatentPrior(Ladder(NormalBase(2), [stage]), identity_whitening(2).double(), (2,))
    return LatentVariableModel(LinearDecoder(2), prior, sigma=0.5), mixture


@pytest.mark.parametrize("method", ["importance", "annealed"])
def test_log_likelihood_under_a_stage_that_makes_a_mixture(method: str, generator: torch.Generator) -> None:
    model, mixture = mixture_model()
    x = images(model, 20)
    value, stderr = model.log_likelihood(x, method=method, samples=128, temperatures=100, generator=generator)
    a, b = model.decoder.matrix.detach(), model.decoder.shift.detach()
    covariance = 0.16 * a @ a.T + 0.25 * torch.eye(6, dtype=torch.float64)
    parts = [MultivariateNormal(a @ m + b, covariance) for m in mixture.component_distribution.mean]
    terms = torch.stack([part.log_prob(x.flatten(1)) for part in parts], 1)
    exact = torch.logsumexp(terms + mixture.mixture_distribution.logits, 1)
    z = (value - exact) / stderr
    assert float(z.abs().max()) < 4.5
    assert 0.1 < float(z.square().mean()) < 2.4


def test_log_likelihood_needs_samples() -> None:
    with pytest.raises(LatentPriorError, match="samples must be 2 or more"):
        linear().log_likelihood(torch.zeros(1, *PIXELS), samples=1)


def test_annealing_needs_temperatures() -> None:
    with pytest.raises(LatentPriorError, match="temperatures must be 1 or more"):
        linear().log_likelihood(images(linear(), 2), method="annealed", temperatures=0)


def test_log_likelihood_of_no_images() -> None:
    assert linear().log_likelihood(torch.zeros(0, *PIXELS)).value.shape == (0,)


@every_prior
def test_anomaly_scores_are_their_formulas(
    prior: str, event_shape: tuple[int, ...], generator: torch.Generator
) -> None:
    model = linear(prior, event_shape)
    x = images(model, 5)
    z = model.infer(x, generator=torch.Generator().manual_seed(1))
    reconstruction = -Normal(model.decode(z).detach(), 0.5).log_prob(x).sum((1, 2, 3))
    unlikely = -model.prior.log_prob(z)
    exact = {"joint": reconstruction + unlikely, "reconstruction": reconstruction, "prior": unlikely}
    for kind, score in exact.items():
        torch.testing.assert_close(model.anomaly_score(x, kind=kind, z=z), score)
        found = model.anomaly_score(x, kind=kind, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(found, score)


def test_the_marginal_score_is_minus_the_log_likelihood() -> None:
    model = linear()
    x = torch.cat([images(model, 5), images(model, 5) + 2.0])
    score = model.anomaly_score(x, kind="marginal", samples=64, generator=torch.Generator().manual_seed(1))
    found = model.log_likelihood(x, samples=64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(score, -found.value)
    # Images two units off the model's are odder, all of them.
    assert float(score[5:].min()) > float(score[:5].max())


# Completing


def test_reconstruct_decodes_the_mode(generator: torch.Generator) -> None:
    model = linear("correlated")
    x = images(model, 6)
    exact = model.decode(posterior(model, x)[0]).detach()
    torch.testing.assert_close(model.reconstruct(x, steps=200, generator=generator), exact, atol=0.01, rtol=0)


def test_inpaint_keeps_seen_pixels_and_draws_the_rest(generator: torch.Generator) -> None:
    model = linear("correlated")
    x = images(model, 1)
    mean, covariance = posterior(model, x, HALF)
    hidden = torch.where(HALF.bool(), x, torch.full_like(x, math.nan)).expand(1500, -1, -1, -1)
    filled = model.inpaint(hidden, HALF, generator=generator)
    unseen = (HALF == 0).flatten()
    assert torch.equal(filled.flatten(1)[:, ~unseen], x.flatten(1)[:, ~unseen].expand(1500, -1))
    rows = filled.flatten(1)[:, unseen]
    a, b = model.decoder.matrix.detach()[unseen], model.decoder.shift.detach()[unseen]
    # Three unseen pixels are a linear map of three latents.
    assert_standard_normal(residuals(rows, mean @ a.T + b, a @ covariance @ a.T))


class Drawn(nn.Module):
    """Latents are their own images."""

    image_shape = torch.Size([1, 1, 2])

    def forward(self, z: Tensor) -> Tensor:
        return z.reshape(-1, 1, 1, 2)


def test_interpolation_bends_to_where_the_prior_has_mass() -> None:
    rings = Rings((2.0,), 0.3, (1.0,))
    model = LatentVariableModel(Drawn(), rings)
    start, end = torch.tensor([2.0, 0.3]), torch.tensor([-2.0, 0.3])
    straight, bent = (model.interpolate(start, end, 9, relaxation=k).reshape(9, 2) for k in (0, 80))
    torch.testing.assert_close(straight, start + torch.linspace(0, 1, 9)[:, None] * (end - start))
    assert torch.equal(bent[0], start)
    assert torch.equal(bent[-1], end)
    gaps = bent.diff(dim=0).norm(dim=1)
    torch.testing.assert_close(gaps, gaps.mean().expand(8), rtol=0.05, atol=0)
    # The straight way crosses the ring's empty middle; the bent one stays on the ring.
    assert float(rings.log_prob(bent).mean()) > float(rings.log_prob(straight).mean()) + 4
    assert float((bent.norm(dim=1) - 2).abs().max()) < 0.3


def test_interpolation_at_its_ends(generator: torch.Generator) -> None:
    model = linear("correlated", (3, 1, 1))
    start, end = model.prior.sample((2,), generator)
    two = model.interpolate(start, end, 2)
    torch.testing.assert_close(two, model.decode(torch.stack([start, end])).detach())
    same = model.interpolate(start, start, 4, relaxation=0)
    torch.testing.assert_close(same, model.decode(start[None]).detach().expand(4, -1, -1, -1))
    with pytest.raises(LatentPriorError, match="2 points or more"):
        model.interpolate(start, end, 1)


# The sampler


def langevin_model(generator: torch.Generator) -> LatentVariableModel:
    model = LatentVariableModel(build_decoder(SPEC, generator), correlated_prior())
    model.sampler = {"sampler": "langevin", "steps": 2, "step_size": 0.3}
    return model


def test_generate_uses_the_models_own_sampler(generator: torch.Generator) -> None:
    model = langevin_model(generator)
    expected = model.decode(model.prior.sample((4,), torch.Generator().manual_seed(1), **model.sampler))
    assert torch.equal(model.generate(4, generator=torch.Generator().manual_seed(1)), expected)
    # A single option changes that option alone; a sampler that is named comes with its own defaults.
    longer = model.prior.sample((4,), torch.Generator().manual_seed(1), "langevin", steps=9, step_size=0.3)
    found = model.generate(4, steps=9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, model.decode(longer))
    plain = model.decode(model.prior.sample((4,), torch.Generator().manual_seed(1)))
    assert torch.equal(model.generate(4, sampler="smc", generator=torch.Generator().manual_seed(1)), plain)
    assert not torch.equal(found, plain)


def test_the_sampler_is_saved_and_older_folders_have_the_default(generator: torch.Generator) -> None:
    model = langevin_model(generator)
    config, tensors = model.state()
    assert LatentVariableModel.from_state(config, tensors).sampler == model.sampler
    older = {key: value for key, value in config.items() if key != "sampler"}
    assert LatentVariableModel.from_state(older, tensors).sampler == {"sampler": "smc"}


@pytest.mark.parametrize(
    "sampler",
    [{"sampler": "x"}, {"sampler": ["smc"]}, {"sampler": "smc", "generator": 5}, {"sampler": "sir", "n": 2}, {}, "smc"],
)
def test_a_sampler_that_cannot_be_used_is_refused(sampler: Any, generator: torch.Generator) -> None:
    model = langevin_model(generator)
    with pytest.raises(LatentPriorError, match=r"sampler|option"):
        model.sampler = sampler
    config, tensors = model.state()
    with pytest.raises(CheckpointError, match="own sampler cannot be used"):
        LatentVariableModel.from_state({**config, "sampler": sampler}, tensors)


class Square(nn.Module):
    """A decoder that does not say what images it makes."""

    def forward(self, z: Tensor) -> Tensor:
        return z.reshape(-1, 1, 2, 2)


def test_the_image_shape_is_the_decoders_or_that_of_an_image(generator: torch.Generator) -> None:
    assert LatentVariableModel(build_decoder(SPEC, generator)).image_shape == PIXELS
    model = LatentVariableModel(Square(), standard_normal_prior((4,)))
    assert model.image_shape == (1, 2, 2)
    with pytest.raises(InvalidImagesError, match=r"the decoder makes \(1, 2, 2\)"):
        model.infer(torch.zeros(1, 1, 1, 4))


# Saving


def flat_linear(fan_in: int, fan_out: int) -> nn.Sequential:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(fan_in))
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer)


def both(generator: torch.Generator) -> LatentVariableModel:
    return LatentVariableModel(
        build_decoder(SPEC, generator), correlated_prior(), sigma=0.2, encoder=build_encoder(SPEC, generator)
    )


def assert_same_model(a: LatentVariableModel, b: LatentVariableModel) -> None:
    assert a.state()[0] == b.state()[0]
    first, second = a.state()[1], b.state()[1]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_saved_and_loaded_is_the_same(tmp_path: Path, generator: torch.Generator) -> None:
    model = both(generator)
    model.save_pretrained(tmp_path)
    loaded = LatentVariableModel.from_pretrained(tmp_path)
    assert_same_model(model, loaded)
    assert loaded.sigma == 0.2
    first, second = (m.generate(3, generator=torch.Generator().manual_seed(1)) for m in (model, loaded))
    assert torch.equal(first, second)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_networks_and_distributions_of_yours_are_given_again(tmp_path: Path) -> None:
    prior = Banana()
    model = LatentVariableModel(LinearDecoder(2), prior)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"decoder is a network of yours: pass it"):
        LatentVariableModel.from_pretrained(tmp_path, prior=prior)
    with pytest.raises(CheckpointError, match="stands on a torch Distribution of yours"):
        LatentVariableModel.from_pretrained(tmp_path, decoder=LinearDecoder(2))
    loaded = LatentVariableModel.from_pretrained(tmp_path, decoder=LinearDecoder(2, seed=9), prior=prior)
    assert_same_model(model, loaded)
    with pytest.raises(CheckpointError, match="do not fit together"):
        LatentVariableModel.from_pretrained(tmp_path, decoder=LinearDecoder(3), prior=prior)


def test_an_encoder_of_yours_is_given_again(tmp_path: Path, generator: torch.Generator) -> None:
    encoder = flat_linear(6, 3)
    LatentVariableModel(build_decoder(SPEC, generator), encoder=encoder).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="encoder is a network of yours"):
        LatentVariableModel.from_pretrained(tmp_path)
    fresh = flat_linear(6, 3)
    loaded = LatentVariableModel.from_pretrained(tmp_path, encoder=fresh)
    assert torch.equal(loaded.encoder[1].weight, encoder[1].weight)


def test_networks_may_share_weights(tmp_path: Path) -> None:
    decoder, encoder = flat_linear(6, 6), flat_linear(6, 6)
    encoder[1].weight = decoder[1].weight
    prior = standard_normal_prior((6,))
    model = LatentVariableModel(decoder, prior, encoder=encoder)
    model.save_pretrained(tmp_path)
    loaded = LatentVariableModel.from_pretrained(tmp_path, decoder=flat_linear(6, 6), encoder=flat_linear(6, 6))
    assert torch.equal(loaded.decoder[1].weight, decoder[1].weight)
    assert torch.equal(loaded.encoder[1].weight, decoder[1].weight)


def test_damage_is_noticed(tmp_path: Path, generator: torch.Generator) -> None:
    both(generator).save_pretrained(tmp_path)
    weights = next(tmp_path.glob("model-*.safetensors"))
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(bytes(blob))
    with pytest.raises(CheckpointError, match="damaged"):
        LatentVariableModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        LatentVariableModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        LatentVariableModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no saved model"):
        LatentVariableModel.from_pretrained(tmp_path / "nowhere")


def test_folders_of_another_kind_are_refused(tmp_path: Path, generator: torch.Generator) -> None:
    correlated_prior().save_pretrained(tmp_path / "prior")
    with pytest.raises(CheckpointError, match="holds a 'prior', not a 'model'"):
        LatentVariableModel.from_pretrained(tmp_path / "prior")
    both(generator).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds a 'model', not a 'prior'"):
        LatentPrior.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigma", -1.0),
        ("sigma", None),
        ("sigma", "much"),
        ("decoder", None),
        ("decoder", {"spec": {"family": "magic"}}),
        ("decoder", {"spec": [1]}),
        ("encoder", {"spec": network_spec("mlp", 2, 8, PIXELS)}),
        ("encoder", 3),
        ("prior", None),
        ("prior", {}),
    ],
)
def test_configurations_that_fit_nothing(generator: torch.Generator, name: str, value: object) -> None:
    config, tensors = both(generator).state()
    for broken in (config | {name: value}, {k: v for k, v in config.items() if k != name}):
        with pytest.raises(LatentPriorError):
            LatentVariableModel.from_state(json.loads(json.dumps(broken)), tensors)


def test_tensors_that_fit_nothing(generator: torch.Generator) -> None:
    config, tensors = both(generator).state()
    for name in tensors:
        if name.startswith(("generator.", "encoder.", "prior.whitening.loc")):
            with pytest.raises(CheckpointError):
                LatentVariableModel.from_state(config, {k: v for k, v in tensors.items() if k != name})


def test_state_is_json_of_one_model(generator: torch.Generator) -> None:
    config, tensors = both(generator).state()
    assert json.loads(json.dumps(config))["encoder"]["spec"] == SPEC
    assert {k.split(".")[0] for k in tensors} == {"decoder", "encoder", "prior"}


def test_moving_nowhere_changes_nothing(generator: torch.Generator) -> None:
    model = both(generator)
    prior = model.prior
    assert model.moved(None) is model
    assert model.moved("cpu").prior is prior
