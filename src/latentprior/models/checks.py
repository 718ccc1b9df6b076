"""Checks of the images, masks, latents and chain settings that a model is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.latents import as_dense, check_tensor
from ..errors import InvalidImagesError, InvalidLatentsError, LatentPriorError

__all__ = ["check_chain", "check_images", "check_latents", "check_mask"]


def check_images(images: Any, shape: Sequence[int] | None, device: torch.device) -> Tensor:
    """Images ``(n, C, H, W)`` on ``device``.

    Parameters
    ----------
    images : Tensor or array_like
        What is given as images.
    shape : sequence of int or None
        The shape (C, H, W) that they must have; None takes any.
    device : torch.device
        Where they are put.

    Raises
    ------
    InvalidImagesError
        For what are no images, for images of another shape, and for NaN or infinite values.
    """
    x = as_dense(images, "images", InvalidImagesError).to(device=device)
    if x.ndim != 4 or not x.is_floating_point():
        raise InvalidImagesError(
            f"images must be floating point (n, C, H, W) in [-1, 1], got {x.dtype} {tuple(x.shape)}; "
            "read files with latentprior.read_images"
        )
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise InvalidImagesError(f"images have shape {tuple(x.shape[1:])}, the decoder makes {tuple(shape)}")
    if not torch.isfinite(x).all():
        raise InvalidImagesError("images hold NaN or infinite values: remove or mend them")
    return x


def check_mask(mask: Any, x: Tensor) -> Tensor:
    """A mask of the images' shape and type, numbers from 0 to 1.

    Parameters
    ----------
    mask : Tensor or array_like
        What is given as a mask, of a shape that broadcasts to the images.
    x : Tensor
        The images ``(n, C, H, W)``.

    Raises
    ------
    InvalidImagesError
        For a mask of another shape, or with other numbers.
    """
    shares = as_dense(mask, "masks", InvalidImagesError).to(x)
    try:
        full_mask = shares.expand_as(x)
    except RuntimeError:
        raise InvalidImagesError(f"a mask {tuple(shares.shape)} does not fit images {tuple(x.shape)}") from None
    if not ((full_mask >= 0) & (full_mask <= 1)).all():
        raise InvalidImagesError("a mask holds numbers from 0 (unseen) to 1 (seen)")
    return full_mask


def check_latents(z: Any, n: int, event_shape: torch.Size, like: Tensor) -> Tensor:
    """Latents ``(n, *event_shape)``, one an image.

    Parameters
    ----------
    z : Tensor or array_like
        What is given as latents.
    n : int
        Number of images.
    event_shape : torch.Size
        Shape of one latent.
    like : Tensor
        A tensor whose device and type they get.

    Raises
    ------
    InvalidLatentsError
        For another number of latents, another shape, and for NaN or infinite values.
    """
    rows = check_tensor(z, event_shape, like.device, like.dtype)
    if len(rows) != n:
        raise InvalidLatentsError(f"{len(rows)} latents for {n} images: give one an image")
    if not rows.isfinite().all():
        raise InvalidLatentsError("latents hold NaN or infinite values: remove or mend them")
    return rows.reshape(n, *event_shape)


def check_chain(steps: Any, step_size: Any) -> None:
    """Check how a chain moves.

    Parameters
    ----------
    steps : int
        Steps of the chain, 0 or more.
    step_size : float
        Size of a step, positive and finite.

    Raises
    ------
    LatentPriorError
        For numbers that no chain can have.
    """
    if not isinstance(steps, (int, np.integer)) or steps < 0:
        raise LatentPriorError(f"steps must be a whole number of 0 or more, got {steps!r}")
    if not isinstance(step_size, (int, float, np.number)) or not 0 < step_size < math.inf:
        raise LatentPriorError(f"step_size must be positive and finite, got {step_size!r}")
