"""One process of a fit: ``python fit_worker.py FOLDER TASK``, the launcher's variables in the environment."""

import contextlib
import itertools
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import latentprior as lp
from latentprior.cli import main as cli
from latentprior.density import normalizers
from latentprior.density.ladder import FreshParticles, Ladder
from latentprior.density.sampling.resampling import LogMean
from latentprior.evaluation.known_densities import Banana
from latentprior.fitting import climb, stage, together
from latentprior.fitting import fit as learning
from latentprior.fitting import run as fit_run
from latentprior.fitting.stage import StageLearner
from latentprior.runtime import run as resumable_run
from latentprior.runtime.processes import Processes, in_unison, joined, launched_processes
from latentprior.storage.checkpoint import locked

SETTINGS = lp.StageSettings(width=16, depth=1, steps=400, batch_size=64, average=0.98, bound=1.5, weight_decay=0.1)
OPTIONS: dict[str, Any] = {"base": "normal", "max_stages": 2, "settings": SETTINGS}
CHAINED_PARTICLES, CHAINED_MOVES = 1024, 2


def rows() -> Tensor:
    return Banana().sample((600,), generator=torch.Generator().manual_seed(0)).float()


def figures(prior: lp.LatentPrior) -> dict[str, Tensor]:
    """Everything a prior is, less the clock, as tensors."""
    config, tensors = prior.state()
    total = config["normalizer"]
    numbers = [total["value"], total["stderr"], prior.info.get("log_prob_held_out", math.nan)]
    for rung in config["stages"]:
        notes = rung["diagnostics"]
        numbers += [rung[key] for key in ("log_normalizer", "log_normalizer_stderr", "gain", "gain_stderr")]
        numbers += [notes[key] for key in ("ess", "acceptance", "log_prob_rise", "steps", "saturated")]
    return tensors | {"numbers": torch.tensor(numbers, dtype=torch.float64)}


class Stop(Exception):
    pass


def stopped(folder: Path) -> None:
    """Begin a fit and leave it amid its second stage, in all processes at once."""

    def update(self: StageLearner, *args: Any, real: Any = StageLearner._update) -> None:
        if (self.index, self.step) == (1, 150):
            raise Stop
        real(self, *args)

    with mock.patch.object(StageLearner, "_update", update), contextlib.suppress(Stop):
        lp.fit(rows(), checkpoint_dir=folder, **OPTIONS)


def told(make: Callable[[], object]) -> str:
    """What a call raises, by name and text."""
    try:
        make()
    except lp.LatentPriorError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def poisoned(self: StageLearner, *args: Any, real: Any = StageLearner._update) -> None:
    """NaN in one process only."""
    real(self, *args)
    if (self.index, self.step, self.processes.rank) == (0, 50, 1) and self.learning_rate == 3e-3:
        next(iter(self.parameters.values())).data.fill_(math.nan)


@contextlib.contextmanager
def clock(pace: float) -> Iterator[None]:
    """Within this context every look at the clock takes ``pace`` seconds, and nothing else takes any."""
    ticks = itertools.count()
    fake = SimpleNamespace(monotonic=lambda: pace * next(ticks))
    with contextlib.ExitStack() as stack:
        for module in (climb, fit_run, normalizers, resumable_run, stage, together):
            stack.enter_context(mock.patch.object(module, "time", fake))
        yield


def check(folder: Path, processes: Processes) -> None:
    """Fits and estimates to be compared with those of one process, and of the other processes."""
    rank = processes.rank
    found: dict[str, dict[str, Tensor]] = {}
    found["whole"] = figures(lp.fit(rows(), checkpoint_dir=folder / "run", **OPTIONS))
    with chained(CHAINED_PARTICLES, CHAINED_MOVES):
        found["chained"] = figures(lp.fit(rows(), **OPTIONS))
    with clock(0.002 * (1 + rank)):
        found["budget"] = figures(lp.fit(rows(), time_budget=2, **OPTIONS))
    with mock.patch.object(StageLearner, "_update", poisoned):
        found["retried"] = figures(lp.fit(rows(), **{**OPTIONS, "max_stages": 1}))
    stopped(folder / "stopped")
    for name in ("stopped", "moved"):
        found[name] = figures(lp.fit(rows(), checkpoint_dir=folder / name, resume=True, **OPTIONS))
    found["estimates"] = estimates(lp.LatentPrior.from_pretrained(folder / "prior"), processes)
    lines = [
        told(lambda: lp.fit(rows() + rank, **OPTIONS)),
        told(lambda: lp.fit(rows() * torch.tensor([1.0, 0.0]), **OPTIONS)),
        told(lambda: collided(folder / "held", processes)),
        told(lambda: only(processes, 1)),
    ]
    (folder / f"told-{rank}.txt").write_text("\n".join(lines))
    for name, tensors in found.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}-{rank}.safetensors")


def collided(folder: Path, processes: Processes) -> None:
    """Fit into a folder that is held; not by the first process, which wants it."""
    with locked(folder) if processes.rank == 1 else contextlib.nullcontext():
        processes.wait()
        lp.fit(rows(), checkpoint_dir=folder, **OPTIONS)


def only(processes: Processes, rank: int) -> None:
    with in_unison(processes):
        if processes.rank == rank:
            raise lp.MissingExtraError("a thing", "flow")


@contextlib.contextmanager
def chained(particles: int, moves: int) -> Iterator[None]:
    """Within this context fresh particles always come from Monte Carlo."""
    carried = Ladder.carried_particles

    def fewer(self: Ladder, n: int, generator: torch.Generator | None = None, **options: Any) -> FreshParticles:
        return carried(self, min(n, particles), generator, **{**options, "moves": moves})

    with (
        mock.patch.object(Ladder, "probe", return_value=LogMean(0.0, math.inf, 0.0)),
        mock.patch.object(Ladder, "carried_particles", fewer),
    ):
        yield


def estimates(prior: lp.LatentPrior, processes: Processes) -> dict[str, Tensor]:
    """log Z of one ladder by every way there is, value and standard error; and the particles of all processes."""
    ladder, found = prior.ladder, {}

    def draws(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(10 * seed + processes.rank)

    # Rows that follow the ladder, the same in all processes: what the bracket's end at the data takes for granted.
    held_out = ladder.fresh_particles(301, torch.Generator().manual_seed(7)).position
    total = together.estimate(ladder, held_out, draws(0), processes)
    assert total.bracket is not None
    found["estimate"] = [total.value, total.stderr]
    found["forward"], found["reverse"] = list(total.bracket.forward)[:2], list(total.bracket.reverse)[:2]
    particles = {}
    for name in ("importance", "smc"):
        with chained(2048, 4) if name == "smc" else contextlib.nullcontext():
            fresh = together.fresh_particles(ladder, 4096, draws(1), processes, smc_particles=2048)
        assert fresh.source == name
        found[name] = list(fresh.log_normalizer)[:2]
        particles[f"{name} particles"] = joined(processes, fresh.position)
    return {name: torch.tensor(pair, dtype=torch.float64) for name, pair in found.items()} | particles


def command(folder: Path, task: str, processes: Processes) -> int:
    """``latentprior fit``; in the task ``die`` the last process is killed amid a stage."""

    def fatal(self: StageLearner, *args: Any, real: Any = StageLearner._update) -> None:
        if (self.step, processes.rank, task) == (250, 1, "die"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *args)

    if processes.rank == 0:
        np.save(folder / "z.npy", rows().numpy())
    processes.wait()
    call = ["fit", str(folder / "z.npy"), "--out", str(folder / "out"), "--base", "normal", "--max-stages", "2"]
    quick = mock.patch.object(learning, "fit", partial(learning.fit, settings=SETTINGS))
    with quick, mock.patch.object(StageLearner, "_update", fatal):
        return cli.main([*call, "--json", *(["--resume"] if task == "go on" else [])])


def main(arguments: Sequence[str]) -> int:
    folder, task = Path(arguments[0]), arguments[1]
    torch.set_num_threads(1)
    processes = launched_processes()
    if task != "check":
        return command(folder, task, processes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(folder, processes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
