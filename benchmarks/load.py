"""Peak memory of scoring and sampling against the number of rows, 10^5 to 10^7 of 8 columns.

    python benchmarks/load.py

Each call runs in a process of its own, watched from outside: ``anonymous`` is the most memory it asked for,
``resident`` adds the pages of its memory-mapped input, which the system takes back whenever it needs them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from _results import write_results
from _watch import watched
from soak import DIM, learned

BLOCK = 100_000
LOG_PROB = """
import sys, numpy as np, torch, latentprior as lp
prior, rows = lp.LatentPrior.from_pretrained(sys.argv[1]), np.load(sys.argv[2], mmap_mode="r")
with torch.no_grad():
    assert prior.log_prob(rows).isfinite().all()
"""


def make(path: Path, n: int) -> None:
    """Rows like those that the prior was learned on, written block by block."""
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, DIM))
    for start in range(0, n, BLOCK):
        u = rng.standard_normal((min(BLOCK, n - start), DIM))
        rows[start : start + len(u)] = u + 0.5 * (np.roll(u, 1, 1) ** 2 - 1)


def measure(folder: Path, n: int) -> dict[str, Any]:
    """Every way to score and to draw ``n`` rows."""
    prior, rows, out = (folder / name for name in ("prior", "rows.npy", "out.npy"))
    make(rows, n)
    cli = [sys.executable, "-m", "latentprior"]
    calls = {
        "imports": [*cli, "info", prior],
        "score": [*cli, "score", prior, rows, "--out", out],
        "log_prob of a mapped array": [sys.executable, "-c", LOG_PROB, prior, rows],
        "sample": [*cli, "sample", prior, "-n", n, "--out", out],
    }
    figures = {}
    for name, call in calls.items():
        figures[name] = watched([str(word) for word in call]).figures()
        if "--out" in call:
            written = np.load(out, mmap_mode="r")
            if len(written) != n:
                raise RuntimeError(f"{name} wrote {len(written)} rows of {n}")
            figures[name]["written_mib"] = out.stat().st_size / 2**20
            out.unlink()
    return {"n": n, "file_mib": rows.stat().st_size / 2**20, "calls": figures}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", nargs="+", type=int, default=[10**5, 10**6, 10**7])
    ask.add_argument("--json", action="store_true", help="print the figures and write no results")
    call = ask.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as place:
        learned(Path(place) / "prior")
        for n in call.rows:
            results.append(measure(Path(place), n))
            print(json.dumps(results[-1]), flush=True)
            if not call.json:
                write_results("load", {"rows": results}, threads=1, settings={"dim": DIM, "rows": call.rows})


if __name__ == "__main__":
    main()
