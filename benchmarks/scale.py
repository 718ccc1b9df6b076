"""Time and memory of fit against rows n, coordinates d, stages K and particles.

    python benchmarks/scale.py

Each point is a fit in a process of its own, with stages far shorter than the defaults so that all points together take
minutes: what is shown is how the cost grows, not what a good fit costs. Seconds are those that cores spent, user and
system, so that other work on the machine hardly counts. Memory is watched from outside: what the process asked for,
without the pages of its memory-mapped rows. Files are written in blocks into a temporary folder and deleted at once.
"""

from __future__ import annotations

import argparse
import json
import resource
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
    # Bounded tightly and from N(0, I), so that there always is something left to learn.
    "K": [{"stages": k, "base": "normal", "bound": 0.5} for k in (1, 2, 4, 8)],
    # Fresh particles a pass: 200 steps of a batch.
    "particles": [{"batch_size": b, "n": 10**5} for b in (256, 1024, 4096)],
}


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
    begun, clock = spent(), time.monotonic()
    marks: dict[str, float] = {}

    def mark(event: lp.Event) -> None:
        if event.kind in ("stage", "learned", "normalizer", "end"):
            marks[f"{event.kind} {event.stage}"] = spent() - begun

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prior = lp.fit(path, max_stages=point["stages"], base=point["base"], settings=settings, callbacks=[mark])
    figures = {
        "core_seconds": spent() - begun,
        "wall_seconds": time.monotonic() - clock,
        "kept": len(prior.stages),
        "steps": [s.diagnostics["steps"] for s in prior.stages],
        "particles": [s.diagnostics["particles"] for s in prior.stages],
        "marks": marks,
        "log_prob_held_out": prior.info["log_prob_held_out"],
    }
    print(json.dumps(figures))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--only", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    ask.add_argument("--child", nargs=2)
    call = ask.parse_args()
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
                found = watched([*command, "--child", str(path), json.dumps(point)])
                size = path.stat().st_size / 2**20
            point |= {"file_mib": size, **found.figures(), **json.loads(found.out.splitlines()[-1])}
            sweeps[name].append(point)
            print(name, point, flush=True)
            settings = {**POINT, **SHORT, "imports_mib": imports}
            ordered = {key: sweeps[key] for key in SWEEPS if key in sweeps}
            write_results("scale", {"sweeps": ordered}, threads=call.threads, settings=settings)


if __name__ == "__main__":
    main()
