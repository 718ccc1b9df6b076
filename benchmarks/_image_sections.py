"""The sections of RESULTS.md on images: E3a to E3d, with their curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from _markdown import EARLIER_BASE, how, produced, spread, table
from _results import read_results

__all__ = [
    "ablations_section",
    "anomaly_section",
    "cost_section",
    "draw_ablations",
    "draw_cost",
    "images_headline",
    "images_section",
]

HERE = Path(__file__).resolve().parent
MNIST_BASES = (
    "The ladders from N(0, I) and on the VAE of 3 x the steps are older than the base that averages several mixtures. "
    "The two-phase and the joint ladder have that base. They ran later than the rivals, on one core."
)
OLDER_STAGES = (
    "They are also older than stages at odds of 16 with orthogonalised momentum: stages were learned at odds of 1 by "
    "AdamW with a decay of 0.1."
)
PUBLISHED = {
    "LEBM": (".336", ".630", ".619", ".463", ".413"),
    "DAMC": (".684", ".911", ".939", ".801", "-"),
    "joint hierarchical": (".470", ".941", ".964", ".815", ".796"),
    "hierarchical features": (".722", ".949", ".980", ".941", ".935"),
}
"""Published average precisions at digits 1, 4, 5, 7, 9; some pick their checkpoint on the test images."""


def images_headline() -> str:
    """Return the table of docs/results.md: every method on the same decoder, at cpu scale."""
    rows = []
    for dataset in ("mnist", "cifar10"):
        seeds = (read_results(f"images_{dataset}_cpu") or {"seeds": {}})["seeds"]
        for method in (m for m in next(iter(seeds.values()), {}) if m != "floors"):
            figures = [run[method] for run in seeds.values() if method in run]
            best = [f["mse_map"] for f in figures if f["mse_map"] is not None]
            cells = [spread((f["frechet"] for f in figures), ".1f"), spread(best, ".4f") if best else "-"]
            rows.append([dataset, method, *cells, spread((f["seconds"] for f in figures), ".0f")])
    return table(["images", "method", "Fréchet distance", "MSE a pixel, most probable latent", "s"], rows)


def images_section(dataset: str, document: dict[str, Any]) -> list[str]:
    """E3a."""
    seeds = document["seeds"]
    runs = list(seeds.values())
    settings = document["settings"]
    out = [f"## Images: {dataset}, scale {settings['scale']}", ""]
    out += [f"*{MNIST_BASES if dataset == 'mnist' else EARLIER_BASE} {OLDER_STAGES}*", ""]
    text = (
        f"All methods have the same decoder; the figures are medians over seeds {', '.join(seeds)}, with the range in "
        "brackets, and rows without a range are of one seed. The Fréchet distance is that of samples from as many test "
        f"images (other real images have {runs[0]['floors']['real']:.1f}); the next column has that of the method's "
        "reconstructions, then comes the kernel distance. The squared error of a pixel is on test images, once by the "
        "method's own inference (the encoder's mean; for ladders the most probable latent; for SRI, LEBM and the "
        "ladder from N(0, I) short-run Langevin), and once for all at the most probable latent. Seconds are those of "
        "training, the shared autoencoder's included. Rivals and ladders ran side by side, a core each. Some cores had "
        "other work (five jobs, for the autoencoder of seed 1 of cifar10), so seconds are rough and time budgets were "
        "shorter. The VAE of 3 x the steps is a control: its decoder takes more steps than the joint ladder's takes in "
        "all."
    )
    rows = []
    for method in (m for m in runs[0] if m != "floors"):
        figures = [run[method] for run in runs if method in run]
        best = [f["mse_map"] for f in figures if f["mse_map"] is not None]
        alone = method.startswith("ladder") and max(f["stages"] for f in figures) == 0
        rows.append(
            [
                f"{method}: **no stage learned**" if alone else method,
                spread((f["frechet"] for f in figures), ".1f"),
                spread((f["frechet_reconstructions"] for f in figures), ".1f"),
                spread((f["kernel"] for f in figures), ".2f"),
                spread((f["mse"] for f in figures), ".4f"),
                spread(best, ".4f") if best else "-",
                spread((f["seconds"] for f in figures), ".0f"),
                spread((f["stages"] for f in figures), ".0f"),
            ]
        )
    head = ["method", "Fréchet", "reconstructions", "kernel", "MSE", "MSE, most probable", "s", "stages"]
    out += [table(head, rows), ""]
    picture = f"results/images_{dataset}_{settings['scale']}.png"
    if (HERE / picture).exists():
        with Image.open(HERE / picture) as grid:
            methods = "; ".join(json.loads(grid.info["rows"]))
        out += [f"![Samples]({picture})", "", f"*Rows: {methods}.*", ""]
    command = f"python benchmarks/images.py --sets {dataset} --scale {settings['scale']}"
    return [*out, *how(command, document, text)]


def cost_section(dataset: str, document: dict[str, Any]) -> list[str]:
    """E3d."""
    rows = []
    for seed, run in document["seeds"].items():
        cells = ["-" if run["seconds"][name] is None else f"{run['seconds'][name]:.0f}" for name in run["curves"]]
        rows.append([seed, f"{run['level']:.1f}", *cells])
    head = ["seed", "LEBM's final distance", *next(iter(document["seeds"].values()))["curves"]]
    text = (
        "The table has the seconds of training until the Fréchet distance is the one that LEBM ends with (`-`: never). "
        "Each point of two-phase learning is a whole run; a point of LEBM is a run of a part of its steps."
    )
    return [
        f"## Cost: {dataset}",
        "",
        f"*{EARLIER_BASE} {OLDER_STAGES}*",
        "",
        table(head, rows),
        "",
        f"![Fréchet distance against seconds](results/cost_{dataset}_{document['settings']['scale']}.png)",
        "",
        *how(f"python benchmarks/cost.py --set {dataset}", document, text),
    ]


def draw_cost(dataset: str, document: dict[str, Any]) -> None:
    """Fréchet distances against seconds of training, as a PNG."""
    curves = {
        f"{name}, seed {seed}": run["curves"][name] for seed, run in document["seeds"].items() for name in run["curves"]
    }
    picture = f"results/cost_{dataset}_{document['settings']['scale']}.png"
    _curves(picture, "seconds of training", curves, log=True)


def ablations_section(dataset: str, document: dict[str, Any]) -> list[str]:
    """E3c."""
    scale = document["settings"]["scale"]
    out = [f"## Ablations: {dataset}, scale {scale}", "", f"*{EARLIER_BASE} {OLDER_STAGES}*", ""]
    for seed, parts in document["seeds"].items():
        for part in ("stages", "width"):
            rows = []
            for name, run in parts.get(part, {}).items():
                points = run["points"]
                rows.append(
                    [
                        name,
                        f"{run['log_prob_base']:.2f}",
                        " / ".join(f"{p['rise']:+.3f}" for p in points[1:]) or "-",
                        " / ".join(f"{p['frechet']:.1f}" for p in points),
                        f"{run['seconds']:.0f}",
                        run["stopped"],
                    ]
                )
            head = [
                "ladder" if part == "stages" else "width of one stage",
                "base, nats",
                "held-out rise of each stage, nats",
                "Fréchet distance of base and each stage",
                "fit, s",
                "ended",
            ]
            if rows:
                out += [f"Ladders on the posteriors of one VAE, seed {seed}.", "", table(head, rows), ""]
        rows = [
            [
                name,
                f"{f['frechet']:.1f}",
                f"{f['mse_map']:.4f}",
                " / ".join(f"{gain:.2f}" for gain, _ in f["gains"]) or "-",
                f"{f['seconds']:.0f}",
            ]
            for name, f in parts.get("joint", {}).items()
        ]
        if rows:
            head = ["joint learning from N(0, I)", "Fréchet", "MSE, most probable", "gains of the stages, nats", "s"]
            out += [
                f"Short runs of joint learning at seed {seed}. Each differs in one setting from the first row, and the "
                "decoder takes as many steps in all of them.",
                "",
                table(head, rows),
                "",
            ]
    if any("stages" in parts for parts in document["seeds"].values()):
        out += [f"![Fréchet distance against stages](results/ablations_{dataset}_{scale}.png)", ""]
    command = f"python benchmarks/ablations.py --set {dataset} --scale {scale}"
    return [*out, f"`{command}`: {produced(document)}", ""]


def draw_ablations(dataset: str, document: dict[str, Any]) -> None:
    """Fréchet distances against the number of stages, as a PNG."""
    curves = {
        f"{name}, seed {seed}": [[p["stage"], p["frechet"]] for p in run["points"]]
        for seed, parts in document["seeds"].items()
        for name, run in parts.get("stages", {}).items()
    }
    if curves:
        _curves(f"results/ablations_{dataset}_{document['settings']['scale']}.png", "stages", curves, log=True)


def anomaly_section(document: dict[str, Any]) -> list[str]:
    """E3b."""
    scale, digits = document["settings"]["scale"], document["digits"]
    out = [f"## Anomaly detection on MNIST, scale {scale}", ""]
    for label, chosen in (("The papers' digits", "14579"), ("Digits of the choice", "02368")):
        by_digit = {digit: list(digits[digit].values()) for digit in chosen if digit in digits}
        if by_digit:
            seeds = ", ".join(f"{digit}: {len(runs)}" for digit, runs in by_digit.items())
            out += [f"{label} (seeds {seeds}).", "", _anomaly_table(by_digit), ""]
    text = (
        "The figures are average precisions (the area under the precision-recall curve) with one digit as the anomaly, "
        "median and range over seeds. Where a row does not have all seeds, parentheses say how many it has. The "
        "score that stands has two networks and a base of 160 components; the first choice had one network and 40 "
        "components. Candidates for the present one had no stages. On 3, 8 and 0 the finer base raised the average "
        "precision (at 0 the first choice on its older base stays above it), and so did the second network. Two "
        "further ideas helped at some digits and cost at others, and were not taken: the ladder of a VAE's latents as "
        "a third term, and features of deformed copies as more rows. The stages add little to their own base "
        "(`auprc_base` in the file). With 0 stages the score is the base alone: mixtures of 160 components beside the "
        "rival's 40. At 7 the features seem to be the limit: neighbours on them end level with the density, and each "
        "network gives other features. Rows of the first choice and of a VAE's latents are older than the base that "
        "averages several mixtures."
    )
    return [*out, *how(f"python benchmarks/mnist_anomaly.py --scale {scale}", document, text)]


def _anomaly_table(by_digit: dict[str, list[dict[str, Any]]]) -> str:
    """Every score at every digit."""
    methods = list(dict.fromkeys(m for runs in by_digit.values() for run in runs for m in run if m != "prevalence"))
    rows = [["*prevalence*", *(f"{runs[0]['prevalence']:.3f}" for runs in by_digit.values()), "", ""]]
    if list(by_digit) == list("14579"):
        rows += [[f"*{name}, published*", *figures, "-", "-"] for name, figures in PUBLISHED.items()]
    for method in methods:
        figures = {digit: [run[method] for run in runs if method in run] for digit, runs in by_digit.items()}
        cells = [spread((run["auprc"] for run in runs), ".3f") if runs else "-" for runs in figures.values()]
        every = [run for runs in figures.values() for run in runs]
        counts = [len(runs) for runs in figures.values()]
        complete = counts == [len(runs) for runs in by_digit.values()]
        name = method if complete else f"{method} (seeds: {', '.join(map(str, counts))})"
        stages = [run.get("stages") for run in every]
        end = "-" if None in stages else spread(stages, ".0f")
        rows.append([name, *cells, spread((run["seconds"] for run in every), ".0f"), end])
    return table(["score", *by_digit, "s", "stages"], rows)


def _curves(picture: str, axis: str, curves: dict[str, list[list[float]]], *, log: bool) -> None:
    """Frechet distances against something, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(name.split(", seed")[0] for name in curves))
    for name, points in curves.items():
        method = name.split(", seed")[0]
        first = name == next(n for n in curves if n.split(", seed")[0] == method)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=f"C{methods.index(method)}", ms=3, lw=1, label=method if first else None)
    axes.set(xlabel=axis, ylabel="Fréchet distance", yscale="log" if log else "linear")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / picture)
