import copy
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from latentprior import InvalidImagesError, LatentPriorError
from latentprior.models.adapters import Autoencoder, from_any, from_callables, from_diffusers, from_pythae
from latentprior.models.model import LatentVariableModel


class Output(OrderedDict):
    """Fields as attributes and as keys, as both libraries return them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class FakeKL(nn.Module):
    """The calls of AutoencoderKL: twice smaller codes of two channels, a scale that depends on the image."""

    def __init__(self, generator: torch.Generator, **config: Any) -> None:
        super().__init__()
        self.config = {"in_channels": 3, "latent_channels": 2, "sample_size": 8, "scaling_factor": 0.25, **config}
        self.encoder = nn.utils.skip_init(nn.Conv2d, 3, 4, 2, 2)
        self.quant_conv = nn.utils.skip_init(nn.Conv2d, 4, 4, 1)
        self.post_quant_conv = nn.utils.skip_init(nn.Conv2d, 2, 2, 1)
        self.decoder = nn.utils.skip_init(nn.ConvTranspose2d, 2, 3, 2, 2)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.3, generator=generator)

    def encode(self, x: Tensor) -> Output:
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, 1)
        std = (0.5 * log_variance).exp()
        return Output(latent_dist=SimpleNamespace(mean=mean, std=std, sample=lambda generator=None: mean))

    def decode(self, z: Tensor) -> Output:
        return Output(sample=self.decoder(self.post_quant_conv(z)))


class FakeTiny(FakeKL):
    """The calls of AutoencoderTiny: codes without a scale, a configuration without the images' size."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(generator, scaling_factor=1.0, shift_factor=0.0)
        del self.config["sample_size"]

    def encode(self, x: Tensor) -> Output:  # type: ignore[override]
        return Output(latents=super().encode(x).latent_dist.mean)


class FakePythaeEncoder(nn.Module):
    def __init__(self, variational: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(12, 4, generator=generator))
        self.log_var = nn.Parameter(torch.randn(12, 4, generator=generator)) if variational else None

    def forward(self, x: Tensor) -> Output:
        assert x.min() >= 0
        assert x.max() <= 1
        output = Output(embedding=x.flatten(1) @ self.embedding)
        if self.log_var is not None:
            output["log_covariance"] = x.flatten(1) @ self.log_var
        return output


class FakePythae(nn.Module):
    def __init__(self, variational: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.latent_dim = 4
        self.encoder = FakePythaeEncoder(variational, generator)
        decoder = nn.utils.skip_init(nn.Linear, 4, 12)
        nn.init.normal_(decoder.weight, generator=generator)
        nn.init.zeros_(decoder.bias)
        self.decoder = FakePythaeDecoder(decoder)


class FakePythaeDecoder(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, z: Tensor) -> Output:
        return Output(reconstruction=self.linear(z).sigmoid().view(-1, 3, 2, 2))


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.rand(40, 3, 8, 8, generator=generator) * 2 - 1


def halves_fit(autoencoder: Autoencoder, x: Tensor) -> None:
    output = autoencoder.encode(x)
    mean = output if isinstance(output, Tensor) else output[0]
    assert mean.shape == (len(x), *autoencoder.event_shape)
    assert autoencoder.encoder.latent_shape == autoencoder.decoder.latent_shape == autoencoder.event_shape
    assert autoencoder.encoder.image_shape == autoencoder.decoder.image_shape == x.shape[1:]
    z = mean.detach().requires_grad_(True)
    decoded = autoencoder.decode(z)
    assert decoded.shape == x.shape
    assert decoded.abs().max() <= 1
    (grad,) = torch.autograd.grad(decoded.sum(), z)
    assert torch.isfinite(grad).all()
    assert grad.abs().sum() > 0


def test_images_pass_in_the_parts_own_range() -> None:
    seen: list[Tensor] = []

    def encode(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)

    autoencoder = from_callables(encode, nn.Unflatten(1, (1, 2, 2)), event_shape=(4,), image_range=(0, 255))
    x = torch.tensor([[[[-1.0, 0.0], [0.5, 1.0]]]])
    z = autoencoder.encode(x)
    torch.testing.assert_close(seen[-1].flatten(), torch.tensor([0.0, 127.5, 191.25, 255.0]))
    torch.testing.assert_close(autoencoder.decode(z), x)
    assert torch.equal(
        autoencoder.decode(torch.tensor([[-9.0, 300.0, 0.0, 255.0]])).flatten(), torch.tensor([-1.0, 1, -1, 1])
    )


@pytest.mark.parametrize(
    "encode",
    [
        lambda x: (x.flatten(1), 0.1 + x.flatten(1).abs()),
        lambda x: [x.flatten(1), 0.1 + x.flatten(1).abs()],
        lambda x: Normal(x.flatten(1), 0.1 + x.flatten(1).abs()),
    ],
    ids=["tuple", "list", "distribution"],
)
def test_callables_may_return_posteriors(encode: Any) -> None:
    autoencoder = from_callables(encode, nn.Unflatten(1, (1, 1, 3)), event_shape=[3])
    x = torch.tensor([[[[-1.0, 0.2, 0.5]]]])
    mean, scale = autoencoder.encode(x)
    torch.testing.assert_close(mean, torch.tensor([[-1.0, 0.2, 0.5]]))
    torch.testing.assert_close(scale, torch.tensor([[1.1, 0.3, 0.6]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_parts_are_called_in_their_own_type(dtype: torch.dtype, generator: torch.Generator, images: Tensor) -> None:
    autoencoder = from_diffusers(FakeKL(generator).to(dtype))
    mean, scale = autoencoder.encode(images)
    assert mean.dtype == scale.dtype == autoencoder.decode(mean).dtype == torch.float32


def test_functions_without_weights_keep_the_callers_type() -> None:
    autoencoder = from_callables(lambda x: x.flatten(1), lambda z: z.view(-1, 1, 1, 2), event_shape=(2,))
    x = torch.tensor([[[[1e-12, 0.3]]]], dtype=torch.float64)
    assert torch.equal(autoencoder.decode(autoencoder.encode(x)), x)


@pytest.mark.parametrize(
    ("config", "shift", "factor"),
    [
        ({}, [0.0, 0.0], [0.25, 0.25]),
        ({"shift_factor": 0.5}, [0.5, 0.5], [0.25, 0.25]),
        ({"scaling_factor": None}, [0.0, 0.0], [1.0, 1.0]),
        ({"latents_mean": [1.0, -2.0], "latents_std": [0.5, 4.0]}, [1.0, -2.0], [0.5, 0.0625]),
        ({"scaling_factor": None, "latents_mean": (1.0, -2.0), "latents_std": (0.5, 4.0)}, [1.0, -2.0], [2.0, 0.25]),
    ],
    ids=["scaling", "shift", "nothing", "moments", "moments alone"],
)
def test_diffusers_stored_factors_are_applied(
    config: dict[str, Any], shift: list[float], factor: list[float], generator: torch.Generator, images: Tensor
) -> None:
    vae = FakeKL(generator, **config)
    autoencoder = from_diffusers(vae)
    assert autoencoder.event_shape == (2, 4, 4)
    halves_fit(autoencoder, images)
    raw, (mean, scale) = vae.encode(images).latent_dist, autoencoder.encode(images)
    a, b = torch.tensor(shift).view(2, 1, 1), torch.tensor(factor).view(2, 1, 1)
    torch.testing.assert_close(mean, (raw.mean - a) * b)
    torch.testing.assert_close(scale, raw.std * b)
    torch.testing.assert_close(autoencoder.decode(mean), vae.decode(raw.mean).sample.clamp(-1, 1))


def test_configurations_may_be_objects(generator: torch.Generator, images: Tensor) -> None:
    vae = FakeKL(generator)
    expected = from_diffusers(vae).encode(images)[0]
    vae.config = SimpleNamespace(**vae.config)
    assert torch.equal(from_diffusers(vae).encode(images)[0], expected)


def test_tiny_autoencoder_has_no_scale_and_asks_for_a_shape(generator: torch.Generator, images: Tensor) -> None:
    vae = FakeTiny(generator)
    with pytest.raises(LatentPriorError, match="give image_shape"):
        from_diffusers(vae)
    autoencoder = from_diffusers(vae, image_shape=(3, 8, 8))
    halves_fit(autoencoder, images)
    assert torch.equal(autoencoder.encode(images), vae.encode(images).latents)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.0},
        {"scaling_factor": float("nan")},
        {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3},
        {"latents_mean": [0.0] * 2, "latents_std": [1.0, 0.0]},
    ],
    ids=str,
)
def test_senseless_stored_factors_are_refused(config: dict[str, Any], generator: torch.Generator) -> None:
    with pytest.raises(LatentPriorError, match="mend scaling_factor"):
        from_diffusers(FakeKL(generator, **config))


def test_halves_own_their_weights_alone_and_share_them_with_the_model(generator: torch.Generator) -> None:
    vae = FakeKL(generator)
    autoencoder = from_diffusers(vae)
    own = [{p.data_ptr() for p in half.parameters()} for half in (autoencoder.encoder, autoencoder.decoder)]
    assert not own[0] & own[1]
    assert own[0] | own[1] == {p.data_ptr() for p in vae.parameters()}
    assert set(dict(vae.named_children())) == {"encoder", "quant_conv", "post_quant_conv", "decoder"}


def test_copies_are_independent(generator: torch.Generator, images: Tensor) -> None:
    autoencoder = from_diffusers(FakeKL(generator))
    average = copy.deepcopy(autoencoder.decoder)
    z = autoencoder.encode(images)[0].detach()
    before = autoencoder.decode(z)
    with torch.no_grad():
        for weight in average.parameters():
            weight.zero_()
    assert torch.equal(autoencoder.decode(z), before)
    assert (average(z) == 0).all()


@pytest.mark.parametrize("variational", [True, False])
def test_pythae(variational: bool, generator: torch.Generator) -> None:
    model = FakePythae(variational, generator)
    autoencoder = from_any(model)
    x = torch.rand(5, 3, 2, 2, generator=generator) * 2 - 1
    halves_fit(autoencoder, x)
    output, raw = autoencoder.encode(x), model.encoder((x + 1) / 2)
    if variational:
        torch.testing.assert_close(output[0], raw.embedding)
        torch.testing.assert_close(output[1], raw.log_covariance.exp().sqrt())
    else:
        torch.testing.assert_close(output, raw.embedding)
    torch.testing.assert_close(autoencoder.decode(raw.embedding), model.decoder(raw.embedding).reconstruction * 2 - 1)


def test_parts_are_put_in_eval_mode(generator: torch.Generator) -> None:
    drop = nn.Sequential(nn.Flatten(), nn.Dropout())
    autoencoder = from_callables(drop, nn.Unflatten(1, (1, 1, 4)), event_shape=(4,))
    x = torch.rand(3, 1, 1, 4, generator=generator)
    assert torch.equal(autoencoder.encode(x), x.flatten(1))


@pytest.mark.parametrize("again", [False, True])
def test_standardised_latents_have_unit_moments(again: bool, generator: torch.Generator, images: Tensor) -> None:
    plain = from_diffusers(FakeKL(generator, shift_factor=0.3))
    measured = plain.standardised(images, batch_size=7)
    if again:
        measured = measured.standardised(images)
    mean, scale = measured.encode(images)
    assert measured.encoder.factor.shape == (2, 1, 1)
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    second = mean.var((0, 2, 3), correction=0) + scale.square().mean((0, 2, 3))
    torch.testing.assert_close(second, torch.ones(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(measured.decode(mean), plain.decode(plain.encode(images)[0]), atol=1e-5, rtol=0)
    assert plain.encoder.factor.unique().tolist() == [0.25]


def test_flat_latents_are_standardised_by_coordinate(generator: torch.Generator) -> None:
    plain = from_callables(lambda x: x.flatten(1) * 5, lambda z: (z / 5).view(-1, 1, 1, 3), event_shape=(3,))
    x = torch.rand(50, 1, 1, 3, generator=generator) * torch.tensor([1.0, 0.1, 0.0]) + torch.tensor([0.0, 0.5, 0.25])
    measured = plain.standardised(x)
    z = measured.encode(x)
    torch.testing.assert_close(z.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(measured.decode(z), x)


def test_measured_moments_are_loaded_with_the_weights(generator: torch.Generator, images: Tensor) -> None:
    vae = FakeKL(generator)
    measured = from_diffusers(vae).standardised(images)
    fresh = from_diffusers(FakeKL(generator))
    for name in ("encoder", "decoder"):
        getattr(fresh, name).load_state_dict(getattr(measured, name).state_dict())
    assert torch.equal(fresh.encode(images)[0], measured.encode(images)[0])
    z = torch.randn(3, 2, 4, 4, generator=generator)
    assert torch.equal(fresh.decode(z), measured.decode(z))


@pytest.mark.parametrize(
    "rows", [torch.zeros(1, 3, 8, 8), torch.zeros(9, 3, 4, 4), [1, 2]], ids=["one", "small", "list"]
)
def test_standardising_needs_images(rows: Any, generator: torch.Generator) -> None:
    with pytest.raises(InvalidImagesError, match=r"tensor \(n, 3, 8, 8\)"):
        from_diffusers(FakeKL(generator)).standardised(rows)


def test_model_takes_the_halves(generator: torch.Generator, images: Tensor) -> None:
    autoencoder = from_diffusers(FakeKL(generator))
    model = LatentVariableModel(autoencoder.decoder, encoder=autoencoder.encoder)
    mean, scale = model.encode(images[:3])
    assert torch.equal(mean, autoencoder.encode(images[:3])[0])
    assert scale is not None
    assert torch.equal(model.decode(mean), autoencoder.decode(mean))


class Methods:
    """Not a module: just the two methods."""

    def encode(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        return z.view(-1, 1, 2, 2)


def test_from_any_chooses_by_what_it_is_given(generator: torch.Generator, images: Tensor) -> None:
    kl = from_any(FakeKL(generator))
    assert kl.encoder.factor.unique().tolist() == [0.25]
    assert from_any(kl) is kl
    assert from_any(FakeTiny(generator), image_shape=(3, 4, 4)).event_shape == (2, 2, 2)
    x = torch.rand(2, 1, 2, 2, generator=generator)
    for obj in (Methods(), (Methods().encode, Methods().decode), (nn.Flatten(), nn.Unflatten(1, (1, 2, 2)))):
        autoencoder = from_any(obj, event_shape=(4,), image_range=(0, 1))
        torch.testing.assert_close(autoencoder.encode(x), (x.flatten(1) + 1) / 2)
        torch.testing.assert_close(autoencoder.decode(autoencoder.encode(x)), x)
        with pytest.raises(LatentPriorError, match="give event_shape"):
            from_any(obj)


@pytest.mark.parametrize(
    "obj",
    [3, None, "vae", nn.Linear(1, 1, device="meta"), (nn.Flatten(),), object()],
    ids=lambda obj: type(obj).__name__,
)
def test_from_any_says_what_it_accepts(obj: Any) -> None:
    with pytest.raises(LatentPriorError, match=r"diffusers or pythae model.*pair \(encode, decode\)"):
        from_any(obj, event_shape=(4,))


SQUARE = nn.Unflatten(1, (1, 2, 2))


@pytest.mark.parametrize(
    ("encode", "decode", "options", "cure"),
    [
        (nn.Flatten(), SQUARE, {"event_shape": (5,)}, "check the shapes"),
        (lambda x: x.flatten(1)[:, :3], SQUARE, {"event_shape": (4,)}, "two halves of one"),
        (lambda x: (x.flatten(1), x.flatten(1) - 9), SQUARE, {"event_shape": (4,)}, "from a log variance"),
        (lambda x: (x.flatten(1), x.flatten(1)[:, :1]), SQUARE, {"event_shape": (4,)}, "of the same shape"),
        (lambda x: "z", SQUARE, {"event_shape": (4,)}, "the encoder returned str"),
        (nn.Flatten(), lambda z: None, {"event_shape": (4,)}, "the decoder returned NoneType"),
        (nn.Flatten(), nn.Flatten(), {"event_shape": (4,)}, r"must be \(n, C, H, W\)"),
        (nn.Flatten(), SQUARE, {"event_shape": (4,), "image_range": (1, 0)}, "low < high"),
        (nn.Flatten(), SQUARE, {"event_shape": (4,), "image_range": (0, float("inf"))}, "low < high"),
    ],
    ids=["shape", "halves", "negative scale", "scale's shape", "encoder", "decoder", "flat images", "range", "endless"],
)
def test_halves_that_do_not_fit_are_refused(encode: Any, decode: Any, options: dict[str, Any], cure: str) -> None:
    with pytest.raises(LatentPriorError, match=cure):
        from_callables(encode, decode, **options)


def test_from_pythae_refuses_a_model_without_halves() -> None:
    with pytest.raises(LatentPriorError, match="give a pythae autoencoder"):
        from_pythae(nn.Identity())


def test_real_diffusers_models(images: Tensor, generator: torch.Generator) -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        kl = diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=2,
            sample_size=8,
            scaling_factor=0.5,
            shift_factor=0.1,
        )
        tiny = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    with torch.no_grad():
        autoencoder = from_any(kl)
        mean, scale = autoencoder.encode(images)
        raw = kl.encode(images).latent_dist
        torch.testing.assert_close(mean, (raw.mean - 0.1) * 0.5)
        torch.testing.assert_close(scale, raw.std * 0.5)
        torch.testing.assert_close(autoencoder.decode(mean), kl.decode(raw.mean).sample.clamp(-1, 1))
        small = from_any(tiny, image_shape=(3, 8, 8))
        assert torch.equal(small.encode(images), tiny.encode(images).latents)
        z = torch.randn(2, 4, 4, 4, generator=generator)
        assert torch.equal(small.decode(z), tiny.decode(z).sample.clamp(-1, 1))
    halves_fit(autoencoder, images)
    halves_fit(small, images)
    shared = [{p.data_ptr() for p in half.parameters()} for half in (autoencoder.encoder, autoencoder.decoder)]
    assert not shared[0] & shared[1]


def test_real_pythae_models(generator: torch.Generator) -> None:
    models = pytest.importorskip("pythae.models")
    x = torch.rand(6, 1, 4, 4, generator=generator) * 2 - 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        vae = models.VAE(models.VAEConfig(input_dim=(1, 4, 4), latent_dim=2))
        ae = models.AE(models.AEConfig(input_dim=(1, 4, 4), latent_dim=2))
    for model in (vae, ae):
        autoencoder = from_any(model)
        halves_fit(autoencoder, x)
        output = model.encoder((x + 1) / 2)
        if model is vae:
            mean, scale = autoencoder.encode(x)
            torch.testing.assert_close(scale, output.log_covariance.exp().sqrt())
        else:
            mean = autoencoder.encode(x)
        torch.testing.assert_close(mean, output.embedding)
        torch.testing.assert_close(autoencoder.decode(mean), model.decoder(mean).reconstruction * 2 - 1)
