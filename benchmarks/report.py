"""Write benchmarks/RESULTS.md from benchmarks/results/*.json; every figure in README comes from there too.

python benchmarks/report.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _image_sections import ablations_section, anomaly_section, cost_section, images_section
from _markdown import EARLIER_BASE, EARLIER_RULE, produced, spread, table
from _results import read_results
from _speed_section import draw_speed, speed_section
from _table_sections import adbench_section, ceilings_section, other_tables_section
from _trust_sections import (
    calibration_section,
    calibration_table,
    draw_soak,
    load_section,
    load_table,
    soak_section,
)

HERE = Path(__file__).resolve().parent
SETS = {
    "mnist16": "latents of a 16-d MNIST VAE (55k train, 10k test)",
    "vae20": "posteriors of the classic 784-400-20 MNIST VAE (55k train, 10k test)",
    "cifar64": "posteriors of a 64-d convolutional VAE on CIFAR-10 (45k train, 10k test)",
}

EARLIER = {"mnist16", "vae20"}
"""Sets measured before the present stopping rule and base."""


def latents_section(document: dict[str, Any]) -> list[str]:
    """E2."""
    sets = " ".join(document["sets"])
    out = [f"## Latents of real generators: {sets}", ""]
    out += [f"`python benchmarks/latents.py --sets {sets}`. {produced(document)}", ""]
    out += [
        "Held-out log density in nats, in coordinates standardised alike for all methods; medians over seeds, range in "
        "brackets. AUC: gradient-boosted trees telling samples from test latents, 0.5 = cannot. "
        "Integral: importance-sampling estimate of the ladder's integral, which must be 1, from a mixture fitted to "
        "its samples and from its base. The ladder's defaults were chosen on mnist16 with its test rows in view, its "
        "base was let have more components, be an average of mixtures, and its networks read the mixture's features "
        "after runs on cifar64, its test rows in view: both sets are slightly selected. vae20 was first read when all "
        "defaults stood.",
        "",
        *([f"{EARLIER_RULE} {EARLIER_BASE}", ""] if EARLIER & set(document["sets"]) else []),
    ]
    for name, runs in document["sets"].items():
        methods = [m for m in runs[0] if m != "floors"]
        has_frechet = "frechet" in runs[0]["ladder"]
        head = [
            "method",
            "log density",
            "AUC",
            *(["Fréchet distance"] if has_frechet else []),
            "fit, s",
            "10k samples, s",
        ]
        rows = []
        for method in methods:
            figures = [run[method] for run in runs]
            row = [method, spread(f["log_prob"] for f in figures), spread((f["auc"] for f in figures), ".3f")]
            if has_frechet:
                row.append(spread((f["frechet"] for f in figures), ".1f"))
            row += [spread((f["seconds"] for f in figures), ".0f")]
            row += [spread((f["seconds_per_10k_samples"] for f in figures), ".1f")]
            rows.append(row)
        out += [f"### {name}: {SETS[name]}, {len(runs)} seeds", "", table(head, rows), ""]
        if has_frechet:
            floors = runs[0]["floors"]
            out += [
                f"Fréchet distance on LeNet-5 features of 10k decoded samples against the 10k test images; floors: "
                f"reconstructions {floors['reconstructions']:.1f}, real against real {floors['real']:.1f}.",
                "",
            ]
        rows = []
        for seed, run in enumerate(runs):
            f = run["ladder"]
            ends = f["bracket"]
            rows.append(
                [
                    str(seed),
                    f"{f['log_prob_base']:.2f}",
                    f"{f['log_prob']:.2f} ± {f['log_prob_stderr']:.2f}",
                    f"± {f['log_prob_stderr_normalizer']:.3f}",
                    f"{f['integral'][0]:.3f} ± {f['integral'][1]:.3f}",
                    f"{f['integral_from_base'][0]:.3f} ± {f['integral_from_base'][1]:.3f}",
                    "-" if not ends else f"{ends[0][0]:.3f} ± {ends[0][1]:.3f} to {ends[1][0]:.3f} ± {ends[1][1]:.3f}",
                    " / ".join(f"{s['gain']:.3f}" for s in f["stages"]),
                    f["stopped"],
                ]
            )
        head = [
            "seed",
            "base",
            "ladder",
            "log Z",
            "integral (mixture)",
            "integral (base)",
            "log Z, base's end to data's",
        ]
        out += [table([*head, "gains", "ended"], rows), ""]
        warned = sorted({w for run in runs for w in run["ladder"]["warnings"]})
        out += [f"Warnings given: {'; '.join(warned) if warned else 'none'}.", ""]
    return out


def known_truth_section(document: dict[str, Any]) -> list[str]:
    """E1."""
    out = ["## Known truth", "", f"`python benchmarks/known_truth.py`. {produced(document)}", "", EARLIER_BASE, ""]
    rows = []
    for name, runs in document["targets"].items():
        rows.append(
            [
                name,
                f"{runs[0]['exact']:.3f}",
                spread((r["model"] for r in runs), ".3f"),
                "; ".join(f"{r['kl']:.3f} ± {r['kl_stderr']:.3f}" for r in runs),
                "; ".join(f"{r['log_z_error']:+.4f} ± {r['log_z_error_stderr']:.4f}" for r in runs),
                "yes" if all(r["within_3_se"] for r in runs) else "no",
                " ".join(str(r["stages"]) for r in runs),
                spread((r["seconds"] for r in runs), ".0f"),
            ]
        )
    head = ["target", "exact", "model", "KL(truth, model)", "error of log Z", "within 3 SE", "stages", "s"]
    return [*out, "20,000 exact draws to learn from, 50,000 to test on; nats.", "", table(head, rows), ""]


def scale_section(document: dict[str, Any]) -> list[str]:
    """Time and memory against n."""
    out = [
        "## Time and memory of fit against n",
        "",
        f"`python benchmarks/scale.py`. {produced(document)}",
        "",
        EARLIER_BASE,
        "",
    ]
    rows = [
        [
            f"{r['n']:,}",
            f"{r['data_mib']:.0f}",
            f"{r['seconds']:.0f}",
            f"{r['marks']['stage 0']:.1f}",
            f"{max(r['marks'].values()) - r['marks']['stage 0']:.0f}",
            " + ".join(map(str, r["steps"])),
            f"{r['peak_mib']:.0f}",
            f"{r['peak_mib'] - r['imports_mib']:.0f}",
        ]
        for r in document["rows"]
    ]
    head = [
        "n",
        "file, MiB",
        "fit, s",
        "reading and base, s",
        "stages and log Z, s",
        "steps",
        "peak, MiB",
        "above imports, MiB",
    ]
    return [
        *out,
        f"d = {document['settings']['dim']}, memory-mapped file, at most two stages.",
        "",
        table(head, rows),
        "",
    ]


def headline(documents: list[dict[str, Any]]) -> str:
    """The README's table: every set, the methods that anyone would try, the ladder last."""
    rows = []
    for document in documents:
        for name, runs in document["sets"].items():
            for method in (m for m in runs[0] if m != "floors"):
                figures = [run[method] for run in runs]
                rows.append(
                    [
                        name,
                        method,
                        spread(f["log_prob"] for f in figures),
                        spread((f["auc"] for f in figures), ".3f"),
                        spread((f["frechet"] for f in figures), ".1f") if "frechet" in figures[0] else "-",
                        spread((f["seconds"] for f in figures), ".0f"),
                    ]
                )
            if "floors" in runs[0]:
                floor = runs[0]["floors"]["reconstructions"]
                rows.append([name, "*floor: reconstructions*", "", "", f"{floor:.1f}", ""])
    return table(
        ["latents", "prior", "held-out log density, nats", "two-sample AUC", "Fréchet distance", "fit, s"], rows
    )


def images_headline() -> str:
    """The README's table of images: every method on the same generator, at cpu scale."""
    rows = []
    for dataset in ("mnist", "cifar10"):
        seeds = (read_results(f"images_{dataset}_cpu") or {"seeds": {}})["seeds"]
        for method in (m for m in next(iter(seeds.values()), {}) if m != "floors"):
            figures = [run[method] for run in seeds.values() if method in run]
            best = [f["mse_map"] for f in figures if f["mse_map"] is not None]
            cells = [spread((f["frechet"] for f in figures), ".1f"), spread(best, ".4f") if best else "-"]
            rows.append([dataset, method, *cells, spread((f["seconds"] for f in figures), ".0f")])
    return table(["images", "method", "Fréchet distance", "MSE a pixel, most probable latent", "s"], rows)


def main() -> None:
    out = ["# Results", "", "Written by `python benchmarks/report.py` from `benchmarks/results/`.", ""]
    found = [read_results(f"latents_{name}") for name in SETS]
    latents = [document for document in found if document is not None]
    for document in latents:
        out += latents_section(document)
    for name, section in (
        ("known_truth", known_truth_section),
        ("calibration", calibration_section),
        ("scale", scale_section),
        ("speed", speed_section),
        ("load", load_section),
        ("soak", soak_section),
    ):
        document = read_results(name)
        if document is not None:
            out += section(document)
    for dataset in ("mnist", "cifar10"):
        for kind, section in (("images", images_section), ("cost", cost_section), ("ablations", ablations_section)):
            for scale in ("cpu", "paper"):
                document = read_results(f"{kind}_{dataset}_{scale}")
                if document is not None:
                    out += section(dataset, document)
    for scale in ("cpu", "paper"):
        document = read_results(f"mnist_anomaly_{scale}")
        if document is not None:
            out += anomaly_section(document)
    document = read_results("adbench")
    if document is not None:
        out += adbench_section(document)
        choice, other = read_results("detector_choice"), read_results("other_tables")
        out += [] if choice is None else ceilings_section(choice, document)
        out += [] if other is None else other_tables_section(other)
    document = read_results("import_time")
    if document is not None:
        out += import_section(document)
    (HERE / "RESULTS.md").write_text("\n".join(out).rstrip() + "\n", encoding="utf-8")
    fill(HERE.parent / "README.md", {"headline": headline(latents), "images": images_headline()})
    if speed := read_results("speed"):
        draw_speed(speed, HERE / "results" / "speed.png")
    measured = {name: read_results(name) for name in ("calibration", "load", "soak")}
    if all(measured.values()):
        soak = measured["soak"]
        draw_soak(soak, HERE / "results" / "soak.png")
        draw_soak(soak, HERE.parent / "docs" / "images" / "soak.png")
        tables = {
            "coverage": calibration_table(measured["calibration"]),
            "load": load_table(measured["load"]),
            "soak": soak_section(soak)[4],
        }
        fill(HERE.parent / "docs" / "explanation" / "trust.md", tables)


def import_section(document: dict[str, Any]) -> list[str]:
    """What the import takes."""
    parts = ("latentprior", "torch", "processor")
    rows = [[which, *(f"{document['seconds'][part][which]:.2f}" for part in parts)] for which in ("least", "median")]
    return [
        "## Import",
        "",
        f"`python benchmarks/import_time.py`: {document['settings']['runs']} fresh interpreters, by `-X importtime`. "
        f"{produced(document)}",
        "",
        table(["seconds", "import latentprior", "of it PyTorch", "processor, whole interpreter"], rows),
        "",
    ]


def fill(page: Path, blocks: dict[str, str]) -> None:
    """Write each block between its two marks on a page."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{block}\n\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
