"""What is declared, pinned, hashed and explained agrees."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
tomllib = pytest.importorskip("tomllib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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
    oldest, extras = pins("constraints-oldest.txt"), PROJECT["optional-dependencies"]
    used = ("flow", "metrics", "report", "images", "features", "tracking", "distributed", "pyod", "hub")
    bounds = least([*PROJECT["dependencies"], *(line for extra in used for line in extras[extra])])
    for name, release in bounds.items():
        # 1.3 and 1.3.0 are one release; the first of a series may have been withdrawn.
        assert (oldest[name] + ".").startswith(release + "."), name


def test_hashed_releases_are_those_of_the_constraints() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    locked, pinned = pins("requirements.lock"), pins("constraints.txt")
    assert locked.items() <= pinned.items()
    assert set(least(PROJECT["dependencies"])) - {"torch"} <= set(locked)
