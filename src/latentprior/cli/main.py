"""The command line: ``latentprior demo | fit | score | sample | info``, and the image side's commands."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from typer.main import get_command

from .. import __version__
from ..data.latents import read_latents
from ..density.figures import record, strict_json, text
from ..density.prior import LatentPrior
from ..density.samplers import SAMPLE_BLOCK, SAMPLERS, check_options
from ..errors import (
    CheckpointError,
    HubError,
    InvalidLatentsError,
    LatentPriorError,
    LearningDivergedError,
    ProcessLostError,
)
from ..fitting import fit as learning
from ..runtime.processes import in_unison, launched_processes
from ..runtime.progress import FitProgress, Stopped, StopSignals, note, row_bar, tidy_warnings
from ..storage.checkpoint import check_ours, locked, remove_checkpoint
from ..storage.output_files import array_file, check_file, check_folder
from . import explore as explore_command
from . import images as image_commands
from . import push as push_command
from . import report as report_command
from . import train as training_command
from .options import AsJson, Device, Key, Seed, WorkFailed, check_device

__all__ = ["app", "main"]

SCORE_ROWS, SCORE_NUMBERS = 1 << 14, 1 << 22
"""Most rows, and most numbers, that are scored at a time."""

app = typer.Typer(
    name="latentprior",
    help="Learn the latent prior that a generator should have had; sample from it, score with it.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that [bold]latentprior fit[/] wrote.")]
LatentsFile = Annotated[Path, typer.Argument(metavar="LATENTS", help="Latents, one a row: .npy, .npz or .safetensors.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0: done, 1: the work failed, or 2: the call or its input is wrong."""
    given = list(sys.argv[1:] if argv is None else argv)
    # --debug is taken out here, so that it may stand anywhere on the line.
    args = [arg for arg in given if arg != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with StopSignals(), tidy_warnings(quiet=not _speaks()):
            code = get_command(app).main(args=args, prog_name="latentprior", standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader of stdout has left; without this Python complains once more when it flushes at exit.
        sys.stdout = io.StringIO()
        return 1
    except Stopped as stopped:
        if not _speaks():
            return 1
        again = f"; go on with: {shlex.join(['latentprior', *args])}" if stopped.resumable else ""
        note("stopped", str(stopped) + again + (" --resume" if again and "--resume" not in args else ""))
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            traceback.print_exc()
        code, message = _explain(error)
        if code == 1 or _speaks():
            note("error", message)
        return code


def _speaks() -> bool:
    """Whether this is the process of a launcher that says what all of them would."""
    return os.environ.get("RANK", "0") == "0"


def _explain(error: BaseException) -> tuple[int, str]:
    usage = getattr(error, "format_message", None)
    if usage is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "latentprior")
        return 2, f"{str(usage()).rstrip('.')}; see {command} --help"
    if isinstance(error, (WorkFailed, LearningDivergedError, ProcessLostError, HubError)):
        return 1, str(error)
    if isinstance(error, LatentPriorError):
        return 2, str(error)
    if isinstance(error, OSError) and error.strerror:
        # The names are those of the call.
        code = 2 if error.errno == errno.ENAMETOOLONG else 1
        return code, f"{error.filename or 'input or output'}: {error.strerror}"
    kind = type(error).__name__
    return 1, f"unexpected {kind}: {error}; add --debug for the traceback" if str(error) else f"unexpected {kind}"


def _version(wanted: bool) -> None:
    if wanted:
        device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"
        print(f"latentprior {__version__} (torch {torch.__version__}, device {device})")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog="Exit codes: 0 done, 1 the work failed, 2 the call or its input is wrong.",
)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            callback=_version,
            is_eager=True,
            help="Print versions and device, and leave.",
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", metavar="", help="Show the traceback of an error; works on every command."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where pictures and numbers go.")] = Path(
        "demo-out"
    ),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Learn a prior on bundled data: samples before and after, numbers, a report.

    [bold]Example:[/] latentprior demo --out demo-out
    """
    from .demo import run_demo

    check_folder(out)
    # With --json the demo's own table must not reach stdout, which holds one JSON object.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        numbers = run_demo(out, seed=seed, progress=sys.stderr.isatty())
    if as_json:
        print(strict_json(numbers))


@app.command()
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
        float | None,
        typer.Option("--time-budget", metavar="SEC", min=0, help="Seconds that learning may take."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Go on from DIR/checkpoint, if a run left one.")
    ] = False,
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
    checkpoint = out / "checkpoint"
    with contextlib.ExitStack() as stack:
        with in_unison(processes):
            if main:
                check_folder(out)
                stack.enter_context(locked(out))
                _make_way(out, checkpoint, resume)
        progress, stop = stack.enter_context(FitProgress()), stack.enter_context(StopSignals())
        try:
            prior = learning.fit(
                target,
                base=base,
                max_stages=max_stages,
                seed=seed,
                device=device,
                validation=validation,
                checkpoint_dir=checkpoint,
                resume=resume,
                time_budget=time_budget,
                callbacks=(stop.check, progress),
                processes=processes,
            )
            if not main:
                return
            prior.save_pretrained(out)
            remove_checkpoint(checkpoint, "fit")
        except Stopped:
            if (checkpoint / "config.json").exists():
                raise Stopped(f"state saved in {checkpoint}", resumable=True) from None
            raise
        except CheckpointError as error:
            # Once the run has begun, checkpoints are written, no longer read.
            if progress.begun:
                raise WorkFailed(str(error)) from error
            raise
    found = record(prior)
    if as_json:
        print(strict_json(found))
        return
    print(f"{latents}: {len(target):,} rows of shape {tuple(target.event_shape)}")
    print("\n".join(text(found)))
    print(f"saved in {out}; next:")
    print(f"  {shlex.join(['latentprior', 'sample', str(out), '-n', '1000', '--out', 'samples.npy'])}")
    chosen = [] if key is None else ["--key", key]
    print(f"  {shlex.join(['latentprior', 'score', str(out), str(latents), *chosen])}")


def _make_way(out: Path, checkpoint: Path, resume: bool) -> None:
    """Remove what an unfinished run left, unless it is to go on; refuse folders that hold anything else."""
    for folder, kind in ((out, "prior"), (checkpoint, "fit")):
        check_ours(folder, kind)
    if not resume and (checkpoint / "config.json").exists():
        note("warning", f"{checkpoint} held an unfinished run: starting anew; --resume would have gone on from it")
        remove_checkpoint(checkpoint, "fit")


@app.command()
def score(
    folder: Folder,
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
    if rows.event_shape != prior.event_shape:
        raise InvalidLatentsError(
            f"{latents}: rows have shape {tuple(rows.event_shape)}, the prior in {folder} was learned on "
            f"{tuple(prior.event_shape)}; score latents of the same generator"
        )
    n, mean, squares, infinite = 0, 0.0, 0.0, 0
    writer = contextlib.nullcontext() if out is None else array_file(out, (len(rows),), "<f8")
    with writer as file, torch.no_grad(), row_bar(len(rows), "scoring") as bar:
        draws = torch.Generator().manual_seed(0)
        for block in rows.blocks(draws, max(1, min(SCORE_ROWS, SCORE_NUMBERS // rows.dim))):
            values = prior.log_prob(block.to(prior.dtype).reshape(-1, *prior.event_shape)).double().cpu()
            if file is not None:
                file.write(values.numpy().astype("<f8").tobytes())
            # Means and squares of two parts combined (Chan, Golub and LeVeque 1979).
            m, here = len(values), float(values.mean())
            squares += float((values - here).square().sum()) + (here - mean) ** 2 * n * m / (n + m)
            mean += (here - mean) * m / (n + m)
            n += m
            infinite += int((~values.isfinite()).sum())
            bar.update(m)
    if infinite:
        note("warning", f"{infinite} of {n} rows have no finite log density: they lie too far out to be scored")
    found = {
        "n": n,
        "mean_log_prob": mean,
        "stderr": math.sqrt(squares / (n - 1) / n) if n > 1 else None,
        "log_normalizer_stderr": prior.log_prob_stderr,
    }
    if as_json:
        print(strict_json(found))
        return
    stderr = "" if n == 1 else f" ± {found['stderr']:.4f}"
    print(f"{latents}: {n:,} rows")
    print(f"mean log density {mean:.4f}{stderr} nats; the normaliser is known to ± {prior.log_prob_stderr:.4f}")
    if out is not None:
        print(f"log density of every row in {out}")


@app.command()
def sample(
    folder: Folder,
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
    with array_file(out, shape, dtype.str) as file, row_bar(n, "sampling") as bar:
        for start in range(0, n, SAMPLE_BLOCK):
            rows = min(SAMPLE_BLOCK, n - start)
            draws = prior.sample((rows,), generator=generator, sampler=sampler)
            file.write(draws.cpu().numpy().astype(dtype).tobytes())
            bar.update(rows)
    if as_json:
        print(strict_json({"n": n, "shape": shape, "dtype": dtype.name, "sampler": sampler, "seed": seed}))
    else:
        print(f"{out}: {n:,} draws of shape {tuple(prior.event_shape)}, {dtype.name}, by {sampler}")


@app.command()
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Print what a saved prior is made of and how well its density is known.

    [bold]Example:[/] latentprior info prior --json
    """
    found = record(_load(folder))
    if as_json:
        print(strict_json(found))
    else:
        print("\n".join(text(found)))


for command in (
    training_command.train,
    *image_commands.COMMANDS,
    report_command.report,
    explore_command.explore,
    push_command.push,
):
    app.command()(command)


def _load(folder: Path) -> LatentPrior:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the one that `latentprior fit --out` wrote")
    return LatentPrior.from_pretrained(folder)
