"""Images, decoders and features of the benchmarks, from the data folder and the image cache."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from _data import CifarVAE, data_folder, image_cache, taef2
from latentprior.evaluation.feature_networks import FeatureNetwork, feature_network
from latentprior.evaluation.metrics import features

__all__ = [
    "DECODERS",
    "NETWORKS",
    "decoded_features",
    "floor_features",
    "network_named",
    "real_features",
    "real_images",
]


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


def mnist16_decoder() -> nn.Module:
    """16-d latents to ``(n, 1, 28, 28)`` in [0, 1]: linear 512, SiLU, linear 512, SiLU, linear, sigmoid."""
    d = nn.Sequential(nn.Linear(16, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 784))
    d.load_state_dict(load_file(data_folder() / "pretrained" / "mnist16_decoder.safetensors"))
    return nn.Sequential(d, nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)))


def vae20_decoder() -> nn.Module:
    """Latents of the classic MNIST VAE to ``(n, 1, 28, 28)`` in [0, 1]: fc3, ReLU, fc4, sigmoid."""
    weights = load_file(data_folder() / "pretrained" / "vae20_mnist.safetensors")
    d = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))
    names = {"0": "fc3", "2": "fc4"}
    d.load_state_dict({f"{i}.{k}": weights[f"{name}.{k}"] for i, name in names.items() for k in ("weight", "bias")})
    return nn.Sequential(d, nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)))


def cifar_decoder(dim: int) -> nn.Module:
    """Latents of the benchmarks' own CIFAR-10 VAE to ``(n, 3, 32, 32)`` in [-1, 1]."""
    decoder = CifarVAE(dim).decoder
    decoder.load_state_dict(load_file(image_cache() / f"cifar_vae{dim}.safetensors"))
    return decoder.to(memory_format=torch.channels_last)


@torch.no_grad()
def decode_mnist16(z: Tensor) -> Tensor:
    """Pictures of :func:`mnist16_decoder`."""
    return mnist16_decoder()(z.float())  # type: ignore[no-any-return]


@torch.no_grad()
def decode_vae20(z: Tensor) -> Tensor:
    """Pictures of :func:`vae20_decoder`."""
    return vae20_decoder()(z.float())  # type: ignore[no-any-return]


@torch.no_grad()
def decode_cifar(z: Tensor) -> Tensor:
    """Pictures of :func:`cifar_decoder` in [0, 1]."""
    decoder = cifar_decoder(z.shape[1])
    return torch.cat([decoder(block.float()) for block in z.split(500)]) / 2 + 0.5


@torch.no_grad()
def decode_taef2(z: Tensor) -> Tensor:
    """Decode flat TAEF2 codes of 32 x 32 images to ``(n, 3, 32, 32)`` in [0, 1], in bfloat16 as they were encoded."""
    generator = taef2().generator.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [generator(block.float().view(-1, 32, 4, 4)).float() for block in z.split(100)]
    return torch.cat(parts) / 2 + 0.5


def taef2_first_layers() -> nn.Module:
    """TAEF2's decoder until its map has doubled once: codes to ``(n, 64, 8, 8)``."""
    decoder = next(taef2().generator.children())
    assert isinstance(decoder, nn.Sequential)
    return decoder[:8].to(memory_format=torch.channels_last)


DECODERS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "mnist16": ("mnist", "lenet", decode_mnist16),
    "vae20": ("mnist", "lenet", decode_vae20),
    "cifar32": ("cifar10", "efficientnet_lite0", decode_cifar),
    "cifar64": ("cifar10", "efficientnet_lite0", decode_cifar),
    "cifar128": ("cifar10", "efficientnet_lite0", decode_cifar),
    "taef512": ("cifar10", "efficientnet_lite0", decode_taef2),
}
"""The images, the feature network and the decoder of a set of latents, where there is one."""
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mnist16": mnist16_decoder,
    "vae20": vae20_decoder,
    "cifar32": lambda: cifar_decoder(32),
    "cifar64": lambda: cifar_decoder(64),
    "cifar128": lambda: cifar_decoder(128),
    "taef512": taef2_first_layers,
}
"""Decoders as networks, or their first layers, for stages that read what they make."""
IMAGES = {"mnist": 10_000, "cifar10": 5_000}
"""Images that are compared, by feature network: EfficientNet-Lite0 takes many times as long as LeNet-5."""


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
