import base64
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from latentprior.report.figures import COLOURS, Points, chart, histogram, intervals, number, quantiles, scatter


def svg(figure):
    image = chart(figure, "a chart")
    kind, _, data = image.source.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


def dots(line):
    """Points ``(n, 2)`` that were drawn as strokes of no length."""
    points = line.get_xydata().reshape(-1, 3, 2)
    assert np.isnan(points[:, 2]).all()
    np.testing.assert_array_equal(points[:, 0], points[:, 1])
    return points[:, 0]


def test_numbers_have_true_minus_signs():
    assert number(-1234.5678, 2) == "−1,234.57"
    assert number(math.nan) == number(None) == "–"


def test_charts_are_whole_documents_in_the_colours_of_the_page():
    sets = [Points(kind, torch.randn(99, 2, generator=torch.Generator().manual_seed(0)), kind) for kind in
            ("data", "model", "base", "other")]  # fmt: skip
    text = svg(scatter(sets, torch.tensor([[-3.0, -3.0], [3.0, 3.0]]), ("a < b", "é")))
    ElementTree.fromstring(text)
    used = set(re.findall(r"var\((--\w+)\)", text))
    assert used == {f"--{name}" for name in COLOURS}
    # Every variable has a value in light, in dark, and on paper.
    assert all(len(re.findall(rf"{name}: #", text)) == 3 for name in used)
    assert not [colour for colour in COLOURS.values() if colour in text]
    assert not re.search(r"<script|@import|(href|src)=\"(?!#)", text)


def test_equal_charts_have_equal_bytes():
    first, again = (svg(intervals("nats", [1, 2], [0.5, 1.0], [0.05, 0.1])) for _ in range(2))
    assert first == again
    assert "<metadata" not in first


def test_error_bars_span_four_standard_errors():
    axes = intervals("nats", [1, 2], [0.5, 1.0], [0.05, 0.1]).axes[0]
    points, _, (bars,) = axes.containers[0]
    np.testing.assert_allclose(points.get_xydata(), [[1, 0.5], [2, 1.0]])
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(lengths, [4 * 0.05, 4 * 0.1])
    assert axes.get_ylim()[0] < 0.01


def test_figures_that_are_not_finite_are_left_out():
    figure = intervals("nats", [1, 2, 3], [0.5, math.nan, 0.2], [math.nan, 0.1, 0.1])
    assert figure.axes[0].containers[0][0].get_xdata().tolist() == [1, 3]
    assert "nan" not in svg(figure)
    assert "<svg" in svg(intervals("nats", [], [], []))


def test_dots_outside_the_limits_are_left_out():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 0.5], [0.5, math.nan]])
    figure = scatter([Points("data", points, "data")], torch.tensor([[-1.0, -1.0], [2.0, 2.0]]), ("a", "b"))
    np.testing.assert_array_equal(dots(figure.axes[0].lines[-1]), [[0, 0], [1, 1]])
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim() == (-1, 2)
    # Both are in the picture too, not thinned out as a path of no length might be.
    assert len(re.findall(r"M ([\d.]+ [\d.]+) \nL \1", svg(figure))) == 2


def test_histograms_have_equal_areas(generator):
    a = torch.randn(4000, generator=generator)
    figure = histogram([Points("data", a, "data"), Points("model", 3 * a[:500], "model")], "nats")
    for patch in figure.axes[0].patches:
        x, y = patch.get_xy().T
        assert abs((np.diff(x) * (y[1:] + y[:-1]) / 2).sum()) == pytest.approx(1)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["data", "model"]


def test_quantiles_of_a_shifted_set_lie_above_the_line(generator):
    a = torch.randn(5000, generator=generator)
    axes = quantiles(Points("data", a, "data"), Points("model", a + 2, "model"), "nats").axes[0]
    diagonal, drawn = axes.lines
    np.testing.assert_array_equal(*diagonal.get_xydata().T)
    points = dots(drawn)
    assert len(points) == 99
    np.testing.assert_allclose(points[:, 1] - points[:, 0], 2, atol=1e-6)


def test_equal_and_infinite_values_can_be_drawn():
    same = Points("data", torch.full((30,), 2.0), "data")
    odd = Points("model", torch.tensor([math.inf, 1.0, 2.0, -math.inf, math.nan]), "model")
    for figure in (histogram([same, same], "x"), histogram([same, odd], "x"), quantiles(same, odd, "x")):
        assert not re.search(r"\b(nan|inf)\b", svg(figure))


def test_settings_of_a_user_change_nothing():
    import matplotlib as mpl

    def drawn():
        return svg(histogram([Points("data", torch.arange(50.0), "data")], "nats"))

    before = drawn()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path", "lines.linewidth": 9}):
        assert drawn() == before
