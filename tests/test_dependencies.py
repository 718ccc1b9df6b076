"""What is declared, pinned, hashed and explained agrees."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
tomllib = pytest.importorskip("tomllib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_FEATURES = {"all", "benchmark", "browser", "dev", "docs", "fuzz"}
"""Extras that bring other extras, or tools to work on the package."""
MODULES = {
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "tensorboard": "torch.utils.tensorboard",
}
"""Modules that a library is imported by, where that is not its name with underscores."""


def least(requirements: list[str]) -> dict[str, str]:
    """Lowest release of each requirement."""
    found = {}
    for line in requirements:
        parts = re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", line)
        if parts:
            found[parts[1].lower()] = parts[2]
    return found


def pins(name: str) -> dict[str, str]:
    """Pinned releases of a file; where there are two, that of the newer Python."""
    lines = (ROOT / name).read_text().splitlines()
    pairs = [re.match(r"([A-Za-z0-9_.-]+)==(\S+)", line) for line in lines if 'version < "3.11"' not in line]
    return {pair[1].lower().replace("_", "-"): pair[2] for pair in pairs if pair}


def test_every_core_dependency_is_explained() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([^|]+) \| [^|]{20,} \|$", page, re.MULTILINE)
    assert {name for name, _ in rows[1:]} == set(least(PROJECT["dependencies"]))


def test_the_oldest_set_is_the_lower_bounds() -> None:
    oldest = pins("constraints-oldest.txt")
    used = ("flow", "sklearn", "metrics", "report", "images", "features", "tracking", "distributed", "pyod", "hub")
    bounds = least([*PROJECT["dependencies"], *(line for extra in used for line in EXTRAS[extra])])
    for name, release in bounds.items():
        # 1.3 and 1.3.0 are one release; the first of a series may have been withdrawn.
        assert (oldest[name] + ".").startswith(release + "."), name


def test_hashed_releases_are_those_of_the_constraints() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    locked, pinned = pins("requirements.lock"), pins("constraints.txt")
    assert locked.items() <= pinned.items()
    assert set(least(PROJECT["dependencies"])) - {"torch"} <= set(locked)


def module(library: str) -> str:
    return MODULES.get(library, library.replace("-", "_"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of modules that a file imports by a statement or by ``import_module`` of a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "import_module":
            yield from (name.value for name in node.args[:1] if isinstance(name, ast.Constant))


IMPORTED = {name for path in (ROOT / "src").rglob("*.py") for name in imports(ast.parse(path.read_text()))}
FEATURES = {extra: sorted(least(lines)) for extra, lines in EXTRAS.items() if extra not in NOT_FEATURES}
DECLARED = {*least(PROJECT["dependencies"]), *(library for libraries in FEATURES.values() for library in libraries)}


@pytest.mark.parametrize("library", sorted(DECLARED))
def test_every_declared_library_is_imported(library: str) -> None:
    assert any(f"{name}.".startswith(f"{module(library)}.") for name in IMPORTED)


def test_every_imported_library_is_declared() -> None:
    packages = {name.partition(".")[0] for name in IMPORTED} - {"latentprior"} - sys.stdlib_module_names
    assert packages <= {module(library).partition(".")[0] for library in DECLARED}


CORE_ALONE = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None
import torch
import latentprior as lp
from latentprior.cli.main import main
z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
prior = lp.fit(z, max_stages=1, settings=lp.StageSettings(width=8, depth=1, steps=20))
assert prior.log_prob(prior.sample((5,), generator=torch.Generator().manual_seed(1))).isfinite().all()
for name in ("LatentDensity", "RatioDetector"):
    try:
        getattr(lp, name)
    except lp.MissingExtraError as error:
        print(error)
sys.argv = ["latentprior", "--help"]
raise SystemExit(main())
"""


def test_the_core_needs_no_extra() -> None:
    core = {module(library) for library in least(PROJECT["dependencies"])}
    absent = {library.replace("-", "_") for library in DECLARED} | {module(library) for library in DECLARED}
    names = sorted(name for name in absent - core if "." not in name)
    command = [sys.executable, "-c", CORE_ALONE, " ".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'latentprior[sklearn]'" in done.stdout
    assert "pip install 'latentprior[pyod]'" in done.stdout
    assert "Usage" in done.stdout
