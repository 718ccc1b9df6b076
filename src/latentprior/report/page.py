"""The page: what was learned in one sentence, key figures, cautions, the parts, settings; one HTML file."""

from __future__ import annotations

import base64
import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any

import torch

from .._version import __version__
from ..density.bases import DistributionBase, MixtureBase
from ..density.figures import record
from ..density.prior import LatentPrior
from ..density.ratios import BoundedRatio
from . import sections
from .figures import number
from .markup import Markup, tag
from .sources import Rows, Subject

__all__ = ["build"]

STOPPED = {
    "no gain": "the next stage could not tell data from samples",
    "no rise": "one more stage would not have raised the held-out log density enough",
    "max_stages": "the number of stages asked for was reached",
    "stages": "the number of stages asked for was reached",
    "time_budget": "the time allowed ran out",
}
PARTS = 8
"""Parts of the work that :func:`build` tells of."""
WIDE_BRACKET, SATURATED, TOLD_APART = 0.1, 1.2, 0.6


def build(subject: Subject, rows: Rows | None, seed: int, begin: Callable[[str], None] = lambda name: None) -> str:
    """The whole document; equal bytes for an equal subject and seed on one machine.

    ``rows`` are all training rows at hand, among which the oddest are looked for. ``begin`` hears of each part of the
    work, one of :data:`PARTS`, as it begins.
    """
    begin("samples and two-sample test")
    found, measured = record(subject.prior), sections.measure(subject, seed)
    cautions = list(_cautions(subject, found, measured))
    parts = [
        tag("header", tag("h1", "Latent prior report"), tag("p", subject.name, class_="name")),
        tag("p", _sentence(subject.prior, found), class_="lead"),
        tag("dl", *_figures(subject, found, measured), class_="figures"),
        tag("ul", *(tag("li", line) for line in cautions), class_="warnings") if cautions else None,
    ]
    sectioned: tuple[tuple[str, Callable[[], Markup]], ...] = (
        ("samples by stage", lambda: sections.samples(subject, seed)),
        ("stages", lambda: sections.stages(subject, found, measured)),
        ("planes", lambda: sections.planes(subject, measured)),
        ("calibration", lambda: sections.calibration(subject, measured)),
        ("nearest rows", lambda: sections.copying(subject, measured)),
        ("oddest rows", lambda: sections.oddities(subject, rows)),
        ("settings", lambda: _settings(subject, rows, found, seed)),
    )
    for name, make in sectioned:
        begin(name)
        parts.append(make())
    return _document(f"Latent prior report: {subject.name}", tag("main", *parts))


def _document(title: str, body: Markup) -> str:
    """A page that loads nothing and runs one script only: its policy names that script by its digest."""
    style, script = (
        Markup((resources.files(__package__) / name).read_text(encoding="utf-8")) for name in ("style.css", "script.js")
    )
    style_digest, script_digest = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_digest}'; script-src 'sha256-{script_digest}'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"latentprior {__version__}"),
        tag("title", title),
        tag("style", style),
    )
    page = tag("html", head, tag("body", body, tag("script", script)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _sentence(prior: LatentPrior, found: Mapping[str, Any]) -> str:
    """What was learned."""
    count, d = len(prior.stages), math.prod(prior.event_shape)
    what = _base_name(prior)
    under = {0: "alone", 1: "under one learned density ratio"}.get(count, f"under {count} learned density ratios")
    text = f"{what[0].upper()}{what[1:]} {under} is the density of these {d}-dimensional latents"
    base, ladder = found["log_prob_base"], found["log_prob_held_out"]
    if base is None or ladder is None:
        return f"{text}."
    if not count:
        return f"{text}: {number(ladder, 2)} nats a held-out row."
    return (
        f"{text}: rows held out while learning went from {number(base, 2)} to {number(ladder, 2)} nats on average, "
        f"{'+' if ladder >= base else ''}{number(ladder - base, 2)}."
    )


def _base_name(prior: LatentPrior) -> str:
    base = prior.base
    if isinstance(base, MixtureBase):
        return f"a mixture of {base.n_components} Gaussians"
    if isinstance(base, DistributionBase):
        return f"a distribution of yours ({type(base.distribution).__name__})"
    return {"normal": "one Gaussian", "copula": "a product of marginals", "flow": "a flow"}.get(base.name, base.name)


def _figures(subject: Subject, found: Mapping[str, Any], measured: sections.Measured) -> Iterator[Markup]:
    """Key figures, one box each."""
    base, ladder = found["log_prob_base"], found["log_prob_held_out"]
    if ladder is not None:
        before = "rows held out while learning" if base is None else f"base {number(base, 2)}; held out while learning"
        yield _box("validation log density, nats", number(ladder, 2), before)
    if measured.log_density:
        first, last = measured.log_density[0], measured.log_density[-1]
        yield _box(
            f"log density of {sections.rows_name(subject)}, nats", number(last.value, 2),
            f"± {number(last.stderr, 2)}; base {number(first.value, 2)}",
        )  # fmt: skip
    ends = found["bracket"]
    text = f"± {number(found['log_normalizer_stderr'], 4)}"
    if ends:
        text += f"; bracket {number(ends['forward'])} to {number(ends['reverse'])}"
    yield _box("log Z, nats", number(found["log_normalizer"], 4), text)
    if measured.auc is not None:
        yield _box("two-sample AUC", number(measured.auc.auc), f"± {number(measured.auc.stderr)}; 0.5 is best")
    reason = found["stopped"]
    count = len(found["stages"])
    yield _box("stages", str(count), f"ended: {STOPPED.get(reason, reason)}" if reason else "")
    if found["total_seconds"] is not None:
        yield _box("time to learn, s", number(found["total_seconds"], 0), "")


def _box(name: str, value: str, text: str) -> Markup:
    return tag("div", tag("dt", name), tag("dd", tag("b", value), tag("span", text) if text else None))


def _cautions(subject: Subject, found: Mapping[str, Any], measured: sections.Measured) -> Iterator[str]:
    """What a reader should know before trusting the rest."""
    ends, entries = found["bracket"], found["stages"]
    if ends and abs(ends["width"]) > WIDE_BRACKET and _beyond_noise(ends):
        yield (
            f"log Z differs by {number(abs(ends['width']), 2)} nats between the base's and the data's end: read "
            "densities up to that constant, or use a better base."
        )
    if entries and entries[-1]["gain"] > SATURATED and found["stopped"] in ("max_stages", "time_budget"):
        yield "The last stage still told data from samples almost perfectly: more stages or a better base would help."
    if measured.auc is not None and measured.auc.auc - 2 * measured.auc.stderr > TOLD_APART:
        yield f"Boosted trees tell samples from data (AUC {measured.auc.auc:.2f}): the prior has not arrived."
    if subject.held_out is not None and not subject.separate:
        yield (
            "Held-out rows were not named, so half of the given rows stand for them. The prior may have been learned "
            "on both halves: densities and AUC are then flattering."
        )


def _beyond_noise(ends: Mapping[str, float]) -> bool:
    """Ends that stand apart count; ends that cross count where noise does not explain it, as for the warning."""
    noise = math.hypot(ends["forward_stderr"], ends["reverse_stderr"])
    return ends["width"] > 0 or ends["width"] < -WIDE_BRACKET - 2 * noise


def _settings(subject: Subject, rows: Rows | None, found: Mapping[str, Any], seed: int) -> Markup:
    """Everything that decides the outcome, and versions."""
    lines = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in _pairs(subject, found)]
    for name, part in (("training rows", rows), ("held-out rows", subject.held_out if subject.separate else None)):
        text = "not given" if part is None else f"{part.name}: {len(part.z):,} used"
        lines.append(tag("tr", tag("th", name, scope="row"), tag("td", text)))
    lines.append(tag("tr", tag("th", "seed of this report", scope="row"), tag("td", seed)))
    here = {"latentprior": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name, versions in (("learned with", found["versions"]), ("reported with", here)):
        if isinstance(versions, Mapping):
            text = ", ".join(f"{k} {v}" for k, v in versions.items())
            lines.append(tag("tr", tag("th", name, scope="row"), tag("td", text)))
    recipe = None
    if subject.recipe is not None:
        recipe = tag("details", tag("summary", "The recipe, config.yaml"), tag("pre", tag("code", subject.recipe)))
    table = tag("table", tag("tbody", *lines), class_="settings")
    return sections.section("Settings and versions", table, recipe)


def _pairs(subject: Subject, found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    prior, model = subject.prior, subject.model
    yield "shape of a latent", " x ".join(map(str, prior.event_shape))
    yield "computed in", f"{str(prior.dtype).removeprefix('torch.')} on {prior.device}"
    yield "standardisation", prior.whitening.kind
    yield "base", f"{prior.base.name}: {_base_name(prior)}"
    specs = [s.network.spec for s in prior.stages if isinstance(s.network, BoundedRatio) and s.network.spec]
    if specs:
        yield "stage network", ", ".join(f"{k} {v}" for k, v in specs[-1].items() if k != "event_shape")
    yield "log Z found by", f"{prior.normalizer.source}, effective share {prior.normalizer.ess:.1%}"
    yield "samples drawn by", ", ".join(f"{k} {v}" if k != "sampler" else str(v) for k, v in subject.sampler.items())
    if model is not None:
        yield "noise of a pixel, sigma", number(model.sigma, 4)
        for name, network in (("decoder", model.decoder), ("encoder", model.encoder)):
            spec = getattr(network, "spec", None)
            text = (
                ", ".join(f"{k} {v}" for k, v in spec.items()) if isinstance(spec, Mapping) else type(network).__name__
            )
            yield name, "none" if network is None else text
    known = {"log_prob_base", "log_prob_held_out", "stopped", "total_seconds", "versions"}
    yield from _flat({k: v for k, v in prior.info.items() if k not in known})


def _flat(entries: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", str(value)
