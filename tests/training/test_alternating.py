import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import latentprior as lp
from latentprior.data.images import Images
from latentprior.models.model import LatentVariableModel
from latentprior.models.networks import build_decoder, build_encoder, network_spec
from latentprior.training.alternating import UNDER_A_PRIOR, train_alternating, train_under_prior
from latentprior.training.config import AutoencoderConfig
from latentprior.training.two_phase import train_two_phase
from linear_gaussian import PIXELS, LinearDecoder

pytestmark = pytest.mark.filterwarnings("ignore::latentprior.NormalizerBracketWarning")

SPEC = network_spec("mlp", 2, 16, PIXELS)
AUTOENCODER = AutoencoderConfig(steps=60, batch_size=64, learning_rate=1e-2, average=0.95)
UNDER = replace(
    UNDER_A_PRIOR, steps=40, settle_steps=160, batch_size=64, held_out=60, evaluate_every=40, ratio_width=16,
    ratio_depth=1, average=0.95, switch="schedule", learning_rate=2e-3, posterior_steps=10, posterior_step_size=0.2,
)  # fmt: skip
SETTINGS = lp.StageSettings(width=16, depth=1, steps=150, batch_size=128, average=0.98)
FIT = {"base": "gmm:2", "max_stages": 1, "settings": SETTINGS}


def pictures(n: int, seed: int) -> Tensor:
    """Images of two clusters of latents, 7 in 10 in the first."""
    g = torch.Generator().manual_seed(seed)
    left = torch.rand(n, generator=g) < 0.7
    z = torch.where(left[:, None], torch.tensor([-1.2, 0.3]), torch.tensor([1.8, -0.5]))
    x = LinearDecoder(2, scale=0.25).float()(z + 0.35 * torch.randn(n, 2, generator=g)).detach()
    return (x + 0.05 * torch.randn(x.shape, generator=g)).clamp(-1, 1)


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(pictures(800, 0))


def fresh() -> LatentVariableModel:
    g = torch.Generator().manual_seed(4)
    return LatentVariableModel(build_decoder(SPEC, g), sigma=0.2, encoder=build_encoder(SPEC, g))


def error(model: LatentVariableModel, x: Tensor) -> float:
    return float((model.reconstruct(x, method="map") - x).square().mean())


@pytest.mark.slow
def test_the_generator_moves_and_its_prior_follows(images: Images) -> None:
    # So many that single rows in a tail decide nothing: both rises are 11 standard errors and more, on torch 2.4 too.
    test = Images(pictures(1500, 7)).batch(torch.arange(1500))
    model = train_two_phase(fresh(), images, AUTOENCODER, **FIT)
    before, old_prior = error(model, test), model.prior
    assert train_under_prior(model, images, UNDER, **FIT) is model
    assert error(model, test) < before
    assert len(model.prior.stages) <= 1
    assert model.prior.base.name == "gmm"
    z = model.infer(test, method="langevin", steps=10, step_size=0.2, generator=torch.Generator().manual_seed(1))
    # Learned on such draws of other images: above the ladder that it replaced, and above the best normal.
    normal = Normal(z.mean(0), z.std(0))
    for other in (old_prior.log_prob(z), normal.log_prob(z).sum(1)):
        rise = model.prior.log_prob(z) - other
        assert float(rise.mean()) > 3 * float(rise.std()) / math.sqrt(len(z))
    made = model.generate(2000, generator=torch.Generator().manual_seed(2))
    assert float((made.mean(0) - test.mean(0)).abs().max()) < 0.08
    assert float((made.std(0) - test.std(0)).abs().max()) < 0.1


def test_alternating_is_two_phases_and_then_those_under_the_prior(images: Images) -> None:
    quick = replace(AUTOENCODER, steps=5), replace(UNDER, steps=3, settle_steps=2, posterior_steps=1)
    whole = train_alternating(fresh(), images, *quick, seed=3, base="gmm:2", max_stages=0)
    parts = train_two_phase(fresh(), images, quick[0], seed=3, base="gmm:2", max_stages=0)
    train_under_prior(parts, images, quick[1], seed=3, base="gmm:2", max_stages=0)
    x = images.batch(torch.arange(9))
    torch.testing.assert_close(whole.reconstruct(x), parts.reconstruct(x), atol=0, rtol=0)
    z = whole.encode(x)[0]
    torch.testing.assert_close(whole.prior.log_prob(z), parts.prior.log_prob(z), atol=0, rtol=0)


def test_too_few_images_are_told_before_the_autoencoder_is_learned(images: Images) -> None:
    def forbidden(_: object) -> None:
        raise AssertionError("learning has begun")

    with pytest.raises(lp.LatentPriorError, match="800 images are too few beside 799 held out"):
        train_alternating(fresh(), images, config=replace(UNDER, held_out=799), callbacks=[forbidden])
