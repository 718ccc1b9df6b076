"""Every figure that README and docs quote in a sentence, by name, read from ``results/*.json``.

A page has ``<!-- figure NAME -->text<!-- /figure -->``; ``report.py`` writes the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from _latent_sections import SETS, best_rivals
from _markdown import ranged
from _results import read_results
from _table_sections import MEASURES, OURS, ranks_at_hand

__all__ = ["figures"]

DECODED = ("cifar128", "taef512")
"""Sets that have runs of `refine`."""
WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")


def figures() -> dict[str, str]:
    """Return the text of every figure by its name."""
    parts = (_ladders, _distances, _checks, _refined, _stages, _images, _anomalies, _tables, _trust, _scale)
    return {name: text for part in parts for name, text in part()}


def _runs(name: str) -> dict[str, dict[str, Any]]:
    document = read_results(name)
    assert document is not None, name
    return document["seeds"]


def _each(name: str, method: str, key: str) -> list[float]:
    return [run[method][key] for run in _runs(name).values() if method in run]


def _ladders() -> Iterator[tuple[str, str]]:
    """Densities of the ladders, and their numbers of stages."""
    stages = [len(run["ladder"]["stages"]) for name in SETS for run in _runs(f"latents_{name}").values()]
    yield "ladders", str(len(stages))
    yield "ladders.one_stage", str(stages.count(1))
    yield "ladders.no_stage", str(stages.count(0))
    budget = next(iter(_runs("latents_mnist16").values()))["ladder"]["budget"]
    yield "budget.rival", f"{budget} s"
    yield "budget.ladder", f"{budget // 2} s"
    for name in ("cifar128", "taef512"):
        rival, runs = best_rivals()[name]
        leads = [run["ladder"]["log_prob"] - run[rival]["log_prob"] for run in runs.values()]
        yield f"{name}.lead", ranged(leads)
    yield "pca50.log_z_error", ranged(_each("latents_pca50", "ladder", "log_prob_stderr_normalizer"))
    yield "pca50.auc", ranged(_each("latents_pca50", "ladder", "auc"), ".2f")
    gains = [run["ladder"]["stages"][0]["gain"] for run in _runs("latents_pca50").values()]
    yield "pca50.gain", ranged(gains, ".2f")
    leads = [run["ladder"]["log_prob"] - run["GMM"]["log_prob"] for run in _runs("latents_vae20").values()]
    yield "vae20.lead_of_mixture", ranged(leads, ".1f")
    yield "ladders.sets", WORDS[len(best_rivals())]
    yield "ladders.ahead", WORDS[sum(_ahead_at_every_seed(runs) for _, runs in best_rivals().values())]


def _ahead_at_every_seed(runs: dict[str, dict[str, Any]]) -> bool:
    return all(
        run["ladder"]["log_prob"] > max(f["log_prob"] for m, f in run.items() if m not in ("floors", "ladder"))
        for run in runs.values()
    )


def _distances() -> Iterator[tuple[str, str]]:
    """On how many sets that decode to images another method's samples come nearer to test images."""
    sets, behind = 0, 0
    for name in SETS:
        runs = _runs(f"latents_{name}")
        methods = {m for run in runs.values() for m, f in run.items() if "frechet" in f}
        if "ladder" not in methods:
            continue
        distance = {m: median(run[m]["frechet"] for run in runs.values() if m in run) for m in methods}
        sets += 1
        behind += min(distance, key=lambda m: distance[m]) != "ladder"
    yield "frechet.sets", WORDS[sets]
    yield "frechet.behind", WORDS[behind]
    for name in DECODED:
        for label, method in (("vampprior", "VampPrior"), ("kde", "KDE"), ("mixture", "GMM"), ("maf", "flow (MAF)")):
            yield f"{name}.{label}.frechet", ranged(_each(f"latents_{name}", method, "frechet"), ".0f")
        lags = [
            run["ladder"]["log_prob"] - run[m]["log_prob"]
            for run in _runs(f"latents_{name}").values()
            for m in ("VampPrior", "KDE")
        ]
        yield f"{name}.copies.lag", f"{int(min(lags))}"
        aucs = [_each(f"latents_{name}", method, "auc") for method in ("VampPrior", "KDE")]
        yield f"{name}.copies.auc", ranged([auc for part in aucs for auc in part], ".2f")


def _checks() -> Iterator[tuple[str, str]]:
    """What the independent check says at 512 coordinates."""
    integrals = [run["ladder"]["integral"] for run in _runs("latents_taef512").values()]
    both = [run["ladder"].get("annealed_from_both_ends", False) for run in _runs("latents_taef512").values()]
    yield (
        "taef512.integral",
        " and ".join(f"{value[0]:.2f} ± {value[1]:.2f}" for value, ends in zip(integrals, both, strict=True) if ends),
    )
    one_way = [value for value, ends in zip(integrals, both, strict=True) if not ends]
    yield "taef512.integral_one_way", " and ".join(f"{value[0]:.2f}" for value in one_way)
    yield "taef512.integral_one_way_error", ranged([value[1] for value in one_way], ".2f")


def _refined() -> Iterator[tuple[str, str]]:
    """Ladders that `refine` added a stage to, beside the ladders and the rivals."""
    for name, rival in (("cifar128", "GMM"), ("taef512", "flow (MAF)")):
        runs, rivals = _runs(f"decoded_{name}"), _runs(f"latents_{name}")
        refined = [run["refined"] for run in runs.values()]
        rises = [run["refined"]["log_prob"] - run["ladder"]["log_prob"] for run in runs.values()]
        yield f"{name}.refined.rise", ranged(rises)
        leads = [run["refined"]["log_prob"] - rivals[seed][rival]["log_prob"] for seed, run in runs.items()]
        yield f"{name}.refined.lead", ranged(leads)
        yield f"{name}.refined.frechet", ranged([f["frechet"] for f in refined], ".0f")
        yield f"{name}.refined.seconds", ranged([f["seconds"] for f in refined], ".0f")
        if name == "cifar128":
            yield f"{name}.refined.stage_seconds", ranged([f["stages"][-1]["seconds"] for f in refined], ".0f")
        yield f"{name}.refined.auc", ranged([f["auc"] for f in refined], ".2f")
        yield f"{name}.refined.log_z_error", f"{max(f['log_prob_stderr_normalizer'] for f in refined):.2f}"
        ends = [abs(f["bracket"][0][0] - f["bracket"][1][0]) for f in refined]
        yield f"{name}.refined.ends", ranged(ends, ".2f")
        integrals = sorted((f["integral"][:2] for f in refined), key=lambda value: value[0])
        yield f"{name}.refined.integrals", ", ".join(f"{value:.1f} ± {error:.1f}" for value, error in integrals)
        minutes = [f["seconds_per_10k_samples"] / 60 for f in refined]
        yield f"{name}.refined.sampling_minutes", ranged(minutes, ".0f")
        ladders = [run["ladder"] for run in runs.values()]
        yield f"{name}.unrefined.frechet", ranged([f["frechet"] for f in ladders], ".0f")
        yield f"{name}.unrefined.auc", ranged([f["auc"] for f in ladders], ".2f")
        nearer = sum(
            run["refined"]["frechet"] < rivals[seed]["GMM"]["frechet"] for seed, run in runs.items() if seed in rivals
        )
        yield f"{name}.refined.nearer_than_mixture", WORDS[nearer]


def _stages() -> Iterator[tuple[str, str]]:
    """What one stage adds to the log density of held-out rows and of training rows."""
    document = read_results("stage_learning")
    assert document is not None
    yield "stage.steps", f"{document['settings']['steps']:,}"
    for name, variants in document["sets"].items():
        runs = variants["odds 16, Muon, decay adapted"].values()
        yield f"{name}.stage.rise", f"{median(f['rise'] for f in runs):.2f}"
        yield f"{name}.stage.rise_train", f"{median(f['rise_train'] for f in runs):.2f}"


def _images() -> Iterator[tuple[str, str]]:
    """Seconds until LEBM's final distance, and distances of the longer autoencoder."""
    seconds = [run["seconds"] for run in _runs("cost_mnist_cpu").values()]
    yield "cost.lebm", ranged([s["LEBM"] for s in seconds], ".0f")
    yield "cost.two_phase", ranged([s["ladder, two-phase"] for s in seconds], ".0f")
    yield "cost.ratio", ranged([s["LEBM"] / s["ladder, two-phase"] for s in seconds], ".0f")


def _anomalies() -> Iterator[tuple[str, str]]:
    """At how many of the papers' digits neighbours on the same features are ahead of the ladder."""
    digits = (read_results("mnist_anomaly_cpu") or {})["digits"]
    ladder, neighbours = "ladder on contrastive features", "kNN on the same features"
    ahead = [
        digit
        for digit in "14579"
        if median(run[neighbours]["auprc"] for run in digits[digit].values())
        > median(run[ladder]["auprc"] for run in digits[digit].values())
    ]
    yield "anomalies.neighbours_ahead", WORDS[len(ahead)]
    better = {
        digit: median(run["ladder, -log p(z)"]["auprc"] for run in runs.values() if "ladder, -log p(z)" in run)
        > median(run["ladder, -log p(x, z)"]["auprc"] for run in runs.values() if "ladder, -log p(z)" in run)
        for digit, runs in digits.items()
    }
    yield "anomalies.prior_score_better", f"{sum(better.values())} of {len(better)}"


def _tables() -> Iterator[tuple[str, str]]:
    """Mean ranks of the detector among the published ones, on sets of the choice and on others."""
    other, adbench = read_results("adbench_other_half"), read_results("adbench")
    assert other is not None
    assert adbench is not None
    for measure in MEASURES:
        name = measure.lower()
        yield f"detector.at_hand.{name}", f"{ranks_at_hand(adbench)[OURS][measure]:.1f}"
        for key in ("mean_rank", "mean"):
            yield f"detector.other_half.{name}.{key}", f"{other['other_half'][OURS][measure][key]:.1f}"
            yield f"published.other_half.{name}.{key}", f"{other['other_half']['best published'][measure][key]:.1f}"


def _trust() -> Iterator[tuple[str, str]]:
    """Coverage of the interval of log Z, and the targets at which the bracket warned."""
    targets = (read_results("calibration") or {})["targets"]
    stated = {name: [run for run in runs.values() if run["stages"]] for name, runs in targets.items()}
    shares = {name: sum(run["covered"] for run in runs) / len(runs) for name, runs in stated.items()}
    every = [run for runs in stated.values() for run in runs]
    yield "coverage", f"{sum(run['covered'] for run in every) / len(every):.3f}"
    yield "coverage.fits", str(len(every))
    yield "coverage.least", f"{min(shares.values()):.2f}"
    for name, label in (("banana", "banana"), ("spikes", "spikes"), ("C: ten modes, d = 16", "modes")):
        yield f"coverage.warnings.{label}", str(sum(run["bracket_warning"] for run in stated[name]))
    known = (read_results("known_truth") or {})["targets"]
    within = [all(run["within_3_se"] for run in runs) for runs in known.values()]
    yield "known_truth.within", f"{sum(within)} of {len(within)}"


def _scale() -> Iterator[tuple[str, str]]:
    """What fits of many rows and of many coordinates cost; two threads against two processes."""
    sweeps: dict[str, list[dict[str, Any]]] = (read_results("scale") or {})["sweeps"]
    rows, coordinates = sweeps["n"][-1], sweeps["d"][-1]
    yield "scale.rows", f"{rows['n']:,}"
    yield "scale.rows.seconds", f"{rows['core_seconds']:.0f}"
    yield "scale.rows.mib", f"{rows['anonymous_mib']:.0f}"
    yield "scale.coordinates", f"{coordinates['dim']:,}"
    yield "scale.coordinates.seconds", f"{coordinates['core_seconds']:.0f}"
    launches = (read_results("processes") or {})["launches"]
    seconds = {(launch["processes"], launch["threads"]): median(launch["fit_seconds"]) for launch in launches}
    yield "processes.two_threads", f"{seconds[1, 2]:.0f}"
    yield "processes.two_processes", f"{seconds[2, 1]:.0f}"
