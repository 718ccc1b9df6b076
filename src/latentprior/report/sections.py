"""The parts of a report, each one function: it measures, draws, and returns what the template shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..density.prior import LatentPrior
from ..evaluation.metrics import TwoSampleTest
from ..runtime.seeding import derived_generator
from ..storage.pictures import data_uri, image_grid, png
from . import evidence
from .figures import Image, Points, chart, histogram, intervals, number, quantiles, scatter
from .sources import Subject

__all__ = ["Measured", "calibration", "copying", "measure", "oddities", "planes", "samples", "stages"]

MOST_SAMPLES = 2_000
"""Samples that are compared with as many held-out rows: an AUC with a standard error near 0.01."""
PLOTTED_POINTS = 600
COMPARED_SAMPLES = 512
"""Samples whose nearest training row is looked for; a twentieth of them is 26 samples."""
SHOWN_PAIRS = 8
SHOWN_ODD_ROWS = 12
SMALL_IMAGE = 32 * 32
"""Pixels of an image up to which a grid has 64 of them, not 36."""
CLOSE_QUANTILE, MOST_CLOSE = 0.01, 0.05
"""A sample is close to a training row if only this share of held-out rows is closer, and the share of close samples
above which the report speaks of copying: five times what chance gives."""

Part = dict[str, Any]


class Captioned(NamedTuple):
    """A picture, its title, and how to read it."""

    image: Image
    title: str = ""
    text: str = ""


@dataclass(frozen=True)
class Measured:
    """What several parts need: samples of the ladder, AUCs of ladder and base, log densities of held-out rows."""

    ladder: Tensor
    auc: TwoSampleTest | None
    base_auc: TwoSampleTest | None
    log_density: list[evidence.LogDensity]


def measure(subject: Subject, seed: int) -> Measured:
    """Draw from ladder and base, and compare both with the held-out rows."""
    prior, rows = subject.prior, subject.held_out
    n = MOST_SAMPLES if rows is None else max(64, min(MOST_SAMPLES, len(rows.z)))
    generator = derived_generator(prior.device, seed, "report", "ladder")
    ladder = prior.sample((n,), generator=generator, **subject.sampler).cpu()
    if rows is None:
        return Measured(ladder, None, None, [])
    auc = base_auc = evidence.two_sample(ladder, rows.z, seed)
    if prior.stages:
        base = prior.with_ladder(prior.ladder.first(0)).sample(
            (n,), generator=derived_generator(prior.device, seed, "report", "base")
        )
        base_auc = evidence.two_sample(base.cpu(), rows.z, seed)
    return Measured(ladder, auc, base_auc, evidence.held_out_by_stage(prior, rows.z))


def samples(subject: Subject, seed: int) -> Part:
    """Draws by stage under a slider: decoded where there is a decoder, else on the first principal plane."""
    prior, model = subject.prior, subject.model
    count = len(prior.stages)
    if model is None:
        draws, kind = evidence.stage_draws(prior, PLOTTED_POINTS, seed), "Draws of every stage"
        images = _stage_planes(subject, draws)
    else:
        small = math.prod(getattr(model.decoder, "image_shape", (1, 64, 64))[1:]) <= SMALL_IMAGE
        draws, kind = evidence.stage_draws(prior, 64 if small else 36, seed), "Images decoded from draws of every stage"
        images = []
        for draw in draws:
            with torch.no_grad():
                decoded = model.decode(draw.z)
            images.append(_picture(decoded, f"{len(draw.z)} images decoded from {_stage(draw.stage, count)}"))
    frames = []
    for draw, image in zip(draws, images, strict=True):
        note = "" if draw.shared or not count else " Drawn by itself: the base's draws hardly reach this stage."
        frames.append((Captioned(image, text=_stage_caption(prior, draw.stage) + note), _short(draw.stage, count)))
    return {"kind": kind, "count": count, "decoded": model is not None, "frames": frames}


def _stage_planes(subject: Subject, draws: Sequence[evidence.StageDraws]) -> list[Image]:
    rows, count = subject.held_out, len(subject.prior.stages)
    mean, axes, shares = evidence.principal_axes(draws[-1].z if rows is None else rows.z, 2)
    flat = [(draw.z.flatten(1).double().cpu() - mean) @ axes for draw in draws]
    data = [] if rows is None else [(rows.z[:PLOTTED_POINTS].flatten(1).double() - mean) @ axes]
    limits, names = evidence.plane_limits([*flat, *data]), _axis_names(shares)
    images = []
    for draw, z in zip(draws, flat, strict=True):
        sets = [*(Points("data", points, "data") for points in data), Points("draws", z, "model")]
        images.append(chart(_on_axes(sets, limits, names), f"{len(z)} draws of {_stage(draw.stage, count)}"))
    return images


def _on_axes(sets: Sequence[Points], limits: Tensor, names: Sequence[str]) -> Figure:
    """Points on two principal axes, or a histogram of those of a latent with one coordinate."""
    if len(names) == 1:
        return histogram([p._replace(values=p.values[:, 0]) for p in sets], "latent")
    return scatter(sets, limits, (names[0], names[1]))


def stages(subject: Subject, figures: Mapping[str, Any], measured: Measured) -> Part:
    """Gains, normalisers and held-out log density of every stage, with error bars, and all of it as a table."""
    entries, count = figures["stages"], len(subject.prior.stages)
    order = range(1, count + 1)

    def by_stage(name: str, label: str, description: str) -> Image:
        values, stderrs = ([entry[key] for entry in entries] for key in (name, f"{name}_stderr"))
        return chart(intervals(label, order, values, stderrs), description)

    if not count:
        return {"charts": [], "rows": []}
    charts = [
        Captioned(by_stage("gain", "gain, nats", "Held-out gain of every stage"), "Gain.",
                  "How well a stage told data from samples of the ladder before it: 0 if it could not, "
                  "1.386 if perfectly. Bars: two standard errors."),
        Captioned(by_stage("log_normalizer", "log normaliser, nats", "Log normaliser of every stage"),
                  "Log normaliser.", "What each log ratio is lowered by, so that the density integrates to one. "
                  "Bars: two standard errors."),
    ]  # fmt: skip
    if measured.log_density:
        means, stderrs = zip(*((d.value, d.rise_stderr) for d in measured.log_density), strict=True)
        figure = intervals("log density, nats", range(count + 1), means, stderrs, line=True)
        text = f"Mean over {subject.rows_name}; 0 is the base. Bars: two standard errors of the rise above the base."
        charts.append(Captioned(chart(figure, "Mean log density by stage"), "Log density.", text))
    rows = []
    for k, (entry, stage) in enumerate(zip(entries, subject.prior.stages, strict=True), 1):
        notes = stage.diagnostics
        # An acceptance of 1 stands for no chain at all: importance sampling drew the particles.
        acceptance = None if entry["acceptance"] == 1.0 else entry["acceptance"]
        rows.append((
            k, _error(entry["gain"], entry["gain_stderr"]),
            _error(entry["log_normalizer"], entry["log_normalizer_stderr"]),
            _error(notes.get("log_prob_rise"), notes.get("log_prob_rise_stderr")),
            _percent(entry["ess"]), _percent(acceptance), number(notes.get("steps"), 0), number(entry["seconds"], 1),
        ))  # fmt: skip
    return {"charts": charts, "rows": rows}


def planes(subject: Subject, measured: Measured) -> Part | None:
    """Data and samples of the ladder side by side on the principal planes of the data."""
    rows = subject.held_out
    if rows is None:
        return None
    mean, axes, shares = evidence.principal_axes(rows.z)
    sets = [
        Points(name, (z[:PLOTTED_POINTS].flatten(1).double() - mean) @ axes, name)
        for name, z in (("data", rows.z), ("model", measured.ladder))
    ]
    names, charts = _axis_names(shares), []
    if len(names) == 1:
        figure = _on_axes(sets, evidence.plane_limits([points.values for points in sets]), names)
        return {"text": "", "charts": [Captioned(chart(figure, "Model against data"), "Histogram.")]}
    for i in range(0, len(names) - 1, 2):
        pair = [p._replace(values=p.values[:, i : i + 2]) for p in sets]
        limits = evidence.plane_limits([points.values for points in pair])
        for points in pair:
            description = f"{points.name} on principal components {i + 1} and {i + 2}"
            charts.append(Captioned(chart(_on_axes([points], limits, names[i : i + 2]), description)))
    n = min(PLOTTED_POINTS, len(rows.z))
    text = f"{n:,} {subject.rows_name} and as many samples, on the principal components of the data."
    return {"text": text, "charts": charts}


def calibration(subject: Subject, measured: Measured) -> Part | None:
    """Whether boosted trees tell samples from data, and whether log densities of both are distributed alike."""
    rows = subject.held_out
    if rows is None:
        return None
    data, model = (_log_prob(subject.prior, z) for z in (rows.z[:MOST_SAMPLES], measured.ladder))
    sets = [Points("data", data, "data"), Points("model", model, "model")]
    figure = histogram(sets, "log density, nats")
    text = f"Of {subject.rows_name} and of samples, under the ladder. They agree where the model is right."
    charts = [Captioned(chart(figure, "Log densities of data and of samples"), "Log densities.", text)]
    if min(len(data), len(model)) >= evidence.LEAST_TEST_ROWS and data.isfinite().any():
        figure = quantiles(sets[0], sets[1], "nats")
        image = chart(figure, "Quantiles of the log densities of samples against data")
        charts.append(Captioned(image, "Quantiles, 1% to 99%.", "Dots below the line: samples less dense than data."))
    lines = []
    if measured.auc is not None:
        auc, base = measured.auc, measured.base_auc
        before = f"; for the base alone it is {base.auc:.3f} ± {base.stderr:.3f}" if base != auc and base else ""
        lines.append(f"Boosted trees tell samples from {subject.rows_name} with an AUC of {auc.auc:.3f} ± "
                     f"{auc.stderr:.3f}, where 0.5 is guessing{before}.")  # fmt: skip
    difference = float(data[data.isfinite()].mean() - model.mean())
    lines.append(f"The mean log density of {subject.rows_name} lies {number(abs(difference), 2)} nats "
                 f"{'above' if difference > 0 else 'below'} that of samples.")  # fmt: skip
    return {"lines": lines, "charts": charts}


def copying(subject: Subject, measured: Measured) -> Part | None:
    """Distances of samples to their nearest training row, beside those of held-out rows; the closest pairs."""
    train, rows, model = subject.train, subject.held_out, subject.model
    if train is None or rows is None:
        return None
    pairs = None
    if model is not None and train.images is not None and rows.images is not None:
        with torch.no_grad():
            decoded = model.decode(measured.ladder[:COMPARED_SAMPLES].to(model.device)).cpu()
            again = model.decode(rows.codes[:COMPARED_SAMPLES].to(model.device)).cpu()
        near = evidence.nearest(decoded, train.images)
        distances = {
            "samples": near.distance,
            "data": evidence.nearest(rows.images[:COMPARED_SAMPLES], train.images).distance,
            "data, decoded": evidence.nearest(again, train.images).distance,
        }
        floor, unit, what = distances["data, decoded"], "distance a pixel", "training image"
        # Copying would show in the closest pairs.
        order = near.distance.argsort(stable=True)[:SHOWN_PAIRS]
        both = torch.cat([decoded[order], train.images[near.row[order]].to(decoded)])
        image = _picture(both, f"{len(order)} samples and below each its nearest training image", len(order), "wide")
        pairs = Captioned(
            image, text=f"Top: the {len(order)} samples closest to any training image. Below each: that image."
        )
    else:
        white = subject.prior.whitening
        a, b, c = (white.whiten(z.flatten(1).to(white.loc)).cpu() for z in (measured.ladder, rows.z, train.z))
        distances = {
            name: evidence.nearest(some[:COMPARED_SAMPLES], c).distance for name, some in (("samples", a), ("data", b))
        }
        floor, unit, what = distances["data"], "distance a standardised coordinate", "training row"
    kinds = {"samples": "model", "data": "data", "data, decoded": "other"}
    figure = histogram([Points(name, values, kinds[name]) for name, values in distances.items()], unit)
    against = ("held-out rows" if subject.separate else "rows set aside") + (" after decoding" if pairs else "")
    middle, other = (float(values.median()) for values in (distances["samples"], floor))
    close = float(torch.quantile(floor.double(), CLOSE_QUANTILE))
    share = float((distances["samples"] < close).double().mean())
    verdict = "That is more than chance allows: look at the pairs." if share > MOST_CLOSE else "No sign of copying."
    text = (
        f"The nearest of {len(train.z):,} {what}s lies {number(middle)} from a sample (median), and {number(other)} "
        f"from {against}. {share:.1%} of samples are closer than the closest 1% of {against}. {verdict}"
    )
    title = f"Distance to the nearest {what}"
    return {"text": text, "pairs": pairs, "chart": Captioned(chart(figure, title), f"{title}.", "Root mean square.")}


def oddities(subject: Subject) -> Part | None:
    """Training rows of the highest anomaly score, as images where there are any."""
    rows = subject.rows
    if rows is None:
        return None
    index, scores = evidence.oddest(subject.prior, subject.model, rows, min(SHOWN_ODD_ROWS, len(rows.z)))
    joint = subject.model is not None and rows.images is not None
    formula = "−log p(x, z) at the encoder's mean" if joint else "−log p(z)"
    text = (
        f"Score: {formula}, nats, higher is odder. The oddest of {len(rows.z):,} rows of {rows.name}, numbered from 0."
    )
    numbered = list(zip(rows.numbers[index].tolist(), scores.tolist(), strict=True))
    if rows.images is None:
        return {"text": text, "rows": [(row, number(score, 2)) for row, score in numbered], "images": []}
    images = [
        (row, number(score, 1), _picture(image[None], f"Training image {row}"))
        for (row, score), image in zip(numbered, rows.images[index], strict=True)
    ]
    return {"text": text, "rows": [], "images": images}


def _picture(x: Tensor, description: str, columns: int | None = None, kind: str = "") -> Image:
    grid = image_grid(x, columns=columns, gap=1, transparent=True)
    return Image(data_uri(png(grid)), description, grid.width, grid.height, f"picture {kind}".rstrip())


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


def _error(value: float | None, stderr: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return number(value) if stderr is None else f"{number(value)} ± {number(stderr)}"


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"
