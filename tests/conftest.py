"""Guards and material shared by the tests."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import latentprior as lp
from browsing import CHROMIUM
from clocks import Clock
from latentprior.evaluation.known_densities import Banana

# A script for the extra `fuzz`, which instruments what it imports.
collect_ignore = ["fuzz/fuzz.py"]


def pytest_configure() -> None:
    # One thread: sums are then taken in one order, on every machine and beside any other test.
    torch.set_num_threads(1)


def global_state() -> dict[str, Any]:
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "numpy's random state": repr(np.random.get_state()),  # noqa: NPY002
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the matmul precision": torch.get_float32_matmul_precision(),
    }


@pytest.fixture(autouse=True)
def unchanged_global_state() -> Iterator[None]:
    """Fail a test that leaves a process-wide setting of torch or numpy other than it found it."""
    before, torch_state, numpy_state = global_state(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    yield
    changed = [name for name, value in global_state().items() if value != before[name]]
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_default_dtype(before["the default dtype"])
    torch.set_num_threads(before["the number of threads"])
    torch.set_grad_enabled(before["grad mode"])
    torch.use_deterministic_algorithms(before["deterministic mode"])
    torch.set_float32_matmul_precision(before["the matmul precision"])
    assert not changed, f"the test changed {', '.join(changed)}"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def seeded() -> Callable[[int], torch.Generator]:
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of this process, moved by the test alone."""
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


@pytest.fixture(scope="session")
def tiny() -> lp.StageSettings:
    """Stages that take a tenth of a second."""
    return lp.StageSettings(width=16, depth=1, steps=200, batch_size=64, average=0.98)


@pytest.fixture(scope="session")
def crescent() -> Tensor:
    """600 asymmetric rows ``(600, 2)``."""
    return Banana().sample((600,), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture(scope="session")
def learned(crescent: Tensor) -> lp.LatentPrior:
    """A prior of two stages on :func:`crescent`, the base a normal."""
    # A low bound: no single stage arrives.
    settings = lp.StageSettings(width=32, depth=1, steps=200, batch_size=256, average=0.98, bound=1.5)
    prior = lp.fit(crescent, base="normal", max_stages=2, settings=settings)
    assert len(prior.stages) == 2
    return prior


@pytest.fixture(scope="session")
def gaussian() -> lp.LatentPrior:
    """The standard normal in two dimensions as a prior without stages."""
    rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    return lp.fit(rows, base="normal", whitening="none", max_stages=0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, started once a file; tests that ask for it are skipped where it or Playwright is absent."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()
