"""``latentprior score | sample | info``: what a learned prior is for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from ..data.latents import read_latents
from ..density.figures import record, strict_json, text
from ..density.prior import LatentPrior
from ..density.samplers import SAMPLE_BLOCK, SAMPLERS, check_options
from ..errors import CheckpointError
from ..report.sources import check_latents_fit
from ..runtime.progress import note, work_bar
from ..storage.output_files import array_file, check_file
from .options import AsJson, Key, LatentsFile, PriorFolder, Seed, counted, mean_and_stderr, plus_minus

__all__ = ["COMMANDS", "info", "sample", "score"]

SCORED_ROWS = 1 << 14
"""Most rows that are scored at a time."""
SCORED_NUMBERS = 1 << 22
"""Most numbers, rows times coordinates, that are scored at a time: 16 MiB in single precision."""


def score(
    folder: PriorFolder,
    latents: LatentsFile,
    key: Key = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="F.npy", help="Also write the log density of every row.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the mean log density of latents under a prior, in nats.

    [bold]Example:[/] latentprior score prior test.npy --out log_prob.npy
    """
    if out is not None:
        check_file(out)
    prior = _load(folder)
    rows = read_latents(latents, key=key)
    check_latents_fit(prior, rows, latents)
    parts: list[Tensor] = []
    writer = contextlib.nullcontext() if out is None else array_file(out, (len(rows),), "<f8")
    with writer as file, torch.no_grad(), work_bar("scoring", len(rows)) as bar:
        generator = torch.Generator().manual_seed(0)
        for block in rows.blocks(generator, max(1, min(SCORED_ROWS, SCORED_NUMBERS // rows.dim))):
            values = prior.log_prob(block.to(prior.dtype).reshape(-1, *prior.event_shape)).double().cpu()
            if file is not None:
                file.write(values.numpy().astype("<f8").tobytes())
            parts.append(values)
            bar.update(len(values))
    log_prob = torch.cat(parts)
    n, (mean, stderr) = len(log_prob), mean_and_stderr(log_prob)
    infinite = int((~log_prob.isfinite()).sum())
    if infinite:
        note("warning", f"{infinite} of {n} rows have no finite log density: they lie too far out to be scored")
    figures = {"n": n, "mean_log_prob": mean, "stderr": stderr, "log_normalizer_stderr": prior.log_prob_stderr}
    if as_json:
        print(strict_json(figures))
        return
    print(f"{latents}: {counted(n, 'row')}")
    error, known = plus_minus(stderr, ".4f"), prior.log_prob_stderr
    print(f"mean log density {mean:.4f}{error} nats; the normaliser is known to ± {known:.4f}")
    if out is not None:
        print(f"log density of every row in {out}")


def sample(
    folder: PriorFolder,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Number of draws.")],
    out: Annotated[Path, typer.Option("--out", metavar="F.npy", help="File that takes the draws.")],
    sampler: Annotated[
        str, typer.Option("--sampler", metavar="S", help=f"How to draw: {', '.join(SAMPLERS)}.")
    ] = "smc",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Draw latents from a prior.

    [bold]Example:[/] latentprior sample prior -n 1000 --out samples.npy --seed 1
    """
    check_options(sampler, {})
    check_file(out)
    prior = _load(folder)
    shape = (n, *prior.event_shape)
    dtype = np.dtype(str(prior.dtype).removeprefix("torch.")).newbyteorder("<")
    generator = torch.Generator().manual_seed(seed % 2**63)
    with array_file(out, shape, dtype.str) as file, work_bar("sampling", n) as bar:
        for start in range(0, n, SAMPLE_BLOCK):
            rows = min(SAMPLE_BLOCK, n - start)
            draws = prior.sample((rows,), generator=generator, sampler=sampler)
            file.write(draws.cpu().numpy().astype(dtype).tobytes())
            bar.update(rows)
    if as_json:
        print(strict_json({"n": n, "shape": shape, "dtype": dtype.name, "sampler": sampler, "seed": seed}))
    else:
        print(f"{out}: {counted(n, 'draw')} of shape {tuple(prior.event_shape)}, {dtype.name}, by {sampler}")


def info(folder: PriorFolder, as_json: AsJson = False) -> None:
    """Print what a saved prior is made of and how well its density is known.

    [bold]Example:[/] latentprior info prior --json
    """
    figures = record(_load(folder))
    if as_json:
        print(strict_json(figures))
    else:
        print("\n".join(text(figures)))


COMMANDS = (score, sample, info)


def _load(folder: Path) -> LatentPrior:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the one that `latentprior fit --out` wrote")
    return LatentPrior.from_pretrained(folder)
