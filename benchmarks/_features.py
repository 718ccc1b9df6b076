"""Decoders and feature networks of the benchmarks, from the safetensors files in the data folder."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from _data import data_folder, image_cache

__all__ = ["decode_mnist16", "lenet_features", "mnist_images"]


def mnist_images(part: str) -> Tensor:
    """MNIST ``train`` or ``test`` as ``(n, 1, 28, 28)`` in [0, 1]."""
    images = np.load(image_cache() / "mnist.npz")[f"x_{part}"]
    return torch.from_numpy(images).float().div(255)[:, None]


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
def lenet_features(images: Tensor) -> Tensor:
    """The 84 features before LeNet-5's last layer (98.6% test accuracy): ``(n, 1, 28, 28) -> (n, 84)``."""
    w = load_file(data_folder() / "pretrained" / "lenet5_mnist.safetensors")
    parts = []
    for x in images.split(2000):
        h = F.pad(x, (2, 2, 2, 2))
        h = F.max_pool2d(F.relu(F.conv2d(h, w["convnet.c1.weight"], w["convnet.c1.bias"])), 2)
        h = F.max_pool2d(F.relu(F.conv2d(h, w["convnet.c3.weight"], w["convnet.c3.bias"])), 2)
        h = F.relu(F.conv2d(h, w["convnet.c5.weight"], w["convnet.c5.bias"])).flatten(1)
        parts.append(F.relu(F.linear(h, w["fc.f6.weight"], w["fc.f6.bias"])))
    return torch.cat(parts)
