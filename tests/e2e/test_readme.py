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
    z = np.load(tmp_path / "samples.npy")
    assert z.shape == (1000, np.load(tmp_path / "demo-out" / "latents.npy").shape[1])
    assert np.isfinite(z).all()
    (scored,) = [text for line, text in printed.items() if " score " in line]
    assert '"n": 400' in scored
    assert (tmp_path / "demo-out" / "samples.png").stat().st_size > 10_000


NUMBER = re.compile(r"-?\d+\.\d+")


def test_python_lines_print_what_the_readme_shows(tmp_path: Path) -> None:
    code, _ = blocks("python")
    printed = run([sys.executable, "-W", "ignore", "-c", code], tmp_path)
    (promised,) = blocks("text")
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", promised)
    # Other processors round otherwise, and hundreds of steps carry that on.
    found, shown = ([float(number) for number in NUMBER.findall(text)] for text in (printed, promised))
    assert found == pytest.approx(shown, abs=0.2)
    assert (tmp_path / "my-prior" / "config.json").exists()


def test_python_lines_on_an_autoencoder(tmp_path: Path) -> None:
    """With a linear autoencoder of digits in the place of the reader's."""
    image = pytest.importorskip("PIL.Image")
    from sklearn.datasets import load_digits

    (tmp_path / "photos").mkdir()
    for number, digit in enumerate(np.clip(load_digits().images[:600] * 16, 0, 255).astype(np.uint8)):
        image.fromarray(digit).save(tmp_path / "photos" / f"{number}.png")
    _, code = blocks("python")
    yours = """
import torch
import latentprior as lp

axes = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0]
encode, decode = lambda x: x.flatten(1) @ axes, lambda z: (z @ axes.T).reshape(-1, 1, 8, 8)
"""
    run_code = yours + code.replace("time_budget=60", "time_budget=5") + "print(tuple(pictures.shape))"
    assert run([sys.executable, "-W", "ignore", "-c", run_code], tmp_path) == "(16, 1, 8, 8)\n"
