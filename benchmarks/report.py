"""Write benchmarks/RESULTS.md, and every figure of README and docs, from benchmarks/results/*.json.

python benchmarks/report.py
python benchmarks/report.py --check   # write nothing; exit with 1 where a page differs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _decoded_section import decoded_sections
from _figures import figures
from _growth_sections import draw_scale, known_truth_section, processes_section, scale_section
from _image_sections import (
    ablations_section,
    anomaly_section,
    cost_section,
    draw_ablations,
    draw_cost,
    images_headline,
    images_section,
)
from _latent_sections import latents_headline, latents_in_short, latents_sections, stage_learning_section
from _markdown import FIGURE, fill_blocks, fill_figures, produced, table
from _mutual_section import mutual_section
from _results import read_results
from _speed_section import draw_speed, speed_section
from _summary_section import choices, shown
from _table_sections import adbench_section, ceilings_section, other_half_section, other_tables_section
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
    soak_sentence,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ONE_FILE = {
    "stage_learning": stage_learning_section,
    "known_truth": known_truth_section,
    "mutual_information": mutual_section,
    "faults": faults_section,
    "fuzz": fuzz_section,
    "calibration": calibration_section,
    "scale": scale_section,
    "processes": processes_section,
    "speed": speed_section,
    "load": load_section,
    "soak": soak_section,
}
"""Sections that read one file of results each, in their order."""


def results_page(values: dict[str, str]) -> str:
    """Return the text of RESULTS.md: what was shown, then every table and how it was made."""
    out = ["# Results", "", "Written by `python benchmarks/report.py` from `benchmarks/results/`.", ""]
    out += [*shown(values), *choices(), *latents_sections(), *decoded_sections()]
    for name, section in ONE_FILE.items():
        if document := read_results(name):
            out += section(document)
    for dataset in ("mnist", "cifar10"):
        for kind, section in (("images", images_section), ("cost", cost_section), ("ablations", ablations_section)):
            for scale in ("cpu", "paper"):
                if document := read_results(f"{kind}_{dataset}_{scale}"):
                    out += section(dataset, document)
    for scale in ("cpu", "paper"):
        if document := read_results(f"mnist_anomaly_{scale}"):
            out += anomaly_section(document)
    if adbench := read_results("adbench"):
        out += adbench_section(adbench)
        if other_half := read_results("adbench_other_half"):
            out += other_half_section(other_half)
        if choice := read_results("detector_choice"):
            out += ceilings_section(choice, adbench)
        if other := read_results("other_tables"):
            out += other_tables_section(other)
    if document := read_results("import_time"):
        out += import_section(document)
    return "\n".join(out).rstrip() + "\n"


def import_section(document: dict[str, Any]) -> list[str]:
    """What the import takes."""
    parts = ("latentprior", "torch", "processor")
    rows = [[which, *(f"{document['seconds'][part][which]:.2f}" for part in parts)] for which in ("least", "median")]
    return [
        "## Import",
        "",
        table(["seconds", "import latentprior", "of it PyTorch", "processor, whole interpreter"], rows),
        "",
        f"`python benchmarks/import_time.py`, {document['settings']['runs']} fresh interpreters, by `-X importtime`: "
        f"{produced(document)}",
        "",
    ]


def blocks() -> dict[str, str]:
    """Return the tables that pages of README and docs have between marks, by name."""
    tables = {"in short": latents_in_short(), "latents": latents_headline(), "images": images_headline()}
    for name, file, section in (
        ("kills", "faults", faults_table),
        ("fuzz", "fuzz", fuzz_table),
        ("coverage", "calibration", calibration_table),
        ("load", "load", load_table),
        ("soak", "soak", soak_sentence),
    ):
        if document := read_results(file):
            tables[name] = section(document)
    return tables


def pages() -> dict[Path, str]:
    """Return every page that has figures, with the text that it must have."""
    values, tables = figures(), blocks()
    texts = {HERE / "RESULTS.md": results_page(values)}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if FIGURE.search(text) or any(f"<!-- {name} -->" in text for name in tables):
            texts[page] = fill_figures(fill_blocks(text, tables), values)
    return texts


def draw() -> None:
    """Draw the pictures that RESULTS.md and docs/explanation/trust.md show."""
    if scale := read_results("scale"):
        draw_scale(scale, HERE / "results" / "scale.png")
    if speed := read_results("speed"):
        draw_speed(speed, HERE / "results" / "speed.png")
    if soak := read_results("soak"):
        draw_soak(soak, HERE / "results" / "soak.png")
        draw_soak(soak, ROOT / "docs" / "images" / "soak.png")
    for dataset in ("mnist", "cifar10"):
        for kind, drawn in (("cost", draw_cost), ("ablations", draw_ablations)):
            for size in ("cpu", "paper"):
                if document := read_results(f"{kind}_{dataset}_{size}"):
                    drawn(dataset, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page differs")
    check = parser.parse_args().check
    texts = pages()
    differ = [page for page, text in texts.items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    if check:
        for page in differ:
            print(f"{page.relative_to(ROOT)} differs from benchmarks/results: run python benchmarks/report.py")
        sys.exit(bool(differ))
    for page in differ:
        page.write_text(texts[page], encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
