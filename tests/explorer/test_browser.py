"""The explorer in a real browser; skipped where Playwright (extra ``browser``) or Chromium is absent."""

import io
import os

import pytest

from browsing import keep_screenshot
from digits_model import digits, digits_model
from latentprior.explorer.explorer import open_explorer

playwright = pytest.importorskip("playwright.sync_api")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def show(browser):
    """Open a served page; nothing may reach its console and no other server may be asked."""
    opened, heard = [], []

    def call(server, **options):
        page = browser.new_page(**options)
        page.set_default_timeout(15_000)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        local = (server.url, "data:", f"blob:{server.url}")
        page.on("request", lambda request: None if request.url.startswith(local) else heard.append(request.url))
        page.goto(server.url)
        opened.append(page)
        page.wait_for_selector("#samples[data-stage]")
        return page

    yield call
    for page in opened:
        page.close()
    assert heard == []


def picture(size=(8, 8), kind="PNG"):
    """A digit as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(digits()[0][1700]).resize(size).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def pictures(page, place):
    return page.locator(f"{place} img").evaluate_all("all => all.map(image => image.src)")


def drop(page, content, kind="image/png"):
    """Drop a file on the page as a person would."""
    transfer = page.evaluate_handle(
        """([bytes, kind]) => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "picture", { type: kind })); return data; }""",
        [list(content), kind],
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


@pytest.mark.slow
def test_a_model_from_end_to_end(show, model_server):
    page = show(model_server, viewport={"width": 1000, "height": 900})
    last = model_server.explorer.stages[-1]
    full = pictures(page, "#samples")
    assert len(full) == 40
    assert page.locator("#samples img").first.get_attribute("alt").startswith("Sample 1, log density ")

    slider = page.get_by_label("Stage", exact=True)
    slider.press("Home")
    page.wait_for_selector('#samples[data-stage="0"]')
    assert slider.get_attribute("aria-valuetext") == f"0 of {last} (base)"
    base = pictures(page, "#samples")
    assert 0 < sum(a == b for a, b in zip(full, base, strict=True)) < 40
    slider.press("End")
    page.wait_for_selector(f'#samples[data-stage="{last}"]')
    assert pictures(page, "#samples") == full
    page.get_by_role("button", name="Next seed").click()
    playwright.expect(page.locator("#samples img").first).not_to_have_attribute("src", full[0])

    tiles = page.locator("#samples button")
    tiles.nth(4).focus()
    page.keyboard.press("Enter")
    tiles.nth(9).click()
    assert [tiles.nth(i).get_attribute("aria-pressed") for i in (0, 4, 9)] == ["false", "true", "true"]
    page.get_by_label("Steps").fill("7")
    page.get_by_role("button", name="Walk from A to B").click()
    playwright.expect(page.locator("#walk img")).to_have_count(7)
    shown, walked = pictures(page, "#samples"), pictures(page, "#walk")
    assert (walked[0], walked[-1]) == (shown[4], shown[9])

    drop(page, picture())
    page.wait_for_selector("#score dl")
    assert page.locator("#score img").count() == 2
    assert not page.get_by_label("Latent, numbers").is_visible()
    assert "against 400 images of images.npz" in page.locator("#score").inner_text()

    page.locator("#property").select_option("brightness")
    page.get_by_label("Strength", exact=True).fill("4")
    page.wait_for_selector('#tilt[data-strength="4"]')
    assert page.locator("#tilt img").count() == 20
    assert "Mean brightness" in page.locator("#tilt-note").inner_text()
    page.locator("#property").select_option("class")
    page.locator("#class").select_option("7")
    page.get_by_label("Strength", exact=True).fill("3")
    page.wait_for_selector('#tilt[data-strength="3"]')
    page.locator("#property").select_option("towards")
    page.locator("#target").select_option("uploaded")
    page.get_by_label("Strength", exact=True).fill("2")
    page.wait_for_selector('#tilt[data-strength="2"]')
    playwright.expect(page.locator("#status")).to_have_text("")


def test_a_prior_from_end_to_end(show, prior_server):
    page = show(prior_server, viewport={"width": 1000, "height": 900})
    dots = page.locator("#samples circle.item")
    assert dots.count() == 200
    box = dots.nth(20).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.get_by_label("A, sample").input_value() == "21"
    page.get_by_role("button", name="Walk from A to B").click()
    page.wait_for_selector("#walk polyline")
    page.get_by_role("button", name="Take A").click()
    page.get_by_role("button", name="Score", exact=True).click()
    page.wait_for_selector("#score dl")
    assert "against 400 rows of z.npy" in page.locator("#score").inner_text()
    page.get_by_label("Strength", exact=True).fill("3")
    page.wait_for_selector('#tilt[data-strength="3"]')
    assert page.locator("#tilt circle.item").count() == 200
    page.get_by_label("Latent, numbers").fill("1, two")
    page.get_by_role("button", name="Score", exact=True).click()
    playwright.expect(page.locator("#status")).to_contain_text("Give numbers")


def test_other_pictures_are_turned_into_png(show, model_server):
    page = show(model_server)
    drop(page, picture((60, 40), "GIF"), "image/gif")
    page.wait_for_selector("#score dl")
    drop(page, b"no picture", "image/webp")
    playwright.expect(page.locator("#status")).to_contain_text("cannot read")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["model", "prior"])
def test_fits_a_phone(show, model_server, prior_server, scheme, kind):
    page = show(
        model_server if kind == "model" else prior_server, viewport={"width": 320, "height": 640}, color_scheme=scheme
    )
    page.get_by_role("button", name="Walk from A to B").click()
    page.wait_for_selector("#walk p")
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")


def test_everything_has_a_name(show, model_server):
    page = show(model_server)
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, select, button, img")].filter((element) => !(
        element.alt || element.labels?.length || element.textContent.trim() || element.querySelector("img[alt]")))
        .map((element) => element.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.slow
@pytest.mark.skipif("LATENTPRIOR_SCREENSHOTS" not in os.environ, reason="no folder for screenshots is named")
def test_screenshot(show, served, saved, tmp_path):
    digits_model(steps=4000, max_stages=4).save_pretrained(tmp_path / "digits")
    page = show(
        served(open_explorer(tmp_path / "digits", saved / "images.npz")), viewport={"width": 760, "height": 700}
    )
    page.get_by_role("button", name="Walk from A to B").click()
    page.wait_for_selector("#walk img")
    drop(page, picture())
    page.wait_for_selector("#score dl")
    page.locator("#property").select_option("class")
    page.locator("#class").select_option("3")
    page.get_by_label("Strength", exact=True).fill("3")
    page.wait_for_selector("#tilt img")
    playwright.expect(page.locator("#status")).to_have_text("")
    keep_screenshot(page, "explorer", full_page=True)
