"""The sections of RESULTS.md on kills, coverage, memory under load and memory over hours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from _markdown import how, produced, spread, table

__all__ = [
    "calibration_section",
    "calibration_table",
    "draw_soak",
    "faults_section",
    "faults_table",
    "fuzz_section",
    "fuzz_table",
    "load_section",
    "load_table",
    "soak_section",
    "soak_sentence",
]


def calibration_table(document: dict[str, Any]) -> str:
    """Coverage of each target, and of all together."""
    rows, everything = [], []
    for name, runs in document["targets"].items():
        kept = [run for run in runs.values() if run["stages"]]
        everything += kept
        rows.append([name, str(len(runs)), *_coverage(kept)])
    rows.append(["**all**", str(sum(len(runs) for runs in document["targets"].values())), *_coverage(everything)])
    head = [
        "target",
        "seeds",
        "with a stage",
        "held by 2 SE",
        "share",
        "held with the truth's error",
        "rms error / SE",
        "SE, nats",
        "bracket warnings",
    ]
    return table(head, rows)


def _coverage(runs: list[dict[str, Any]]) -> list[str]:
    held = sum(run["covered"] for run in runs)
    both = [abs(run["value"] - run["truth"]) <= 2 * math.hypot(run["stderr"], run["truth_stderr"]) for run in runs]
    scores = [(run["value"] - run["truth"]) / run["stderr"] for run in runs]
    return [
        str(len(runs)),
        str(held),
        f"{held / len(runs):.3f}",
        f"{sum(both) / len(runs):.3f}",
        f"{math.sqrt(sum(score**2 for score in scores) / len(scores)):.2f}",
        spread((run["stderr"] for run in runs), ".4f"),
        str(sum(run["bracket_warning"] for run in runs)),
    ]


def calibration_section(document: dict[str, Any]) -> list[str]:
    """E1: intervals of log Z."""
    runs = [run for runs in document["targets"].values() for run in runs.values() if run["stages"]]
    worst = max(run["truth_stderr"] / run["stderr"] for run in runs)
    text = (
        f"Each seed learns a small ladder of at most two stages from {document['settings']['rows']:,} fresh draws and "
        "a normal base. The log Z that it states is compared with the true one. The truth is estimated by importance "
        "sampling from the exact target and the base, and, where these two are not enough, from a mixture fitted to "
        f"the ladder's samples; its standard error is at worst {worst:.2f} of the stated one. The interval is judged "
        "alone, and then by the errors of both together. Nominal coverage is 0.954. A fit without a stage has "
        "log Z = 0 exactly and is not counted."
    )
    return [
        "## Coverage of the normaliser's interval",
        "",
        calibration_table(document),
        "",
        *how("python benchmarks/calibration.py", document, text),
    ]


def faults_table(document: dict[str, Any]) -> str:
    """Kills and what became of the runs."""
    rows = []
    for kind, outcomes in document["runs"].items():
        kill = outcomes["kill"]
        same = "failed" not in kill and kill["identical"]
        counts = [kill.get(name, "-") for name in ("stops", "while_saving", "runs", "states_found")]
        rows.append([f"`{kind}`", *map(str, counts), "all" if same else "**not all**"])
    head = [
        "command",
        "kills",
        "of these amid a save",
        "runs",
        "saved states loaded",
        "runs that ended with the same bytes",
    ]
    return table(head, rows)


def faults_section(document: dict[str, Any]) -> list[str]:
    """E6: kills."""
    text = (
        "Small runs of the commands are killed by SIGKILL at random moments and resumed until they end. Every state "
        "that a kill left behind was loaded."
    )
    return [
        "## Killed and resumed",
        "",
        faults_table(document),
        "",
        *how("python benchmarks/faults.py", document, text),
    ]


def fuzz_table(document: dict[str, Any]) -> str:
    """What each search ran."""
    rows = []
    for name, row in document["targets"].items():
        cells = [f"{row['processor_seconds']:.0f}", f"{row['inputs']:,}", f"{row['edges']:,}"]
        rows.append([name, *cells, str(row["findings"]), str(row.get("mended", 0))])
    return table(["files", "processor, s", "inputs", "edges reached", "findings", "of earlier searches, mended"], rows)


def fuzz_section(document: dict[str, Any]) -> list[str]:
    """E6: hostile files under coverage-guided search."""
    text = (
        f"A coverage-guided search (atheris) runs for {document['settings']['seconds']} s of clock on each kind of "
        "file. The core had other work, so the table gives seconds of the processor, the start included. Kinds of "
        "file that a run did not reach are not in the table. What earlier searches found is mended. The inputs that "
        "found it stand in `tests/fuzz/corpus` and are read in every test run."
    )
    return ["## Hostile files", "", fuzz_table(document), "", *how("python benchmarks/fuzz.py", document, text)]


def load_table(document: dict[str, Any]) -> str:
    """Peak memory of every call at every n."""
    rows = []
    for row in document["rows"]:
        for name, call in row["calls"].items():
            if name != "imports":
                figures = [row["calls"]["imports"]["anonymous_mib"], call["anonymous_mib"], call["resident_mib"]]
                rows.append([name, f"{row['n']:,}", *(f"{v:.0f}" for v in figures), f"{call['seconds']:.0f}"])
    head = ["call", "rows", "imports alone, MiB", "anonymous, MiB", "resident, MiB", "s"]
    return table(head, sorted(rows, key=lambda row: row[0]))


def load_section(document: dict[str, Any]) -> list[str]:
    """Streams of rows."""
    text = (
        f"Rows have {document['settings']['dim']} columns of float32, and the prior has two stages of width 32. Each "
        "call is a process of its own, its start included. The core had other work, so seconds are rough. Anonymous "
        "memory is what the process asked for. Resident memory includes the pages of the memory-mapped file, which "
        "the system takes back when it needs them. `log_prob` of a mapped array, called in Python, holds its results, "
        "one number a row."
    )
    return [
        "## Memory of scoring and sampling against n",
        "",
        load_table(document),
        "",
        *how("python benchmarks/load.py", document, text),
    ]


def soak_sentence(document: dict[str, Any]) -> str:
    """What hours of work did to resident memory."""
    first, last = document["curve_mib"][0][1], document["curve_mib"][-1][1]
    return (
        f"In {document['minutes']:.0f} minutes at {100 * document['cpu_share']:.0f}% of a core there were "
        f"{document['rounds']:,} rounds and {document['rows']:,} rows of drawing by every sampler, scoring, tilting "
        f"and reloading. Resident memory was {first:.1f} MiB at first and {last:.1f} MiB at last. The largest reading "
        f"of the last quarter is {document['rise_mib']:+.1f} MiB from the largest between the first fifth and "
        f"half-time (allowed: {document['allowed_mib']} MiB)."
    )


def soak_section(document: dict[str, Any]) -> list[str]:
    """Hours of work."""
    return [
        "## Memory over hours",
        "",
        soak_sentence(document),
        "",
        "![Resident memory each minute](results/soak.png)",
        "",
        f"`python benchmarks/soak.py`: {produced(document)}",
        "",
    ]


def draw_soak(document: dict[str, Any], path: Path) -> None:
    """Resident memory against minutes, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    minutes, mib = zip(*document["curve_mib"], strict=True)
    axes.plot(minutes, mib, color="#2563eb")
    axes.set(xlabel="minutes", ylabel="resident, MiB", ylim=(0, 1.25 * max(mib)))
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Software": None})
