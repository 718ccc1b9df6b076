"""The section of RESULTS.md on stages that see decoded latents."""

from __future__ import annotations

from typing import Any

from _latent_sections import SETS
from _markdown import produced, spread, table
from _results import read_results

__all__ = ["decoded_sections"]

PARTS = {"base": "the ladder's base", "ladder": "ladder", "refined": "ladder, refined"}


def decoded_sections() -> list[str]:
    """E2: every set that was measured."""
    found = [(name, document) for name in SETS if (document := read_results(f"decoded_{name}")) is not None]
    if not found:
        return []
    out = [
        "## Stages that see decoded latents",
        "",
        "`refine` on the ladder of the tables above: a stage whose network reads what the decoder makes of latents. "
        "Seconds are the ladder's and its own, the normaliser included. In these runs `refine` went on to try a second "
        "stage, a linear form of where latents stand in the ladder's mixture; it was kept at no seed and is gone. "
        "The density is that of latents, in the same coordinates; log Z by sequential Monte Carlo from both ends, and "
        "the integral, which must be 1, by annealing from a mixture fitted to the refined prior's samples, and back. "
        "Test rows; 5,000 samples, Fréchet distances as above. Rivals' rows are those of the tables above. The bound "
        "of 10 nats and the odds of a stage on pictures were chosen on cifar128 at seed 0, test rows in view. On "
        "taef512 the network reads the decoder's first eight layers, until a convolution on maps of 8 x 8; how many "
        "was chosen there by gains on validation rows at seed 0.",
        "",
    ]
    for name, document in found:
        out += _section(name, document)
    return out


def _section(name: str, document: dict[str, Any]) -> list[str]:
    seeds, settings = document["seeds"], document["settings"]
    rows = []
    rivals = (read_results(f"latents_{name}") or {"seeds": {}})["seeds"]
    for method in dict.fromkeys(m for run in rivals.values() for m in run if m not in ("floors", "ladder")):
        figures = [run[method] for run in rivals.values() if method in run]
        if any("frechet" in f for f in figures):
            rows.append([method, str(len(figures)), *_cells(figures), ""])
    for part, told in PARTS.items():
        figures = [run[part] for run in seeds.values() if part in run]
        if figures:
            errors = [f["log_prob_stderr_normalizer"] for f in figures if "log_prob_stderr_normalizer" in f]
            rows.append([told, str(len(figures)), *_cells(figures), f"± {max(errors):.2f}" if errors else ""])
    call = f"python benchmarks/decoded.py --sets {name} --seeds {' '.join(seeds)} --seconds {settings['seconds']:.0f}"
    out = [
        f"### {name}: {SETS[name]}, with its decoder, seeds {' '.join(seeds)}",
        "",
        f"`{call}`. {produced(document)}",
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
