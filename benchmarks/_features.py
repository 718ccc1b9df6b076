"""Images, decoders and features of the benchmarks, from the data folder and the image cache."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from _data import CifarVAE, data_folder, image_cache, taef2
from latentprior.feature_networks import FeatureNetwork, feature_network
from latentprior.metrics import features

__all__ = ["DECODERS", "decoded_features", "floor_features", "network_named", "real_features", "real_images"]


def real_images(dataset: str, part: str, n: int | None = None) -> Tensor:
    """The first n images of ``mnist`` or ``cifar10``, part ``train`` or ``test``: ``(n, C, H, W)`` in [-1, 1]."""
    pixels = torch.from_numpy(np.load(image_cache() / f"{dataset}.npz")[f"x_{part}"][:n])
    planes = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return planes.float() / 127.5 - 1


def network_named(name: str) -> FeatureNetwork:
    """A named feature network; LeNet-5's weights are those of the data folder."""
    weights = data_folder() / "pretrained" / "lenet5_mnist.safetensors" if name == "lenet" else None
    network = feature_network(name, weights=weights)
    assert isinstance(network, FeatureNetwork)
    return network


def real_features(dataset: str, part: str, name: str, n: int | None = None) -> Tensor:
    """Features of :func:`real_images` under a named network, ``(n, d)``, taken once and kept in the image cache."""
    network = network_named(name)
    path = image_cache() / f"features_{dataset}_{part}_{n or 'all'}_{network.name}.npy"
    if not path.exists():
        partial = path.with_name(f".{os.getpid()}_{path.name}")
        np.save(partial, features(network, real_images(dataset, part, n)).numpy())
        os.replace(partial, path)
    return torch.from_numpy(np.load(path))


@torch.no_grad()
def decode_mnist16(z: Tensor) -> Tensor:
    """Decode 16-d latents to ``(n, 1, 28, 28)`` in [0, 1]: linear 512, SiLU, linear 512, SiLU, linear, sigmoid."""
    weights = load_file(data_folder() / "pretrained" / "mnist16_decoder.safetensors")
    h = z.float()
    for layer in ("0", "2", "4"):
        h = F.linear(h, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        h = F.silu(h) if layer != "4" else h.sigmoid()
    return h.view(-1, 1, 28, 28)


@torch.no_grad()
def decode_vae20(z: Tensor) -> Tensor:
    """Decode latents of the classic MNIST VAE to ``(n, 1, 28, 28)`` in [0, 1]: fc3, ReLU, fc4, sigmoid."""
    weights = load_file(data_folder() / "pretrained" / "vae20_mnist.safetensors")
    h = F.relu(F.linear(z.float(), weights["fc3.weight"], weights["fc3.bias"]))
    return F.linear(h, weights["fc4.weight"], weights["fc4.bias"]).sigmoid().view(-1, 1, 28, 28)


@torch.no_grad()
def decode_cifar(z: Tensor) -> Tensor:
    """Decode latents of the benchmarks' own CIFAR-10 VAE to ``(n, 3, 32, 32)`` in [0, 1]."""
    decoder = CifarVAE(z.shape[1]).decoder
    decoder.load_state_dict(load_file(image_cache() / f"cifar_vae{z.shape[1]}.safetensors"))
    return torch.cat([decoder(block.float()) for block in z.split(500)]) / 2 + 0.5


@torch.no_grad()
def decode_taef2(z: Tensor) -> Tensor:
    """Decode flat TAEF2 codes of 32 x 32 images to ``(n, 3, 32, 32)`` in [0, 1], in bfloat16 as they were encoded."""
    generator = taef2().generator.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [generator(block.float().view(-1, 32, 4, 4)).float() for block in z.split(100)]
    return torch.cat(parts) / 2 + 0.5


DECODERS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "mnist16": ("mnist", "lenet", decode_mnist16),
    "vae20": ("mnist", "lenet", decode_vae20),
    "cifar32": ("cifar10", "efficientnet_lite0", decode_cifar),
    "cifar64": ("cifar10", "efficientnet_lite0", decode_cifar),
    "cifar128": ("cifar10", "efficientnet_lite0", decode_cifar),
    "taef512": ("cifar10", "efficientnet_lite0", decode_taef2),
}
"""The images, the feature network and the decoder of a set of latents, where there is one."""
IMAGES = {"mnist": 10_000, "cifar10": 5_000}
"""How many are compared: EfficientNet-Lite0 takes many times as long as LeNet-5."""


def decoded_features(name: str, z: Tensor) -> Tensor:
    """Features of decoded latents ``(n, d)``, in the latents' own coordinates; on CIFAR-10 of the first only."""
    dataset, network, decode = DECODERS[name]
    blocks = z[: IMAGES[dataset]].split(1000)
    return torch.cat([features(network_named(network), decode(block) * 2 - 1) for block in blocks])


def floor_features(name: str, test: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of test images, of as many train images, and of the reconstructions of ``test`` latents."""
    dataset, network, _ = DECODERS[name]
    n = IMAGES[dataset]
    rows = torch.as_tensor(test).flatten(1).float()
    return real_features(dataset, "test", network, n), {
        "reconstructions": decoded_features(name, rows),
        "real": real_features(dataset, "train", network, n),
    }
