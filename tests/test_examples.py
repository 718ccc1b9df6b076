"""Every script in examples/, run as a person would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def test_there_are_examples() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} >= {
        "better_samples",
        "density_of_embeddings",
        "anomaly_detection",
    }


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_example_runs_without_a_warning(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("LatentPrior(event_shape=")
    assert not list(tmp_path.iterdir())
