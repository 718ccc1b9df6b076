"""What every release saved still loads, and gives the numbers that it gave then."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentprior as lp
from golden.make import HERE, figures
from latentprior.storage.checkpoint import read_config

SAVED = [
    (path.parent, name)
    for path in sorted(HERE.glob("*/expected.json"))
    for name in json.loads(path.read_text())["saved"]
]


def expected(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return found


@pytest.mark.parametrize(("folder", "name"), [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in SAVED])
def test_saved_by_a_release_loads_and_scores_to_the_same_numbers(folder: Path, name: str) -> None:
    if name == "flow":
        pytest.importorskip("zuko")
    told = expected(folder)["saved"][name]
    kind = told["kind"]
    saved: Any = (lp.LatentVariableModel if kind == "model" else lp.LatentPrior).from_pretrained(folder / name)
    found = figures(kind, saved, torch.tensor(told["rows"]))
    assert found.keys() == told["figures"].keys()
    for figure, value in told["figures"].items():
        # Float32 on another processor or release of torch: sums are taken in another order.
        np.testing.assert_allclose(found[figure], value, rtol=2e-5, atol=2e-5, err_msg=figure)


@pytest.mark.parametrize(("folder", "name"), SAVED, ids=lambda value: getattr(value, "name", value))
def test_a_saved_folder_names_its_writer_and_format(folder: Path, name: str) -> None:
    told = expected(folder)
    config = read_config(folder / name, told["saved"][name]["kind"])
    assert config["format_version"] == told["format_version"]
    assert config["written_by"] == f"latentprior {folder.name}"


def test_this_release_is_among_them() -> None:
    assert lp.__version__ in {folder.name for folder, _ in SAVED}, "run python tests/golden/make.py and commit"


def test_stages_of_both_kinds_are_kept() -> None:
    told = expected(HERE / "0.1.0")["saved"]
    assert [told[name]["figures"]["stages"] for name in ("normal", "gmm", "copula")] == [1, 1, 1]
