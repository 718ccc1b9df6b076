"""Images, decoders and features of the benchmarks, from the data folder and the image cache."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from _data import data_folder, image_cache
from latentprior.feature_networks import FeatureNetwork, feature_network
from latentprior.metrics import features

__all__ = ["decode_mnist16", "lenet_features", "mnist_images", "network_named", "real_features", "real_images"]


def mnist_images(part: str) -> Tensor:
    """MNIST ``train`` or ``test`` as ``(n, 1, 28, 28)`` in [0, 1]."""
    images = np.load(image_cache() / "mnist.npz")[f"x_{part}"]
    return torch.from_numpy(images).float().div(255)[:, None]


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


def lenet_features(images: Tensor) -> Tensor:
    """The 84 features before LeNet-5's last layer (98.6% test accuracy): ``(n, 1, 28, 28)`` in [0, 1]."""
    return features(network_named("lenet"), images * 2 - 1, batch_size=2000)
