import json
import math
from typing import Any

import pytest
import torch

from latentprior import CheckpointError, InvalidImagesError, InvalidLatentsError, LatentPriorError
from latentprior.models.networks import build_decoder, build_encoder, network_spec

SMALL = [
    network_spec("svhn", 5, 2),
    network_spec("cifar10", 5, 2),
    network_spec("celeba64", 5, 2),
    network_spec("mnist", 5, 2),
    network_spec("mlp", 5, 7, (2, 3, 4)),
    network_spec("svhn", 5, 2, image_shape=(1, 32, 32)),
]
small = pytest.mark.parametrize("spec", SMALL, ids=lambda s: f"{s['family']}-{s['image_shape'][0]}")


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# Kernel area times input times output channels, plus output channels, layer by layer.
@pytest.mark.parametrize(
    ("family", "generator_size", "encoder_size"),
    [
        (
            "svhn",
            (16 * 100 * 512 + 512) + (16 * 512 * 256 + 256) + (16 * 256 * 128 + 128) + (16 * 128 * 3 + 3),
            (16 * 3 * 128 + 128) + (16 * 128 * 256 + 256) + (16 * 256 * 512 + 512) + (16 * 512 * 200 + 200),
        ),
        (
            "cifar10",
            (64 * 128 * 1024 + 1024) + (16 * 1024 * 512 + 512) + (16 * 512 * 256 + 256) + (9 * 256 * 3 + 3),
            (9 * 3 * 256 + 256) + (16 * 256 * 512 + 512) + (16 * 512 * 1024 + 1024) + (64 * 1024 * 256 + 256),
        ),
        ("celeba64", 12_656_515, 14_295_112),
        (
            "mnist",
            (49 * 16 * 128 + 128) + (16 * 128 * 64 + 64) + (16 * 64 * 32 + 32) + (9 * 32 + 1),
            (9 * 32 + 32) + (16 * 32 * 64 + 64) + (16 * 64 * 128 + 128) + (49 * 128 * 32 + 32),
        ),
        (
            "mlp",
            (16 * 256 + 256) + (256 * 256 + 256) + (256 * 784 + 784),
            (784 * 256 + 256) + (256 * 256 + 256) + (256 * 32 + 32),
        ),
    ],
)
def test_size_at_the_papers_width(
    family: str, generator_size: int, encoder_size: int, generator: torch.Generator
) -> None:
    spec = network_spec(family)
    assert parameters(build_decoder(spec, generator)) == generator_size
    assert parameters(build_encoder(spec, generator)) == encoder_size


@small
def test_shapes_and_ranges(spec: dict[str, Any], generator: torch.Generator) -> None:
    decoder, encoder = build_decoder(spec, generator), build_encoder(spec, generator)
    for network in (decoder, encoder):
        assert network.spec == spec
        assert tuple(network.latent_shape) == (5,)
        assert list(network.image_shape) == spec["image_shape"]
    for scale in (0.0, 1.0, 1e4):
        x = decoder(scale * torch.randn(3, 5, generator=generator))
        assert list(x.shape) == [3, *spec["image_shape"]]
        assert x.abs().max() <= 1
    mean, deviation = encoder(x)
    assert mean.shape == deviation.shape == (3, 5)
    assert torch.equal(deviation, torch.ones(3, 5))
    assert mean.std() > 0
    assert decoder(torch.zeros(0, 5)).shape == (0, *spec["image_shape"])


@small
def test_weights_are_a_function_of_the_generator_alone(spec: dict[str, Any]) -> None:
    for build in (build_decoder, build_encoder):
        states = []
        for global_seed, seed in ((1, 7), (2, 7), (2, 8)):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(global_seed)
                states.append(build(spec, torch.Generator().manual_seed(seed)).state_dict())
        a, b, c = states
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert all(not torch.equal(a[k], c[k]) for k in a if k.endswith("weight"))
        assert all((a[k] == 0).all() for k in a if k.endswith("bias"))


@small
def test_rows_do_not_mix_and_every_coordinate_counts(spec: dict[str, Any], generator: torch.Generator) -> None:
    decoder, encoder = build_decoder(spec, generator).double(), build_encoder(spec, generator).double()
    for network, shape in ((decoder, (4, 5)), (encoder, (4, *spec["image_shape"]))):
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(True)

        def output(rows: torch.Tensor, network: torch.nn.Module = network) -> torch.Tensor:
            result = network(rows)
            return result if isinstance(result, torch.Tensor) else result[0]

        torch.testing.assert_close(output(inputs)[1:2], output(inputs[1:2]))
        (grad,) = torch.autograd.grad(output(inputs)[0].square().sum(), inputs)
        assert torch.isfinite(grad).all()
        assert (grad[0] != 0).all()
        assert (grad[1:] == 0).all()


def test_variance_is_kept_through_the_layers(generator: torch.Generator) -> None:
    # Zero padding at the borders loses some: a wrong count of products would be off by a factor of 2 or more.
    for family, width in (("svhn", 32), ("cifar10", 16), ("celeba64", 32), ("mnist", 32), ("mlp", 256)):
        spec = network_spec(family, width=width)
        decoder = build_decoder(spec, generator)
        before_tanh = decoder.layers[:-1](torch.randn(16, spec["latent_dim"], generator=generator))
        assert 0.5 < before_tanh.std() < 1.3
        x = torch.randn(16, *spec["image_shape"], generator=generator)
        assert 0.5 < build_encoder(spec, generator)(x)[0].std() < 1.3


def test_log_scale_is_clamped(generator: torch.Generator) -> None:
    encoder = build_encoder(network_spec("mlp", 2, 4, (1, 2, 2)), generator)
    with torch.no_grad():
        encoder.layers[-1].bias[2:] = torch.tensor([-50.0, 50.0])
    _, scale = encoder(torch.zeros(1, 1, 2, 2))
    torch.testing.assert_close(scale, torch.tensor([[math.exp(-7), math.exp(2)]]))


@small
def test_spec_survives_json_and_rebuilds_the_same_network(spec: dict[str, Any], generator: torch.Generator) -> None:
    z = torch.randn(2, 5, generator=generator)
    decoder = build_decoder(spec, generator)
    again = build_decoder(json.loads(json.dumps(decoder.spec)), generator)
    again.load_state_dict(decoder.state_dict())
    assert torch.equal(decoder(z), again(z))


def test_spec_is_a_copy(generator: torch.Generator) -> None:
    spec = network_spec("mlp", 2, 4, (1, 2, 2))
    network = build_decoder(spec, generator)
    spec["image_shape"][0] = 9
    assert network.spec["image_shape"] == [1, 2, 2]


GOOD = {"family": "svhn", "latent_dim": 4, "width": 2, "image_shape": [3, 32, 32]}


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"family": "resnet"}, "choose svhn"),
        ({"family": ["svhn"]}, "choose svhn"),
        ({"latent_dim": 0}, "whole numbers"),
        ({"latent_dim": True}, "whole numbers"),
        ({"latent_dim": "4"}, "whole numbers"),
        ({"width": -2}, "whole numbers"),
        ({"width": 2.0}, "whole numbers"),
        ({"width": 10**12}, "whole numbers"),
        ({"image_shape": [32, 32]}, "whole numbers"),
        ({"image_shape": "333"}, "whole numbers"),
        ({"image_shape": None}, "whole numbers"),
        ({"image_shape": [3, 28, 28]}, "not 28 x 28: choose another family"),
        ({"dropout": 0.1}, "network_spec"),
    ],
    ids=str,
)
def test_foreign_specs_are_refused_with_a_cure(change: dict[str, Any], cure: str) -> None:
    for build in (build_decoder, build_encoder):
        with pytest.raises(CheckpointError, match=cure):
            build({**GOOD, **change})


def test_incomplete_specs_and_unknown_families_are_refused() -> None:
    with pytest.raises(CheckpointError, match="network_spec"):
        build_decoder({"family": "svhn"})
    with pytest.raises(CheckpointError, match="network_spec"):
        build_encoder(["svhn"])
    with pytest.raises(LatentPriorError, match="unknown network family 'vgg': choose svhn"):
        network_spec("vgg")


def test_wrong_inputs_are_named(generator: torch.Generator) -> None:
    with pytest.raises(InvalidLatentsError, match=r"shape \(2, 3\): this decoder takes \(n, 4\)"):
        build_decoder(GOOD, generator)(torch.zeros(2, 3))
    with pytest.raises(InvalidImagesError, match=r"this encoder takes \(n, 3, 32, 32\)"):
        build_encoder(GOOD, generator)(torch.zeros(2, 1, 32, 32))
