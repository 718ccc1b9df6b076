"""The charts of a report, drawn by matplotlib as SVG pictures in the colours of the page."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

__all__ = ["Image", "Points", "chart", "histogram", "intervals", "number", "quantiles", "scatter"]

WIDTH, HEIGHT = 340, 236
"""Size of a chart in points of matplotlib, which become pixels of the page."""
MOST_BINS = 36
COLOURS = {
    name: f"#00000{i}" for i, name in enumerate(("ink", "quiet", "hair", "model", "data", "base", "other"), start=1)
}
"""Placeholders that :func:`chart` replaces by the variables of ``style.css``, for light, dark and print."""
DASHES = {"model": "-", "data": "-", "base": (0, (5, 3)), "other": (0, (2, 2))}
"""Lines also differ in their dashes, for readers who do not see the colours."""
STYLE = {
    "font.size": 10, "axes.labelcolor": COLOURS["ink"], "axes.edgecolor": COLOURS["quiet"], "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "axes.spines.left": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.formatter.useoffset": False, "grid.color": COLOURS["hair"],
    "xtick.color": COLOURS["quiet"], "ytick.color": COLOURS["quiet"], "xtick.major.size": 0, "ytick.major.size": 0,
    "legend.frameon": False, "legend.labelcolor": COLOURS["ink"], "path.simplify": False, "svg.fonttype": "none",
    "svg.hashsalt": "latentprior",
}  # fmt: skip
in_style = style.context(["default", STYLE])
"""Decorates what draws, so that a user's own settings of matplotlib change nothing."""


class Points(NamedTuple):
    """A named set of numbers ``(n,)`` or points ``(n, 2)``; ``kind`` is its colour: data, model, base or other."""

    name: str
    values: Tensor
    kind: str


class Image(NamedTuple):
    """What an ``img`` element of the page needs; ``kind`` is its class in the style sheet."""

    source: str
    description: str
    width: int
    height: int
    kind: str


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace("-", "−")


@in_style
def chart(figure: Figure, description: str) -> Image:
    """A figure as an SVG picture, equal bytes for equal figures, that takes light or dark colours as the page does."""
    text = io.StringIO()
    unknown = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=unknown)
    svg = text.getvalue()
    for name, placeholder in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    svg = re.sub(r"'DejaVu Sans', [^;\"]*sans-serif", "system-ui, sans-serif", svg)
    sheet = (resources.files(__package__) / "style.css").read_text(encoding="utf-8")
    svg = svg.replace("<defs>", f"<defs><style>{sheet.partition('/* The page. */')[0]}</style>", 1)
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    return Image(source, description, WIDTH, HEIGHT, "chart")


@in_style
def intervals(
    y_label: str, stages: Sequence[int], values: Sequence[float], stderrs: Sequence[float], *, line: bool = False
) -> Figure:
    """A dot for each stage with bars of two standard errors; ``line`` joins the dots, else the axis holds 0."""
    figure, axes = _axes("stage", y_label)
    finite = [row for row in zip(stages, values, stderrs, strict=True) if math.isfinite(row[1])]
    x, y = ([row[i] for row in finite] for i in (0, 1))
    bars = [0.0 if math.isnan(row[2]) else 2 * row[2] for row in finite]
    axes.errorbar(x, y, bars, fmt="o-" if line else "o", color=COLOURS["model"], capsize=4, linewidth=1.6)
    axes.set_xlim(min(stages, default=0) - 0.6, max(stages, default=0) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    if not line:
        axes.axhline(0.0, color=COLOURS["quiet"], linewidth=1, linestyle="--")
    return figure


@in_style
def scatter(sets: Sequence[Points], limits: Tensor, labels: tuple[str, str]) -> Figure:
    """Points ``(n, 2)`` of every set over one another; ``limits`` ``(2, 2)`` are the low and the high corner."""
    figure, axes = _axes(*labels, sets)
    for points in sets:
        inside = points.values[((points.values >= limits[0]) & (points.values <= limits[1])).all(1)]
        _dots(axes, inside, points.kind, width=3.2, opacity=0.5)
    (left, low), (right, high) = limits.tolist()
    axes.set(xlim=(left, right), ylim=(low, high))
    return figure


@in_style
def histogram(sets: Sequence[Points], x_label: str) -> Figure:
    """Outlines of the sets' histograms over common bins, areas 1; the axis holds 99.6% of the values of each."""
    figure, axes = _axes(x_label, "density", sets)
    known = [(points.kind, values) for points in sets if len(values := _finite(points.values))]
    ends = [torch.quantile(v, torch.tensor([0.002, 0.998], dtype=v.dtype)).tolist() for _, v in known]
    low, high = _opened(min((e[0] for e in ends), default=0.0), max((e[1] for e in ends), default=1.0))
    bins = min([MOST_BINS, *(max(8, math.isqrt(len(v))) for _, v in known)])
    for kind, values in known:
        opacity = 0.13 if DASHES[kind] == "-" else 0.0
        axes.hist(
            values.numpy(), bins, range=(low, high), density=True, histtype="stepfilled", linewidth=1.6,
            linestyle=DASHES[kind], edgecolor=COLOURS[kind], facecolor=(COLOURS[kind], opacity),
        )  # fmt: skip
    axes.set_xlim(low, high)
    return figure


@in_style
def quantiles(across: Points, up: Points, unit: str) -> Figure:
    """Quantiles 1% to 99% of one set against those of another, beside the line on which equal laws lie."""
    figure, axes = _axes(f"{across.name}, {unit}", f"{up.name}, {unit}")
    share = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    pairs = torch.stack([torch.quantile(_finite(points.values), share) for points in (across, up)], 1)
    low, high = _opened(float(pairs.min()), float(pairs.max()))
    axes.plot([low, high], [low, high], color=COLOURS["quiet"], linewidth=1, linestyle="--")
    _dots(axes, pairs, "model", width=4, opacity=0.9)
    axes.set(xlim=(low, high), ylim=(low, high))
    return figure


def _axes(x_label: str, y_label: str, sets: Sequence[Points] = ()) -> tuple[Figure, Any]:
    """An empty chart with labels, and a legend of the sets above it."""
    # Not pyplot, which keeps every figure and chooses a backend for the whole process.
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    for points in sets:
        axes.plot([], [], "o", color=COLOURS[points.kind], label=points.name)
    if sets:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(sets), borderpad=0, handletextpad=0)
    return figure, axes


def _dots(axes: Any, points: Tensor, kind: str, *, width: float, opacity: float) -> None:
    """Draw points ``(n, 2)`` as strokes of no length with round ends: one path, not an element for each point."""
    gap = torch.full_like(points, math.nan)
    x, y = torch.stack([points, points, gap], 1).flatten(0, 1).unbind(1)
    axes.plot(x.numpy(), y.numpy(), color=COLOURS[kind], alpha=opacity, linewidth=width, solid_capstyle="round")


def _finite(values: Tensor) -> Tensor:
    values = values.detach().double().cpu()
    return values[values.isfinite()]


def _opened(low: float, high: float) -> tuple[float, float]:
    """The limits of an axis; one without length gets some."""
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-12):
        return low, high
    return low - max(0.5, 0.01 * abs(low)), high + max(0.5, 0.01 * abs(high))
