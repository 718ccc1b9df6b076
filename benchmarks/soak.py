"""Memory of sampling and scoring for hours: must be flat.

    python benchmarks/soak.py --minutes 120 --share 0.12

Rounds of unequal size draw by every sampler, score, tilt and reload a prior from its folder, resting between rounds so
that no more than ``--share`` of a core is taken. Resident memory is noted at fixed intervals. The first fifth of the
time is a warm-up; the rise is the largest reading of the last quarter above the largest between warm-up and half-time,
and must not pass ``ALLOWED_MIB``. Ctrl-C or SIGTERM ends a run early, and what it measured is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import latentprior as lp
from _results import write_results
from latentprior.density.samplers import SAMPLERS

ALLOWED_MIB = 16
"""MiB that rounds of unequal size may leave in the allocator; 120 minutes make some thousand rounds."""
DIM = 8


def resident_mib() -> float:
    """Resident memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not say how much memory this process holds")


def learned(folder: Path) -> None:
    """Save a small ladder of two stages on bent rows."""
    u = torch.randn(4000, DIM, generator=torch.Generator().manual_seed(0))
    settings = lp.StageSettings(steps=150, width=32, depth=1, bound=2.0)
    lp.fit(u + 0.5 * (u.roll(1, 1) ** 2 - 1), base="normal", max_stages=2, settings=settings).save_pretrained(folder)


def rounds(folder: Path, generator: torch.Generator) -> Iterator[int]:
    """Draw, score, tilt and reload for ever, yielding the rows of each round."""
    prior, number = lp.LatentPrior.from_pretrained(folder), 0
    while True:
        sampler = SAMPLERS[number % len(SAMPLERS)]
        n = int(torch.randint(100, 2000, (), generator=generator))
        z = prior.sample((n,), generator=generator, sampler=sampler)
        if not prior.log_prob(z).isfinite().all():
            raise RuntimeError(f"a draw by {sampler} has no finite density")
        if number % 7 == 0:
            prior.tilt(lambda z: -z[:, 0].square(), particles=1024, generator=generator).sample((100,), generator)
        if number % 11 == 0:
            prior = lp.LatentPrior.from_pretrained(folder)
        number += 1
        yield n


def soak(minutes: float, share: float, every: float, log: Path | None, most: int | None = None) -> dict[str, Any]:
    """Run rounds, at ``most`` so many, and note ``(minute, MiB)``; a log file takes every reading at once."""
    curve: list[tuple[float, float]] = []
    rows = count = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "prior"
        learned(folder)
        start, cpu, due = time.monotonic(), time.process_time(), 0.0
        with suppress(KeyboardInterrupt):
            for n in rounds(folder, torch.Generator().manual_seed(1)):
                rows, count = rows + n, count + 1
                elapsed = time.monotonic() - start
                if elapsed >= due:
                    curve.append((elapsed / 60, resident_mib()))
                    due += every
                    if log is not None:
                        with log.open("a") as file:
                            print(f"{curve[-1][0]:.2f} {curve[-1][1]:.1f} {rows} {count}", file=file)
                if elapsed >= 60 * minutes or count == most:
                    break
                # Sleep for as long as the share of the processor asks for.
                owed = (time.process_time() - cpu) / share - elapsed
                time.sleep(min(max(0.0, owed), 60 * minutes))
        elapsed, used = time.monotonic() - start, time.process_time() - cpu
    return {
        "minutes": elapsed / 60,
        "cpu_share": used / elapsed,
        "rounds": count,
        "rows": rows,
        "curve_mib": curve,
        "rise_mib": rise(curve),
        "allowed_mib": ALLOWED_MIB,
    }


def rise(curve: list[tuple[float, float]]) -> float:
    """Largest reading of the last quarter above the largest between the first fifth and half-time, in MiB."""
    end = curve[-1][0]
    settled = [mib for minute, mib in curve if 0.2 * end <= minute <= 0.5 * end]
    late = [mib for minute, mib in curve if minute >= 0.75 * end]
    return max(late) - max(settled) if settled else math.nan


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--minutes", type=float, default=120)
    ask.add_argument("--share", type=float, default=0.12, help="of one core, rests included")
    ask.add_argument("--every", type=float, default=60, help="seconds between readings")
    ask.add_argument("--rounds", type=int, help="stop after so many, whatever the time")
    ask.add_argument("--log", type=Path, help="a file that takes every reading at once")
    ask.add_argument("--json", action="store_true", help="print the figures and write no results")
    call = ask.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)
    figures = soak(call.minutes, call.share, call.every, call.log, call.rounds)
    print(json.dumps(figures))
    if not call.json:
        settings = {"minutes": call.minutes, "share": call.share, "every": call.every, "dim": DIM}
        write_results("soak", figures, threads=1, settings=settings)


if __name__ == "__main__":
    main()
