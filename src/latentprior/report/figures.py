"""Charts as SVG, drawn by hand: light, crisp at every size, coloured by the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .markup import Markup, joined, tag

__all__ = ["Points", "histogram", "intervals", "number", "quantiles", "scatter"]

WIDTH, HEIGHT = 340, 236
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 24, 42
BINS = 36


class Points(NamedTuple):
    """A named set of numbers ``(n,)`` or points ``(n, 2)``; ``kind`` is its colour: data, model, base or other."""

    name: str
    values: Tensor
    kind: str


class Axis(NamedTuple):
    """The straight map from ``[low, high]`` to pixels ``[start, end]``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value; values beyond an end by more than the axis is long are held there."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, -1.0), 2.0) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values on the axis, about ``wanted`` of them: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace("-", "−")


def across(low: float, high: float) -> Axis:
    """A horizontal axis; one without length gets some."""
    return Axis(*_opened(low, high), LEFT, WIDTH - RIGHT)


def upwards(low: float, high: float) -> Axis:
    """A vertical axis."""
    return Axis(*_opened(low, high), HEIGHT - BOTTOM, TOP)


def intervals(
    title: str, y_label: str, stages: Sequence[int], values: Sequence[float], stderrs: Sequence[float], *,
    zero: bool = True, line: bool = False,
) -> Markup:  # fmt: skip
    """A dot a stage with bars of two standard errors; ``zero`` puts 0 on the axis, ``line`` joins the dots."""
    known = [(k, v, 0.0 if math.isnan(e) else e) for k, v, e in zip(stages, values, stderrs, strict=True)]
    known = [row for row in known if math.isfinite(row[1])]
    ends = [v + side * 2 * e for _, v, e in known for side in (-1, 1)] + ([0.0] if zero else [])
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = 0.08 * (high - low)
    y = upwards(low - (room if low < 0 or not zero else 0), high + room)
    x = across(min(stages, default=0) - 0.6, max(stages, default=0) + 0.6)
    body = [_rule(y(0.0))] if zero and y.low < 0 else []
    if line:
        body.append(_path([(x(k), y(v)) for k, v, _ in known], "line model"))
    for k, v, e in known:
        bar = f"M{x(k):.1f} {y(v - 2 * e):.1f}V{y(v + 2 * e):.1f}"
        for end in (v - 2 * e, v + 2 * e):
            bar += f"M{x(k) - 4:.1f} {y(end):.1f}h8"
        body += [tag("path", d=bar, class_="bar model"), tag("circle", cx=_f(x(k)), cy=_f(y(v)), r=4, class_="model")]
    every = max(1, math.ceil(len(stages) / 10))
    return _chart(title, x, y, "stage", y_label, joined(*body), x_ticks=list(map(float, stages[::every])), whole=True)


def scatter(title: str, sets: Sequence[Points], limits: Tensor, labels: tuple[str, str]) -> Markup:
    """Points ``(n, 2)`` of every set over one another; ``limits`` ``(2, 2)`` are the low and the high corner."""
    (left, low), (right, high) = limits.tolist()
    x, y = across(left, right), upwards(low, high)
    body = []
    for points in sets:
        inside = points.values[((points.values >= limits[0]) & (points.values <= limits[1])).all(1)]
        # A stroke of no length with round ends is a dot: one path holds them all.
        dots = "".join(f"M{x(a):.1f} {y(b):.1f}h0" for a, b in inside.tolist())
        body.append(tag("path", d=dots or None, class_=f"dots {points.kind}"))
    return _chart(title, x, y, *labels, joined(*body), legend=sets)


def histogram(title: str, sets: Sequence[Points], x_label: str) -> Markup:
    """Outlines of the sets' histograms over common bins, areas 1; the axis holds 99.6% of the values of each."""
    values = [_finite(points.values) for points in sets]
    ends = [torch.quantile(v, torch.tensor([0.002, 0.998], dtype=v.dtype)).tolist() for v in values if len(v)]
    x = across(min((e[0] for e in ends), default=0.0), max((e[1] for e in ends), default=1.0))
    bins = min([BINS, *(max(8, math.isqrt(len(v))) for v in values if len(v))])
    width = (x.high - x.low) / bins
    heights = []
    for v in values:
        counts = torch.histc(v, bins, x.low, x.high) / max(1, len(v)) / width
        heights.append(counts.tolist())
    y = upwards(0.0, 1.05 * max((max(h) for h in heights), default=1.0))
    body = []
    for points, height in zip(sets, heights, strict=True):
        edges = [(x.low + (i + side) * width, h) for i, h in enumerate(height) for side in (0, 1)]
        outline = [(x.low, 0.0), *edges, (x.high, 0.0)]
        body.append(_path([(x(a), y(b)) for a, b in outline], f"area {points.kind}"))
    return _chart(title, x, y, x_label, "density", joined(*body), legend=sets)


def quantiles(title: str, across_set: Points, up_set: Points, unit: str) -> Markup:
    """Quantiles 1% to 99% of one set against those of another, beside the line on which equal laws lie."""
    share = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    a, b = (torch.quantile(_finite(s.values), share) for s in (across_set, up_set))
    low, high = float(min(a[0], b[0])), float(max(a[-1], b[-1]))
    x, y = across(low, high), upwards(low, high)
    diagonal = _path([(x(x.low), y(y.low)), (x(x.high), y(y.high))], "rule")
    dots = "".join(f"M{x(p):.1f} {y(q):.1f}h0" for p, q in zip(a.tolist(), b.tolist(), strict=True))
    body = joined(diagonal, tag("path", d=dots, class_="dots strong model"))
    return _chart(title, x, y, f"{across_set.name}, {unit}", f"{up_set.name}, {unit}", body)


def _chart(
    title: str, x: Axis, y: Axis, x_label: str, y_label: str, body: Markup, *,
    legend: Sequence[Points] = (), x_ticks: Sequence[float] | None = None, whole: bool = False,
) -> Markup:  # fmt: skip
    """Axes, ticks, labels and legend around a body."""
    x_ticks, y_ticks = x.ticks() if x_ticks is None else x_ticks, y.ticks()
    named_x, named_y = (_named(ticks) for ticks in (x_ticks, y_ticks))
    parts = [
        tag("title", title),
        *(_path([(x.start, y(t)), (x.end, y(t))], "grid") for t in y_ticks),
        tag("g", body),
        _path([(x.start, y.start), (x.end, y.start)], "axis"),
    ]
    for tick in x_ticks:
        shown = f"{tick:.0f}" if whole else named_x(tick)
        parts.append(tag("text", shown, x=_f(x(tick)), y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    parts += [tag("text", named_y(tick), x=LEFT - 6, y=_f(y(tick) + 4), text_anchor="end") for tick in y_ticks]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f"rotate(-90 10 {middle:.0f})"
    parts.append(tag("text", x_label, x=_f((x.start + x.end) / 2), y=HEIGHT - 8, text_anchor="middle", class_="label"))
    parts.append(tag("text", y_label, x=10, y=_f(middle), text_anchor="middle", transform=turned, class_="label"))
    right: float = LEFT
    for points in legend:
        parts.append(tag("circle", cx=_f(right + 5), cy=11, r=4.5, class_=points.kind))
        parts.append(tag("text", points.name, x=_f(right + 14), y=15, class_="label"))
        right += 30 + 6.6 * len(points.name)
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="chart")


def _named(ticks: Sequence[float]) -> Callable[[float], str]:
    """Write ticks with as many digits as tell them apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if digits > 5 or any(abs(t) >= 1e6 for t in ticks):
        return lambda value: f"{value:.2g}".replace("-", "−")
    return lambda value: number(value + 0.0 if value else 0.0, digits)


def _path(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    return tag("path", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points), class_=kind) if points else Markup()


def _rule(height: float) -> Markup:
    return _path([(LEFT, height), (WIDTH - RIGHT, height)], "rule")


def _finite(values: Tensor) -> Tensor:
    values = values.detach().double().cpu()
    return values[values.isfinite()]


def _opened(low: float, high: float) -> tuple[float, float]:
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-12):
        return low, high
    return low - max(0.5, 0.01 * abs(low)), high + max(0.5, 0.01 * abs(high))


def _f(value: float) -> str:
    return f"{value:.1f}"
