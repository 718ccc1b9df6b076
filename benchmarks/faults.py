"""E6: `fit` and `train` killed at random moments, half of the kills amid a save, each run resumed until it ends.

    python benchmarks/faults.py --stops 50

What a resumed run leaves must have the bytes of a run never stopped; ``tests/faults/harness.py`` does the work and says
how. Seconds are those of one run that nobody stops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _results import write_results

HARNESS = Path(__file__).resolve().parents[1] / "tests" / "faults" / "harness.py"


def killed(kind: str, stops: int, seed: int) -> dict[str, Any]:
    """Figures of one command."""
    with tempfile.TemporaryDirectory() as folder:
        words = [folder, "--kind", kind, "--scenario", "kill", "--stops", stops, "--seed", seed]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(HARNESS), *map(str, words)],
            capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--stops", type=int, default=50)
    ask.add_argument("--seed", type=int, default=14)
    call = ask.parse_args()
    runs = {kind: killed(kind, call.stops, call.seed) for kind in ("fit", "train")}
    write_results("faults", {"runs": runs}, threads=1, settings=vars(call))


if __name__ == "__main__":
    main()
