"""The section on speed, and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _markdown import how, table

__all__ = ["draw_speed", "speed_section"]

GRADIENT = Path(__file__).parent / "results" / "gradient.json"
COLORS = ("#2563eb", "#f59e0b", "#10b981", "#9ca3af")


def speed_section(document: dict[str, Any]) -> list[str]:
    """E5."""
    engine, profile, steps = (document[part] for part in ("engine", "profile", "steps"))
    out = ["## Speed: the gradient, the matrix product, other loops", ""]
    ratios = json.loads(GRADIENT.read_text(encoding="utf-8"))
    names = ("dim", "components", "members", "stages")
    out += [
        "The figures after the first table are of a gradient by hand, which stood until networks were differentiated "
        f"automatically. {ratios['about']} A fifth was the gain that would have kept it.",
        "",
        table(
            [*names, "median", "least", "most"],
            [
                [*(str(row[n]) for n in names), *(f"{row[n]:.2f}" for n in ("median", "least", "most"))]
                for row in ratios["rows"]
            ],
        ),
        "",
    ]
    rows = [[name, *(f"{q:.2f}" for q in share)] for name, share in engine["share"].items()]
    out += [table(["share of the peak", "median", "least", "most"], rows), ""]
    kinds = list(profile["engine"])
    rows = [[name, *(f"{shares[kind]:.1%}" for kind in kinds)] for name, shares in profile.items()]
    out += [table(["share of time", *kinds], rows), ""]
    if "products" in document:
        rates = document["products"]
        out += [
            "Other forms of the products, on 1,024 rows. The package uses one product for each stage and layer. It "
            "does not use bfloat16 in samplers: a Metropolis step needs the value in float32, which is half of the "
            "work, so at twice the rate a step of MALA would gain a third at most.",
            "",
            table(["product", "share of the peak"], [[name, f"{rate:.2f}"] for name, rate in rates.items()]),
            "",
        ]
    ks = [int(k) for k in engine["stages"]]
    per_stage = [1e3 * s / k for k, s in zip(ks, engine["stages"].values(), strict=True)]
    ns = [int(n) for n in engine["particles"]]
    per_row = [1e6 * s / n for n, s in zip(ns, engine["particles"].values(), strict=True)]
    out += [
        table(["stages", *map(str, ks)], [["ms a stage (2,048 particles)", *(f"{s:.0f}" for s in per_stage)]]),
        "",
        table(["particles", *(f"{n:,}" for n in ns)], [["µs a particle (2 stages)", *(f"{s:.1f}" for s in per_row)]]),
        "",
        "![Shares of time before and after; seconds against stages and particles](results/speed.png)",
        "",
    ]
    out += how(
        "taskset -c 0 python benchmarks/speed.py",
        document,
        "All figures are of one core, in seconds of the process on it, from one run. The core's pace changes between "
        "the measurement of the peak and what is compared with it: where a share is above 1, it changed by at least as "
        "much, so read medians. There are five residual stages of width 256, d = 64, 8,192 particles and no mixture "
        f"features. The peak is a 2,048-square product in float32, {engine['peak_gflops']:.0f} Gflop/s. Only matrix "
        "products are counted as work.",
    )
    lebm = steps["LEBM's loop (Langevin)"]
    rows = [
        [name, *(f"{f[which]:,.0f} ({f[which] / lebm[which]:.2f})" for which in ("median", "best"))]
        for name, f in steps.items()
    ]
    out += [
        "Updates a second of 2,048 chains of the same energy, and in brackets the ratio to LEBM's loop. An update "
        "takes one value and gradient, and nearly all of it is matrix products. At the peak it would be faster by the "
        "inverse of autograd's share above, and no more.",
        "",
        table(["loop", "median of rounds", "best round"], rows),
        "",
    ]
    draws = document.get("draws")
    if draws is None:
        return out
    methods = {name: figures for name, figures in draws.items() if isinstance(figures, dict)}
    lebm = methods["LEBM's loop, 60 steps of 0.4"]["rate"]
    rows = [
        [
            name,
            f"{f['rate']:,.0f}",
            f"{f['rate'] / lebm:.2f}",
            f"{f['log_prob_error']:+.2f} ± {f['stderr']:.2f}",
            f"{f['auc']:.3f}",
        ]
        for name, f in methods.items()
    ]
    head = ["draws of a ladder", "effective draws a second", "to LEBM's loop", "error of mean log density", "AUC"]
    out += [
        f"Draws of a ladder of {draws['stages']} stage(s) on {draws['dim']} principal components of digits. Every end "
        "of LEBM's short chains counts as a draw. Of Metropolis chains as many draws count as blackjax's estimate of "
        f"effective size says, of importance resampling the effective share of its weights ({draws['ess']:.2f} of the "
        "base's draws). Error and AUC are against 2,048 other draws by importance resampling; an AUC of 0.5 means that "
        "trees cannot tell them apart. Where the error is not zero, draws are not of equal worth.",
        "",
        table(head, rows),
        "",
    ]
    return out


def draw_speed(document: dict[str, Any], path: Path) -> None:
    """Shares of time, and seconds against stages and particles, as a PNG."""
    from matplotlib.figure import Figure

    engine, profile = document["engine"], document["profile"]
    figure = Figure(figsize=(10, 3), dpi=120, layout="constrained")
    shares, stages, particles = figure.subplots(1, 3)
    left = [0.0] * len(profile)
    for kind, color in zip(profile["engine"], COLORS, strict=True):
        widths = [profile[name][kind] for name in profile]
        shares.barh(list(profile), widths, left=left, color=color, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    shares.set(xlabel="share of time", ylim=(-0.5, 2.9))
    shares.legend(fontsize=6, loc="upper left")
    for axes, part, label in ((stages, "stages", "stages"), (particles, "particles", "particles")):
        counts = [int(k) for k in engine[part]]
        spent = list(engine[part].values())
        axes.plot(counts, spent, "o-", color=COLORS[0], label="measured")
        slope = spent[-1] / counts[-1]
        axes.plot(counts, [slope * k for k in counts], "--", color=COLORS[3], label="proportional")
        axes.set(xlabel=label, ylabel="seconds", xscale="log", yscale="log")
        axes.set_xticks(counts, [f"{k:,}" for k in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Software": None})
