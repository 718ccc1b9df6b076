"""Runs of the command line that are killed, stopped, starved of disk and collided, then resumed: a script.

``python tests/faults/harness.py FOLDER --kind train --scenario kill --stops 50`` prints one JSON object, which
``test_faults.py`` reads. Every run is a fork of this process, so that torch is imported once; pytest never forks.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from latentprior import StageSettings
from latentprior.cli import main as cli
from latentprior.evaluation.known_densities import Banana
from latentprior.fitting import fit as learning
from latentprior.storage.checkpoint import load_state
from latentprior.training import autoencoder

TINY = StageSettings(steps=300, width=16, depth=1, batch_size=64, average=0.98, bound=1.5)
TRAIN = """method=alternating network.width=16 network.latent_dim=2 autoencoder.steps=60 fit.base=normal
fit.max_stages=1 fit.settings.steps=200 fit.settings.width=16 joint.steps=40 joint.stages=1
joint.switch=schedule joint.held_out=40 joint.evaluate_every=20 joint.ratio_width=16 joint.settle_steps=20"""


class Runs:
    """Command lines on small data in ``root``, each in a process of its own."""

    def __init__(self, root: Path, kind: str, seed: int) -> None:
        self.root, self.kind, self.random = root, kind, random.Random(seed)
        root.mkdir(parents=True, exist_ok=True)
        g = torch.Generator().manual_seed(0)
        # Bent so little that log Z is sure: a warning of its bracket would stand beside what a stopped run says.
        np.save(root / "z.npy", Banana(curvature=0.5).sample((300,), generator=g).float().numpy())
        row, column = np.mgrid[0:8, 0:8]
        centre = np.random.default_rng(0).uniform(1.5, 5.5, (160, 2, 1, 1))
        spots = 255 * np.exp(-((row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2) / 3)
        np.savez(root / "i.npz", x_train=spots.astype(np.uint8))
        # Here once, for what is imported late; a fork then starts with all of it.
        with contextlib.redirect_stdout(sys.stderr):
            assert self.main("warm") == 0
        began = time.monotonic()
        code, _, said = self.run("whole")
        assert code == 0, said
        self.seconds = time.monotonic() - began
        self.whole = self.result("whole")

    def command(self, name: str) -> list[str]:
        if self.kind == "fit":
            call = ["fit", self.root / "z.npy", "--base", "normal", "--max-stages", "2"]
        else:
            call = ["train", self.root / "i.npz", *(w for pair in TRAIN.split() for w in ("--set", pair))]
        return [str(word) for word in (*call, "--out", self.root / name, "--resume")]

    def main(self, name: str) -> int:
        autoencoder.SAVE_STEPS = 20
        with mock.patch.object(learning, "fit", partial(learning.fit, settings=TINY)):
            return cli.main(self.command(name))

    def start(self, name: str, before: Callable[[], None] = lambda: None) -> int:
        """Fork a run of folder ``name``; ``before`` is called in it. Its output goes to files of that name."""
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            for number, stream in ((1, "out"), (2, "err")):
                os.dup2(os.open(self.root / f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            # A script's own: what a shell that ignores signals left is not passed on.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            code = self.main(name)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)

    def run(self, name: str, before: Callable[[], None] = lambda: None) -> tuple[int, str, str]:
        return self.ended(self.start(name, before), name)

    def ended(self, child: int, name: str) -> tuple[int, str, str]:
        """Exit code (minus the signal that ended it), standard output and error."""
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out, err = ((self.root / f"{name}.{stream}").read_text() for stream in ("out", "err"))
        return code, out, err

    def result(self, name: str) -> dict[str, bytes]:
        """The tensor files that a finished run left, wherever they are; nothing else may be left half done."""
        folder = self.root / name
        found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}
        assert found
        assert not (folder / "checkpoint").exists(), sorted(folder.rglob("*"))
        return found

    def check(self, name: str) -> int:
        """Load every state that a stopped run left; returns how many there are."""
        states = [path.parent for path in (self.root / name).rglob("config.json")]
        for folder in states:
            kind = json.loads((folder / "config.json").read_text())["kind"]
            config, _ = load_state(folder, kind)
            assert config["written_by"].startswith("latentprior ")
        return len(states)

    def await_state(self, name: str) -> None:
        """Return as soon as a run has left a state."""
        while not any((self.root / name).rglob("config.json")):
            time.sleep(0.002)

    def interrupted(self, wanted: int, how: signal.Signals) -> dict[str, Any]:
        """Stop runs at ``wanted`` random moments; each goes on until it ends, and must end with the same bytes.

        The first stop comes once there is a state to resume from, and the second, of kills, amid a save.
        """
        stops, runs, states, during = 0, 0, 0, 0
        while stops < wanted:
            name = f"{how.name}-{runs}"
            runs += 1
            assert runs <= 4 * wanted, f"runs end before {how.name}: {stops} of {wanted} stops"
            while True:
                saving = how == signal.SIGKILL and stops > 0 and (stops == 1 or self.random.random() < 0.5)
                if stops == wanted:
                    child = self.start(name)
                elif saving:
                    child = self.start(name, partial(kill_at_call, self.random.randint(1, 25)))
                else:
                    child = self.start(name)
                    if stops:
                        time.sleep(self.random.uniform(0, 0.7 * self.seconds))
                    else:
                        self.await_state(name)
                    os.kill(child, how)
                code, out, err = self.ended(child, name)
                if code == 0:
                    break
                stops, during = stops + 1, during + saving
                if how == signal.SIGKILL:
                    assert code == -how, (code, err)
                else:
                    # One line, code 1; before the command line listens, Python's own end.
                    assert code in (1, -how), (code, out, err)
                    assert code != 1 or (err.startswith("stopped: ") and err.count("\n") == 1 and not out), err
                states += self.check(name)
            assert self.result(name) == self.whole, f"{name} differs"
        return {"stops": stops, "while_saving": during, "runs": runs, "states_found": states, "identical": True}


def kill_at_call(number: int) -> None:
    """Make the n-th call that changes the disk the last: the process is killed before it, after it, or half-way."""
    calls = 0

    def trap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(*args, **options)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, name, wrapped)

    for name in ("fsync", "replace", "unlink"):
        trap(os, name)
    trap(Path, "unlink")


def limited(size: int) -> None:
    """Let no file of this process grow past ``size`` bytes: writes fail half-way, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def starved(runs: Runs) -> dict[str, Any]:
    """Files that may not grow: code 1 or 2, the last good state kept, and the same bytes once there is room."""
    failures = 0
    for i, size in enumerate((0, 100, 3_000, 12_000)):
        name = f"starved-{i}"
        # From nothing, and from a state that a run has left.
        if i % 2:
            child = runs.start(name)
            runs.await_state(name)
            os.kill(child, signal.SIGKILL)
            runs.ended(child, name)
        states = runs.check(name) if (runs.root / name).exists() else 0
        child = runs.start(name, partial(limited_after_streams, size))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (1, 2), code
        failures += 1
        assert runs.check(name) >= states
        assert not list((runs.root / name).rglob(".*.partial")), list((runs.root / name).rglob("*"))
        code, _, err = runs.run(name)
        assert code == 0, err
        assert runs.result(name) == runs.whole
    return {"failures": failures, "identical": True}


def limited_after_streams(size: int) -> None:
    """Standard streams go nowhere, that the limit may fall on the run's own files alone."""
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    limited(size)


def full(runs: Runs) -> dict[str, Any]:
    """A file system that is full: code 1 or 2, the last good state kept, and the same bytes once there is room."""
    failures = 0
    for kibibytes in (4, 24, 48):
        name = f"full-{kibibytes}"
        folder = runs.root / name
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return {"mounted": False}
        try:
            code, out, err = runs.run(name)
            assert code in (1, 2), (code, err)
            assert not out
            assert os.strerror(errno.ENOSPC) in err, err
            failures += 1
            runs.check(name)
            assert not list(folder.rglob(".*.partial")), list(folder.rglob("*"))
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
            code, _, err = runs.run(name)
            assert code == 0, err
            assert runs.result(name) == runs.whole
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    return {"mounted": True, "failures": failures, "identical": True}


def collided(runs: Runs) -> dict[str, Any]:
    """A second run into a folder that is in use ends at once by name, whether it resumes or not; the first goes on."""
    first = runs.start("shared")
    lock = runs.root / "shared" / ".lock"
    # Whoever has saved holds the lock.
    runs.await_state("shared")
    os.kill(first, signal.SIGSTOP)
    (runs.root / "second.err").touch()
    command = runs.command("shared")
    refused = 0
    for call in (command, command[:-1]):
        runs.command = lambda name, call=call: call  # type: ignore[method-assign]
        code, out, err = runs.run("second")
        assert (code, out) == (2, ""), (code, err)
        assert "another run is writing there" in err, err
        assert "choose another folder" in err
        assert err.count("\n") == 1
        refused += 1
    del runs.command  # type: ignore[method-assign]
    os.kill(first, signal.SIGCONT)
    code, _, err = runs.ended(first, "shared")
    assert code == 0, err
    assert runs.result("shared") == runs.whole
    assert not lock.exists()
    # The lock of a killed run keeps nobody out.
    child = runs.start("left")
    while not (runs.root / "left" / ".lock").exists():
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (runs.root / "left" / ".lock").exists()
    code, _, err = runs.run("left")
    assert code == 0, err
    return {"refused": refused, "identical": runs.result("left") == runs.whole}


def clocked(runs: Runs) -> dict[str, Any]:
    """The wall clock jumps by years, back and forth: nothing that is saved depends on it."""

    def jump() -> None:
        real, draws = time.time, random.Random(0)
        time.time = lambda: real() + draws.uniform(-1e9, 1e9)
        time.time_ns = lambda: int(1e9 * time.time())

    code, _, err = runs.run("clocked", jump)
    assert code == 0, err
    return {"identical": runs.result("clocked") == runs.whole}


def read_only(runs: Runs) -> dict[str, Any]:
    """A folder that may not be written: one line and code 2 before any work."""
    root = runs.root
    with tempfile.TemporaryDirectory() as place:
        # Where anybody may read: pytest's own folders are their owner's alone.
        runs.root = Path(place)
        for name in ("z.npy", "i.npz"):
            shutil.copy(root / name, place)
        Path(place).chmod(0o755)
        folder = runs.root / "read-only"
        folder.mkdir(mode=0o555)

        def step_down() -> None:
            # Root may write anywhere.
            if os.getuid() == 0:
                os.setuid(65534)

        code, out, err = runs.run("read-only", step_down)
        left = len(list(folder.iterdir()))
    runs.root = root
    assert (code, out, err.count("\n")) == (2, "", 1), (code, err)
    assert os.strerror(errno.EACCES) in err, err
    return {"refused": 1, "left": left}


SCENARIOS: dict[str, Callable[[Runs, int], dict[str, Any]]] = {
    "kill": lambda runs, n: runs.interrupted(n, signal.SIGKILL),
    "sigterm": lambda runs, n: runs.interrupted(n, signal.SIGTERM),
    "ctrl-c": lambda runs, n: runs.interrupted(n, signal.SIGINT),
    "starved": lambda runs, n: starved(runs),
    "full": lambda runs, n: full(runs),
    "collided": lambda runs, n: collided(runs),
    "clocked": lambda runs, n: clocked(runs),
    "read-only": lambda runs, n: read_only(runs),
}


def main() -> None:
    """Run scenarios and print what they found, or how they failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("fit", "train"), default="fit")
    parser.add_argument("--scenario", choices=tuple(SCENARIOS), action="append")
    parser.add_argument("--stops", type=int, default=5, help="how often runs are killed or stopped")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(chosen.folder, chosen.kind, chosen.seed)
    found: dict[str, Any] = {"kind": chosen.kind, "seconds_of_a_run": round(runs.seconds, 2)}
    for name in chosen.scenario or SCENARIOS:
        try:
            found[name] = SCENARIOS[name](runs, chosen.stops)
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
