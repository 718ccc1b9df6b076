"""Writing ``results/NAME.json``: figures beside what produced them."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["join_results", "read_results", "write_results"]

FOLDER = Path(__file__).resolve().parent / "results"


def write_results(name: str, figures: dict[str, Any], *, threads: int, settings: dict[str, Any]) -> None:
    """Write the figures with versions, threads and settings."""
    import torch

    FOLDER.mkdir(exist_ok=True)
    document = {
        "settings": settings,
        "threads": threads,
        "device": "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": version("scikit-learn"),
            "zuko": version("zuko"),
            "latentprior": version("latentprior"),
        },
        **figures,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def read_results(name: str) -> dict[str, Any] | None:
    """What :func:`write_results` wrote, or None."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def join_results(name: str, seed: int, figures: dict[str, Any], *, threads: int, settings: dict[str, Any]) -> None:
    """Write a seed's figures beside those of other seeds, and beside what else is known of this one."""
    seeds = (read_results(name) or {}).get("seeds", {})
    seeds[str(seed)] = {**seeds.get(str(seed), {}), **figures}
    write_results(name, {"seeds": dict(sorted(seeds.items()))}, threads=threads, settings=settings)
