"""The picture of a model card: samples of the base beside those of the ladder."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .pictures import image_grid

__all__ = ["samples_png"]


def samples_png(draws: Mapping[str, Tensor]) -> bytes | None:
    """Draw a PNG with a panel for each named set; return None without matplotlib (extra ``report``).

    Parameters
    ----------
    draws : mapping
        Images ``(n, C, H, W)`` in [-1, 1], which become grids, or rows ``(n, d)``, which become a scatter on the two
        principal axes of the last set, or a histogram if d is 1.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # Not pyplot, which keeps every figure and chooses a backend for the whole process.
    figure = Figure(figsize=(4 * len(draws), 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(draws), squeeze=False)[0]
    sets = [rows.detach().cpu().double() for rows in draws.values()]
    if sets[-1].ndim == 4:
        for panel, images in zip(panels, sets, strict=True):
            panel.imshow(image_grid(images, gap=0, transparent=True))
            panel.axis("off")
    else:
        _plane(panels, [rows.flatten(1) for rows in sets])
    for panel, name in zip(panels, draws, strict=True):
        panel.set_title(name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plane(panels: Any, sets: list[Tensor]) -> None:
    last = sets[-1]
    if last.shape[1] == 1:
        low, high = torch.quantile(last, torch.tensor([0.002, 0.998], dtype=last.dtype)).tolist()
        for panel, rows in zip(panels, sets, strict=True):
            panel.hist(rows.flatten().numpy(), bins=40, range=(low, high), density=True)
        return
    centre = last.mean(0)
    axes = torch.linalg.eigh(torch.cov(last.T)).eigenvectors[:, -2:].flip(1)
    flat = [(rows - centre) @ axes for rows in sets]
    ends = torch.tensor([0.002, 0.998], dtype=last.dtype)
    limits = torch.quantile(flat[-1], ends, dim=0)
    room = 0.2 * (limits[1] - limits[0])
    (left, bottom), (right, top) = (limits[0] - room).tolist(), (limits[1] + room).tolist()
    for panel, rows in zip(panels, flat, strict=True):
        panel.scatter(rows[:, 0].numpy(), rows[:, 1].numpy(), s=2, alpha=0.5, linewidths=0)
        panel.set_xlim(left, right)
        panel.set_ylim(bottom, top)
        panel.set_xlabel("first principal axis")
    panels[0].set_ylabel("second")
