"""``latentprior fit``: latents in, a saved prior out."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..data.latents import read_latents
from ..density.figures import record, strict_json, text
from ..errors import CheckpointError
from ..fitting import fit as learning
from ..runtime.processes import in_unison, launched_processes
from ..runtime.progress import Progress
from ..runtime.stopping import StopSignals
from ..storage.checkpoint import check_ours, locked
from ..storage.output_files import check_folder
from .options import AsJson, Device, Key, LatentsFile, Resume, Seed, check_device, counted
from .runs import RunState

__all__ = ["fit"]


def fit(
    latents: LatentsFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that takes the prior.")],
    key: Key = None,
    base: Annotated[
        str,
        typer.Option("--base", metavar="B", help="Where to start: normal, gmm, gmm:K, gmm-lowrank, copula or flow."),
    ] = "gmm",
    max_stages: Annotated[int, typer.Option("--max-stages", metavar="N", min=0, help="Most stages to learn.")] = 20,
    seed: Seed = 0,
    time_budget: Annotated[
        float | None, typer.Option("--time-budget", metavar="SEC", min=0, help="Seconds that learning may take.")
    ] = None,
    resume: Resume = False,
    device: Device = None,
    validation: Annotated[
        float, typer.Option("--validation", metavar="SHARE", help="Share of rows held out (10,000 at most).")
    ] = 0.1,
    as_json: AsJson = False,
) -> None:
    """Learn a prior on latents and save it.

    Ctrl-C and SIGTERM leave a checkpoint in DIR/checkpoint; the same command with --resume goes on from it.

    Also starts under accelerate launch and torchrun: all processes learn one prior.

    [bold]Examples:[/]

    latentprior fit latents.npy --out prior

    latentprior fit codes.npz --key train --out prior --time-budget 600
    """
    check_device(device)
    target = read_latents(latents, key=key)
    processes = launched_processes(device)
    main = processes.rank == 0
    state = RunState(out / "checkpoint", {"": "fit"})
    with contextlib.ExitStack() as stack:
        with in_unison(processes):
            if main:
                check_folder(out)
                stack.enter_context(locked(out))
                check_ours(out, "prior")
                state.check()
                state.make_way(resume)
        progress, stop = stack.enter_context(Progress()), stack.enter_context(StopSignals())
        # Once the run has begun, checkpoints are written, no longer read.
        stack.enter_context(state.ending(lambda: progress.begun, CheckpointError))
        prior = learning.fit(
            target, base=base, max_stages=max_stages, seed=seed, device=device, validation=validation,
            checkpoint_dir=state.folder, resume=resume, time_budget=time_budget, callbacks=(stop.check, progress),
            processes=processes,
        )  # fmt: skip
        if not main:
            return
        prior.save_pretrained(out)
        state.remove()
    figures = record(prior)
    if as_json:
        print(strict_json(figures))
        return
    print(f"{latents}: {counted(len(target), 'row')} of shape {tuple(target.event_shape)}")
    print("\n".join(text(figures)))
    print(f"saved in {out}; next:")
    print(f"  {shlex.join(['latentprior', 'sample', str(out), '-n', '1000', '--out', 'samples.npy'])}")
    chosen = [] if key is None else ["--key", key]
    print(f"  {shlex.join(['latentprior', 'score', str(out), str(latents), *chosen])}")
