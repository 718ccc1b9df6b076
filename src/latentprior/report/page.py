"""The page: one sentence, key figures, cautions, the parts, settings; all in one HTML file."""

from __future__ import annotations

import base64
import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .._version import __version__
from ..density.bases import DistributionBase, MixtureBase
from ..density.figures import record
from ..density.prior import LatentPrior
from ..density.ratios import BoundedRatio
from ..fitting.fit import SATURATED_GAIN_NATS
from . import sections
from .figures import number
from .sources import Subject

__all__ = ["PARTS", "build"]

STOPPED = {
    "no gain": "the next stage could not tell data from samples",
    "no rise": "one more stage would not have raised the held-out log density enough",
    "max_stages": "the number of stages asked for was reached",
    "stages": "the number of stages asked for was reached",
    "time_budget": "the time allowed ran out",
}
PARTS = 8
"""Parts of the work that :func:`build` announces."""
TOLD_APART_AUC = 0.6
"""The two-sample AUC, less two standard errors, above which the page warns: 0.5 is guessing, 1 is certainty."""


def build(subject: Subject, seed: int, announce: Callable[[str], None]) -> str:
    """Return the whole document; it is the same for an equal subject and seed on one machine.

    ``announce`` is called with the name of each of the :data:`PARTS` parts of the work as that part begins.
    """
    announce("samples and two-sample test")
    figures, measured = record(subject.prior), sections.measure(subject, seed)
    parts: dict[str, tuple[str, Callable[[], Any]]] = {
        "samples": ("samples by stage", lambda: sections.samples(subject, seed)),
        "stages": ("stages", lambda: sections.stages(subject, figures, measured)),
        "planes": ("planes", lambda: sections.planes(subject, measured)),
        "calibration": ("calibration", lambda: sections.calibration(subject, measured)),
        "copying": ("nearest rows", lambda: sections.copying(subject, measured)),
        "oddities": ("oddest rows", lambda: sections.oddities(subject)),
        "settings": ("settings", lambda: list(_settings(subject, figures, seed))),
    }
    made = {}
    for key, (name, make) in parts.items():
        announce(name)
        made[key] = make()
    style, script = (
        (resources.files(__package__) / name).read_text(encoding="utf-8") for name in ("style.css", "script.js")
    )
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made["key_figures"] = list(_key_figures(subject, figures, measured))
    made["cautions"] = list(_cautions(subject, figures, measured))
    return environment.get_template("report.html.j2").render(
        subject=subject, version=__version__, sentence=_sentence(subject.prior, figures),
        policy=_policy(style, script), style=Markup(style), script=Markup(script), **made,
    )  # fmt: skip


def _policy(style: str, script: str) -> str:
    """A content security policy: the page loads nothing, and its only style and script are named by their digests."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    return "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*digests)


def _sentence(prior: LatentPrior, figures: Mapping[str, Any]) -> str:
    """Say what was learned."""
    count, d = len(prior.stages), math.prod(prior.event_shape)
    what = _base_name(prior)
    under = {0: "alone", 1: "under one learned density ratio"}.get(count, f"under {count} learned density ratios")
    text = f"{what[0].upper()}{what[1:]} {under} is the density of these {d}-dimensional latents"
    base, ladder = figures["log_prob_base"], figures["log_prob_held_out"]
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


def _key_figures(
    subject: Subject, figures: Mapping[str, Any], measured: sections.Measured
) -> Iterator[tuple[str, str, str]]:
    """Name, value and remark of each key figure."""
    base, ladder = figures["log_prob_base"], figures["log_prob_held_out"]
    if ladder is not None:
        before = "rows held out while learning" if base is None else f"base {number(base, 2)}; held out while learning"
        yield "validation log density, nats", number(ladder, 2), before
    if measured.log_density:
        first, last = measured.log_density[0], measured.log_density[-1]
        text = f"± {number(last.stderr, 2)}; base {number(first.value, 2)}"
        yield f"log density of {subject.rows_name}, nats", number(last.value, 2), text
    ends = figures["bracket"]
    text = f"± {number(figures['log_normalizer_stderr'], 4)}"
    if ends:
        text += f"; bracket {number(ends['forward'])} to {number(ends['reverse'])}"
    yield "log Z, nats", number(figures["log_normalizer"], 4), text
    if measured.auc is not None:
        yield "two-sample AUC", number(measured.auc.auc), f"± {number(measured.auc.stderr)}; 0.5 is best"
    reason = figures["stopped"]
    yield "stages", str(len(figures["stages"])), f"ended: {STOPPED.get(reason, reason)}" if reason else ""
    if figures["total_seconds"] is not None:
        yield "time to learn, s", number(figures["total_seconds"], 0), ""


def _cautions(subject: Subject, figures: Mapping[str, Any], measured: sections.Measured) -> Iterator[str]:
    """Warn of what a reader should know before trusting the rest."""
    ends, stages = subject.prior.bracket, subject.prior.stages
    if ends is not None and ends.is_wide:
        yield (
            f"log Z differs by {number(abs(ends.width), 2)} nats between the base's and the data's end: read "
            "densities up to that constant, or use a better base."
        )
    if stages and stages[-1].gain > SATURATED_GAIN_NATS and figures["stopped"] in ("max_stages", "time_budget"):
        yield "The last stage still told data from samples almost perfectly: more stages or a better base would help."
    if measured.auc is not None and measured.auc.auc - 2 * measured.auc.stderr > TOLD_APART_AUC:
        yield f"Boosted trees tell samples from data (AUC {measured.auc.auc:.2f}): the prior has not arrived."
    if subject.held_out is not None and not subject.separate:
        yield (
            "Held-out rows were not named, so half of the given rows stand for them. The prior may have been learned "
            "on both halves: densities and AUC are then flattering."
        )


def _settings(subject: Subject, figures: Mapping[str, Any], seed: int) -> Iterator[tuple[str, str]]:
    """List everything that decides the outcome, and versions."""
    yield from _choices(subject)
    for name, part in (
        ("training rows", subject.rows),
        ("held-out rows", subject.held_out if subject.separate else None),
    ):
        yield name, "not given" if part is None else f"{part.name}: {len(part.z):,} used"
    yield "seed of this report", str(seed)
    here = {"latentprior": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name, versions in (("learned with", figures["versions"]), ("reported with", here)):
        if isinstance(versions, Mapping):
            yield name, ", ".join(f"{k} {v}" for k, v in versions.items())


def _choices(subject: Subject) -> Iterator[tuple[str, str]]:
    """List how prior and model are made."""
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
