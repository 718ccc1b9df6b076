"""Images and masks that a model is given, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InvalidImagesError

__all__ = ["check_images", "check_mask"]


def check_images(x: Tensor, shape: Sequence[int] | None, device: torch.device) -> Tensor:
    """Images ``(n, C, H, W)`` on ``device``; raises :class:`InvalidImagesError` for anything else, or another shape."""
    x = torch.as_tensor(x).to(device=device)
    if x.ndim != 4 or not x.is_floating_point():
        raise InvalidImagesError(
            f"images must be floating point (n, C, H, W) in [-1, 1], got {x.dtype} {tuple(x.shape)}; "
            "read files with latentprior.read_images"
        )
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise InvalidImagesError(f"images have shape {tuple(x.shape[1:])}, the generator makes {tuple(shape)}")
    if not torch.isfinite(x).all():
        raise InvalidImagesError("images hold NaN or infinite values: remove or mend them")
    return x


def check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of the images' shape and type; raises :class:`InvalidImagesError` where it does not broadcast to them."""
    try:
        return mask.to(x).expand_as(x)
    except RuntimeError:
        raise InvalidImagesError(f"a mask {tuple(mask.shape)} does not fit images {tuple(x.shape)}") from None
