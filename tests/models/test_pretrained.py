import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentprior import CheckpointError, LatentPriorError
from latentprior.models.pretrained import mlp_vae_from_safetensors, taesd_from_safetensors

Tensors = dict[str, Tensor]


def perceptron(generator: torch.Generator, pixels: int = 16, width: int = 5, dim: int = 3) -> Tensors:
    sizes = {
        "fc1": (width, pixels),
        "fc21": (dim, width),
        "fc22": (dim, width),
        "fc3": (width, dim),
        "fc4": (pixels, width),
    }
    tensors = {f"{name}.weight": torch.randn(size, generator=generator) for name, size in sizes.items()}
    return tensors | {f"{name}.bias": torch.randn(size[0], generator=generator) for name, size in sizes.items()}


def convolution(
    name: str, fan_in: int, fan_out: int, g: torch.Generator, *, kernel: int = 3, bias: bool = True
) -> Tensors:
    weight = torch.randn(fan_out, fan_in, kernel, kernel, generator=g) / (kernel * fan_in**0.5)
    return {f"{name}.weight": weight} | ({f"{name}.bias": 0.1 * torch.randn(fan_out, generator=g)} if bias else {})


def block(name: str, g: torch.Generator, *, pool: bool = False) -> Tensors:
    tensors: Tensors = {}
    for layer in (0, 2, 4):
        tensors |= convolution(f"{name}.conv.{layer}", 4, 4, g)
    if pool:
        tensors |= convolution(f"{name}.pool.0", 4, 8, g, kernel=1, bias=False)
        tensors |= {f"{name}.pool.1.weight": torch.ones(8), f"{name}.pool.1.bias": 0.1 * torch.randn(8, generator=g)}
        tensors |= convolution(f"{name}.pool.3", 8, 4, g, kernel=1, bias=False)
    return tensors


def tiny_encoder(g: torch.Generator) -> Tensors:
    tensors = convolution("0", 3, 4, g) | block("1", g)
    for layer in (2, 3, 4):
        tensors |= convolution(str(layer), 4, 4, g, bias=False)
    return tensors | block("5", g, pool=True) | convolution("6", 4, 2, g)


def tiny_decoder(g: torch.Generator) -> Tensors:
    tensors = convolution("1", 2, 4, g) | block("3", g, pool=True)
    for layer in (5, 7, 9):
        tensors |= convolution(str(layer), 4, 4, g, bias=False)
    return tensors | block("10", g) | convolution("11", 4, 3, g)


def run_block(x: Tensor, t: Tensors, name: str) -> Tensor:
    if f"{name}.pool.0.weight" in t:
        h = F.conv2d(x, t[f"{name}.pool.0.weight"])
        h = F.relu(F.group_norm(h, 4, t[f"{name}.pool.1.weight"], t[f"{name}.pool.1.bias"]))
        x = x + F.conv2d(h, t[f"{name}.pool.3.weight"])
    h = x
    for layer in (0, 2, 4):
        h = F.conv2d(h, t[f"{name}.conv.{layer}.weight"], t[f"{name}.conv.{layer}.bias"], padding=1)
        h = h if layer == 4 else F.relu(h)
    return F.relu(h + x)


def run_tiny(x: Tensor, e: Tensors, d: Tensors) -> tuple[Tensor, Tensor]:
    """Codes of images in [0, 1], and the images of those codes."""
    h = run_block(F.conv2d(x, e["0.weight"], e["0.bias"], padding=1), e, "1")
    for layer in (2, 3, 4):
        h = F.conv2d(h, e[f"{layer}.weight"], padding=1, stride=2)
    z = F.conv2d(run_block(h, e, "5"), e["6.weight"], e["6.bias"], padding=1)
    h = F.relu(F.conv2d(3 * (z / 3).tanh(), d["1.weight"], d["1.bias"], padding=1))
    h = run_block(h, d, "3")
    for layer in (5, 7, 9):
        h = F.conv2d(h.repeat_interleave(2, 2).repeat_interleave(2, 3), d[f"{layer}.weight"], padding=1)
    return z, F.conv2d(run_block(h, d, "10"), d["11.weight"], d["11.bias"], padding=1)


def test_perceptron_is_the_classic_one(tmp_path: Path, generator: torch.Generator) -> None:
    t = perceptron(generator)
    save_file(t, tmp_path / "vae.safetensors")
    autoencoder = mlp_vae_from_safetensors(tmp_path / "vae.safetensors")
    assert autoencoder.event_shape == (3,)
    assert autoencoder.image_shape == (1, 4, 4)
    x = torch.rand(6, 1, 4, 4, generator=generator) * 2 - 1
    mean, scale = autoencoder.encode(x)
    h = F.relu(F.linear((x.flatten(1) + 1) / 2, t["fc1.weight"], t["fc1.bias"]))
    torch.testing.assert_close(mean, F.linear(h, t["fc21.weight"], t["fc21.bias"]))
    torch.testing.assert_close(scale.square().log(), F.linear(h, t["fc22.weight"], t["fc22.bias"]))
    z = torch.randn(6, 3, generator=generator, requires_grad=True)
    h = F.relu(F.linear(z, t["fc3.weight"], t["fc3.bias"]))
    expected = 2 * F.linear(h, t["fc4.weight"], t["fc4.bias"]).sigmoid() - 1
    torch.testing.assert_close(autoencoder.decode(z).flatten(1), expected)
    (grad,) = torch.autograd.grad(autoencoder.decode(z).sum(), z)
    assert (grad != 0).any(1).all()


def test_perceptron_of_oblong_images(tmp_path: Path, generator: torch.Generator) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(perceptron(generator, pixels=12), path)
    assert mlp_vae_from_safetensors(path, image_shape=(3, 2, 2)).image_shape == (3, 2, 2)
    with pytest.raises(LatentPriorError, match="images of 12 numbers"):
        mlp_vae_from_safetensors(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("fc22.bias"),
        lambda t: t.pop("fc1.weight"),
        lambda t: t.update({"fc4.weight": torch.zeros(16, 6)}),
        lambda t: t.update({"fc1.weight": torch.zeros(16)}),
        lambda t: t.update({"fc5.weight": torch.zeros(1)}),
        lambda t: t.clear(),
    ],
    ids=["no bias", "no layer", "wrong shape", "wrong rank", "one too many", "empty"],
)
def test_other_perceptrons_are_refused(
    damage: Callable[[Tensors], object], tmp_path: Path, generator: torch.Generator
) -> None:
    tensors = perceptron(generator)
    damage(tensors)
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"vae\.safetensors"):
        mlp_vae_from_safetensors(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    "content", [None, b"", b"not safetensors", b"\xff" * 64], ids=["absent", "empty", "text", "header"]
)
def test_unreadable_files_are_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net\.safetensors"):
        mlp_vae_from_safetensors(path)
    with pytest.raises(CheckpointError, match=r"net\.safetensors"):
        taesd_from_safetensors(path, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiny_autoencoder_layer_by_layer(dtype: torch.dtype, tmp_path: Path, generator: torch.Generator) -> None:
    halves = [{k: v.to(dtype) for k, v in t.items()} for t in (tiny_encoder(generator), tiny_decoder(generator))]
    paths = [tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"]
    for half, path in zip(halves, paths, strict=True):
        save_file(half, path)
    autoencoder = taesd_from_safetensors(*paths, image_shape=(3, 16, 24))
    assert autoencoder.event_shape == (2, 2, 3)
    assert autoencoder.image_shape == (3, 16, 24)
    assert {p.dtype for p in autoencoder.decoder.parameters()} == {torch.float32}
    x = torch.rand(3, 3, 16, 24, generator=generator) * 2 - 1
    z, y = run_tiny((x + 1) / 2, *({k: v.float() for k, v in half.items()} for half in halves))
    torch.testing.assert_close(autoencoder.encode(x), z)
    torch.testing.assert_close(autoencoder.decode(z), (2 * y - 1).clamp(-1, 1))
    assert (autoencoder.decode(z).abs() < 1).any()


@pytest.mark.parametrize("shape", [(3, 20, 16), (3, 0, 8), (1, 16, 16)], ids=str)
def test_tiny_autoencoder_refuses_other_images(
    shape: tuple[int, int, int], tmp_path: Path, generator: torch.Generator
) -> None:
    paths = [tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"]
    save_file(tiny_encoder(generator), paths[0])
    save_file(tiny_decoder(generator), paths[1])
    with pytest.raises(LatentPriorError, match=r"multiples of 8|mend image_shape"):
        taesd_from_safetensors(*paths, image_shape=shape)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("1.conv.0.bias"),
        lambda t: t.pop("1.conv.0.weight"),
        lambda t: t.pop("2.weight"),
        lambda t: t.update({"3.bias": torch.zeros(4)}),
        lambda t: t.update({"6.weight": torch.zeros(2, 5, 3, 3)}),
        lambda t: t.update({"encoder.weight": torch.zeros(1)}),
        lambda t: t.update({"99.weight": torch.zeros(1)}),
        lambda t: t.clear(),
    ],
    ids=["no bias", "no layer", "gap", "strides", "wrong shape", "foreign name", "far name", "empty"],
)
def test_other_networks_are_no_tiny_autoencoders(
    damage: Callable[[Tensors], object], tmp_path: Path, generator: torch.Generator
) -> None:
    tensors = tiny_encoder(generator)
    damage(tensors)
    paths = [tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"]
    save_file(tensors, paths[0])
    save_file(tiny_decoder(generator), paths[1])
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors"):
        taesd_from_safetensors(*paths)


def test_halves_swapped_are_refused(tmp_path: Path, generator: torch.Generator) -> None:
    paths = [tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"]
    save_file(tiny_encoder(generator), paths[0])
    save_file(tiny_decoder(generator), paths[1])
    with pytest.raises(CheckpointError, match="no encoder of a tiny autoencoder"):
        taesd_from_safetensors(*reversed(paths))


def pretrained(name: str) -> Path:
    path = Path(os.environ.get("LATENTPRIOR_DATA", ".")) / "pretrained" / name
    if not path.is_file():
        pytest.skip(f"LATENTPRIOR_DATA holds no pretrained/{name}")
    return path


def test_real_tiny_autoencoder_reconstructs_smooth_images(generator: torch.Generator) -> None:
    paths = [pretrained(f"taef2_{half}.safetensors") for half in ("encoder", "decoder")]
    autoencoder = taesd_from_safetensors(*paths)
    assert autoencoder.event_shape == (32, 4, 4)
    assert sum(p.numel() for p in autoencoder.decoder.parameters()) == sum(
        t.numel() for t in load_file(paths[1]).values()
    )
    coarse = torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1
    x = F.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=False).clamp(-1, 1)
    with torch.no_grad():
        error = (autoencoder.decode(autoencoder.encode(x)) - x).square().mean()
    # 0.0214; with 8 groups instead of 4 it is 0.0280, with 2 groups 0.081, fed in [-1, 1] 0.10.
    assert error < 0.024


def test_real_perceptron_draws_strokes(generator: torch.Generator) -> None:
    autoencoder = mlp_vae_from_safetensors(pretrained("vae20_mnist.safetensors"))
    assert autoencoder.event_shape == (20,)
    stroke = -torch.ones(1, 1, 28, 28)
    stroke[:, :, 5:23, 13:16] = 1.0
    with torch.no_grad():
        mean, scale = autoencoder.encode(stroke)
        error = (autoencoder.decode(mean) - stroke).square().mean()
    assert (scale < 1.1).all()
    assert error < 0.05
