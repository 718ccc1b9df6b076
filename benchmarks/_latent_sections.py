"""The sections of RESULTS.md on latents, and the README's table of them."""

from __future__ import annotations

from statistics import median
from typing import Any

from _markdown import how, produced, spread, table
from _results import read_results

__all__ = [
    "DIMENSIONS",
    "SETS",
    "best_rivals",
    "latents_headline",
    "latents_in_short",
    "latents_sections",
    "stage_learning_section",
]

Runs = dict[str, dict[str, Any]]

SETS = {
    "mnist16": "latents of a 16-d MNIST VAE (55k train, 10k test)",
    "vae20": "posteriors of the classic 784-400-20 MNIST VAE (55k train, 10k test)",
    "cifar64": "posteriors of a 64-d convolutional VAE on CIFAR-10 (45k train, 10k test)",
    "cifar128": "posteriors of a 128-d convolutional VAE on CIFAR-10 (45k train, 10k test)",
    "taef512": "codes of CIFAR-10 under TAEF2, 32 x 4 x 4 = 512-d (45k train, 10k test)",
    "cifar32": "posteriors of a 32-d convolutional VAE on CIFAR-10 (45k train, 10k test)",
    "cifarpca40": "CIFAR-10 pixels on 40 principal components (45k train, 10k test)",
    "pca50": "MNIST pixels on 50 principal components (55k train, 10k test)",
}
DIMENSIONS = {
    "mnist16": 16,
    "vae20": 20,
    "cifar64": 64,
    "cifar128": 128,
    "taef512": 512,
    "cifar32": 32,
    "cifarpca40": 40,
    "pca50": 50,
}
UNKNOWN_LOG_Z = 0.1
"""Nats: a larger standard error of log Z is told beside the density."""
FEATURES = {"mnist16": "LeNet-5", "vae20": "LeNet-5"}
HOW = (
    "Log densities are in nats, in coordinates that are standardised alike for all methods, on test rows; each figure "
    "is the median over seeds, with the range in brackets. AUC is that of gradient-boosted trees that tell samples "
    "from test latents; 0.5 means that they cannot. The integral of the ladder must be 1. It is estimated from a "
    "mixture fitted to the ladder's samples, and from the ladder's base. This is done by importance sampling, or, "
    "where the weights have a heavy tail, by sequential Monte Carlo ('annealed'): from the mixture's end alone, or "
    "also back from the ladder's samples ('from both ends'). All rivals that learn by gradients have the same time, "
    "the ladder has half of it. The search for the mixture goes on until validation rows get worse, as long as that "
    "takes. Other work ran on the machine's other core, and sometimes on this one, so seconds and gaps of a few "
    "hundredths are rough. VampPrior has 500 learned diagonal components; on sets with posteriors it is trained on "
    "fresh draws, and no encoder makes its components. The log densities of the single ratio and of LEBM are as "
    "uncertain as their log Z. The samples of LEBM are those of its short run. The column GFLOP/s tells how fast the "
    "machine was (matrix products of a hidden layer on the thread that fits). Rows at about 180 are of one day, rows "
    "at about 100 are of later days, rows without a figure are of earlier days. What a method learns in its seconds "
    "depends on it. All ladders are of the later days."
)


HEADLINE = ("N(0,I)", "GMM", "flow (NSF)", "flow (MAF)", "NCE, one ratio", "ladder")


def _documents(record: str = "latents") -> list[tuple[str, dict[str, Any], Runs]]:
    """Name, document and runs by seed of every set that was measured."""
    documents = []
    for name in SETS:
        document = read_results(f"{record}_{name}")
        if document is None:
            continue
        documents.append((name, document, document["seeds"]))
    return documents


def _methods(runs: Runs) -> list[str]:
    seen = dict.fromkeys(m for run in runs.values() for m in run if m != "floors")
    # The ladder stands last.
    return sorted(seen, key=lambda m: m == "ladder")


def _figures(runs: Runs, method: str) -> list[dict[str, Any]]:
    return [run[method] for run in runs.values() if method in run]


def latents_sections() -> list[str]:
    """E2, set by set."""
    documents = _documents()
    if not documents:
        return []
    out = ["## Latents of real generators", ""]
    for name, _, runs in documents:
        out += [f"### {name}: {SETS[name]}, seeds {' '.join(runs)}", ""]
        out += [_table(runs), "", *_verdict(runs), *_floors(name, runs), *_normalizers(runs)]
    for name, document, runs in _documents("longer"):
        budget = next(f["budget"] for run in runs.values() for m, f in run.items() if m != "floors")
        call = f"--record longer --sets {name} --seeds {' '.join(runs)} --seconds {budget:.0f}"
        out += [f"### {name} with {budget:.0f} s for each rival, {budget / 2:.0f} s for the ladder", ""]
        out += [_table(runs), "", *_verdict(runs), *_normalizers(runs)]
        out += [f"`python benchmarks/latents.py {call}`: {produced(document)}", ""]
    first = documents[0][1]
    call = f"python benchmarks/latents.py --sets {' '.join(name for name, *_ in documents)} --seeds 0 1 2"
    return [*out, "### How the latents were measured", "", *how(call, first, HOW)]


def _table(runs: Runs) -> str:
    has_frechet = any("frechet" in f for m in _methods(runs) for f in _figures(runs, m))
    has_pace = any("gflops" in f for m in _methods(runs) for f in _figures(runs, m))
    rows = []
    for method in _methods(runs):
        figures = _figures(runs, method)
        errors = [f["log_normalizer_stderr"] for f in figures if f.get("log_normalizer_stderr")]
        row = [method, str(len(figures)), spread(f["log_prob"] for f in figures)]
        row += [f"± {max(errors):.2f}" if errors else "", spread((f["auc"] for f in figures), ".3f")]
        if has_frechet:
            distances = [f["frechet"] for f in figures if "frechet" in f]
            row.append(spread(distances, ".1f") if distances else "-")
        row += [spread((f["seconds"] for f in figures), ".0f")]
        row += [spread((f["seconds_per_10k_samples"] for f in figures), ".1f")]
        if has_pace:
            paces = [f["gflops"] for f in figures if "gflops" in f]
            row.append(spread(paces, ".0f") if paces else "")
        rows.append(row)
    distance = ["Fréchet distance"] if has_frechet else []
    head = ["method", "seeds", "log density", "log Z", "AUC", *distance, "fit, s", "10k samples, s"]
    return table([*head, "GFLOP/s"] if has_pace else head, rows)


def _verdict(runs: Runs) -> list[str]:
    """By how much the ladder leads the best rival or trails it, seed by seed, in density and in distance."""
    parts = []
    for key, sign, unit in (("log_prob", 1, "nats in log density"), ("frechet", -1, "in Fréchet distance")):
        leads = []
        for seed, run in runs.items():
            rivals = {m: f[key] for m, f in run.items() if m not in ("floors", "ladder") and key in f}
            if not rivals or key not in run.get("ladder", {}):
                continue
            best = max(rivals, key=lambda m: sign * rivals[m])
            lead = sign * (run["ladder"][key] - rivals[best])
            leads.append(f"{'ahead of' if lead >= 0 else 'BEHIND'} {best} by {abs(lead):.2f} at seed {seed}")
        if leads:
            parts.append(f"{unit}: {', '.join(leads)}")
    return [f"The ladder against the best rival, {'; '.join(parts)}.", ""] if parts else []


def _floors(name: str, runs: Runs) -> list[str]:
    """What reconstructions, and draws of the training rows' own posteriors, reach."""
    told = [run["floors"] for run in runs.values() if run.get("floors")]
    aucs = [floors["auc"] for floors in told if "auc" in floors]
    out = []
    if aucs:
        out.append(
            f"The prior has to learn the training rows' posteriors; draws of these have an AUC of {spread(aucs, '.3f')}"
        )
    if any("reconstructions" in floors for floors in told):
        distances = [floors["training rows"] for floors in told if "training rows" in floors]
        if distances:
            out[-1] += f" and a Fréchet distance of {spread(distances, '.1f')}"
        floors = next(floors for floors in told if "reconstructions" in floors)
        out.append(
            f"Fréchet distances are on {FEATURES.get(name, 'EfficientNet-Lite0')} features, of 10k decoded samples "
            f"from the 10k test images; reconstructions have {floors['reconstructions']:.1f}, other real images "
            f"{floors['real']:.1f}"
        )
    return [". ".join(out) + ".", ""] if out else []


def _annealed(figures: dict[str, Any]) -> str:
    if "annealing" not in figures["integral"]:
        return ""
    return ", annealed from both ends" if figures.get("annealed_from_both_ends") else ", annealed"


def _normalizers(runs: Runs) -> list[str]:
    rows = []
    for seed, run in runs.items():
        if "ladder" not in run:
            continue
        f = run["ladder"]
        ends = f["bracket"]
        rows.append(
            [
                seed,
                f"{f['log_prob_base']:.2f}",
                f"{f['log_prob']:.2f} ± {f['log_prob_stderr']:.2f}",
                f"± {f['log_prob_stderr_normalizer']:.3f}",
                f"{f['integral'][0]:.3f} ± {f['integral'][1]:.3f}{_annealed(f)}",
                f"{f['integral_from_base'][0]:.3f} ± {f['integral_from_base'][1]:.3f}",
                "-" if not ends else f"{ends[0][0]:.3f} ± {ends[0][1]:.3f} to {ends[1][0]:.3f} ± {ends[1][1]:.3f}",
                " / ".join(f"{s['gain']:.3f}" for s in f["stages"]),
                f["stopped"],
            ]
        )
    if not rows:
        return []
    head = ["seed", "base", "ladder", "log Z", "integral (mixture)", "integral (base)", "log Z, base's end to data's"]
    warned = sorted({w for run in runs.values() for w in run.get("ladder", {}).get("warnings", [])})
    return [
        table([*head, "gains", "ended"], rows), "", f"Warnings given: {'; '.join(warned) if warned else 'none'}.", "",
    ]  # fmt: skip


def stage_learning_section(document: dict[str, Any]) -> list[str]:
    """E2: a stage by the odds of its loss, its optimiser and its weight decay, after as many steps."""
    rows = []
    for name, variants in document["sets"].items():
        for variant, by_seed in variants.items():
            runs = list(by_seed.values())
            cells = [("log_prob_base", ".2f"), ("log_prob", ".2f"), ("rise", ".3f"), ("rise_train", ".3f")]
            cells += [("gain", ".3f"), ("ess", ".3f"), ("steps", ".0f"), ("processor_seconds", ".0f")]
            row = [name, variant, str(len(runs)), *(spread((f[key] for f in runs), form) for key, form in cells)]
            rows.append([*row, f"± {max(f['log_normalizer_stderr'] for f in runs):.3f}"])
    head = ["latents", "loss, optimiser, decay", "seeds", "base", "log density", "rise", "rise on train", "gain", "ESS"]
    return [
        "## Loss, optimiser and weight decay of a stage",
        "",
        table([*head, "steps", "processor, s", "log Z"], rows),
        "",
        *how(
            "python benchmarks/stage_learning.py",
            document,
            f"One stage learns for {document['settings']['steps']:,} steps at most, on one mixture of 32 components. "
            "The log density is that of test rows in nats, the median over seeds. The rise is what the stage adds to "
            "the base's log density, log Z taken off; log Z is estimated on draws of the base that trained nothing, "
            "and ESS is the effective share of these draws. The odds say how much particles weigh in the loss against "
            "as many rows (`StageSettings`). The decay is that of the weights, 0.1 where none is given. Weight decays "
            "of 0.03 to 2, odds of 4 and 48, a bound of 8 nats, a width of 384 and dropout were tried as well. In the "
            "row on cifar128 the hidden layers are orthogonalised in bfloat16, in the others in float32. The processor "
            "was shared, so its seconds are rough.",
        ),
    ]


def latents_headline() -> str:
    """Return the table of docs/results.md: every set, the methods that most users would try, the ladder last."""
    rows = []
    for name, _, runs in _documents():
        for method in HEADLINE:
            if not (figures := _figures(runs, method)):
                continue
            distances = [f["frechet"] for f in figures if "frechet" in f]
            rows.append(
                [
                    name,
                    method,
                    spread(f["log_prob"] for f in figures),
                    spread((f["auc"] for f in figures), ".3f"),
                    spread(distances, ".1f") if distances else "-",
                    spread((f["seconds"] for f in figures), ".0f"),
                ]
            )
        floors = [run["floors"] for run in runs.values() if run.get("floors")]
        aucs = [floor["auc"] for floor in floors if "auc" in floor]
        distances = [floor["training rows"] for floor in floors if "training rows" in floor]
        if aucs:
            distance = spread(distances, ".1f") if distances else "-"
            rows.append([name, "*training rows' posteriors*", "", spread(aucs, ".3f"), distance, ""])
        if floor := next((f["reconstructions"] for f in floors if "reconstructions" in f), None):
            rows.append([name, "*test reconstructions*", "", "", f"{floor:.1f}", ""])
    return table(
        ["latents", "prior", "held-out log density, nats", "two-sample AUC", "Fréchet distance", "fit, s"], rows
    )


def best_rivals() -> dict[str, tuple[str, Runs]]:
    """Return for each set the rival with the highest median log density, and the set's runs by seed."""
    best = {}
    for name, _, runs in _documents():
        densities = {m: median(f["log_prob"] for f in _figures(runs, m)) for m in _methods(runs) if m != "ladder"}
        best[name] = max(densities, key=lambda method: densities[method]), runs
    return best


def latents_in_short() -> str:
    """Return the README's table: one row a set, the ladder beside the best of its rivals, with every loss."""
    rows = []
    for name, (rival, runs) in best_rivals().items():
        leads = [run["ladder"]["log_prob"] - run[rival]["log_prob"] for run in runs.values()]
        lead = spread(leads, "+.2f")
        density, ladder = (spread((f["log_prob"] for f in _figures(runs, m)), ".2f") for m in (rival, "ladder"))
        rows.append([name, str(DIMENSIONS[name]), rival, density, ladder, lead, "; ".join(_cautions(runs, leads))])
    return table(["latents", "d", "best rival", "its log density", "ladder's", "difference", "note"], rows)


def _cautions(runs: Runs, leads: list[float]) -> list[str]:
    """What a reader has to know before quoting a row."""
    ladders, notes = _figures(runs, "ladder"), []
    if (behind := sum(lead < 0 for lead in leads)) > 0:
        notes.append(f"**behind** at {behind} of {len(leads)} seeds")
    errors = [f["log_prob_stderr_normalizer"] for f in ladders]
    if max(errors) > UNKNOWN_LOG_Z:
        notes.append(f"log Z is known to {min(errors):.1f} to {max(errors):.1f} nats only")
    if (without := sum(not f["stages"] for f in ladders)) == len(ladders):
        notes.append("no stage was kept: this is the base")
    elif without:
        notes.append(f"no stage was kept at {without} of {len(ladders)} seeds")
    return notes
