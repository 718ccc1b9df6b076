"""Checks of the images, masks and latents that a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.latents import as_dense, check_tensor
from ..errors import InvalidImagesError, InvalidLatentsError

__all__ = ["check_images", "check_latents", "check_mask"]


def check_images(images: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return what is given as images, ``(n, *shape)`` on ``device``, or raise :class:`InvalidImagesError`."""
    x = as_dense(images, "images", InvalidImagesError).to(device=device)
    if x.ndim != 4 or not x.is_floating_point():
        raise InvalidImagesError(
            f"images must be floating point (n, C, H, W) in [-1, 1], got {x.dtype} {tuple(x.shape)}; "
            "read files with latentprior.read_images"
        )
    if tuple(x.shape[1:]) != tuple(shape):
        raise InvalidImagesError(f"images have shape {tuple(x.shape[1:])}, the decoder makes {tuple(shape)}")
    if not torch.isfinite(x).all():
        raise InvalidImagesError("images hold NaN or infinite values: remove or mend them")
    return x


def check_mask(mask: Any, x: Tensor) -> Tensor:
    """Return a mask spread to the shape of the images ``x``, or raise :class:`InvalidImagesError`."""
    shares = as_dense(mask, "masks", InvalidImagesError).to(x)
    try:
        full_mask = shares.expand_as(x)
    except RuntimeError:
        raise InvalidImagesError(f"a mask {tuple(shares.shape)} does not fit images {tuple(x.shape)}") from None
    if not ((full_mask >= 0) & (full_mask <= 1)).all():
        raise InvalidImagesError("a mask holds numbers from 0 (unseen) to 1 (seen)")
    return full_mask


def check_latents(z: Any, n: int, event_shape: torch.Size, like: Tensor) -> Tensor:
    """Return latents ``(n, *event_shape)``, one an image, of the device and type of ``like``, or raise."""
    rows = check_tensor(z, event_shape, like.device, like.dtype)
    if len(rows) != n:
        raise InvalidLatentsError(f"{len(rows)} latents for {n} images: give one an image")
    if not rows.isfinite().all():
        raise InvalidLatentsError("latents hold NaN or infinite values: remove or mend them")
    return rows.reshape(n, *event_shape)
