"""Time and memory of fit against rows n, coordinates d, stages K and particles.

    python benchmarks/scale.py
    python benchmarks/scale.py --processes

Each point is a fit in a process of its own, with stages far shorter than the defaults so that all points together take
minutes: what is shown is how the cost grows, not what a good fit costs. Seconds are those that cores spent, user and
system, so that other work on the machine hardly counts. Memory is watched from outside: what the process asked for,
without the pages of its memory-mapped rows. Files are written in blocks into a temporary folder and deleted at once.

With ``--processes`` instead: seconds of 1,000 steps of a stage by one process and by two, with the same batch of all
processes together, and the density that comes of it. It needs two cores without other work.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import latentprior as lp
from _results import read_results, write_results
from _watch import watched

SHORT = {"steps": 200, "width": 128}
POINT: dict[str, Any] = {"n": 20_000, "dim": 16, "stages": 2, "base": "gmm:8", "batch_size": 1024, "bound": 5.0}
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "n": [{"n": n} for n in (10**4, 10**5, 10**6, 10**7)],
    "n x 64": [{"n": 10**7, "dim": 64}],
    "d": [{"dim": d} for d in (2, 8, 32, 128, 512, 1024)],
    # The bound is tight and the base is N(0, I), so that something is always left to learn.
    "K": [{"stages": k, "base": "normal", "bound": 0.5} for k in (1, 2, 4, 8)],
    # Fresh particles of a pass, for 200 steps of a batch.
    "particles": [{"batch_size": b, "n": 10**5} for b in (256, 1024, 4096)],
}


SHARED: dict[str, Any] = {"n": 50_000, "dim": 64, "base": "gmm:8", "batch_size": 1024, "width": 256, "steps": 1000}
"""One stage of the default width, on about as many rows as the sets of latents have."""
LAUNCHES = [{"processes": 1, "threads": 1}, {"processes": 1, "threads": 2}, {"processes": 2, "threads": 1}]


def make(path: Path, n: int, dim: int) -> None:
    """A bent density that no mixture of few Gaussians matches, block by block."""
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, dim))
    for start in range(0, n, 100_000):
        u = rng.standard_normal((min(100_000, n - start), dim), dtype=np.float32)
        rows[start : start + len(u)] = u + 0.5 * (np.roll(u, 1, 1) ** 2 - 1)
    rows.flush()


def spent() -> float:
    """Core seconds of this process, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def child(path: str, point: dict[str, Any], threads: int) -> None:
    """Fit once and print figures."""
    torch.set_num_threads(threads)
    settings = lp.StageSettings(**SHORT, batch_size=point["batch_size"], bound=point["bound"])
    start_time, clock = spent(), time.monotonic()
    marks: dict[str, float] = {}

    def mark(event: lp.Event) -> None:
        if event.kind in ("stage", "learned", "normalizer", "end"):
            marks[f"{event.kind} {event.stage}"] = spent() - start_time

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prior = lp.fit(path, max_stages=point["stages"], base=point["base"], settings=settings, callbacks=[mark])
    figures = {
        "core_seconds": spent() - start_time,
        "wall_seconds": time.monotonic() - clock,
        "kept": len(prior.stages),
        "steps": [s.diagnostics["steps"] for s in prior.stages],
        "particles": [s.diagnostics["particles"] for s in prior.stages],
        "marks": marks,
        "log_prob_held_out": prior.info["log_prob_held_out"],
    }
    print(json.dumps(figures))


def member(path: str, threads: int) -> None:
    """One of the processes that fit together; the first prints figures."""
    torch.set_num_threads(threads)
    settings = lp.StageSettings(width=SHARED["width"], steps=SHARED["steps"], batch_size=SHARED["batch_size"])
    clock: dict[str, float] = {}

    def mark(event: lp.Event) -> None:
        clock.setdefault(event.kind, time.monotonic())
        clock[f"last {event.kind}"] = time.monotonic()
        clock["steps"] = max(clock.get("steps", 0), event.step)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prior = lp.fit(path, max_stages=1, base=SHARED["base"], settings=settings, callbacks=[mark])
    if not clock:
        return
    spent = clock["last evaluate"] - clock["step"]
    figures = {
        "seconds_1000_steps": 1000 * spent / (clock["steps"] - 1),
        "normalizer_seconds": clock["end"] - clock["normalizer"],
        "fit_seconds": clock["end"] - clock["base"],
        "log_prob_held_out": prior.info["log_prob_held_out"],
        "log_normalizer": prior.normalizer.value,
        "log_normalizer_stderr": prior.normalizer.stderr,
    }
    print(json.dumps(figures))


def in_processes(repeats: int) -> None:
    """Every launch in turn, several times over, so that what else the machine does meets all of them."""
    runs_by_launch: dict[str, list[dict[str, Any]]] = {json.dumps(launch): [] for launch in LAUNCHES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        make(path, SHARED["n"], SHARED["dim"])
        for _ in range(repeats):
            for launch in LAUNCHES:
                alone = launch["processes"] == 1
                several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch['processes']}"]
                command = [sys.executable, *([] if alone else several), __file__, "--threads", str(launch["threads"])]
                ended = subprocess.run([*command, "--member", str(path)], check=True, capture_output=True, text=True)
                runs_by_launch[json.dumps(launch)].append(json.loads(ended.stdout.splitlines()[-1]))
                print(launch, runs_by_launch[json.dumps(launch)][-1], flush=True)
    launches = [
        {**json.loads(launch), **{key: [run[key] for run in runs] for key in runs[0]}}
        for launch, runs in runs_by_launch.items()
    ]
    one, *_, two = (statistics.median(launch["seconds_1000_steps"]) for launch in launches)
    print(f"two processes of one thread: {one / two:.2f} times as fast as one")
    write_results("processes", {"launches": launches}, threads=1, settings={**SHARED, "repeats": repeats})


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--only", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    ask.add_argument("--processes", action="store_true", help="one process against two, in place of the sweeps")
    ask.add_argument("--repeats", type=int, default=3, help="of --processes")
    ask.add_argument("--child", nargs=2)
    ask.add_argument("--member")
    call = ask.parse_args()
    if call.member:
        member(call.member, call.threads)
        return
    if call.processes:
        in_processes(call.repeats)
        return
    if call.child:
        child(call.child[0], json.loads(call.child[1]), call.threads)
        return
    imports = watched([sys.executable, "-c", "import latentprior"]).anonymous_mib
    sweeps: dict[str, Any] = (read_results("scale") or {}).get("sweeps", {})
    for name in call.only:
        sweeps[name] = []
        for change in SWEEPS[name]:
            point = {**POINT, **change}
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "rows.npy"
                make(path, point["n"], point["dim"])
                command = [sys.executable, __file__, "--threads", str(call.threads)]
                process = watched([*command, "--child", str(path), json.dumps(point)])
                size = path.stat().st_size / 2**20
            point |= {"file_mib": size, **process.figures(), **json.loads(process.out.splitlines()[-1])}
            sweeps[name].append(point)
            print(name, point, flush=True)
            settings = {**POINT, **SHORT, "imports_mib": imports}
            ordered = {key: sweeps[key] for key in SWEEPS if key in sweeps}
            write_results("scale", {"sweeps": ordered}, threads=call.threads, settings=settings)


if __name__ == "__main__":
    main()
