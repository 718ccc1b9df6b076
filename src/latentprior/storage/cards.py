"""Model cards: Markdown with the front matter that the Hugging Face hub reads, from what is saved of a prior."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from .checkpoint import tensors_under

__all__ = ["PICTURE", "model_card"]

PICTURE = "samples.png"
TAGS = ("latent-prior", "density-estimation", "density-ratio-estimation", "energy-based-model")
Config = Mapping[str, Any]


class Saveable(Protocol):
    """A prior or a model of images: here all that counts is what is saved of it."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (JSON) and tensors."""


def model_card(
    prior_or_model: Saveable,
    *,
    name: str = "my-prior",
    license: str | None = None,
    check: bool = True,
    picture: str | None = None,
) -> str:
    """Describe a prior, or a model of images, in the Markdown of a ``README.md`` for the Hugging Face hub.

    What was learned on, base, stages with their gains, held-out log densities of base and ladder, log Z with its
    standard error and bracket, how it was made, and lines of Python that load it from ``name``. Densities are in nats,
    in the user's coordinates. What is quoted from the prior is escaped.

    Arguments
    ---------
    name : folder, or ``"user/name"``, that the lines of Python load.
    license : identifier in the front matter, ``"apache-2.0"`` say; left out unless given.
    check : whether to integrate the density from an independent one (:meth:`LatentPrior.check_normalizer`, seconds).
    picture : file name of a picture beside the card.

    Raises :class:`~latentprior.errors.CheckpointError` for a tilted prior, which cannot be saved either.

    Examples
    --------
    >>> import torch, latentprior as lp
    >>> z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    >>> card = model_card(lp.fit(z, base="normal", max_stages=0), license="mit", check=False)
    >>> card.splitlines()[:3]
    ['---', 'library_name: latentprior', 'license: "mit"']
    """
    config, tensors = prior_or_model.state()
    model = config if "decoder" in config else None
    prior = config if model is None else config["prior"]
    prefix = "" if model is None else "prior."
    tensors = tensors_under(tensors, prefix)
    learned: Any = getattr(prior_or_model, "prior", prior_or_model)
    integral = learned.check_normalizer() if check else None
    parts = [
        *_front(license, model),
        "",
        f"# {_text(name)}",
        "",
        *_introduction(prior, model),
        "",
        *([f"![Samples of the base and of the ladder]({picture})", ""] if picture else []),
        "## Use",
        "",
        "```python",
        *_usage(name, prior, model),
        "```",
        "",
        "## What was learned",
        "",
        *_table(("", ""), _facts(prior, tensors, model)),
        "",
        *_stages(prior),
        "## How far to trust the density",
        "",
        *_trust(prior, integral),
        "",
        "## Method",
        "",
        "Adaptive multi-stage density ratio estimation: Xiao and Han, NeurIPS 2022,",
        "[arXiv 2209.08739](https://arxiv.org/abs/2209.08739); bounds and normalisers are latentprior's own.",
    ]
    return "\n".join(parts) + "\n"


def _front(license: str | None, model: Config | None) -> Iterator[str]:
    yield "---"
    yield "library_name: latentprior"
    if license:
        yield f"license: {_quoted(license)}"
    if model is not None:
        yield "pipeline_tag: unconditional-image-generation"
    yield "tags:"
    yield from (f"- {tag}" for tag in TAGS)
    yield "---"


def _introduction(prior: Config, model: Config | None) -> Iterator[str]:
    shape, stages = tuple(prior["event_shape"]), len(prior["stages"])
    rungs = "no density ratio" if not stages else "1 density ratio" if stages == 1 else f"{stages} density ratios"
    if model is None:
        yield f"A prior on latents of shape `{shape}`: a base density times {rungs}."
    else:
        yield f"A decoder of images with its prior on latents of shape `{shape}`: a base density times {rungs}."
    yield "It samples, and scores with a normalised log density."


def _usage(name: str, prior: Config, model: Config | None) -> Iterator[str]:
    own = prior["base"].get("name") == "distribution"
    draws = "generator=torch.Generator().manual_seed(0)"
    kind = "LatentPrior" if model is None else "LatentVariableModel"
    given = [f"{'base' if model is None else 'prior'}=distribution"] if own else []
    for part in ("decoder", "encoder") if model is not None else ():
        if model is not None and model[part] is not None and not model[part]["spec"]:
            given.append(f"{part}={part}")
    yield "import torch"
    yield ""
    yield "import latentprior as lp"
    yield ""
    if given:
        yield f"# Of the author's own, given again: {', '.join(entry.partition('=')[2] for entry in given)}."
    subject = "prior" if model is None else "model"
    yield f"{subject} = lp.{kind}.from_pretrained({', '.join([_quoted(name), *given])})"
    if model is None:
        yield f"z = prior.sample((16,), {draws})"
        yield "print(prior.log_prob(z))  # nats, normalised"
        return
    yield f"x = model.generate(16, {draws})  # images (16, C, H, W) in [-1, 1]"
    yield f"z = model.prior.sample((16,), {draws})"
    yield "print(x.shape, model.prior.log_prob(z))  # nats, normalised"


def _facts(prior: Config, tensors: Mapping[str, Tensor], model: Config | None) -> Iterator[tuple[str, str]]:
    info = prior.get("info") or {}
    if model is not None:
        for part in ("decoder", "encoder"):
            yield part, _network(model[part])
        yield "standard deviation of a pixel", _number(model["sigma"])
    shape = tuple(prior["event_shape"])
    yield "latents", f"{shape}, {math.prod(shape)} numbers, {_text(prior['dtype'])}"
    base, weights = _text(prior["base"].get("name", "-")), tensors.get("base.log_weights")
    yield "base", base if weights is None else f"{base} of {len(weights)} components"
    yield "standardisation", _text(prior["whitening"])
    ends = [_shifted(info.get(key), tensors) for key in ("log_prob_base", "log_prob_held_out")]
    if all(end is not None for end in ends):
        low, high = (_number(end) for end in ends)
        yield "held-out log density, nats", f"base {low}, ladder {high}"
    if info.get("stopped") is not None:
        yield "learning ended by", _text(info["stopped"])
    if isinstance(info.get("total_seconds"), (int, float)):
        yield "seconds", _number(info["total_seconds"], 1)
    versions = info.get("versions")
    if isinstance(versions, Mapping):
        yield "versions", ", ".join(f"{_text(k)} {_text(v)}" for k, v in versions.items())


def _network(entry: Config | None) -> str:
    if entry is None:
        return "none"
    if not entry["spec"]:
        return "the author's own"
    return ", ".join(f"{_text(k)} {_text(v)}" for k, v in entry["spec"].items())


def _shifted(value: Any, tensors: Mapping[str, Tensor]) -> float | None:
    """A log density in standardised coordinates, as one in the user's."""
    return float(value) + float(tensors["whitening.log_abs_det"]) if isinstance(value, (int, float)) else None


def _stages(prior: Config) -> Iterator[str]:
    if not prior["stages"]:
        return
    yield "Each stage is a network that tells data from samples of the ladder before it. Its gain on held-out rows runs"
    yield "from 0 (no difference) to 1.386 nats."
    yield ""
    rows = []
    for i, stage in enumerate(prior["stages"]):
        spec, notes = stage["spec"], stage["diagnostics"]
        network = f"{_text(spec.get('kind', '-'))} {_text(spec.get('width', '-'))} x {_text(spec.get('depth', '-'))}"
        rise = _with_error(notes.get("log_prob_rise"), notes.get("log_prob_rise_stderr"))
        ess = notes.get("ess")
        rows.append(
            (
                str(i),
                network + (", mixture features" if spec.get("features") else ""),
                _number(spec.get("bound"), 1),
                _number(notes.get("steps"), 0),
                _with_error(stage["gain"], stage["gain_stderr"]),
                rise,
                _with_error(stage["log_normalizer"], stage["log_normalizer_stderr"]),
                f"{ess:.1%}" if isinstance(ess, float) else "-",
            )
        )
    head = ("stage", "network", "bound", "steps", "gain", "rise of held-out log density", "log normaliser", "ESS")
    yield from _table(head, iter(rows))
    yield ""


def _trust(prior: Config, integral: Any) -> Iterator[str]:
    found = prior["normalizer"]
    rows = [("log Z, nats", _with_error(found["value"], found["stderr"], 4))]
    if found["bracket"]:
        forward, reverse = found["bracket"]["forward"], found["bracket"]["reverse"]
        rows.append(("log Z from the base", _with_error(forward[0], forward[1], 4)))
        rows.append(("log Z from held-out data", _with_error(reverse[0], reverse[1], 4)))
    if integral is not None:
        verdict = "passed" if integral.passed else "**failed: do not take the density as normalised**"
        value = _with_error(integral.value, integral.stderr, 4)
        source = f"by importance sampling from another density ({_text(integral.reference)}, ESS {integral.ess:.1%})"
        rows.append((f"integral, {source}; must be 1", f"{value}, {verdict}"))
    yield from _table(("", ""), iter(rows))
    yield ""
    yield "Every log density carries the same unknown shift of the size of log Z's standard error."


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _number(value: Any, digits: int = 3) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:,.{digits}f}"


def _with_error(value: Any, stderr: Any, digits: int = 3) -> str:
    return f"{_number(value, digits)} ± {_number(stderr, digits)}"


def _quoted(value: str) -> str:
    """A string of Python, and of YAML, between double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    """One line that neither HTML nor Markdown reads as anything but text."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)
