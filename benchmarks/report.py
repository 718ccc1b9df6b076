"""Write benchmarks/RESULTS.md from benchmarks/results/*.json; every figure in README comes from there too.

python benchmarks/report.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _decoded_section import decoded_sections
from _growth_sections import draw_scale, known_truth_section, processes_section, scale_section
from _image_sections import ablations_section, anomaly_section, cost_section, images_section
from _latent_sections import latents_headline, latents_sections, stage_learning_section
from _markdown import produced, spread, table
from _mutual_section import mutual_section
from _results import read_results
from _speed_section import draw_speed, speed_section
from _table_sections import adbench_section, ceilings_section, other_tables_section
from _trust_sections import (
    calibration_section,
    calibration_table,
    draw_soak,
    faults_section,
    faults_table,
    fuzz_section,
    fuzz_table,
    load_section,
    load_table,
    soak_section,
)

HERE = Path(__file__).resolve().parent


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


OLDER = (
    "All tables but those of latents, of known truth, of mutual information, of kills, of the normaliser's coverage, "
    "of costs against d and of the loss, optimiser and decay of a stage are older than these: their ladders were "
    "learned at odds of 1 by AdamW with a decay of 0.1, and their trials of a stage took 200 steps. Detector and "
    "rivals still learn so. They are also older than the shrinkage of mixtures' covariances, and than the rule that "
    "averages of mixtures begin at 32 coordinates. The normaliser's coverage is older than the adapted decay of stages "
    "and their 3,000 steps. All but tables of latents and of several processes are older than the orthogonalisation of "
    "hidden layers in bfloat16."
)


def main() -> None:
    out = ["# Results", "", "Written by `python benchmarks/report.py` from `benchmarks/results/`.", "", OLDER, ""]
    out += latents_sections()
    out += decoded_sections()
    for name, section in (
        ("stage_learning", stage_learning_section),
        ("known_truth", known_truth_section),
        ("mutual_information", mutual_section),
        ("faults", faults_section),
        ("fuzz", fuzz_section),
        ("calibration", calibration_section),
        ("scale", scale_section),
        ("processes", processes_section),
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
    fill(HERE.parent / "README.md", {"headline": latents_headline(), "images": images_headline()})
    if scale := read_results("scale"):
        draw_scale(scale, HERE / "results" / "scale.png")
    if speed := read_results("speed"):
        draw_speed(speed, HERE / "results" / "speed.png")
    measured = {name: read_results(name) for name in ("faults", "fuzz", "calibration", "load", "soak")}
    if all(measured.values()):
        soak = measured["soak"]
        draw_soak(soak, HERE / "results" / "soak.png")
        draw_soak(soak, HERE.parent / "docs" / "images" / "soak.png")
        tables = {
            "kills": faults_table(measured["faults"]),
            "fuzz": fuzz_table(measured["fuzz"]),
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
