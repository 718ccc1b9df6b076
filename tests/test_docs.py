"""The pages of docs/: what they show runs, and the API pages know every public name."""

import gzip
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import latentprior as lp
from fake_hub import TOKEN, serve
from latentprior.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str = "python") -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def entries(*pages: str) -> list[str]:
    """Names that API pages have an entry of, whatever the kind."""
    texts = "\n".join((DOCS / "api" / f"{page}.md").read_text(encoding="utf-8") for page in pages)
    return re.findall(r"^\.\. auto\w+:: (\S+)$", texts, re.MULTILINE)


def test_every_public_name_has_its_entry() -> None:
    public = {f"latentprior.{name}" for name in {*lp.__all__, "RatioDetector"} - {"__version__"}}
    named = entries("priors", "models", "estimators", "autoencoders", "errors")
    assert set(named) == public | {"latentprior.models.adapters.Autoencoder"}
    assert len(named) == len(set(named))


def test_what_is_documented_as_internals_is_there() -> None:
    named = entries("internals")
    assert named
    for name in named:
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name
        assert name.removeprefix("latentprior.") not in lp.__all__


def test_architecture_names_every_room_and_no_file_that_is_gone() -> None:
    package = Path(lp.__file__).parent
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").exists()} | {"errors"}
    assert set(re.findall(r"^### (\w+)$", text, re.MULTILINE)) == rooms
    files = re.findall(r"`((?:\w+/)+(?:\w+\.py)?|errors\.py)`", text.partition("## Rooms")[2].partition("## A fit")[0])
    assert len(files) > len(rooms)
    assert [file for file in files if not (package / file).exists()] == []


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
def test_pictures_page_goes_on_from_the_tutorial(tmp_path: Path) -> None:
    printed = run("\n".join([*blocks("tutorial.md")[:3], *blocks("howto/decoder.md")]), tmp_path)
    assert printed.splitlines()[-1].startswith("LatentPrior(event_shape=(8,)")


@pytest.mark.slow
def test_better_samples_from_a_diffusers_autoencoder(tmp_path: Path) -> None:
    """From pip install to better samples in 12 lines of a person's own code at most."""
    pytest.importorskip("diffusers")
    pytest.importorskip("PIL")
    run((DOCS / "howto" / "tiny_vae.py").read_text(encoding="utf-8"), tmp_path)
    code, _ = blocks("howto/diffusers.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    judged = """
import torch
from latentprior.evaluation.metrics import two_sample_auc
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
def test_better_samples_from_a_pythae_autoencoder(tmp_path: Path) -> None:
    pytest.importorskip("pythae.models")
    _, code = blocks("howto/diffusers.md")
    printed = run(code, tmp_path)
    assert printed.startswith("LatentPrior(event_shape=(6,)")
    assert "torch.Size([16, 1, 8, 8])" in printed


@pytest.mark.slow
def test_sharing_page_runs(tmp_path: Path) -> None:
    printed = run("\n".join(blocks("howto/hub.md")), tmp_path)
    assert printed.startswith("---\nlibrary_name: latentprior\n")
    assert "license: apache-2.0\n" in (tmp_path / "my-prior" / "README.md").read_text(encoding="utf-8")


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


# Lines of the shell


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small files of the names that the pages use, and the place to be in."""
    rng = np.random.default_rng(0)
    for name in ("latents", "test_latents", "normal", "new"):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((300, 2)).astype(np.float32))
    pixels = np.clip(load_digits().images * 16, 0, 255).astype(np.uint8)
    large = np.zeros((700, 28, 28), np.uint8)
    large[:, 2:26, 2:26] = pixels[:700].repeat(3, 1).repeat(3, 2)
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in large.shape)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + large.tobytes()))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    np.savez(tmp_path / "images.npz", x_train=large[:600], x_test=large[600:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


BRIEF = {
    "fit": ["--max-stages", "1", "--time-budget", "5"],
    "train": [
        *("--set=joint.steps=2", "--set=joint.evaluate_every=1", "--set=joint.stages=1", "--set=joint.batch_size=8"),
        *("--set=network.width=4", "--set=network.latent_dim=4", "--set=fit.max_stages=0"),
        *("--set=joint.posterior_steps=2", "--set=joint.prior_steps=2"),
    ],
    "evaluate": ["--features", "pixels", "-n", "20"],
}  # fmt: skip


def call(line: str) -> None:
    """Run one line of a page, its work made short by options behind it."""
    words = shlex.split(line)
    assert words.pop(0) == "latentprior"
    if "--device" in words:
        del words[words.index("--device") : words.index("--device") + 2]
    words += BRIEF.get(words[0], [])
    if "--config" not in words and words[0] == "train":
        words += ["--set=autoencoder.steps=2", "--set=joint.settle_steps=2"]
    if "method=lebm" in words:
        words += ["--set=rival.steps=2", "--set=rival.batch_size=8"]
    assert main(words) == 0, line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["anomalies", "resume", "paper"])
def test_shell_lines_run(page: str, desk: Path) -> None:
    lines = [line for block in blocks(f"howto/{page}.md", "sh") for line in block.splitlines()]
    calls = [line for line in lines if not line.startswith("pip ")]
    assert len(calls) >= 2
    for line in calls:
        if " train " in line and "--resume" not in line and (desk / "run").exists():
            (desk / "run").rename(desk / f"run {line[-20:].replace('/', ' ')}")
        call(line)
    left = {
        "anomalies": "log_density.npy",
        "resume": "run/model",
        "paper": "generated.png",
        "several-gpus": "run/model",
    }
    assert (desk / left[page]).exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_report_and_push_lines_run(desk: Path, learned: lp.LatentPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    (lines,) = [block.splitlines() for block in blocks("howto/report.md", "sh")]
    call("latentprior train images.npz --out my-model")
    for line in lines:
        call(line)
    assert (desk / "my-prior" / "report.html").exists()
    assert (desk / "my-model.html").exists()
    with serve() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        ((line,),) = [block.splitlines() for block in blocks("howto/hub.md", "sh")]
        call(line)
        assert "config.json" in hub.repositories["user/my-prior"].files


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lines_of_the_command_line_page_run(tmp_path: Path) -> None:
    """As a person would run them, at full length."""
    latents, images = (block.splitlines() for block in blocks("howto/shell.md", "sh"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    printed = {}
    for line in [*latents, *images]:
        done = subprocess.run(
            line.split(), cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
        printed[line] = done.stdout
    columns = np.load(tmp_path / "demo-out" / "latents.npy").shape[1]
    for name in ("samples.npy", "chains.npy"):
        z = np.load(tmp_path / name)
        assert z.shape == (1000, columns)
        assert np.isfinite(z).all()
    assert np.isfinite(np.load(tmp_path / "scores.npy")).all()
    assert np.load(tmp_path / "reconstructions.npy").shape[0] == 1147
    assert (tmp_path / "generated.png").stat().st_size > 500
    (evaluated,) = [text for line, text in printed.items() if " evaluate " in line]
    assert "400" in evaluated


@pytest.mark.slow
def test_python_lines_of_the_command_line_page_run(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", np.clip(load_digits().images * 16, 0, 255).astype(np.uint8))
    (code,) = blocks("howto/shell.md")
    assert run(code, tmp_path) == "torch.Size([16, 1, 8, 8]) torch.Size([3, 1, 8, 8]) torch.Size([3])\n"
    assert (tmp_path / "my-model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_explorer_lines_run(desk: Path) -> None:
    pytest.importorskip("PIL.Image")
    from PIL import Image

    first, requests = (block.splitlines() for block in blocks("howto/explore.md", "sh"))
    (desk / "demo-out").mkdir()
    (desk / "images.npz").rename(desk / "demo-out" / "images.npz")
    call(first[0])
    Image.fromarray(np.load(desk / "demo-out" / "images.npz")["x_test"][0]).save(desk / "digit.png")
    command = [sys.executable, "-m", *shlex.split(first[1]), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().split()[0]
            answers = []
            for line in requests:
                words = shlex.split(line)
                kind, address = words[words.index("-H") + 1].partition(": ")[2], words[-1]
                body = words[words.index("-d") + 1].encode() if "-d" in words else (desk / "digit.png").read_bytes()
                there = address.replace("http://127.0.0.1:7860/", url)
                assert there != address
                request = urllib.request.Request(there, body, {"Content-Type": kind})
                with urllib.request.urlopen(request, timeout=60) as answer:
                    answers.append(json.load(answer))
        finally:
            process.terminate()
    assert len(answers[0]["items"]) == 4
    assert 0 < answers[1]["p_value"] <= 1
