"""The page in a real browser; skipped where Playwright (extra ``browser``) or Chromium is absent."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

import latentprior as lp
from browsing import keep_screenshot
from digits_model import digits, digits_model
from latentprior.models.networks import build_decoder, network_spec


@pytest.fixture(scope="module")
def pages(tmp_path_factory, learned, crescent):
    """A report with images by stage and one with points, in a folder whose name would run as a script."""
    folder = tmp_path_factory.mktemp("reports")
    hostile = folder / "<img src=x onerror=document.title='ran'>"
    learned.save_pretrained(hostile)
    lp.write_report(hostile, folder / "points.html", crescent[:300])
    weights = torch.Generator().manual_seed(0)
    spec = network_spec("mlp", latent_dim=2, width=16, image_shape=(1, 8, 8))
    lp.write_report(lp.LatentVariableModel(build_decoder(spec, weights), learned), folder / "images.html")
    return folder


@pytest.fixture
def show(browser, pages):
    """Open a page; no message on the console and no request may come of it."""
    opened, heard = [], []

    def call(name, **options):
        page = browser.new_page(**options)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: None if request.url[:5] in ("file:", "data:") else heard.append(request.url))
        page.goto((pages / f"{name}.html").as_uri())
        opened.append(page)
        return page

    yield call
    for page in opened:
        page.close()
    assert heard == []


@pytest.mark.parametrize("name", ["images", "points"])
def test_slider_changes_the_picture(show, name):
    page = show(name)
    seen, slider = page.locator(".stages figure:visible"), page.get_by_label("Stage", exact=True)
    pictures = []
    for stage in (2, 1, 0):
        assert seen.count() == 1
        assert page.locator(".stages output").text_content().startswith(f"{stage} of 2")
        assert slider.get_attribute("aria-valuetext").startswith(f"{stage} of 2")
        pictures.append(seen.screenshot())
        slider.press("ArrowLeft")
    assert len(set(pictures)) == 3


def test_names_do_not_run(show):
    page = show("points")
    assert page.title().startswith("Latent prior report: ")
    assert page.locator("img:not([src^='data:image/'])").count() == 0


def test_all_stages_are_printed(show):
    page = show("images")
    page.emulate_media(media="print")
    assert page.locator(".stages figure:visible").count() == 3
    assert not page.get_by_label("Stage", exact=True).is_visible()


def test_all_stages_stand_there_without_scripts(show):
    page = show("images", java_script_enabled=False)
    assert page.locator(".stages figure:visible").count() == 3
    assert not page.get_by_label("Stage", exact=True).is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_and_has_contrast(show, scheme):
    page = show("points", viewport={"width": 320, "height": 640}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    ink, quiet, paper = (
        page.evaluate(
            """name => { const probe = document.createElement("i"); document.body.append(probe);
            probe.className = name; const style = getComputedStyle(name === "paper" ? document.body : probe);
            const value = name === "paper" ? style.backgroundColor : style.color; probe.remove(); return value; }""",
            name,
        )
        for name in ("ink", "quiet", "paper")
    )
    for colour, least in ((ink, 7), (quiet, 4.5)):
        assert contrast(colour, paper) >= least


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_have_the_colours_of_the_page(show, scheme):
    page = show("points", color_scheme=scheme)
    picture = Image.open(io.BytesIO(page.locator("figure:visible .chart").first.screenshot())).convert("RGB")
    colours = {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.unique(np.array(picture).reshape(-1, 3), axis=0)}
    wanted = {"light": ("#fdfdfb", "#1f5fa8"), "dark": ("#14171b", "#74aff0")}[scheme]
    assert colours.issuperset(wanted)


@pytest.mark.slow
@pytest.mark.skipif("LATENTPRIOR_SCREENSHOTS" not in os.environ, reason="no folder for screenshots is named")
def test_screenshot(browser, tmp_path):
    model, pixels = digits_model(steps=4000, max_stages=4), digits()[0]
    out = tmp_path / "report.html"
    lp.write_report(model, out, images=lp.Images(pixels[:1200]), held_out=lp.Images(pixels[1200:]))
    page = browser.new_page(viewport={"width": 860, "height": 1060})
    page.goto(out.as_uri())
    keep_screenshot(page, "report")
    page.close()


def contrast(first, second):
    """Contrast ratio of two ``rgb(...)`` colours (WCAG 2.1)."""

    def luminance(colour):
        parts = [int(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
