"""The section of RESULTS.md on stages that see decoded latents."""

from __future__ import annotations

from typing import Any

from _latent_sections import SETS
from _markdown import how, spread, table
from _results import read_results

__all__ = ["decoded_sections"]

HOW = (
    "`refine` adds a stage to a ladder that is learned again as in the tables above, in 90 s; this is another run, so "
    "the figures of the ladder differ a little from those above. The network of the stage reads what the decoder makes "
    "of latents. The seconds are those of the ladder and of the new stage, the normaliser included. In these runs "
    "`refine` went on to try a second stage, a linear form of where latents stand in the ladder's mixture; it was kept "
    "at no seed, and `refine` no longer has it. The density is that of latents, in the same coordinates. Log Z comes "
    "from sequential Monte Carlo from both ends. The integral, which must be 1, is annealed from a mixture that is "
    "fitted to the refined prior's samples, and back. AUC and Fréchet distances are those of 5,000 samples, on test "
    "rows. The rows of the rivals are those of the tables above. On taef512 the network reads the first eight layers "
    "of the decoder, up to a convolution on maps of 8 x 8."
)
PARTS = {"base": "the ladder's base", "ladder": "ladder", "refined": "ladder, refined"}


def decoded_sections() -> list[str]:
    """E2: every set that was measured."""
    documents = {name: document for name in SETS if (document := read_results(f"decoded_{name}")) is not None}
    if not documents:
        return []
    out = ["## Stages that see decoded latents", ""]
    for name, document in documents.items():
        out += _section(name, document)
    first = next(iter(documents.values()))
    seconds = first["settings"]["seconds"]
    command = f"python benchmarks/decoded.py --sets {' '.join(documents)} --seeds 0 1 2 --seconds {seconds:.0f}"
    return [*out, "### How refined ladders were measured", "", *how(command, first, HOW)]


def _section(name: str, document: dict[str, Any]) -> list[str]:
    seeds = document["seeds"]
    rows = []
    rivals = (read_results(f"latents_{name}") or {"seeds": {}})["seeds"]
    for method in dict.fromkeys(m for run in rivals.values() for m in run if m not in ("floors", "ladder")):
        figures = [run[method] for run in rivals.values() if method in run]
        if any("frechet" in f for f in figures):
            rows.append([method, str(len(figures)), *_cells(figures), ""])
    for part, label in PARTS.items():
        figures = [run[part] for run in seeds.values() if part in run]
        if figures:
            errors = [f["log_prob_stderr_normalizer"] for f in figures if "log_prob_stderr_normalizer" in f]
            rows.append([label, str(len(figures)), *_cells(figures), f"± {max(errors):.2f}" if errors else ""])
    out = [
        f"### {name}: {SETS[name]}, with its decoder, seeds {' '.join(seeds)}",
        "",
        table(["method", "seeds", "log density", "Fréchet distance", "AUC", "fit, s", "10k samples, s", "log Z"], rows),
        "",
    ]
    checks = []
    for seed, run in seeds.items():
        if "refined" not in run:
            checks.append([seed, "none was kept", "", "", "", ""])
            continue
        f = run["refined"]
        (up, up_error, _), (down, down_error, _) = f["bracket"]
        ends = f"{up:.2f} ± {up_error:.2f} to {down:.2f} ± {down_error:.2f}"
        value, error = f["integral"][:2]
        gain = " / ".join(f"{s['kind']} {s['gain']:.3f} ({s['steps']})" for s in f["stages"])
        checks.append(
            [
                seed,
                gain,
                f"{run['ladder']['log_prob']:.2f}",
                f"{f['log_prob']:.2f} ± {f['log_prob_stderr_normalizer']:.2f}",
                ends,
                f"{value:.2f} ± {error:.2f}",
            ]
        )
    head = ["seed", "stages, gains (steps)", "before", "after", "log Z, base's end to data's", "integral"]
    warned = sorted({w for run in seeds.values() for w in run["warnings"]})
    return [*out, table(head, checks), "", f"Warnings given: {'; '.join(warned) if warned else 'none'}.", ""]


def _cells(figures: list[dict[str, Any]]) -> list[str]:
    cells = [spread(f["log_prob"] for f in figures), spread((f["frechet"] for f in figures), ".0f")]
    for key, form in (("auc", ".3f"), ("seconds", ".0f"), ("seconds_per_10k_samples", ".1f")):
        values = [f[key] for f in figures if key in f]
        cells.append(spread(values, form) if values else "")
    return cells
