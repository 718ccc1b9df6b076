"""The pages of docs/: what they show runs, and the API pages know every public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import latentprior as lp

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_public_name_has_its_entry() -> None:
    entries = " ".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    named = set(re.findall(r"auto\w+:: latentprior\.(\w+)$", entries, re.MULTILINE))
    assert named == set(lp.__all__) - {"__version__"} | {"RatioDetector", "metrics", "feature_networks", "targets"} | {
        "baselines", "ladder", "bases", "ratios", "whitening", "stage", "sampling"
    }  # fmt: skip


def test_every_page_is_reached() -> None:
    pages = {
        path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md") if "_build" not in str(path)
    }
    trees = {}
    for page in pages:
        found = re.findall(r"^```{toctree}\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
        lines = [line for block in found for line in block.splitlines() if line and not line.startswith(":")]
        trees[page] = {(Path(page).parent / line).as_posix() for line in lines}
    assert set().union(*trees.values()) | {"index"} == pages


@pytest.mark.slow
def test_tutorial(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    printed = run("\n".join(blocks("tutorial.md")), tmp_path)
    assert "1500 torch.Size([8]) True" in printed
    digits, noise = map(float, re.findall(r"(-?[\d.]+) nats", printed.splitlines()[-1]))
    assert digits > noise
    assert (tmp_path / "tutorial.png").stat().st_size > 10_000
    assert (tmp_path / "my-prior" / "config.json").exists()


@pytest.mark.slow
def test_better_samples_from_a_diffusers_autoencoder(tmp_path: Path) -> None:
    """From pip install to better samples in 12 lines of a person's own code at most."""
    pytest.importorskip("diffusers")
    pytest.importorskip("PIL")
    run((DOCS / "howto" / "tiny_vae.py").read_text(encoding="utf-8"), tmp_path)
    (code,) = blocks("howto/diffusers.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    judged = """
import torch
from latentprior.metrics import two_sample_auc
with torch.no_grad():
    z = latents.draw(torch.arange(1000), torch.Generator().manual_seed(0)).reshape(-1, *autoencoder.event_shape)
    normal = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    rows = [autoencoder.decode(v).flatten(1) for v in (z, normal)]
    rows.append(model.generate(1000, generator=torch.Generator().manual_seed(0)).flatten(1))
print(tuple(samples.shape), *(two_sample_auc(other, rows[0]).auc for other in rows[1:]))
"""
    found = re.fullmatch(r"\(16, 1, 8, 8\) (\S+) (\S+)\n", run(code + judged, tmp_path))
    assert found
    # Standard errors are about 0.01: trees tell draws of N(0, I) from data with 0.88, those of the prior with 0.57.
    assert float(found[2]) < 0.7 < 0.8 < float(found[1])


@pytest.mark.slow
def test_sharing_page_runs(tmp_path: Path) -> None:
    printed = run("\n".join(blocks("howto/hub.md")), tmp_path)
    assert printed.startswith("---\nlibrary_name: latentprior\n")
    assert 'license: "apache-2.0"' in (tmp_path / "my-prior" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_onnx_page_runs(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert run("\n".join(blocks("howto/onnx.md")), tmp_path) == "True\n(1000, 3)\n"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index.md", "howto/resume.md", "explanation/normalisers.md"])
def test_page_runs(page: str, tmp_path: Path) -> None:
    printed = run("\n".join(blocks(page)), tmp_path)
    wanted = {"index.md": "event_shape=(3,)", "howto/resume.md": "max_stages", "explanation/normalisers.md": "base"}
    assert wanted[page] in printed
