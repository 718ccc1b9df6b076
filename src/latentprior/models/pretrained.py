"""Autoencoders rebuilt from safetensors files whose layout is known: MLP VAEs and the tiny autoencoders."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, LatentPriorError
from .adapters import Autoencoder, from_callables

__all__ = ["mlp_vae_from_safetensors", "taesd_from_safetensors"]

POOL_GROUPS = 4
"""Groups of the normalisation in a pooled block. The files do not store it: of powers of 2, 4 reconstructs best."""
DOWNSAMPLING = 8
"""Pixels a side of an image for each number a side of its latent."""
CLAMP_UNITS = 3
"""Size that a tiny decoder bounds latents to: beyond it the decoder was never trained."""


class _MLPEncoder(nn.Module):
    def __init__(self, pixels: int, width: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(pixels, width, device="meta")
        self.fc21 = nn.Linear(width, dim, device="meta")
        self.fc22 = nn.Linear(width, dim, device="meta")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.fc1(x.flatten(1)))
        return self.fc21(h), (0.5 * self.fc22(h)).exp()


class _MLPDecoder(nn.Module):
    def __init__(self, dim: int, width: int, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.fc3 = nn.Linear(dim, width, device="meta")
        self.fc4 = nn.Linear(width, math.prod(image_shape), device="meta")
        self.image_shape = tuple(image_shape)

    def forward(self, z: Tensor) -> Tensor:
        return self.fc4(F.relu(self.fc3(z))).sigmoid().unflatten(1, self.image_shape)  # type: ignore[no-any-return]


def mlp_vae_from_safetensors(path: str | Path, *, image_shape: Sequence[int] | None = None) -> Autoencoder:
    r"""The classic perceptron VAE with layers ``fc1``, ``fc21`` (mean), ``fc22`` (log variance), ``fc3``, ``fc4``.

    :math:`h = \mathrm{relu}(W_1 x + b_1)`, :math:`m = W_{21} h + b_{21}`, :math:`s = \exp((W_{22} h + b_{22}) / 2)`,
    :math:`x = \mathrm{sigmoid}(W_4 \, \mathrm{relu}(W_3 z + b_3) + b_4)`: images in [0, 1] inside, in [-1, 1] outside.

    Parameters
    ----------
    path : str or Path
        A safetensors file, whose shapes give the sizes of the layers.
    image_shape : sequence of int, optional
        Shape (C, H, W) of one image; by default images are square and grey.

    Raises
    ------
    CheckpointError
        For a file that is absent, damaged or of another layout.
    LatentPriorError
        For an ``image_shape`` of another number of pixels.

    Notes
    -----
    Source: Kingma and Welling (2014), appendix C.
    """
    tensors = _loaded(path)
    try:
        (width, pixels), dim = tensors["fc1.weight"].shape, len(tensors["fc21.weight"])
        decoder_width = len(tensors["fc3.weight"])
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(f"{path}: no perceptron VAE (it needs the layers fc1, fc21, fc22, fc3 and fc4)") from None
    shape = (1, math.isqrt(pixels), math.isqrt(pixels)) if image_shape is None else tuple(image_shape)
    if math.prod(shape) != pixels:
        raise LatentPriorError(f"{path}: made for images of {pixels} numbers, not {shape}: give their image_shape")
    encoder, decoder = _MLPEncoder(pixels, width, dim), _MLPDecoder(dim, decoder_width, shape)
    encoder_names = ("fc1.", "fc21.", "fc22.")
    _assign(encoder, {k: v for k, v in tensors.items() if k.startswith(encoder_names)}, path)
    _assign(decoder, {k: v for k, v in tensors.items() if not k.startswith(encoder_names)}, path)
    return from_callables(encoder, decoder, event_shape=(dim,), image_range=(0.0, 1.0))


class _Clamp(nn.Module):
    """Softly bound latents."""

    def forward(self, z: Tensor) -> Tensor:
        return CLAMP_UNITS * torch.tanh(z / CLAMP_UNITS)


class _Block(nn.Module):
    """``relu(h + conv(h))``, after ``h = x + pool(x)`` where the file has such a branch."""

    def __init__(self, channels: int, pool_channels: int | None) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv3(channels, channels), nn.ReLU(), _conv3(channels, channels), nn.ReLU(), _conv3(channels, channels)
        )
        self.pool: nn.Module | None = None
        if pool_channels is not None:
            self.pool = nn.Sequential(
                nn.Conv2d(channels, pool_channels, 1, bias=False, device="meta"),
                nn.GroupNorm(POOL_GROUPS, pool_channels, device="meta"),
                nn.ReLU(),
                nn.Conv2d(pool_channels, channels, 1, bias=False, device="meta"),
            )

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.pool is None else x + self.pool(x)
        return F.relu(h + self.conv(h))


def _conv3(fan_in: int, fan_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, 3, padding=1, device="meta", **options)


def taesd_from_safetensors(
    encoder_path: str | Path, decoder_path: str | Path, *, image_shape: Sequence[int] = (3, 32, 32)
) -> Autoencoder:
    """A tiny autoencoder of the TAESD line (for SD, SDXL, SD3, FLUX.1, FLUX.2) from its two files.

    Images ``(n, 3, H, W)`` to latents ``(n, C, H / 8, W / 8)``, C = 4, 16 or 32, without scales.

    Parameters
    ----------
    encoder_path, decoder_path : str or Path
        The two safetensors files.
    image_shape : sequence of int
        Shape (C, H, W) of one image; H and W must be multiples of 8.

    Raises
    ------
    CheckpointError
        For files that are absent, damaged or of another layout.
    LatentPriorError
        For images whose sides are no multiples of 8, or of another number of channels.

    Notes
    -----
    The layers follow from the names and shapes of the tensors: a residual block has ``i.conv``; a convolution without
    bias halves the image in the encoder, and comes after a doubling in the decoder. Half-precision weights are kept
    in float32. Images lie in [0, 1] inside, in [-1, 1] outside.
    """
    channels, height, width = image_shape
    if height % DOWNSAMPLING or width % DOWNSAMPLING or min(height, width) < DOWNSAMPLING:
        raise LatentPriorError(
            f"tiny autoencoders take sides that are multiples of {DOWNSAMPLING}, not {height} x {width}"
        )
    encoder, decoder = _taesd_half(encoder_path, decodes=False), _taesd_half(decoder_path, decodes=True)
    first, last = encoder[0], encoder[-1]
    if not isinstance(first, nn.Conv2d) or not isinstance(last, nn.Conv2d) or first.in_channels != channels:
        raise LatentPriorError(f"{encoder_path}: does not take images of {channels} channels: mend image_shape")
    event_shape = (last.out_channels, height // DOWNSAMPLING, width // DOWNSAMPLING)
    try:
        return from_callables(encoder, decoder, event_shape=event_shape, image_range=(0.0, 1.0))
    except LatentPriorError as error:
        raise CheckpointError(f"{encoder_path}, {decoder_path}: not one tiny autoencoder ({error})") from None


def _taesd_half(path: str | Path, decodes: bool) -> nn.Sequential:
    tensors = _loaded(path)
    shapes: dict[int, dict[str, torch.Size]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(\d{1,2})\.(.+)", name)
        if match is None:
            raise CheckpointError(f"{path}: no tiny autoencoder (unexpected tensor {name!r})")
        shapes.setdefault(int(match[1]), {})[match[2]] = tensor.shape
    layers: list[nn.Module] = []
    doublings = 0
    for i in range(max(shapes, default=-1) + 1):
        layer = shapes.get(i)
        if layer is None:
            if not decodes:
                raise CheckpointError(f"{path}: no encoder of a tiny autoencoder (layer {i} has no weights)")
            layers.append(_Clamp() if i == 0 else nn.ReLU() if i == 2 else nn.Upsample(scale_factor=2.0))
        elif "conv.0.weight" in layer:
            pool = layer.get("pool.0.weight")
            layers.append(_Block(layer["conv.0.weight"][0], None if pool is None else pool[0]))
        elif len(layer.get("weight", ())) == 4:
            fan_out, fan_in = layer["weight"][:2]
            doublings += "bias" not in layer
            stride = 2 if "bias" not in layer and not decodes else 1
            layers.append(_conv3(fan_in, fan_out, stride=stride, bias="bias" in layer))
        else:
            raise CheckpointError(f"{path}: no tiny autoencoder (layer {i} is neither convolution nor block)")
    if 2**doublings != DOWNSAMPLING or not isinstance(layers[-1], nn.Conv2d):
        raise CheckpointError(f"{path}: no {'de' if decodes else 'en'}coder of a tiny autoencoder of {DOWNSAMPLING} x")
    half = nn.Sequential(*layers)
    _assign(half, tensors, path)
    return half


def _loaded(path: str | Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None


def _assign(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Put the file's tensors in a module made without memory, and so without drawing any weights."""
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: its tensors do not fit the layout ({reason})") from None
