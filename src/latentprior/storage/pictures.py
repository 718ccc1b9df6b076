"""Images as PNG: grids of them, by Pillow."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["data_uri", "image_grid", "picture", "picture_grid", "pillow", "png"]


def pillow() -> Any:
    """Return Pillow's module ``PIL.Image``; raise :class:`MissingExtraError` without it."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("writing pictures", "images") from None
    return Image


def image_grid(x: Tensor, *, columns: int | None = None, gap: int = 2, transparent: bool = False) -> Image:
    """Place images side by side, row by row.

    Parameters
    ----------
    x : Tensor
        Images ``(n, C, H, W)`` in [-1, 1]. With fewer than three channels the first is drawn in grey, with more the
        first three in colour.
    columns : int, optional
        Images in a row; by default as many as make the grid about square.
    gap : int, default 2
        Pixels between two images.
    transparent : bool, default False
        Whether gaps and places without an image are transparent, and the picture RGBA; otherwise they are white.
    """
    n, c, h, w = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    mode, blank = ("RGBA", (0, 0, 0, 0)) if transparent else ("L" if c < 3 else "RGB", "white")
    grid: Image = pillow().new(mode, (columns * (w + gap) - gap, rows * (h + gap) - gap), blank)
    for i, image in enumerate(x):
        grid.paste(picture(image), ((i % columns) * (w + gap), (i // columns) * (h + gap)))
    return grid


def picture(image: Tensor) -> Image:
    """Round one image ``(C, H, W)`` in [-1, 1] to bytes."""
    pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    array = pixels[:3].permute(1, 2, 0) if len(pixels) >= 3 else pixels[0]
    found: Image = pillow().fromarray(array.contiguous().numpy())
    return found


def png(image: Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture_grid(x: Tensor, *, columns: int | None = None) -> bytes:
    """Encode images ``(n, C, H, W)`` in [-1, 1] as the PNG of one grid, with white lines of two pixels."""
    return png(image_grid(x, columns=columns))


def data_uri(blob: bytes, kind: str = "image/png") -> str:
    """Write a file of this kind as an address that holds the file itself."""
    return f"data:{kind};base64,{base64.b64encode(blob).decode()}"
