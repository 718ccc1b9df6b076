"""What a prior is made of, as the JSON and tensors of a saved one, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..errors import CheckpointError, LatentPriorError, MissingExtraError
from ..storage.checkpoint import UNFIT, tensors_under
from ..storage.sized_networks import built_for
from .bases import Base, DistributionBase, MixtureBase, base_from_state
from .decoded_ratio import StandardisedDecoder
from .ladder import Ladder, Stage
from .normalizers import Bracket, Normalizer
from .ratios import NOT_LEARNED, BoundedRatio, build_ratio
from .sampling.resampling import LogMean
from .whitening import Whitening

__all__ = ["prior_parts", "prior_state"]

STAGE_FIGURES = ("log_normalizer", "log_normalizer_stderr", "gain", "gain_stderr")
FIGURES = {"ess", "acceptance", "seconds", "total_seconds", "log_prob_base", "log_prob_held_out"}
"""Notes beside a density that are printed as numbers."""


def prior_state(
    ladder: Ladder, whitening: Whitening, event_shape: Sequence[int], normalizer: Normalizer, info: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration (JSON) and tensors from which :func:`prior_parts` rebuilds a prior.

    Raises :class:`CheckpointError` for a ladder that holds a function of the user's.
    """
    tensors = {f"whitening.{k}": v for k, v in whitening.state_dict().items()}
    if not isinstance(ladder.base, DistributionBase):
        tensors.update({f"base.{k}": v for k, v in ladder.base.state_dict().items()})
    if ladder.cover is not None:
        tensors.update({f"cover.{k}": v for k, v in ladder.cover.state_dict().items()})
    stages = []
    for i, stage in enumerate(ladder.stages):
        if not isinstance(stage.network, BoundedRatio) or not stage.network.spec:
            raise CheckpointError("a tilted prior holds a function of yours and cannot be saved: save the prior")
        tensors.update({f"stages.{i}.{k}": v for k, v in stage.network.weights().items()})
        figures = {name: getattr(stage, name) for name in STAGE_FIGURES}
        stages.append({"spec": stage.network.spec, **figures, "diagnostics": dict(stage.diagnostics)})
    config = {
        "event_shape": list(event_shape),
        "dtype": str(whitening.loc.dtype).removeprefix("torch."),
        "whitening": whitening.kind,
        "base": ladder.base.config(),
        "cover": ladder.cover and ladder.cover.config(),
        "stages": stages,
        "normalizer": _normalizer_to_json(normalizer),
        "info": info,
    }
    return config, tensors


def prior_parts(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    base: Distribution | None,
    where: str,
    decoder: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Ladder, Whitening, list[int], Normalizer, dict[str, Any]]:
    """Rebuild what :func:`prior_state` wrote: the arguments of :class:`~latentprior.LatentPrior`, in its order.

    Raises :class:`CheckpointError` where configuration and tensors do not fit together.
    """
    try:
        for name, value in tensors.items():
            if value.is_floating_point() and value.isnan().any():
                raise ValueError(f"{name} holds NaN")
        whitening = Whitening.from_state(tensors_under(tensors, "whitening."), config["whitening"])
        shape = [int(size) for size in config["event_shape"]]
        if min(shape, default=0) < 1 or math.prod(shape) != len(whitening.loc):
            raise ValueError(f"event shape {shape} for {len(whitening.loc)} coordinates")
        ladder = _ladder(config, tensors, whitening, tuple(shape), base, decoder, where)
        normalizer = _normalizer_from_json(config["normalizer"])
        if not math.isfinite(normalizer.value):
            raise ValueError("the log normaliser is not finite")
        if base is None:
            _check_numbers(ladder, normalizer, whitening)
        return ladder, whitening, shape, normalizer, _figures(config.get("info") or {})
    except (CheckpointError, MissingExtraError):
        raise
    except (LatentPriorError, *UNFIT) as error:
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: configuration and tensors do not fit together ({line})") from None


def _ladder(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    whitening: Whitening,
    shape: tuple[int, ...],
    given: Distribution | None,
    decoder: Callable[[Tensor], Tensor] | None,
    where: str,
) -> Ladder:
    """Rebuild base, cover and stages."""
    name = config["base"]["name"]
    if given is not None and name != DistributionBase.name:
        raise CheckpointError(f"{where}: its base is {str(name)[:40]!r}, saved with it: give no Distribution")
    base: Base = (
        DistributionBase(given, whitening)
        if given is not None
        else base_from_state(config["base"], tensors_under(tensors, "base."))
    )
    cover = base_from_state(config["cover"], tensors_under(tensors, "cover.")) if config["cover"] else None
    if not isinstance(cover, (MixtureBase, type(None))):
        raise CheckpointError(f"{where}: its cover is not a mixture")
    mixture = base if isinstance(base, MixtureBase) else cover
    stages = []
    for i, entry in enumerate(config["stages"]):
        spec, pictures = entry["spec"], None
        if decoder is not None and spec["kind"] == "decoded":
            pictures = StandardisedDecoder(decoder, whitening, shape, spec["pictures"])
            pictures.check()
        network = _rebuilt(spec, shape, tensors_under(tensors, f"stages.{i}."), mixture, pictures)
        network.to(whitening.loc.dtype).eval().requires_grad_(False)
        figures = {name: float(entry[name]) for name in STAGE_FIGURES}
        stages.append(Stage(network, **figures, diagnostics=_figures(entry["diagnostics"])))
    return Ladder(base, stages, cover)


@torch.no_grad()
def _check_numbers(ladder: Ladder, normalizer: Normalizer, whitening: Whitening) -> None:
    """Raise where the density is not a number: parts may each be whole and not fit one another."""
    centre = whitening.loc.new_zeros(2, len(whitening.loc))
    weights = [part.log_prob(centre) for part in (ladder.base, ladder.start)]
    value = weights[0] + ladder.log_potential(centre) - normalizer.value
    if torch.stack([value, *weights]).isnan().any():
        raise ValueError("its density is not a number")


def _rebuilt(
    spec: Mapping[str, Any],
    shape: Sequence[int],
    weights: Mapping[str, Tensor],
    mixture: MixtureBase | None,
    decoder: StandardisedDecoder | None,
) -> BoundedRatio:
    """The ratio network of a saved stage, with its weights; raises :class:`ValueError` where they are not of it."""
    if list(spec["event_shape"]) != list(shape) or not 0 <= int(spec["depth"]) <= len(weights):
        raise ValueError(f"a stage for rows of shape {spec['event_shape']}, {spec['depth']} deep")
    network = built_for(weights, lambda: build_ratio(spec, torch.Generator(), mixture, decoder), ignored=NOT_LEARNED)
    network.load_weights(weights)
    return network


def _figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Notes beside a density; those that are printed as numbers must be numbers."""
    found = dict(entry)
    for name in FIGURES & found.keys():
        if found[name] is not None:
            found[name] = float(found[name])
    return found


def _normalizer_to_json(normalizer: Normalizer) -> dict[str, Any]:
    ends = normalizer.bracket
    return {**normalizer._asdict(), "bracket": ends and {k: list(v) for k, v in ends._asdict().items()}}


def _normalizer_from_json(entry: Mapping[str, Any]) -> Normalizer:
    ends = entry["bracket"]
    bracket = ends and Bracket(LogMean(*map(float, ends["forward"])), LogMean(*map(float, ends["reverse"])))
    return Normalizer(
        float(entry["value"]), float(entry["stderr"]), float(entry["ess"]), str(entry["source"]), bracket or None
    )
