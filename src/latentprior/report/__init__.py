"""One HTML file that shows what a prior learned, how far to trust it, and whether it copies."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import LatentPriorError, MissingExtraError
from ..runtime.progress import work_bar
from ..storage.checkpoint import write_whole
from ..storage.output_files import check_folder

__all__ = ["Report", "check_report_out", "write_report"]


class Report(NamedTuple):
    """A report that was written.

    Parameters
    ----------
    path : Path
        The file.
    bytes : int
        Its size.
    stages : int
        Number of stages of the prior.
    seconds : float
        Time that the report took.
    """

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

    The file loads nothing from elsewhere. Densities are in nats, in the user's coordinates. Without data the file shows
    what the prior itself knows, and the parts that need data say which argument fills them.

    Parameters
    ----------
    source : LatentPrior, LatentVariableModel, str or Path
        A prior, a model, or the folder of one that ``save_pretrained`` or the command line wrote.
    out : str or Path
        Path of the file, with the suffix ``.html``. The file is replaced whole or not at all.
    latents : array, str or Path, optional
        Training rows ``(n, *event_shape)``, in any form that :func:`latentprior.fit` takes. At most 20,000 are used.
        For a prior that ``latentprior demo`` wrote they are found beside it.
    images : Images, array, str or Path, optional
        Training images, in any form that :func:`latentprior.read_images` takes. The model encodes them; at most 10,000
        are used. Together with ``latents`` they must be the n images that these encode, in the same order.
    held_out : array, Images, str or Path, optional
        Rows that nothing was trained on: latents or images, like the rows above. Images that come in parts have them
        in ``test``. Without such rows a random half of the training rows takes their place, and the page says so.
    seed : int, default 0
        Seed of every draw: equal calls write equal bytes.
    device : torch.device or str, optional
        By default where the prior is, or the CPU for a folder.
    progress : bool, default False
        Whether to draw a bar on standard error, if that is a terminal or a notebook.

    Returns
    -------
    Report
        Where the file is, and its figures.

    Raises
    ------
    CheckpointError
        If a folder is absent, damaged, foreign, or its learning has not ended.
    InvalidLatentsError, InvalidImagesError
        If data have another shape than those of the prior or the decoder, or cannot be read.
    LatentPriorError
        If ``out`` cannot be written.
    MissingExtraError
        If a package of the extra ``report`` is not installed.
    """
    for module in ("jinja2", "matplotlib", "PIL"):
        if find_spec(module) is None:
            raise MissingExtraError("writing a report", "report")
    # Late, so that `import latentprior` does not load every baseline.
    from . import page, sources

    start = time.monotonic()
    out = Path(out)
    check_report_out(out)
    with torch.no_grad(), work_bar("report", page.PARTS + 1, shown=progress) as bar:
        bar.begin("reading")
        subject = sources.find(source, latents, images, held_out, seed=seed, device=device)
        blob = page.build(subject, seed, bar.begin).encode()
    write_whole(out, blob)
    return Report(out, len(blob), len(subject.prior.stages), time.monotonic() - start)


def check_report_out(out: Path) -> None:
    """Raise :class:`LatentPriorError` now if no ``.html`` of this name can be written."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise LatentPriorError(f"--out {out}: give a name that ends in .html")
    if os.path.isdir(out):
        raise LatentPriorError(f"--out {out}: is a folder; give a file name that ends in .html")
    check_folder(out.parent, out.name)
