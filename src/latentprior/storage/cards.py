"""Model cards: Markdown with front matter for the Hugging Face hub, written from what a saved prior holds."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Protocol

from torch import Tensor

from ..errors import MissingExtraError
from .checkpoint import tensors_under

__all__ = ["PICTURE", "model_card"]

PICTURE = "samples.png"
TEMPLATE = "templates/model_card.md.j2"
TAGS = ("latent-prior", "density-estimation", "density-ratio-estimation", "energy-based-model")
METHODS = {"importance": "importance sampling", "annealing": "annealing"}
"""Names of what ``NormalizerCheck.method`` may be."""
Config = Mapping[str, Any]


class Saveable(Protocol):
    """A prior or a model of images; a card is written from what is saved of it."""

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

    The card tells what was learned, base, stages with their gains, held-out log densities of base and ladder, log Z
    with its standard error and bracket, how it was made, and lines of Python that load it. Densities are in nats, in
    the user's coordinates. What is quoted from the prior is escaped.

    Parameters
    ----------
    prior_or_model : LatentPrior or LatentVariableModel
        What the card describes.
    name : str, default "my-prior"
        Title of the card, and the folder, or ``"user/name"``, from which its lines of Python load.
    license : str, optional
        Identifier in the front matter, for example ``"apache-2.0"``.
    check : bool, default True
        Whether to integrate the density from an independent one (:meth:`LatentPrior.check_normalizer`), which takes
        seconds.
    picture : str, optional
        File name of a picture that stands beside the card.

    Returns
    -------
    str
        The card, front matter included.

    Raises
    ------
    CheckpointError
        For a tilted prior, which cannot be saved either.
    MissingExtraError
        Without the extra ``hub``.

    Examples
    --------
    >>> import torch, latentprior as lp
    >>> z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    >>> card = model_card(lp.fit(z, base="normal", max_stages=0), license="mit", check=False)
    >>> card.splitlines()[:3]
    ['---', 'library_name: latentprior', 'license: mit']
    """
    config, tensors = prior_or_model.state()
    model = config if "decoder" in config else None
    prior = config if model is None else config["prior"]
    tensors = tensors_under(tensors, "" if model is None else "prior.")
    learned: Any = getattr(prior_or_model, "prior", prior_or_model)
    integral = learned.check_normalizer() if check else None
    try:
        from huggingface_hub import ModelCard, ModelCardData

        task = None if model is None else "unconditional-image-generation"
        return str(
            ModelCard.from_template(
                ModelCardData(library_name="latentprior", license=license, pipeline_tag=task, tags=list(TAGS)),
                template_str=(resources.files(__package__) / TEMPLATE).read_text(encoding="utf-8"),
                name=_text(name),
                source=json.dumps(name, ensure_ascii=False),
                decodes=model is not None,
                shape=tuple(prior["event_shape"]),
                picture=picture,
                own_parts=_own_parts(prior, model),
                facts=list(_facts(prior, tensors, model)),
                stages=[_stage(i, stage) for i, stage in enumerate(prior["stages"])],
                trust=list(_trust(prior, integral)),
            )
        )
    except ImportError:
        raise MissingExtraError("a model card", "hub") from None


def _own_parts(prior: Config, model: Config | None) -> dict[str, str]:
    """Arguments of ``from_pretrained`` for what the author made and no file holds."""
    parts = {}
    if prior["base"].get("name") == "distribution":
        parts["base" if model is None else "prior"] = "distribution"
    for part in ("decoder", "encoder") if model is not None else ():
        if model is not None and model[part] is not None and not model[part]["spec"]:
            parts[part] = part
    return parts


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
    means = [_shifted(info.get(key), tensors) for key in ("log_prob_base", "log_prob_held_out")]
    if all(mean is not None for mean in means):
        base, ladder = (_number(mean) for mean in means)
        yield "held-out log density, nats", f"base {base}, ladder {ladder}"
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
    """Convert a log density in standardised coordinates to one in the user's."""
    return float(value) + float(tensors["whitening.log_abs_det"]) if isinstance(value, (int, float)) else None


def _stage(number: int, stage: Config) -> tuple[str, ...]:
    """One row of the table of stages."""
    spec, notes = stage["spec"], stage["diagnostics"]
    network = f"{_text(spec.get('kind', '-'))} {_text(spec.get('width', '-'))} x {_text(spec.get('depth', '-'))}"
    ess = notes.get("ess")
    return (
        str(number),
        network + (", mixture features" if spec.get("features") else ""),
        _number(spec.get("bound"), 1),
        _number(notes.get("steps"), 0),
        _with_error(stage["gain"], stage["gain_stderr"]),
        _with_error(notes.get("log_prob_rise"), notes.get("log_prob_rise_stderr")),
        _with_error(stage["log_normalizer"], stage["log_normalizer_stderr"]),
        f"{ess:.1%}" if isinstance(ess, float) else "-",
    )


def _trust(prior: Config, integral: Any) -> Iterator[tuple[str, str]]:
    """Rows on the normaliser; ``integral`` is a ``NormalizerCheck`` or None."""
    normalizer = prior["normalizer"]
    yield "log Z, nats", _with_error(normalizer["value"], normalizer["stderr"], 4)
    if normalizer["bracket"]:
        forward, reverse = normalizer["bracket"]["forward"], normalizer["bracket"]["reverse"]
        yield "log Z from the base", _with_error(forward[0], forward[1], 4)
        yield "log Z from held-out data", _with_error(reverse[0], reverse[1], 4)
    if integral is not None:
        verdict = "passed" if integral.passed else "**failed: do not take the density as normalised**"
        method = METHODS.get(integral.method, _text(integral.method))
        source = f"by {method} from another density ({_text(integral.reference)}, ESS {integral.ess:.1%})"
        value = _with_error(integral.value, integral.stderr, 4)
        yield f"integral, {source}; must be 1", f"{value}, {verdict}"


def _number(value: Any, digits: int = 3) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:,.{digits}f}"


def _with_error(value: Any, stderr: Any, digits: int = 3) -> str:
    return f"{_number(value, digits)} ± {_number(stderr, digits)}"


def _text(value: Any) -> str:
    """Escape a value so that HTML and Markdown read one line of plain text."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)
