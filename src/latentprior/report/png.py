"""Pictures as PNG data URIs, without an imaging library."""

from __future__ import annotations

import base64
import math
import struct
import zlib

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["data_uri", "grid"]

GAP = 1


def grid(x: Tensor, columns: int | None = None) -> Tensor:
    """Images ``(n, C, H, W)`` in [-1, 1] side by side as one ``(4, rows, width)`` uint8; gaps are transparent."""
    pixels = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    n, c, h, w = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    opaque = torch.full((n, 1, h, w), 255, dtype=torch.uint8)
    tiles = pad(torch.cat([pixels.expand(n, 3, h, w) if c == 1 else pixels, opaque], 1), (0, GAP, 0, GAP))
    tiles = torch.cat([tiles, tiles.new_zeros(rows * columns - n, *tiles.shape[1:])])
    canvas = tiles.reshape(rows, columns, 4, h + GAP, w + GAP).permute(2, 0, 3, 1, 4)
    return canvas.reshape(4, rows * (h + GAP), columns * (w + GAP))[:, :-GAP, :-GAP]


def data_uri(canvas: Tensor) -> str:
    """A ``(4, H, W)`` uint8 picture (red, green, blue, opacity) as ``data:image/png;base64,...``.

    Source: PNG specification (third edition), sections 5 and 11: one IHDR, one IDAT, one IEND chunk.
    """
    _, h, w = canvas.shape
    lines = canvas.permute(1, 2, 0).reshape(h, 4 * w)
    # The byte before each line names its filter: 0, none.
    raw = pad(lines, (1, 0)).contiguous().numpy().tobytes()
    header = struct.pack(">IIBBBBB", w, h, 8, 6, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw, 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
