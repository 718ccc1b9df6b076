"""A PNG of decoded samples beside the results, one row a method; rows of earlier runs are kept in the image cache."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from _data import LatentSet, image_cache
from _features import DECODERS, real_images
from _results import FOLDER

__all__ = ["add_picture"]

COLUMNS = 16


def add_picture(latents: LatentSet, record: str, name: str, z: Tensor, order: list[str]) -> None:
    """Add method ``name``'s samples ``(n, d)``, in the latents' own coordinates, under data and reconstructions."""
    dataset, _, decode = DECODERS[latents.name]
    path = image_cache() / f"{record}_pictures.npz"
    rows = {k: torch.from_numpy(v) for k, v in np.load(path).items()} if path.exists() else {}
    if not rows:
        rows["data"] = real_images(dataset, "test", COLUMNS) / 2 + 0.5
        rows["reconstructions"] = decode(torch.as_tensor(latents.test[:COLUMNS]).flatten(1).float())
    rows[name] = decode(z[:COLUMNS])
    np.savez(path, **{k: v.numpy() for k, v in rows.items()})
    shown = [rows[k] for k in ("data", "reconstructions", *order) if k in rows]
    grid = torch.cat([torch.cat(list(x), 2) for x in shown], 1).permute(1, 2, 0).squeeze(2)
    pixels = (grid * 255).round().clamp(0, 255).byte().numpy()
    size = (2 * pixels.shape[1], 2 * pixels.shape[0])
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(FOLDER / f"{record}.png", optimize=True)
