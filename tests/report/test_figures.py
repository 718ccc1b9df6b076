import base64
import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from latentprior.report import png
from latentprior.report.figures import Axis, Points, histogram, intervals, number, quantiles, scatter
from latentprior.report.markup import Markup, tag


def numbers(path):
    return [float(x) for x in re.findall(r"-?[0-9.]+", path)]


def test_texts_and_attributes_are_escaped():
    made = tag("p", "<script>alert(1)</script>", tag("img", alt='"><script>', src="x"), title="'&\"", class_="a b")
    assert made == (
        '<p title="&#x27;&amp;&quot;" class="a b">&lt;script&gt;alert(1)&lt;/script&gt;'
        '<img alt="&quot;&gt;&lt;script&gt;" src="x"></p>'
    )
    # A string that was cut from markup is no longer trusted.
    assert tag("p", Markup("<b>")[:3]) == "<p>&lt;b&gt;</p>"


def test_scripts_take_trusted_text_only():
    with pytest.raises(TypeError):
        tag("script", "alert(1)")
    assert tag("script", Markup("a < b")) == "<script>a < b</script>"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (1e-6, 3e-6), (-1e5, 2e5), (0.999, 1.001)])
def test_ticks_are_round_and_on_the_axis(low, high):
    ticks = Axis(low, high, 0, 100).ticks()
    assert 2 <= len(ticks) <= 7
    assert low - 1e-9 * (high - low) <= ticks[0] < ticks[-1] <= high + 1e-9 * (high - low)
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step * (1 + 1e-9)))
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6
    np.testing.assert_allclose(np.diff(ticks), step)


def test_numbers_have_true_minus_signs():
    assert number(-1234.5678, 2) == "−1,234.57"
    assert number(math.nan) == number(None) == "–"


def test_error_bars_span_four_standard_errors():
    chart = intervals("t", "nats", [1, 2], [0.5, 1.0], [0.05, 0.1])
    bars = re.findall(r'd="M([0-9.]+) ([0-9.]+)V([0-9.]+)', chart)
    lengths = [float(b) - float(c) for _, b, c in bars]
    heights = [float(y) for y in re.findall(r'cy="([0-9.]+)" r="4"', chart)]
    assert len(bars) == len(heights) == 2
    # Pixels a nat, from the dots, must be those of the bars.
    scale = (heights[0] - heights[1]) / 0.5
    np.testing.assert_allclose(lengths, [4 * 0.05 * scale, 4 * 0.1 * scale], atol=0.25)


def test_figures_that_are_not_finite_are_left_out():
    chart = intervals("t", "nats", [1, 2, 3], [0.5, math.nan, 0.2], [math.nan, 0.1, 0.1])
    assert "nan" not in chart
    assert chart.count("<circle") == 2
    assert "<svg" in intervals("t", "nats", [], [], [])


def test_dots_outside_the_limits_are_left_out(generator):
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 0.5], [0.5, math.nan]])
    chart = scatter("t", [Points("data", points, "data")], torch.tensor([[-1.0, -1.0], [2.0, 2.0]]), ("a", "b"))
    (dots,) = re.findall(r'd="([^"]*h0)"', chart)
    assert dots.count("h0") == 2
    x0, y0, _, x1, y1, _ = numbers(dots)
    assert x0 < x1
    assert y0 > y1


def test_histograms_have_equal_areas(generator):
    a = torch.randn(4000, generator=generator)
    chart = histogram("t", [Points("data", a, "data"), Points("model", 3 * a[:500], "model")], "nats")
    areas = []
    for d in re.findall(r'd="(M[^"]*)" class="area', chart):
        x, y = np.array(numbers(d)).reshape(-1, 2).T
        areas.append(float((np.diff(x) * (y.max() - y)[1:]).sum()))
    # 1% of each may lie beyond the axis, and pixels are rounded to tenths.
    assert areas[0] == pytest.approx(areas[1], rel=0.03)


def test_quantiles_of_a_shifted_set_lie_above_the_line(generator):
    a = torch.randn(5000, generator=generator)
    chart = quantiles("t", Points("data", a, "data"), Points("model", a + 2, "model"), "nats")
    line, dots = (numbers(re.search(rf'd="([^"]*)" class="{kind}', chart)[1]) for kind in ("rule", "dots strong"))
    x0, y0, x1, y1 = line
    points = np.array(dots).reshape(-1, 3)[:, :2]
    on_line = y0 + (points[:, 0] - x0) / (x1 - x0) * (y1 - y0)
    assert len(points) == 99
    assert (points[:, 1] < on_line - 5).all()


def test_equal_and_infinite_values_can_be_drawn():
    same = Points("data", torch.full((30,), 2.0), "data")
    odd = Points("model", torch.tensor([math.inf, 1.0, 2.0, -math.inf, math.nan]), "model")
    for chart in (histogram("t", [same, same], "x"), histogram("t", [same, odd], "x"), quantiles("t", same, odd, "x")):
        assert not re.search(r"\b(nan|inf)\b", chart)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_what_another_reader_sees(channels, generator):
    x = torch.rand(5, channels, 4, 3, generator=generator) * 2 - 1
    uri = png.data_uri(png.grid(x, 3))
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        pixels = np.array(picture)
    assert pixels.shape == (2 * 5 - 1, 3 * 4 - 1, 4)
    expected = ((x + 1) * 127.5).round().byte().expand(5, 3, 4, 3).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels[5:9, 4:7, :3], expected[4])
    np.testing.assert_array_equal(pixels[:4, 8:11, :3], expected[2])
    # Between the pictures, and where there is none, the page shows through.
    assert (pixels[4, :, 3] == 0).all()
    assert (pixels[5:9, 8:11, 3] == 0).all()
    assert (pixels[:4, :3, 3] == 255).all()
