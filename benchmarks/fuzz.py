"""E6: the readers of files from elsewhere under coverage-guided search, each target for as long.

    python benchmarks/fuzz.py --seconds 180

Needs the extra ``fuzz``. A finding stops its target's search; its input then stands in the folder of findings that is
named on stderr: mend it, keep it in ``tests/fuzz/corpus``, and search again.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _results import write_results

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "fuzz"
TARGETS = ("state", "prior", "model", "npy", "npz", "safetensors", "images", "idx", "recipe")


def searched(target: str, seconds: int, seed: int, findings: Path) -> dict[str, Any]:
    """Inputs that were run, edges that they reached, and what was found."""
    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={findings / target}-"]
    options += ["-print_final_stats=1", "-rss_limit_mb=4096", "-timeout=60", "-report_slow_units=60"]
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / "fuzz.py"), target, *options],
        capture_output=True, text=True, check=False, errors="replace", env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    names = sorted(path.name for path in findings.glob(f"{target}-*"))
    counts = [re.findall(pattern, done.stderr) for pattern in (r"number_of_executed_units: (\d+)", r"cov: (\d+)")]
    if (done.returncode and not names) or not all(counts):
        sys.exit(f"{target}: the search did not run:\n{done.stderr[-2000:]}")
    inputs, edges = (int(values[-1]) for values in counts)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start
    mended = len(list((FOLDER / "corpus" / target).glob("*")))
    return {"processor_seconds": spent, "inputs": inputs, "edges": edges, "findings": len(names), "mended": mended}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seconds", type=int, default=180)
    ask.add_argument("--seed", type=int, default=1)
    call = ask.parse_args()
    findings = Path(tempfile.mkdtemp(prefix="findings-"))
    print(f"findings: {findings}", file=sys.stderr)
    rows = {}
    for target in TARGETS:
        rows[target] = searched(target, call.seconds, call.seed, findings)
        print(f"{target}: {rows[target]}", file=sys.stderr)
        write_results("fuzz", {"targets": rows}, threads=1, settings=vars(call))


if __name__ == "__main__":
    main()
