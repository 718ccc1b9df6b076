"""Time and memory of fit against the number of rows: n = 10^4, 10^5, 10^6 at d = 16, memory-mapped.

    python benchmarks/scale.py

Each fit runs in a process of its own with two stages of full length, and reports its peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import latentprior as lp
from _results import write_results

DIM = 16


def make(path: Path, n: int) -> None:
    """A bent 16-d density that no mixture of few Gaussians matches."""
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, DIM))
    for start in range(0, n, 100_000):
        u = rng.standard_normal((min(100_000, n - start), DIM))
        rows[start : start + len(u)] = u + 0.5 * (np.roll(u, 1, 1) ** 2 - 1)
    rows.flush()


def child(path: str, threads: int) -> None:
    """Fit once and print figures."""
    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    marks: dict[str, float] = {}

    def mark(event: lp.Event) -> None:
        if event.kind in ("base", "stage", "learned", "normalizer", "end"):
            marks[f"{event.kind} {event.stage}"] = time.monotonic() - begun

    prior = lp.fit(path, max_stages=2, base="gmm:16", callbacks=[mark])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {
        "seconds": time.monotonic() - begun,
        "peak_mib": peak / 1024,
        "imports_mib": before / 1024,
        "steps": [s.diagnostics["steps"] for s in prior.stages],
        "marks": marks,
        "log_prob_held_out": prior.info["log_prob_held_out"],
    }
    print(json.dumps(figures))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--child")
    call = ask.parse_args()
    if call.child:
        child(call.child, call.threads)
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for n in call.rows:
            path = Path(folder) / f"{n}.npy"
            make(path, n)
            command = [sys.executable, __file__, "--child", str(path), "--threads", str(call.threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(
                {"n": n, "data_mib": path.stat().st_size / 2**20, **json.loads(done.stdout.splitlines()[-1])}
            )
            print(results[-1], flush=True)
    write_results("scale", {"rows": results}, threads=call.threads, settings={"dim": DIM, "rows": call.rows})


if __name__ == "__main__":
    main()
