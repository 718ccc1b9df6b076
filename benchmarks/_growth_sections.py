"""The sections of RESULTS.md on densities known exactly, and on how the cost of a fit grows."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from _markdown import how, spread, table

__all__ = ["draw_scale", "known_truth_section", "processes_section", "scale_section"]

AXES = {"n": "n", "n x 64": "n", "d": "dim", "K": "stages", "particles": "batch_size"}
"""What each sweep changes."""


def known_truth_section(document: dict[str, Any]) -> list[str]:
    """E1."""
    rows = []
    for name, runs in document["targets"].items():
        modes = [r for r in runs if r["mode_error"] is not None]
        rows.append(
            [
                name,
                str(len(runs)),
                f"{runs[0]['exact']:.3f}",
                spread((r["model"] for r in runs), ".3f"),
                "; ".join(f"{r['kl']:.3f} ± {r['kl_stderr']:.3f}" for r in runs),
                spread((r["rmse"] for r in runs), ".3f"),
                "; ".join(f"{r['log_z_error']:+.4f} ± {r['log_z_error_stderr']:.4f}" for r in runs),
                "yes" if all(r["within_3_se"] for r in runs) else "**no**",
                f"{max(r['mode_error'] for r in modes):.4f} ({modes[0]['mode_error_of_exact']:.4f})" if modes else "-",
                "; ".join(f"{r['auc'][0]:.3f} ± {r['auc'][1]:.3f}" for r in runs),
                spread((r["stages"] for r in runs), ".0f"),
            ]
        )
    head = ["target", "seeds", "exact", "model", "KL(truth, model)", "RMSE", "error of log Z", "within 3 SE"]
    text = (
        "Each target has 20,000 exact draws to learn from and 50,000 to test on; log densities are in nats. RMSE is "
        "the error of log p under the target. The column 'weights' has the largest error of a mode's weight among "
        "10,000 samples, and in brackets what 95 of 100 sets of exact draws stay below. AUC is that of boosted trees "
        "that tell samples from exact draws; 0.5 means that they cannot. Where the support is bounded, the model's "
        "mass inside is compared with the share of samples that lie inside. A ladder without a stage has log Z = 0 by "
        "construction. Such a row tests the density of the base, and not a normaliser; the section on coverage tests "
        "normalisers."
    )
    return [
        "## Known truth",
        "",
        table([*head, "weights", "AUC", "stages"], rows),
        "",
        *how("python benchmarks/known_truth.py", document, text),
    ]


def scale_section(document: dict[str, Any]) -> list[str]:
    """E5: how the cost grows."""
    settings = document["settings"]
    out = ["## Time and memory of fit", ""]
    for name, points in document["sweeps"].items():
        rows = [
            [
                f"{p[AXES[name]]:,}",
                f"{p['file_mib']:.0f}",
                f"{p['marks']['stage 0']:.1f}",
                f"{p['core_seconds']:.1f}",
                f"{p['anonymous_mib']:.0f}",
                str(p["kept"]),
            ]
            for p in points
        ]
        head = [name, "file, MiB", "reading and base, s", "whole fit, s", "anonymous, MiB", "stages kept"]
        out += [table(head, rows), ""]
    text = (
        "Each point is a fit in a process of its own, from a memory-mapped file. Stages have "
        f"{settings['steps']} steps and width {settings['width']}, so that the points show how cost grows, and not "
        f"what a good fit costs. What a sweep does not change is n = {settings['n']:,}, d = {settings['dim']}, at most "
        f"{settings['stages']} stages, base {settings['base']} and batches of {settings['batch_size']:,}. Seconds are "
        "those of the core, user and system. Memory is what the process asked for, without the pages of its mapped "
        f"file; imports alone take {settings['imports_mib']:.0f} MiB. The steps of a stage do not grow with n, and the "
        "number of rows that a base is fitted to does not either."
    )
    picture = ["![Seconds and memory of a fit](results/scale.png)", ""]
    return [*out, *picture, *how("python benchmarks/scale.py", document, text)]


def processes_section(document: dict[str, Any]) -> list[str]:
    """One process against two on the same cores."""
    settings, launches = document["settings"], document["launches"]
    one = statistics.median(launches[0]["seconds_1000_steps"])
    rows = [
        [
            str(launch["processes"]),
            str(launch["threads"]),
            spread(launch["seconds_1000_steps"], ".1f"),
            f"{one / statistics.median(launch['seconds_1000_steps']):.2f}",
            spread(launch["normalizer_seconds"], ".1f"),
            spread(launch["fit_seconds"], ".0f"),
            spread(launch["log_prob_held_out"], ".3f"),
            f"{launch['log_normalizer'][0]:.4f} ± {launch['log_normalizer_stderr'][0]:.4f}",
        ]
        for launch in launches
    ]
    head = [
        "processes",
        "threads each",
        "1,000 steps, s",
        "times as fast",
        "log Z, s",
        "whole fit, s",
        "held out, nats",
    ]
    text = (
        f"One stage of width {settings['width']} learns on n = {settings['n']:,} rows of d = {settings['dim']}, base "
        f"{settings['base']}, with {settings['batch_size']:,} rows a batch of all processes together. The figures are "
        f"medians of {settings['repeats']} runs, with their range. Held-out evaluations count as part of the steps. "
        "The first process alone fits the base. On as many cores, two threads of one process are faster than two "
        "processes of one thread each. There is no figure on GPUs."
    )
    return [
        "## Several processes",
        "",
        table([*head, "log Z, nats"], rows),
        "",
        *how("python benchmarks/scale.py --processes", document, text),
    ]


def draw_scale(document: dict[str, Any], path: Path) -> None:
    """Core seconds and memory of every sweep, as a PNG."""
    from matplotlib.figure import Figure

    sweeps = {name: points for name, points in document["sweeps"].items() if len(points) > 1}
    figure = Figure(figsize=(2.6 * len(sweeps), 4.2), dpi=120, layout="constrained")
    grid = figure.subplots(2, len(sweeps), squeeze=False)
    for column, (name, points) in enumerate(sweeps.items()):
        for row, (key, label) in enumerate((("core_seconds", "core seconds"), ("anonymous_mib", "MiB asked for"))):
            axes = grid[row][column]
            x, y = [p[AXES[name]] for p in points], [p[key] for p in points]
            axes.plot(x, y, "o-", color="#2563eb", ms=3, lw=1)
            axes.set(xscale="log", ylim=(0, 1.15 * max(y)), xlabel="batch" if name == "particles" else name)
            # A label that would touch its neighbour is left out.
            labelled = [v for v, after in zip(x, [*x[1:], math.inf], strict=True) if after > 2 * v]
            axes.set_xticks(
                labelled, [f"{v:,}" if v < 10_000 else f"{v:.0e}".replace("e+0", "e") for v in labelled], fontsize=8
            )
            axes.minorticks_off()
            if column == 0:
                axes.set_ylabel(label)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
