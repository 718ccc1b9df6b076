"""The parts of a report, each one function: what is measured, drawn, and said about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..density.prior import LatentPrior
from ..evaluation.metrics import TwoSampleTest
from ..runtime.seeding import derived_generator
from . import evidence, png
from .figures import Points, histogram, intervals, number, quantiles, scatter
from .markup import Markup, tag
from .sources import Rows, Subject

__all__ = ["Measured", "calibration", "copying", "measure", "oddities", "planes", "samples", "stages"]

SAMPLES = 2_000
SHOWN_POINTS = 600
COPIES = 512
PAIRS = 8
ODD = 12


@dataclass(frozen=True)
class Measured:
    """What several parts need: samples of ladder and base, AUCs, log densities by stage of the held-out rows."""

    ladder: Tensor
    base: Tensor
    auc: TwoSampleTest | None
    base_auc: TwoSampleTest | None
    log_density: list[evidence.LogDensity]


def measure(subject: Subject, seed: int) -> Measured:
    """Draw from ladder and base, and hold them against the held-out rows."""
    prior, rows = subject.prior, subject.held_out
    n = SAMPLES if rows is None else max(64, min(SAMPLES, len(rows.z)))
    draws = [derived_generator(prior.device, seed, "report", use) for use in ("ladder", "base")]
    ladder = prior.sample((n,), generator=draws[0], **subject.sampler).cpu()
    base = prior.with_ladder(prior.ladder.first(0)).sample((n,), generator=draws[1]).cpu() if prior.stages else ladder
    if rows is None:
        return Measured(ladder, base, None, None, [])
    auc = evidence.two_sample(ladder, rows.z, seed)
    base_auc = evidence.two_sample(base, rows.z, seed) if prior.stages else auc
    return Measured(ladder, base, auc, base_auc, evidence.held_out_by_stage(prior, rows.z))


def rows_name(subject: Subject) -> str:
    """What to call the rows that samples are held against."""
    return "held-out rows" if subject.separate else "given rows"


def absent(what: str, options: str) -> Markup:
    """A line that says which option would have filled this part."""
    return tag("p", f"{what} Run the command again with ", tag("code", options), ".", class_="quiet")


def section(title: str, *children: object) -> Markup:
    """A part with its heading."""
    return tag("section", tag("h2", title), *children)


def figure(chart: Markup, title: str, text: str = "") -> Markup:
    """A chart under which its title and how to read it stand."""
    return tag("figure", chart, tag("figcaption", tag("b", title), f" {text}" if text else None))


def samples(subject: Subject, seed: int) -> Markup:
    """Draws by stage under a slider: decoded where there is a decoder, else on the first principal plane."""
    prior, model = subject.prior, subject.model
    count = len(prior.stages)
    pictured = model is not None
    if model is not None:
        small = math.prod(getattr(model.decoder, "image_shape", (1, 64, 64))[1:]) <= 32 * 32
        draws = evidence.stage_draws(prior, 64 if small else 36, seed)
    else:
        draws = evidence.stage_draws(prior, SHOWN_POINTS, seed)
    if model is not None:
        with torch.no_grad():
            shown = [_picture(model.decode(draw.z), f"{len(draw.z)} images decoded from {_stage(draw.stage, count)}")
                     for draw in draws]  # fmt: skip
        kind = "Images decoded from draws of every stage"
    else:
        shown, kind = _stage_planes(subject, draws), "Draws of every stage"
    figures = []
    for draw, picture in zip(draws, shown, strict=True):
        note = "" if draw.shared or not count else " Drawn by itself: the base's draws hardly reach this stage."
        text = _stage_caption(prior, draw.stage) + note
        figures.append(tag("figure", picture, tag("figcaption", text), data_stage=_short(draw.stage, count)))
    control = None
    if count:
        control = tag(
            "div",
            tag("label", "Stage", for_="stage"),
            tag("input", type="range", id="stage", min=0, max=len(draws) - 1, value=len(draws) - 1),
            tag("output", for_="stage"),
            class_="control",
        )
    shared = " from the same random draws, so that a place changes only where a stage changes it" if count else ""
    what = f"{kind}{shared}. Stage 0 is the base, stage {count} the whole ladder." if count else (
        "There are no stages: these are draws of the base."
    )  # fmt: skip
    missing = None
    if not pictured:
        missing = tag("p", "There is no decoder in this folder, so latents are shown, not images.", class_="quiet")
    return section("Samples by stage", tag("p", what), missing, tag("div", control, *figures, class_="stages"))


def _stage_planes(subject: Subject, draws: Sequence[evidence.StageDraws]) -> list[Markup]:
    rows = subject.held_out
    source = draws[-1].z if rows is None else rows.z
    mean, axes, shares = evidence.principal_axes(source, 2)
    flat = [(d.z.flatten(1).double().cpu() - mean) @ axes for d in draws]
    data = [] if rows is None else [Points("data", (rows.z[:SHOWN_POINTS].flatten(1).double() - mean) @ axes, "data")]
    count = len(subject.prior.stages)
    titles = [f"{len(d.z)} draws of {_stage(d.stage, count)}" for d in draws]
    if axes.shape[1] == 1:
        data = [Points(p.name, p.values[:, 0], p.kind) for p in data]
        return [
            histogram(title, [*data, Points("draws", z[:, 0], "model")], "latent")
            for z, title in zip(flat, titles, strict=True)
        ]
    limits = evidence.plane_limits([*flat, *(p.values for p in data)])
    labels = _axis_names(shares)
    return [
        scatter(title, [*data, Points("draws", z, "model")], limits, (labels[0], labels[1]))
        for z, title in zip(flat, titles, strict=True)
    ]


def stages(subject: Subject, found: dict[str, Any], measured: Measured) -> Markup:
    """Gains, normalisers and held-out log density of every stage, with error bars, and all of it as a table."""
    prior = subject.prior
    entries, count = found["stages"], len(prior.stages)
    if not count:
        return section("Stages", tag("p", "No stage was learned: the prior is its base, normalised by construction."))
    order = list(range(1, count + 1))
    gain = intervals(
        "Held-out gain of every stage", "gain, nats", order, *([s[k] for s in entries] for k in ("gain", "gain_stderr"))
    )
    c = intervals(
        "Log normaliser of every stage", "log normaliser, nats", order,
        *([s[k] for s in entries] for k in ("log_normalizer", "log_normalizer_stderr")),
    )  # fmt: skip
    charts = [
        figure(gain, "Gain.", "How well a stage told data from samples of the ladder before it: 0 if it could not, "
               "1.386 if perfectly. Bars: two standard errors."),
        figure(c, "Log normaliser.", "What each log ratio is lowered by, so that the density integrates to one. "
               "Bars: two standard errors."),
    ]  # fmt: skip
    if measured.log_density:
        known = measured.log_density
        chart = intervals(
            "Mean log density by stage", "log density, nats", list(range(count + 1)), [d.value for d in known],
            [d.rise_stderr for d in known], zero=False, line=True,
        )  # fmt: skip
        charts.append(figure(chart, "Log density.", f"Mean over {rows_name(subject)}; 0 is the base. Bars: two "
                             "standard errors of the rise above the base."))  # fmt: skip
    # An acceptance of 1 stands for no chain at all: importance sampling drew the particles.
    heads = ("stage", "gain", "log normaliser", "rise of log density", "ESS", "acceptance", "steps", "seconds")
    body = []
    for k, (entry, stage) in enumerate(zip(entries, prior.stages, strict=True), 1):
        notes = stage.diagnostics
        rise = _error(notes.get("log_prob_rise"), notes.get("log_prob_rise_stderr"))
        cells = (
            k, _error(entry["gain"], entry["gain_stderr"]),
            _error(entry["log_normalizer"], entry["log_normalizer_stderr"]), rise,
            _percent(entry["ess"]), _percent(None if entry["acceptance"] == 1.0 else entry["acceptance"]),
            number(notes.get("steps"), 0), number(entry["seconds"], 1),
        )  # fmt: skip
        body.append(tag("tr", *(tag("td", cell, class_="n") for cell in cells)))
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", head, scope="col", class_="n") for head in heads))),
        tag("tbody", *body),
    )
    return section(
        "Stages",
        tag("div", *charts, class_="row"),
        tag("p", "All in nats; the rise is on rows held out while learning.", class_="quiet"),
        tag("div", table, class_="table", tabindex=0, role="region", aria_label="figures of every stage"),
    )


def planes(subject: Subject, measured: Measured) -> Markup:
    """Data and samples of the ladder side by side on the principal planes of the data."""
    rows, title = subject.held_out, "Model against data"
    if rows is None:
        return section(title, absent("No data was given to hold the model against.", _options(subject)))
    mean, axes, shares = evidence.principal_axes(rows.z)
    sets = {
        "data": (rows.z[:SHOWN_POINTS].flatten(1).double() - mean) @ axes,
        "model": (measured.ladder[:SHOWN_POINTS].flatten(1).double() - mean) @ axes,
    }
    if axes.shape[1] == 1:
        pair = [Points(name, values[:, 0], name) for name, values in sets.items()]
        return section(title, tag("div", figure(histogram(title, pair, "latent"), "Histogram."), class_="row"))
    names, charts = _axis_names(shares), []
    for i in range(0, axes.shape[1] - 1, 2):
        limits = evidence.plane_limits([values[:, i : i + 2] for values in sets.values()])
        for name, values in sets.items():
            points = Points(name, values[:, i : i + 2], name)
            alt = f"{name} on principal components {i + 1} and {i + 2}"
            charts.append(tag("figure", scatter(alt, [points], limits, (names[i], names[i + 1]))))
    n = min(SHOWN_POINTS, len(rows.z))
    text = f"{n:,} {rows_name(subject)} and as many samples, on the principal components of the data."
    return section(title, tag("p", text), tag("div", *charts, class_="row pairs"))


def calibration(subject: Subject, measured: Measured) -> Markup:
    """Whether boosted trees tell samples from data, and whether log densities of both are distributed alike."""
    rows, title = subject.held_out, "Can they be told apart?"
    if rows is None:
        return section(title, absent("This part compares samples with data.", _options(subject)))
    prior = subject.prior
    data, model = (_log_prob(prior, z) for z in (rows.z[:SAMPLES], measured.ladder))
    sets = [Points("data", data, "data"), Points("model", model, "model")]
    charts = [
        figure(histogram("Log densities of data and of samples", sets, "log density, nats"), "Log densities.",
               f"Of {rows_name(subject)} and of samples, under the ladder. They agree where the model is right."),
    ]  # fmt: skip
    if min(len(data), len(model)) >= 20 and data.isfinite().any():
        chart = quantiles("Quantiles of the log densities of samples against data", sets[0], sets[1], "nats")
        charts.append(figure(chart, "Quantiles, 1% to 99%.", "Dots below the line: samples less dense than data."))
    said = []
    if measured.auc is not None:
        auc, base = measured.auc, measured.base_auc
        before = f"; for the base alone it is {base.auc:.3f} ± {base.stderr:.3f}" if base != auc and base else ""
        said.append(f"Boosted trees tell samples from {rows_name(subject)} with an AUC of {auc.auc:.3f} ± "
                    f"{auc.stderr:.3f}, where 0.5 is guessing{before}.")  # fmt: skip
    short = float(data[data.isfinite()].mean() - model.mean())
    said.append(f"The mean log density of {rows_name(subject)} lies {number(abs(short), 2)} nats "
                f"{'above' if short > 0 else 'below'} that of samples.")  # fmt: skip
    return section(title, *(tag("p", line) for line in said), tag("div", *charts, class_="row pairs"))


def copying(subject: Subject, measured: Measured) -> Markup:
    """Distances of samples to their nearest training row, beside those of held-out rows; the closest pairs."""
    title, train, rows, model = "Is it copying?", subject.train, subject.held_out, subject.model
    if train is None or rows is None:
        return section(title, absent("This part needs training rows.", _options(subject)))
    pictures = None
    if model is not None and train.images is not None and rows.images is not None:
        with torch.no_grad():
            drawn = model.decode(measured.ladder[:COPIES].to(model.device)).cpu()
            again = model.decode(rows.codes[:COPIES].to(model.device)).cpu()
        near = evidence.nearest(drawn, train.images)
        compared = {
            "samples": near.distance,
            "data": evidence.nearest(rows.images[:COPIES], train.images).distance,
            "data, decoded": evidence.nearest(again, train.images).distance,
        }
        floor, unit, what = compared["data, decoded"], "distance a pixel", "training image"
        # The closest pairs are the ones that copying would show in.
        order = near.distance.argsort(stable=True)[:PAIRS]
        both = torch.cat([drawn[order], train.images[near.row[order]].to(drawn)])
        alt = f"{len(order)} samples and below each its nearest training image"
        pictures = tag(
            "figure", _picture(both, alt, columns=len(order), wide=True),
            tag("figcaption", f"Top: the {len(order)} samples closest to any training image. Below each: that image."),
        )  # fmt: skip
    else:
        white = subject.prior.whitening
        a, b, c = (white.whiten(z.flatten(1).to(white.loc)).cpu() for z in (measured.ladder, rows.z, train.z))
        compared = {
            "samples": evidence.nearest(a[:COPIES], c).distance,
            "data": evidence.nearest(b[:COPIES], c).distance,
        }
        floor, unit, what = compared["data"], "distance a standardised coordinate", "training row"
    kinds = {"samples": "model", "data": "data", "data, decoded": "other"}
    chart = histogram(f"Distance to the nearest {what}", [Points(k, v, kinds[k]) for k, v in compared.items()], unit)
    against = ("held-out rows" if subject.separate else "rows set aside") + (" after decoding" if pictures else "")
    middle, other = (float(v.median()) for v in (compared["samples"], floor))
    close = float(torch.quantile(floor.double(), 0.01))
    share = float((compared["samples"] < close).double().mean())
    verdict = "That is more than chance allows: look at the pairs." if share > 0.05 else "No sign of copying."
    text = (
        f"The nearest of {len(train.z):,} {what}s lies {number(middle)} from a sample (median), and {number(other)} "
        f"from {against}. {100 * share:.1f}% of samples are closer than the closest 1% of {against}. {verdict}"
    )
    shown = figure(chart, f"Distance to the nearest {what}.", "Root mean square.")
    return section(title, tag("p", text), pictures, tag("div", shown, class_="row"))


def oddities(subject: Subject, rows: Rows | None) -> Markup:
    """Training rows of the highest anomaly score, as images where there are any."""
    title = "Most anomalous training points"
    if rows is None:
        return section(title, absent("This part needs training rows.", _options(subject)))
    index, scores = evidence.oddest(subject.prior, subject.model, rows, min(ODD, len(rows.z)))
    joint = subject.model is not None and rows.images is not None
    formula = "−log p(x, z) at the encoder's mean" if joint else "−log p(z)"
    text = (
        f"Score: {formula}, nats, higher is odder. The oddest of {len(rows.z):,} rows of {rows.name}, numbered from 0."
    )
    numbers = rows.numbers[index].tolist()
    if rows.images is not None:
        items = [
            tag("li", tag("figure", _picture(image[None], f"Training image {row}"),
                          tag("figcaption", f"row {row}", tag("br"), number(score, 1))))
            for image, row, score in zip(rows.images[index], numbers, scores.tolist(), strict=True)
        ]  # fmt: skip
        return section(title, tag("p", text), tag("ul", *items, class_="odd"))
    lines = [
        tag("tr", tag("td", row, class_="n"), tag("td", number(score, 2), class_="n"))
        for row, score in zip(numbers, scores.tolist(), strict=True)
    ]
    heads = tag("tr", *(tag("th", head, scope="col", class_="n") for head in ("row", "score, nats")))
    table = tag("table", tag("thead", heads), tag("tbody", *lines))
    return section(title, tag("p", text), tag("div", table, class_="table"))


def _picture(x: Tensor, alt: str, *, columns: int | None = None, wide: bool = False) -> Markup:
    canvas = png.grid(x, columns)
    return tag(
        "img", src=png.data_uri(canvas), alt=alt, width=canvas.shape[2], height=canvas.shape[1],
        class_="picture wide" if wide else "picture",
    )  # fmt: skip


def _log_prob(prior: LatentPrior, z: Tensor) -> Tensor:
    with torch.no_grad():
        return prior.log_prob(z.to(prior.device)).double().cpu()


def _stage(k: int, count: int) -> str:
    return "the base" if k == 0 else "the whole ladder" if k == count else f"the ladder's first {k} stages"


def _short(k: int, count: int) -> str:
    return f"{k} of {count}" + (" (base)" if k == 0 else " (all)" if k == count else "")


def _stage_caption(prior: LatentPrior, k: int) -> str:
    if k == 0:
        return f"Stage 0: the base, {prior.base.name}."
    stage = prior.stages[k - 1]
    return f"Stage {k}: gain {_error(stage.gain, stage.gain_stderr)} nats."


def _axis_names(shares: Tensor) -> list[str]:
    return [f"component {i} ({share:.0%})" for i, share in enumerate(shares.tolist(), 1)]


def _options(subject: Subject) -> str:
    return "--latents FILE" if subject.model is None else "--images SOURCE"


def _error(value: float | None, stderr: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return number(value) if stderr is None else f"{number(value)} ± {number(stderr)}"


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"
