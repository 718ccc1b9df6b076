"""One HTML file that shows what a prior learned, how far to trust it, and whether it copies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import LatentPriorError
from ..runtime.progress import work_bar
from ..storage.checkpoint import write_whole
from ..storage.output_files import check_folder

__all__ = ["Report", "check_report_out", "write_report"]


class Report(NamedTuple):
    """Where a report was written, its size in bytes, the number of stages in it, and the seconds that it took."""

    path: Path
    bytes: int
    stages: int
    seconds: float


def write_report(
    source: Any,
    out: str | Path,
    latents: Any = None,
    images: Any = None,
    *,
    held_out: Any = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Report:
    """Write one HTML file about a prior: samples by stage, gains, normalisers, model against data, settings.

    The file loads nothing from elsewhere. Densities are in nats, in the user's coordinates. Without data it holds what
    the prior itself knows; the parts that need data say which argument fills them.

    Arguments
    ---------
    source : a :class:`~latentprior.LatentPrior`, a :class:`~latentprior.LatentVariableModel`, or the folder of one that
        ``save_pretrained``, ``latentprior fit``, ``train`` or ``demo`` wrote.
    out : path of the file, ``.html``; it is replaced whole or not at all.
    latents : training rows ``(n, *event_shape)`` as :func:`latentprior.fit` takes them; 20,000 at most are used. Of a
        prior that ``latentprior demo`` left they are found beside it.
    images : training images as :func:`latentprior.read_images` takes them, encoded by the model; 10,000 at most are
        used. Beside ``latents`` they are the n images that these encode, in their order.
    held_out : rows that trained nothing, latents or images as the rows above are. Images in parts have them in
        ``test``. Without them half of the training rows, at random, stands for them, and the page says so.
    seed : of every draw: equal calls write equal bytes.
    progress : draw a bar on standard error, if that is a terminal or a notebook's.

    Raises
    ------
    CheckpointError
        For a folder that is absent, damaged, foreign or of unfinished learning.
    InvalidLatentsError, InvalidImagesError
        For data of another shape than the prior's or the decoder's, or that cannot be read.
    LatentPriorError
        For an ``out`` that cannot be written.
    """
    # Late, so that `import latentprior` does not load every baseline.
    from . import page, sources

    began = time.monotonic()
    out = Path(out)
    check_report_out(out)
    with torch.no_grad(), work_bar("report", page.PARTS + 1, shown=progress) as bar:
        bar.begin("reading")
        subject, rows = sources.find(source, latents, images, held_out, seed=seed, device=device)
        blob = page.build(subject, rows, seed, bar.begin).encode()
    write_whole(out, blob)
    return Report(out, len(blob), len(subject.prior.stages), time.monotonic() - began)


def check_report_out(out: Path) -> None:
    """Raise :class:`LatentPriorError` now if no ``.html`` of this name can be written."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise LatentPriorError(f"--out {out}: give a name that ends in .html")
    if os.path.isdir(out):
        raise LatentPriorError(f"--out {out}: is a folder; give a file name that ends in .html")
    check_folder(out.parent, out.name)
