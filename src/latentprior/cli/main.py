"""The command line: ``latentprior demo | fit | score | sample | info``, and the image side's commands."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from typer.main import get_command

from .. import __version__
from ..density.figures import strict_json
from ..errors import HubError, LatentPriorError, LearningDivergedError, ProcessLostError
from ..runtime.progress import note, tidy_warnings
from ..runtime.stopping import Stopped, StopSignals
from ..storage.output_files import check_folder
from . import explore, fit, images, latents, push, report, train
from .options import AsJson, Seed, WorkFailed

__all__ = ["app", "main"]

app = typer.Typer(
    name="latentprior",
    help="Learn the latent prior that a generator should have had; sample from it, score with it.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    invoke_without_command=True, epilog="Exit codes: 0 done, 1 the work failed, 2 the call or its input is wrong."
)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Print versions and device, and leave."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show the traceback of an error; works on every command.")
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


for command in (fit.fit, *latents.COMMANDS, train.train, *images.COMMANDS, report.report, explore.explore, push.push):
    app.command()(command)
