"""Hostile and damaged input: refused in one line, nothing executed, nothing left behind; ``fuzz.py`` searches on."""

import importlib.util
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def _targets() -> Any:
    # One module for these tests and for the script, which is no package.
    spec = importlib.util.spec_from_file_location("fuzz_targets", Path(__file__).with_name("targets.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_targets"] = module
    spec.loader.exec_module(module)
    return module


targets = _targets()
NAMES = list(targets.TARGETS)
FINDINGS = sorted(Path(__file__).parent.glob("corpus/*/*"))
"""Every file, so that one in a folder of no target's name is not passed over."""
TRAPS = {"npy": 2, "npz": 1, "safetensors": 2, "recipe": 1}
"""How many seeds hold what must be refused: pickles, object arrays, vast headers, tags of Python's own."""


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_are_read_and_traps_refused(name: str, tmp_path: Path) -> None:
    target = targets.TARGETS[name]
    found = [targets.run(target, tmp_path, seed) for seed in target.seeds(tmp_path)]
    assert found[0] is None
    assert sum(error is not None for error in found) == TRAPS.get(name, 0)
    assert not list(tmp_path.parent.rglob("escaped.npy"))


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_findings_stay_mended(path: Path, tmp_path: Path) -> None:
    targets.run(targets.TARGETS[path.parent.name], tmp_path, path.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_refused_by_name_or_harmless(name: str, tmp_path: Path) -> None:
    target, draws = targets.TARGETS[name], random.Random(0)
    seeds, refused = target.seeds(tmp_path), 0
    for _ in range(60):
        refused += targets.run(target, tmp_path, targets.mutated(draws.choice(seeds), draws)) is not None
    assert refused > 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_a_longer_search_finds_nothing(name: str, tmp_path: Path) -> None:
    target, draws, end = targets.TARGETS[name], random.Random(time.monotonic_ns()), time.monotonic() + targets.seconds()
    seeds = target.seeds(tmp_path)
    while time.monotonic() < end:
        data = targets.mutated(draws.choice(seeds), draws)
        try:
            targets.run(target, tmp_path, data)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} by {data!r}") from error
