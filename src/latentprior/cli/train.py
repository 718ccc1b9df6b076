"""``latentprior train``: images in, a folder with the model, its recipe, its curves and its pictures out."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..data.images import Images, read_images
from ..density.figures import record, strict_json, text
from ..errors import CheckpointError, LatentPriorError, LearningDivergedError
from ..models.model import LatentVariableModel
from ..recipes.model_folders import new_model, sampler_options, save_model
from ..recipes.recipe import Recipe, changed, read_recipe, recipe_for, recipe_names, rival, to_yaml
from ..runtime.events import TrainingEvent
from ..runtime.processes import Processes, launched_processes
from ..runtime.progress import FitProgress, Stopped, StopSignals, TrainingProgress, note
from ..runtime.seeding import derived_generator
from ..runtime.tracking import JSONLinesTracker, TensorBoardTracker, Tracker, tracked
from ..storage.checkpoint import check_ours, locked, remove_checkpoint
from ..storage.output_files import check_folder, check_images_out, picture_grid, write_whole
from ..training import joint as training
from ..training.alternating import train_alternating
from ..training.two_phase import train_two_phase
from .options import AsJson, Device, ImagesSource, Key, Seed, WorkFailed, check_device

__all__ = ["train"]

SHOWN = 64
"""Images on ``samples.png``."""
SAVED = (
    ("", "training"), ("autoencoder", "autoencoder"), ("prior", "fit"), ("second", "second"), ("joint", "training"),
    ("refit", "fit"),
)  # fmt: skip
"""Folders in DIR/checkpoint, and the kind of what each holds."""
PARTS = {
    **dict.fromkeys(("joint", "sri", "lebm"), ("",)),
    "alternating": ("autoencoder", "prior", "joint", "refit"),
    "vae": ("autoencoder",),
    "two-stage-vae": ("autoencoder", "second"),
}
"""By method, which of them its run writes; every other method writes ``autoencoder`` and ``prior``."""
Callbacks = Sequence[Callable[[Any], None]]


def train(
    images: ImagesSource,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that takes the model.")],
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="NAME|F.yaml",
            help=f"Recipe, a file or one of {', '.join(recipe_names())}; by default one for the images' size.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the recipe, as joint.steps=500."),
    ] = None,
    key: Key = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Take the first N images only.")
    ] = None,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Go on from DIR/checkpoint, if a run left one.")
    ] = False,
    device: Device = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", metavar="", help="Also write curves and samples to DIR/tensorboard.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Learn a generator and its prior on images, and save them.

    Ctrl-C and SIGTERM leave a checkpoint in DIR/checkpoint; the same command with --resume goes on from it.
    DIR gets the model, config.yaml, log.jsonl (curves), metrics.json and samples.png.

    Runs of the method joint also start under accelerate launch and torchrun. The method is one of joint, two-phase,
    alternating, and the rivals vae, rae, sri, lebm, ncp-vae, two-stage-vae, gmm and flow.

    [bold]Examples:[/]

    latentprior train photos/ --out run --set image_size=32

    latentprior train mnist.npz --out run --config mnist-cpu --set joint.steps=500 --tensorboard

    latentprior train mnist.npz --out rival --config mnist-cpu --set method=lebm
    """
    check_device(device)
    processes = launched_processes(device)
    main = processes.rank == 0
    checkpoint = out / "checkpoint"
    if os.path.lexists(out):
        # Before images are read, which can take minutes; a folder that is not there yet is made after them.
        _check_out(out, checkpoint)
    recipe, name, pictures = _prepared(images, out, config, settings or [], key, limit, resume, processes.count > 1)
    if processes.count > 1 and recipe.method != "joint":
        raise LatentPriorError(f"method {recipe.method!r} learns in one process: leave the launcher out, or use joint")
    model = new_model(recipe, pictures.shape, seed=seed, device=processes.device)
    check_folder(out)
    with locked(out if main else None):
        _check_out(out, checkpoint)
        there = [part for part, _ in SAVED if (checkpoint / part / "config.json").exists()]
        unfinished = bool(there)
        if resume and not set(there) <= set(PARTS.get(recipe.method, ("autoencoder", "prior"))):
            raise CheckpointError(
                f"{checkpoint}: holds a run of another method than {recipe.method}; choose another folder, or leave "
                "--resume out"
            )
        if main and unfinished and not resume:
            note("warning", f"{checkpoint} held an unfinished run: starting anew; --resume would have gone on from it")
            _remove(checkpoint)
        log = out / "log.jsonl"
        if main:
            if not (unfinished and resume):
                log.unlink(missing_ok=True)
            if config is None or not (out / "config.yaml").exists() or not (out / "config.yaml").samefile(config):
                write_whole(out / "config.yaml", to_yaml(recipe).encode())
        processes.wait()
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            progress, bars = stack.enter_context(TrainingProgress()), stack.enter_context(FitProgress())
            stop = stack.enter_context(StopSignals())
            trackers: list[Tracker] = []
            if main:
                trackers = [JSONLinesTracker(log), *([TensorBoardTracker(out / "tensorboard")] if tensorboard else [])]
            for tracker in trackers:
                stack.callback(tracker.close)
            last = _Last()
            curves = [tracked(tracker) for tracker in trackers]
            samples = _Samples(out, seed, trackers)
            heard: Callbacks = (stop.check, progress, last, *curves, samples)
            fit_heard: Callbacks = (stop.check, lambda _: progress.close(), bars, *curves)
            try:
                _learn(model, pictures, recipe, checkpoint, seed, resume, processes, heard, fit_heard)
                if main:
                    save_model(model, out / "model")
                    samples.draw(model)
            except Stopped:
                if any((checkpoint / part / "config.json").exists() for part, _ in SAVED):
                    raise Stopped(f"state saved in {checkpoint}", resumable=True) from None
                raise
            except (LearningDivergedError, WorkFailed):
                raise
            except LatentPriorError as error:
                # Once the run has begun, its input has been found right.
                if progress.begun or bars.begun:
                    raise WorkFailed(str(error)) from error
                raise
            processes.wait()
        if not main:
            return
        figures = record(model.prior)
        found = {
            "method": recipe.method,
            "recipe": name,
            "images": len(pictures),
            "image_shape": list(pictures.shape),
            "sigma": model.sigma,
            "seed": seed,
            "seconds": time.monotonic() - begun,
            "losses": last.losses,
            "prior": figures,
        }
        write_whole(out / "metrics.json", (strict_json(found) + "\n").encode())
        # Last: until then --resume finds a run that has ended, not one to begin.
        _remove(checkpoint)
    if as_json:
        print(strict_json(found))
        return
    print(f"{images}: {len(pictures):,} images of {' x '.join(map(str, pictures.shape))}, {recipe.method} by {name}")
    print("\n".join(text(figures)))
    print(f"  {'sigma':<22} {model.sigma:.4f}")
    print(f"saved in {out}; look at {out / 'samples.png'}; next:")
    print(f"  {shlex.join(['latentprior', 'generate', str(out), '-n', '64', '--out', 'generated.png'])}")
    print(f"  {shlex.join(['latentprior', 'evaluate', str(out), str(images)])}")


def _prepared(
    source: Path,
    out: Path,
    config: str | None,
    settings: Sequence[str],
    key: str | None,
    limit: int | None,
    resume: bool,
    several: bool,
) -> tuple[Recipe, str, Images]:
    """The recipe, what to call it, and the images as it wants them."""
    before = out / "config.yaml"
    name = config if config is not None else str(before) if resume and before.is_file() else None
    if name is not None:
        recipe = changed(read_recipe(name), settings)
        return recipe, name, read_images(source, key=key, size=recipe.image_size, limit=limit)
    # Settings that no recipe takes are told before a large set of images is read.
    wanted = changed(read_recipe(recipe_for()), settings)
    pictures = read_images(source, key=key, size=wanted.image_size, limit=limit)
    # Joint learning from untrained networks has settings of its own: scales of an untrained encoder lead nowhere.
    name = recipe_for(pictures.shape, several=several or wanted.method == "joint")
    return changed(read_recipe(name), settings), name, pictures


def _learn(
    model: LatentVariableModel,
    images: Images,
    recipe: Recipe,
    checkpoint: Path,
    seed: int,
    resume: bool,
    processes: Processes,
    heard: Callbacks,
    fit_heard: Callbacks,
) -> None:
    if recipe.method == "joint":
        training.train(
            model,
            images,
            recipe.joint,
            seed=seed,
            checkpoint_dir=checkpoint,
            resume=resume,
            processes=processes,
            callbacks=heard,
        )
    elif recipe.method in ("two-phase", "alternating"):
        _with_autoencoder(model, images, recipe, checkpoint, seed, resume, heard, fit_heard)
    else:
        how = {"seed": seed, "checkpoint_dir": checkpoint, "resume": resume, "callbacks": heard}
        rival(recipe.method)(model, images, recipe.rival_config(), **how)


def _with_autoencoder(
    model: LatentVariableModel,
    images: Images,
    recipe: Recipe,
    checkpoint: Path,
    seed: int,
    resume: bool,
    heard: Callbacks,
    fit_heard: Callbacks,
) -> None:
    names = ("base", "max_stages", "validation", "whitening", "settings", "time_budget")
    options: dict[str, Any] = {name: getattr(recipe.fit, name) for name in names}
    options |= {"seed": seed, "checkpoint_dir": checkpoint, "resume": resume}
    options |= {"callbacks": heard, "fit_callbacks": fit_heard}
    if recipe.method == "two-phase":
        train_two_phase(model, images, recipe.autoencoder, **options)
    else:
        train_alternating(model, images, recipe.autoencoder, recipe.joint, **options)


class _Last:
    """A callback that keeps the last losses that were told."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}

    def __call__(self, event: TrainingEvent) -> None:
        self.losses = dict(event.losses) or self.losses


class _Samples:
    """A callback that draws ``samples.png`` at every tenth of a phase and whenever a stage has joined the ladder."""

    def __init__(self, out: Path, seed: int, trackers: Sequence[Tracker]) -> None:
        self.path, self.seed, self.trackers = out / "samples.png", seed, trackers

    def __call__(self, event: TrainingEvent) -> None:
        tenth = event.losses and event.kind != "evaluate" and event.step % max(25, event.steps // 10) == 0
        if event.model is not None and (tenth or event.kind == "learned"):
            self.draw(event.model, event.step)

    def draw(self, model: LatentVariableModel, step: int = 0) -> None:
        """Draw the same latents every time, as far as the prior allows."""
        draws = derived_generator(torch.device("cpu"), self.seed, "samples")
        x = model.generate(SHOWN, generator=draws, **sampler_options(model))
        write_whole(self.path, picture_grid(x))
        for tracker in self.trackers:
            tracker.images(step, "samples", x)


def _check_out(out: Path, checkpoint: Path) -> None:
    check_folder(out)
    check_images_out(out / "samples.png", SHOWN)
    for folder, kind in ((out / "model", "model"), *((checkpoint / part, kind) for part, kind in SAVED)):
        check_ours(folder, kind)


def _remove(checkpoint: Path) -> None:
    for part, kind in reversed(SAVED):
        remove_checkpoint(checkpoint / part, kind)
