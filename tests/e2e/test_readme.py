"""Every command and every line of Python that the README shows, run as a newcomer would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# The lines are run at full length.
pytestmark = pytest.mark.slow

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    # The console script stands beside the interpreter that runs the tests.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_shell_lines(tmp_path: Path) -> None:
    (lines,) = [block.splitlines() for block in blocks("sh") if block.startswith("latentprior demo")]
    printed = {line: run(line.split(), tmp_path) for line in lines}
    demo = printed[lines[0]]
    assert "must be 1" in demo
    assert "ladder" in demo
    for name in ("samples.npy", "chains.npy"):
        z = np.load(tmp_path / name)
        assert z.shape == (1000, np.load(tmp_path / "demo-out" / "latents.npy").shape[1])
        assert np.isfinite(z).all()
    (scored,) = [text for line, text in printed.items() if " score " in line]
    assert '"n": 400' in scored
    assert (tmp_path / "demo-out" / "samples.png").stat().st_size > 10_000


def test_python_lines(tmp_path: Path) -> None:
    code, _ = blocks("python")
    printed = run([sys.executable, "-W", "ignore", "-c", code], tmp_path)
    assert "LatentPrior(event_shape=(4,)" in printed
    assert (tmp_path / "my-prior" / "config.json").exists()


def test_python_lines_with_images(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    np.save(tmp_path / "digits.npy", np.clip(load_digits().images * 16, 0, 255).astype(np.uint8))
    _, code = blocks("python")
    run([sys.executable, "-W", "ignore", "-c", code + "print(model)"], tmp_path)
    assert (tmp_path / "my-model" / "config.json").exists()


def test_shell_lines_with_images(tmp_path: Path) -> None:
    run(["latentprior", "demo", "--out", "demo-out"], tmp_path)
    (lines,) = [block.splitlines() for block in blocks("sh") if block.startswith("latentprior train")]
    printed = {line: run(line.split(), tmp_path) for line in lines}
    assert "400" in printed[lines[-1]]
    assert np.isfinite(np.load(tmp_path / "scores.npy")).all()
    assert np.load(tmp_path / "reconstructions.npy").shape[0] == 1147
    assert (tmp_path / "generated.png").stat().st_size > 500
