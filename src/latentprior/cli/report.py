"""``latentprior report``: one HTML file about a learned prior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..density.figures import strict_json
from ..report import write_report
from .options import AsJson, Device, SavedFolder, Seed, check_device, counted

__all__ = ["report"]


def report(
    folder: SavedFolder,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="F.html", help="The file; by default report.html in DIR.")
    ] = None,
    latents: Annotated[
        Path | None, typer.Option("--latents", metavar="F", help="Latents that the prior was learned on.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="F", help="Images that the model was learned on, or those of --latents."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", metavar="F", help="Rows that trained nothing: latents or images, as those above."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file: what was learned, samples by stage, how far to trust it, whether it copies.

    [bold]Examples:[/]

    latentprior report prior --latents latents.npy

    latentprior report run --images mnist.npz --out run.html
    """
    check_device(device)
    target = folder / "report.html" if out is None and folder.is_dir() else out or Path("report.html")
    done = write_report(folder, target, latents, images, held_out=held_out, seed=seed, device=device, progress=True)
    if as_json:
        print(strict_json(done._asdict()))
        return
    stages = counted(done.stages, "stage")
    print(f"{done.path}: {done.bytes / 1e6:.1f} MB, {stages}, {done.seconds:.1f} s; open it in any browser")
