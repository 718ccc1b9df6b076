"""The scripts of benchmarks/, and the figures that README and docs quote from their results."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
FILES = sorted(BENCHMARKS.glob("*.py"))
SCRIPTS = [path for path in FILES if not path.stem.startswith("_")]
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "_build" not in page.relative_to(ROOT).parts
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


# Scripts


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_script_imports_from_the_package_is_there(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "latentprior":
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("_") and node.module != "__future__":
            other = ast.parse((BENCHMARKS / f"{node.module}.py").read_text(encoding="utf-8"))
            defined = {name.id for line in other.body for name in ast.walk(line) if isinstance(name, ast.Name)}
            defined |= {line.name for line in other.body if isinstance(line, ast.FunctionDef | ast.ClassDef)}
            assert {name.name for name in node.names} <= defined


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_tells_its_options(path: Path) -> None:
    done = run(str(path), "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage:")


# Figures on pages

GENERATED = re.compile(r"^<!-- ([\w ]+) -->$.*?^<!-- /\1 -->$|^```.*?^```", re.MULTILINE | re.DOTALL)
MARKED = re.compile(r"<!-- figure (\S+) -->.*?<!-- /figure -->")
QUOTED = re.compile(r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|https?://\S+", re.DOTALL)
MEASURED = re.compile(
    r"(?<![\w.])\d*\.\d+(?!\w|\.\d)"
    r"|(?<![\w.,])\d[\d,.]*\s?(?:nats|s|seconds|minutes|times|MiB|%)(?!\w)"
    r"|(?:[Dd]istances?|AUC|AUCROC|AUCPR|[Rr]anks?|[Ii]ntegrals?)(?:\s(?:of|is|are|to|from|has|have))?\s\d{2}\d*"
)
"""A decimal fraction, a number with a unit of measurement, or a number right behind the name of a measure."""
NOT_MEASURED = {
    "0.05": "nats: the least rise for which a stage is kept",
    "0.1": "nats: the width of a bracket from which on there is a warning",
    "0.5": "the AUC where nothing can be told, a Pareto shape, the mean of a normal",
    "0.954": "the nominal coverage of two standard errors",
    "1.386": "2 log 2",
    "1.5": "the bound of a picture; a version",
    "1.0": "a version",
    "2.0": "a version or a licence",
    "3.10": "a version of Python",
    "3.13": "a version of Python",
    "2209.08739": "a paper",
    "200 times": "repetitions of an experiment that docs/pictures.py makes",
    "8 MiB": "a limit of the explorer",
    "64 MiB": "a limit of the explorer",
    "20 seconds": "a limit of the explorer",
    "120 seconds": "a limit of the explorer",
}
"""Numbers of that kind that no results file has."""


def prose(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    for pattern in (GENERATED, MARKED, QUOTED):
        text = pattern.sub(" ", text)
    return text


@pytest.mark.parametrize(
    ("sentence", "numbers"),
    [
        ("It leads by 1.6 to 1.8 nats.", ["1.6", "1.8"]),
        ("It takes 580 s, or 9 minutes; 12% of it.", ["580 s", "9 minutes", "12%"]),
        ("Fréchet distances of 1459 and an AUC of 0.7.", ["distances of 1459", "0.7"]),
        ("It leads by <!-- figure x -->1.6 nats<!-- /figure -->, see `0.3` and $2.5$.", []),
        ("Version 0.1.2 of 3 stages has 64 latents.", []),
    ],
)
def test_a_number_in_a_sentence_is_noticed(sentence: str, numbers: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(sentence, encoding="utf-8")
    assert MEASURED.findall(prose(page)) == numbers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_measured_numbers_are_marked(page: Path) -> None:
    """A figure in a sentence stands between ``<!-- figure NAME -->`` and ``<!-- /figure -->``."""
    assert set(MEASURED.findall(prose(page))) <= set(NOT_MEASURED)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_line_begins_with_a_mark(page: Path) -> None:
    """Markdown takes a line that begins with a comment for HTML, and shows what follows as it is."""
    begun = re.findall(r"^\s*(?:[-*]\s+|\d+\.\s+)?<!-- /?figure.*", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert begun == []


def test_figures_on_pages_are_those_of_the_results() -> None:
    """``report.py --check`` reads every results file and compares every page; an unknown name ends it too."""
    pytest.importorskip("PIL.Image")
    done = run(str(BENCHMARKS / "report.py"), "--check")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_changed_figure_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    markdown = importlib.import_module("_markdown")
    text = "It leads by <!-- figure lead -->1.9<!-- /figure --> nats."
    assert markdown.fill_figures(text, {"lead": "1.8"}) == text.replace("1.9", "1.8")
    with pytest.raises(KeyError):
        markdown.fill_figures(text, {})


def test_every_figure_that_has_a_name_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    quoted = {name for page in PAGES for name in MARKED.findall(page.read_text(encoding="utf-8"))}
    quoted |= set(re.findall(r"f\['([^']+)'\]", (BENCHMARKS / "_summary_section.py").read_text(encoding="utf-8")))
    assert set(importlib.import_module("_figures").figures()) == quoted


def test_there_are_marked_figures_in_the_readme() -> None:
    assert len(MARKED.findall((ROOT / "README.md").read_text(encoding="utf-8"))) >= 5
