"""A picture from the bytes that a browser sent: PNG or JPEG, of a size that is known before it is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..data.pictures import Upright
from ..errors import InvalidImagesError, MissingExtraError
from .requests import Refused

__all__ = ["MAX_BYTES", "TYPES", "read_picture"]

TYPES = {"image/png": "PNG", "image/jpeg": "JPEG"}
"""The formats whose headers give the size before anything is decoded; WebP, for one, takes the memory at once."""
MAX_BYTES = 8 << 20
"""The size of a file: twice what the page sends as it is."""
MAX_PIXELS = 1 << 24
"""The pixels of a picture, 64 MiB where Pillow has decoded it."""
STRIP_PIXELS = 1 << 20
"""The pixels that are floats at a time, 12 MiB, or one row."""
GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in grey (ITU-R BT.601)."""


def read_picture(body: bytes, kind: str, shape: Sequence[int]) -> Tensor:
    """Decode a picture of a content type, cut out its middle and resize it to one image ``(1, C, H, W)`` in [-1, 1].

    The middle has the aspect of ``shape``, (C, H, W). Raises :class:`Refused` with status 400 where the file is no
    such picture, and with 413 where it has more than 2^24 pixels.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("reading pictures", "explore") from None
    # Pillow's warnings of a stranger's picture are not for the terminal, and Python would keep each new text.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = _resize_in_strips(_open(Image, body, kind), shape[1], shape[2])
        except InvalidImagesError as error:
            raise Refused(400, str(error)) from None
    if shape[0] == 1 and x.shape[1] == 3:
        x = (x * x.new_tensor(GREY_WEIGHTS)[:, None, None]).sum(1, keepdim=True)
    return (x.expand(1, shape[0], -1, -1) / 127.5 - 1).clamp(-1, 1)


def _open(Image: Any, body: bytes, kind: str) -> Upright:
    try:
        image = Image.open(io.BytesIO(body), formats=(TYPES[kind],))
    except Image.DecompressionBombError:
        raise Refused(413, f"the picture is too large: {MAX_PIXELS:,} pixels are the most") from None
    except Exception:
        # Pillow's readers raise almost anything on damaged input.
        raise Refused(400, f"this is no {TYPES[kind]} picture, or a damaged one") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Refused(413, f"the picture has {width} x {height} pixels; {MAX_PIXELS:,} are the most")
    return Upright(image, "the picture")


def _resize_in_strips(source: Upright, height: int, width: int) -> Tensor:
    """Return the middle as floats ``(1, C, height, width)`` in [0, 255].

    The rows of a large picture are resized strip by strip, then the columns of all. That gives what torch gives for
    the whole picture, in less memory.
    """
    h, w = source.height, source.width
    tall, wide = min(h, max(1, w * height // width)), min(w, max(1, h * width // height))
    top, left = (h - tall) // 2, (w - wide) // 2
    rows = max(1, STRIP_PIXELS // wide)
    strips: list[Tensor] = []
    for y in range(top, top + tall, rows):
        pixels = torch.from_numpy(source.pixels((left, y, left + wide, min(y + rows, top + tall))).copy())
        strip = (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))[None].float()
        strips.append(strip if tall <= rows else _resize(strip, strip.shape[2], width))
    # A single strip keeps its strides, which a network's arithmetic may follow.
    return _resize(strips[0] if len(strips) == 1 else torch.cat(strips, 2), height, width)


def _resize(x: Tensor, height: int, width: int) -> Tensor:
    if x.shape[2:] == (height, width):
        return x
    return interpolate(x, (height, width), mode="bilinear", antialias=True)
