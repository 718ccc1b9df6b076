"""The section of RESULTS.md on mutual information."""

from __future__ import annotations

from typing import Any

from _markdown import how, spread, table

__all__ = ["mutual_section"]

HEAD = ["d", "exact", "method", "seeds", "sum", "its error", "normalised", "its error", "normalised within 5%"]
NAMES = {"adamw": "AdamW", "sgd": "plain momentum"}
HEAD += ["log Z", "its ends", "error of log Z by the exact density", "RMSE", "stages", "steps", "gains from, to", "s"]


def mutual_section(document: dict[str, Any]) -> list[str]:
    """E1: correlated Gaussians."""
    rows = []
    for dim, methods in document["dims"].items():
        for name, by_seed in methods.items():
            runs = list(by_seed.values())
            rows.append([dim, f"{runs[0]['exact']:.0f}", name, *_cells(runs)])
    settings = document["settings"]
    noise = max(
        r["test_stderr"] for methods in document["dims"].values() for runs in methods.values() for r in runs.values()
    )
    text = (
        f"Pairs of correlated unit normals have {settings['rows']:,} rows to learn from, which are whitened only where "
        f"the table says so. The mean log ratio is over {settings['test']:,} fresh rows, in nats, with a standard "
        f"error of {noise:.2f} at most. The base is the product of the marginals. 'Sum' is the sum of the log ratios "
        "as they were learned. 'Normalised' has log Z of the whole ladder taken off; it is a lower bound, except for "
        "errors of log Z. The two ends of log Z (from the base, from held-out rows) stand beside it; where they are "
        "far apart, their middle is taken and says little. RMSE is the error of the normalised log ratio under the "
        "target. The exact log ratio is a quadratic form. Quadratic forms are learned by natural gradients, or by "
        "AdamW where the table says so. Other work shared the core, so seconds are rough."
    )
    return [
        "## Mutual information",
        "",
        table(HEAD, rows),
        "",
        *_tried(document.get("tried", [])),
        *how("python benchmarks/mutual_information.py", document, text),
    ]


def _tried(runs: list[dict[str, Any]]) -> list[str]:
    """Runs at other attempts, before those of the script."""
    attempts = []
    for run in runs:
        ends = "{:.1f} and {:.1f}".format(*run["log_z_ends"])
        attempts.append(
            f"d = {run['dim']}, {run['method']}, {NAMES[run['optimizer']]} at rate {run['learning_rate']}, "
            f"batches of {run['batch_size']}, {max(run['steps']):,} steps: sum {run['sum_of_log_ratios']:.1f}, "
            f"normalised {run['normalised']:.1f}, log Z's ends {ends}"
        )
    return (
        [f"Before the present settings others were tried, at one seed: {'; '.join(attempts)}.", ""] if attempts else []
    )


def _cells(runs: list[dict[str, Any]]) -> list[str]:
    errors = [[100 * (r[key] / r["exact"] - 1) for r in runs] for key in ("sum_of_log_ratios", "normalised")]
    ends = "; ".join("-" if r["log_z_ends"] is None else "{:.2f}, {:.2f}".format(*r["log_z_ends"]) for r in runs)
    gains = [gain for r in runs for gain in r["gains"]]
    return [
        str(len(runs)),
        spread((r["sum_of_log_ratios"] for r in runs), ".2f"),
        spread(errors[0], "+.1f") + "%",
        spread((r["normalised"] for r in runs), ".2f"),
        spread(errors[1], "+.1f") + "%",
        "yes" if max(map(abs, errors[1])) <= 5 else "**no**",
        "; ".join(f"{r['log_z']:.2f} ± {r['log_z_stderr']:.2f}" for r in runs),
        ends,
        "; ".join("{:+.3f} ± {:.3f} ({:.0%} effective)".format(*r["log_z_error"]) for r in runs),
        spread((r["rmse"] for r in runs), ".2f"),
        spread((r["stages"] for r in runs), ".0f"),
        spread((max(r["steps"], default=0) for r in runs), ".0f"),
        f"{min(gains):.2f}, {max(gains):.2f}" if gains else "-",
        spread((r["seconds"] for r in runs), ".0f"),
    ]
