"""Seconds that ``import latentprior`` takes, by ``python -X importtime``, and what PyTorch takes of them.

    python benchmarks/import_time.py --runs 15

Each run is a fresh interpreter with files in the system's cache; the least of them is the one that other work on the
machine disturbed least. Beside them the processor's seconds of the whole interpreter, which waiting does not lengthen.
"""

from __future__ import annotations

import argparse
import re
import resource
import statistics
import subprocess
import sys

from _results import write_results


def seconds() -> dict[str, float]:
    """Return the seconds of one interpreter: the whole import, PyTorch's part of it, and the processor's time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-c", "import latentprior"]
    trace = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    parts = {name: int(t) / 1e6 for t, name in re.findall(r"\|\s+(\d+) \|\s+(latentprior|torch)$", trace, re.MULTILINE)}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"latentprior": parts["latentprior"], "torch": parts["torch"], "processor": processor}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--runs", type=int, default=15)
    call = ask.parse_args()
    seconds()
    runs = [seconds() for _ in range(call.runs)]
    figures = {
        name: {"least": min(run[name] for run in runs), "median": statistics.median(run[name] for run in runs)}
        for name in runs[0]
    }
    print(figures)
    write_results("import_time", {"seconds": figures}, threads=1, settings=vars(call))


if __name__ == "__main__":
    main()
