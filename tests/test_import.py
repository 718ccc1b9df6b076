"""``import latentprior`` costs little beyond PyTorch."""

import re
import subprocess
import sys

CODE = """import sys, torch
before = set(sys.modules)
import latentprior
print(*sorted({name.partition('.')[0] for name in {*sys.modules} - before}))"""
LATE = {
    "PIL", "accelerate", "datasets", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "onnx", "pandas", "pyod",
    "scipy", "sklearn", "starlette", "tensorboard", "torchmetrics", "uvicorn", "zuko",
}  # fmt: skip


def test_extras_and_scikit_learn_are_imported_when_asked_for() -> None:
    # PyTorch is imported first: what it brings by itself is none of ours.
    code = "import sys, torch; before = set(sys.modules); " + CODE.replace(
        "in sys.modules", "in {*sys.modules} - before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not LATE & set(done.stdout.split())


def test_most_of_the_import_is_that_of_pytorch() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import latentprior"]
    trace = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    times = {name: int(t) for t, name in re.findall(r"\|\s+(\d+) \|\s+(latentprior|torch)$", trace, re.MULTILINE)}
    # About a tenth; a share, since seconds depend on the machine and on what else it does.
    assert times["latentprior"] - times["torch"] < 0.5 * times["torch"]
