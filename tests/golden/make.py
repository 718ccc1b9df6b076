"""Save small priors and a model with today's release, beside the numbers they give: ``python tests/golden/make.py``.

Run once for each release, before its tag; a folder that exists is never written again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import latentprior as lp
from digits_model import as_images, digits, digits_model
from latentprior.evaluation.known_densities import Banana
from latentprior.storage.checkpoint import FORMAT_VERSION

HERE = Path(__file__).resolve().parent
BASES = ("normal", "gmm:1", "copula", "flow")


def priors() -> dict[str, lp.LatentPrior]:
    """A prior of each base, all but the flow under a stage."""
    z = Banana().sample((1500,), torch.Generator().manual_seed(0)).float()
    tiny = lp.StageSettings(width=16, depth=1, steps=200, batch_size=128, average=0.98, bound=2.0)
    found = {}
    for base in BASES:
        name = base.partition(":")[0]
        stages = 0 if name == "flow" else 1
        found[name] = lp.fit(z, base=base, max_stages=stages, settings=tiny, time_budget=30 if name == "flow" else None)
    return found


def rows_for(kind: str) -> torch.Tensor:
    """Rows to score: images of digits, or points of the target."""
    if kind == "model":
        return as_images(digits()[0][-12:])
    return Banana().sample((40,), torch.Generator().manual_seed(1)).float()


def figures(kind: str, saved: Any, rows: torch.Tensor) -> dict[str, Any]:
    """What a saved prior or model gives on these rows, as JSON."""
    if kind == "model":
        with torch.no_grad():
            latents = saved.encode(rows)[0]
            return {
                "encoded": latents.tolist(),
                "decoded": saved.decode(latents)[:, 0, 3].tolist(),
                "log_prob": saved.prior.log_prob(latents).tolist(),
                "sigma": float(saved.sigma),
            }
    return {
        "log_prob": saved.log_prob(rows).tolist(),
        "log_prob_stderr": saved.log_prob_stderr,
        "stages": len(saved.stages),
    }


def main() -> None:
    folder = HERE / lp.__version__
    if folder.exists():
        sys.exit(f"{folder} exists: what a release has written stays as it is")
    made: dict[str, tuple[str, Any]] = {name: ("prior", prior) for name, prior in priors().items()}
    made["model"] = ("model", digits_model(rows=600, steps=200, max_stages=1))
    told = {}
    for name, (kind, saved) in made.items():
        saved.save_pretrained(folder / name)
        rows = rows_for(kind)
        told[name] = {"kind": kind, "rows": rows.tolist(), "figures": figures(kind, saved, rows)}
    document = {"format_version": FORMAT_VERSION, "saved": told}
    (folder / "expected.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
