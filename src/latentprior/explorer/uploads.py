"""A picture out of the bytes that a browser sent: PNG or JPEG, its size known before it is decoded."""

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

__all__ = ["MOST_BYTES", "TYPES", "read_picture"]

TYPES = {"image/png": "PNG", "image/jpeg": "JPEG"}
"""Formats whose headers give the size without any decoding (WebP, say, takes memory for the picture at once)."""
MOST_BYTES = 8 << 20
MOST_PIXELS = 1 << 24
STRIP = 1 << 20
"""Most pixels that are floats at a time (or one row)."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


def read_picture(body: bytes, kind: str, shape: Sequence[int]) -> Tensor:
    """Decode a picture and cut and resize it to one image ``(1, C, H, W)`` in [-1, 1].

    ``kind`` is the content type, ``shape`` (C, H, W). The middle of the picture's aspect is kept. Raises
    :class:`Refused`: 400 for what is no such picture, 413 for one of more than 2^24 pixels.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("reading pictures", "explore") from None
    # What Pillow thinks of a stranger's picture is not for the terminal, and each new text would be kept for good.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = _resized(_opened(Image, body, kind), shape[1], shape[2])
        except InvalidImagesError as error:
            raise Refused(400, str(error)) from None
    if shape[0] == 1 and x.shape[1] == 3:
        x = (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    return (x.expand(1, shape[0], -1, -1) / 127.5 - 1).clamp(-1, 1)


def _opened(Image: Any, body: bytes, kind: str) -> Upright:
    try:
        image = Image.open(io.BytesIO(body), formats=(TYPES[kind],))
    except Image.DecompressionBombError:
        raise Refused(413, f"the picture is too large: {MOST_PIXELS:,} pixels are the most") from None
    except Exception:
        # Pillow's readers raise almost anything on damaged input.
        raise Refused(400, f"this is no {TYPES[kind]} picture, or a damaged one") from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise Refused(413, f"the picture has {width} x {height} pixels; {MOST_PIXELS:,} are the most")
    return Upright(image, "the picture")


def _resized(source: Upright, height: int, width: int) -> Tensor:
    """The middle as floats ``(1, C, height, width)`` in [0, 255].

    Rows of a large picture are resized strip by strip, then the columns of all: what torch does to the whole, in less
    memory.
    """
    h, w = source.height, source.width
    tall, wide = min(h, max(1, w * height // width)), min(w, max(1, h * width // height))
    top, left = (h - tall) // 2, (w - wide) // 2
    rows = max(1, STRIP // wide)
    strips: list[Tensor] = []
    for y in range(top, top + tall, rows):
        pixels = torch.from_numpy(source.pixels((left, y, left + wide, min(y + rows, top + tall))).copy())
        strip = (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))[None].float()
        strips.append(strip if tall <= rows else _scaled(strip, strip.shape[2], width))
    # What is of one strip keeps its strides, too.
    return _scaled(strips[0] if len(strips) == 1 else torch.cat(strips, 2), height, width)


def _scaled(x: Tensor, height: int, width: int) -> Tensor:
    if x.shape[2:] == (height, width):
        return x
    return interpolate(x, (height, width), mode="bilinear", antialias=True)
