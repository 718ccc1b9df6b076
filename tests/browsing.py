"""A real browser for tests of pages: Chromium of the system, by Playwright (extra ``browser``)."""

import io
import os
import shutil
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def keep_screenshot(page, name, **options):
    """Write ``name.png``, of 256 colours, to the folder that LATENTPRIOR_SCREENSHOTS names, if it names one."""
    folder = os.environ.get("LATENTPRIOR_SCREENSHOTS")
    if folder:
        from PIL import Image

        picture = Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")
        picture.quantize(256).save(Path(folder) / f"{name}.png", optimize=True)
