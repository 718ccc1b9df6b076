"""``import latentprior``, and its command line, import little beyond PyTorch."""

import subprocess
import sys

import pytest

# PyTorch is imported first: what it brings by itself is none of ours.
CODE = """import sys, torch
before = set(sys.modules)
import {module}
print(*{{name.partition('.')[0] for name in {{*sys.modules}} - before}} - sys.stdlib_module_names)"""
LATE = {
    "PIL", "accelerate", "datasets", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "onnx", "pandas", "pyod",
    "pyarrow", "scipy", "sklearn", "starlette", "uvicorn", "tensorboard", "torchmetrics", "zuko",
}  # fmt: skip


def brought(module: str) -> set[str]:
    """The packages that a module imports beyond PyTorch's and Python's own."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(module=module)], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["latentprior", "latentprior.cli.main"])
def test_extras_and_scikit_learn_are_imported_when_asked_for(module: str) -> None:
    assert not LATE & brought(module)
