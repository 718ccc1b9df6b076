"""``latentprior train``: images in, a folder with the model, its recipe, its curves and its pictures out."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..data.images import Images, read_images
from ..density.figures import record, strict_json, text
from ..errors import CheckpointError, LatentPriorError
from ..models.model import LatentVariableModel
from ..recipes.model_folders import new_model, save_model
from ..recipes.recipe import Recipe, changed, read_recipe, recipe_for, recipe_names, rival, to_yaml
from ..runtime.events import Event
from ..runtime.processes import Processes, launched_processes
from ..runtime.progress import Progress
from ..runtime.seeding import derived_generator
from ..runtime.stopping import StopSignals
from ..runtime.tracking import JSONLinesTracker, TensorBoardTracker, Tracker, tracked
from ..storage.checkpoint import check_ours, locked
from ..storage.output_files import check_folder, check_images_out, picture_grid, write_whole
from ..training import joint as training
from ..training.alternating import train_alternating
from ..training.two_phase import train_two_phase
from .options import AsJson, Device, ImagesSource, Key, Limit, Resume, Seed, check_device, counted
from .runs import RunState

__all__ = ["train"]

SAMPLE_COUNT = 64
"""Images on ``samples.png``."""
STATES = {
    "": "training", "autoencoder": "autoencoder", "prior": "fit", "second": "second", "joint": "training",
    "refit": "fit",
}  # fmt: skip
"""Folders in DIR/checkpoint, and the kind of the state in each."""
STATES_OF_METHOD = {
    **dict.fromkeys(("joint", "sri", "lebm"), ("",)),
    "alternating": ("autoencoder", "prior", "joint", "refit"),
    "vae": ("autoencoder",),
    "two-stage-vae": ("autoencoder", "second"),
}
"""The folders of :data:`STATES` that the run of a method writes; a method not named here writes these two:"""
STATES_OF_OTHERS = ("autoencoder", "prior")


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
    limit: Limit = None,
    seed: Seed = 0,
    resume: Resume = False,
    device: Device = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", metavar="", help="Also write curves and samples to DIR/tensorboard.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Learn a decoder and its prior on images, and save them.

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
    state = RunState(out / "checkpoint", STATES)
    if os.path.lexists(out):
        # Before images are read, which can take minutes; a folder that is not there yet is made after them.
        _check_out(out, state)
    recipe, name, pictures = _prepared(images, out, config, settings or [], key, limit, resume, processes.count > 1)
    if processes.count > 1 and recipe.method != "joint":
        raise LatentPriorError(f"method {recipe.method!r} learns in one process: leave the launcher out, or use joint")
    model = new_model(recipe, pictures.shape, seed=seed, device=processes.device)
    check_folder(out)
    with locked(out if main else None):
        _check_out(out, state)
        _check_method(state, recipe.method, resume)
        if main:
            _begin(out, state, resume, recipe, config)
        processes.wait()
        start = time.monotonic()
        losses = _learned(model, pictures, recipe, out, state, seed, resume, processes, tensorboard)
        if not main:
            return
        prior_figures = record(model.prior)
        figures = {
            "method": recipe.method,
            "recipe": name,
            "images": len(pictures),
            "image_shape": list(pictures.shape),
            "sigma": model.sigma,
            "seed": seed,
            "seconds": time.monotonic() - start,
            "losses": losses,
            "prior": prior_figures,
        }
        write_whole(out / "metrics.json", (strict_json(figures) + "\n").encode())
        # This comes last: until then --resume finds a run that has ended, not one to begin.
        state.remove()
    if as_json:
        print(strict_json(figures))
        return
    shape = " x ".join(map(str, pictures.shape))
    print(f"{images}: {counted(len(pictures), 'image')} of {shape}, {recipe.method} by {name}")
    print("\n".join(text(prior_figures)))
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
    # Settings that no recipe takes raise an error here, before a large set of images is read.
    general = changed(read_recipe(recipe_for()), settings)
    pictures = read_images(source, key=key, size=general.image_size, limit=limit)
    # Joint learning from untrained networks has settings of its own: it cannot use the scales of an untrained encoder.
    name = recipe_for(pictures.shape, several=several or general.method == "joint")
    return changed(read_recipe(name), settings), name, pictures


def _check_out(out: Path, state: RunState) -> None:
    """Raise if the run could not write to its folder, or would write over what is not its own."""
    check_folder(out)
    check_images_out(out / "samples.png", SAMPLE_COUNT)
    check_ours(out / "model", "model")
    state.check()


def _check_method(state: RunState, method: str, resume: bool) -> None:
    """Raise :class:`CheckpointError` if a run is to go on that another method began."""
    if resume and not set(state.unfinished()) <= set(STATES_OF_METHOD.get(method, STATES_OF_OTHERS)):
        raise CheckpointError(
            f"{state.folder}: holds a run of another method than {method}; choose another folder, or leave --resume out"
        )


def _begin(out: Path, state: RunState, resume: bool, recipe: Recipe, config: str | None) -> None:
    """Leave nothing in the folder of a run that is not to go on, and write the recipe there."""
    goes_on = resume and bool(state.unfinished())
    state.make_way(resume)
    if not goes_on:
        (out / "log.jsonl").unlink(missing_ok=True)
    written = out / "config.yaml"
    if config is None or not written.exists() or not written.samefile(config):
        write_whole(written, to_yaml(recipe).encode())


def _learned(
    model: LatentVariableModel,
    images: Images,
    recipe: Recipe,
    out: Path,
    state: RunState,
    seed: int,
    resume: bool,
    processes: Processes,
    tensorboard: bool,
) -> dict[str, float]:
    """Learn the model with bars and curves, save it, and return the last losses."""
    main = processes.rank == 0
    with contextlib.ExitStack() as stack:
        progress, stop = stack.enter_context(Progress()), stack.enter_context(StopSignals())
        trackers: list[Tracker] = [JSONLinesTracker(out / "log.jsonl")] if main else []
        if main and tensorboard:
            trackers.append(TensorBoardTracker(out / "tensorboard"))
        for tracker in trackers:
            stack.callback(tracker.close)
        last, samples = _Last(), _Samples(out, seed, trackers)
        callbacks = (stop.check, progress, last, *map(tracked, trackers), samples)
        options = {"seed": seed, "checkpoint_dir": state.folder, "resume": resume, "callbacks": callbacks}
        with state.ending(lambda: progress.begun, LatentPriorError):
            _learn(model, images, recipe, processes, options)
            if main:
                save_model(model, out / "model")
                samples.draw(model)
        processes.wait()
    return last.losses


def _learn(
    model: LatentVariableModel, images: Images, recipe: Recipe, processes: Processes, options: Mapping[str, Any]
) -> None:
    """Learn the model by the recipe's method; every method takes ``options``."""
    if recipe.method == "joint":
        training.train(model, images, recipe.joint, processes=processes, **options)
    elif recipe.method in ("two-phase", "alternating"):
        names = ("base", "max_stages", "validation", "whitening", "settings", "time_budget")
        fit_options = {name: getattr(recipe.fit, name) for name in names}
        if recipe.method == "two-phase":
            train_two_phase(model, images, recipe.autoencoder, **options, **fit_options)
        else:
            train_alternating(model, images, recipe.autoencoder, recipe.joint, **options, **fit_options)
    else:
        rival(recipe.method)(model, images, recipe.rival_config(), **options)


class _Last:
    """A callback that keeps the losses of the last event that had any."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        self.losses = dict(event.losses) or self.losses


class _Samples:
    """A callback that draws ``samples.png`` at every tenth of a phase and whenever a stage has joined the ladder."""

    def __init__(self, out: Path, seed: int, trackers: Sequence[Tracker]) -> None:
        self.path, self.seed, self.trackers = out / "samples.png", seed, trackers

    def __call__(self, event: Event) -> None:
        tenth = event.losses and event.kind != "evaluate" and event.step % max(25, event.steps // 10) == 0
        if event.model is not None and (tenth or event.kind == "learned"):
            self.draw(event.model, event.step)

    def draw(self, model: LatentVariableModel, step: int = 0) -> None:
        """Draw the same latents every time, as far as the prior allows."""
        generator = derived_generator(torch.device("cpu"), self.seed, "samples")
        x = model.generate(SAMPLE_COUNT, generator=generator, **model.sampler)
        write_whole(self.path, picture_grid(x))
        for tracker in self.trackers:
            tracker.images(step, "samples", x)
