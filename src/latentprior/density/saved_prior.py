"""What a prior is made of, as the JSON and tensors of a saved one, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..errors import CheckpointError, LatentPriorError, MissingExtraError
from ..storage.checkpoint import UNFIT, tensors_under
from ..storage.sized_networks import built_for
from .bases import (
    Base,
    DistributionBase,
    MixtureBase,
    base_from_state,
)
from .decoded_ratio import Decoder
from .ladder import Ladder, Stage
from .normalizers import Bracket, Normalizer
from .ratios import NOT_LEARNED, BoundedRatio, build_ratio
from .sampling.resampling import LogMean
from .whitening import Whitening

__all__ = ["PriorParts"]

FIGURES = {"ess", "acceptance", "seconds", "total_seconds", "log_prob_base", "log_prob_held_out"}
"""Notes beside a density that are printed as numbers."""


@dataclass(frozen=True)
class PriorParts:
    """All that a :class:`~latentprior.LatentPrior` is made of."""

    base: Base
    stages: Sequence[Stage]
    whitening: Whitening
    event_shape: Sequence[int]
    normalizer: Normalizer
    info: Mapping[str, Any]
    cover: MixtureBase | None

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (JSON) and tensors from which :meth:`from_state` rebuilds the parts."""
        stages = []
        tensors = {f"whitening.{k}": v for k, v in self.whitening.state_dict().items()}
        if not isinstance(self.base, DistributionBase):
            tensors.update({f"base.{k}": v for k, v in self.base.state_dict().items()})
        if self.cover is not None:
            tensors.update({f"cover.{k}": v for k, v in self.cover.state_dict().items()})
        for i, stage in enumerate(self.stages):
            if not isinstance(stage.network, BoundedRatio) or not stage.network.spec:
                raise CheckpointError("a tilted prior holds a function of yours and cannot be saved: save the prior")
            spec = stage.network.spec
            tensors.update({f"stages.{i}.{k}": v for k, v in stage.network.weights().items()})
            stages.append(
                {
                    "spec": spec,
                    "log_normalizer": stage.log_normalizer,
                    "log_normalizer_stderr": stage.log_normalizer_stderr,
                    "gain": stage.gain,
                    "gain_stderr": stage.gain_stderr,
                    "diagnostics": dict(stage.diagnostics),
                }
            )
        config = {
            "event_shape": list(self.event_shape),
            "dtype": str(self.whitening.loc.dtype).removeprefix("torch."),
            "whitening": self.whitening.kind,
            "base": self.base.config(),
            "cover": self.cover and self.cover.config(),
            "stages": stages,
            "normalizer": _normalizer_to_json(self.normalizer),
            "info": self.info,
        }
        return config, tensors

    @classmethod
    def from_state(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        base: Distribution | None,
        where: str,
        decoder: Callable[[Tensor], Tensor] | None = None,
    ) -> PriorParts:
        """Rebuild from :meth:`state`; raises :class:`CheckpointError` where the two do not fit together."""
        try:
            for name, value in tensors.items():
                if value.is_floating_point() and value.isnan().any():
                    raise ValueError(f"{name} holds NaN")
            whitening = Whitening.from_state(tensors_under(tensors, "whitening."), config["whitening"])
            shape = [int(size) for size in config["event_shape"]]
            if min(shape, default=0) < 1 or math.prod(shape) != len(whitening.loc):
                raise ValueError(f"event shape {shape} for {len(whitening.loc)} coordinates")
            if base is not None and config["base"]["name"] != DistributionBase.name:
                raise CheckpointError(
                    f"{where}: its base is {str(config['base']['name'])[:40]!r}, saved with it: give no Distribution"
                )
            start: Base = (
                DistributionBase(base, whitening)
                if base is not None
                else base_from_state(config["base"], tensors_under(tensors, "base."))
            )
            cover = base_from_state(config["cover"], tensors_under(tensors, "cover.")) if config["cover"] else None
            if not isinstance(cover, (MixtureBase, type(None))):
                raise CheckpointError(f"{where}: its cover is not a mixture")
            mixture = start if isinstance(start, MixtureBase) else cover
            stages = []
            for i, entry in enumerate(config["stages"]):
                spec, learned = entry["spec"], tensors_under(tensors, f"stages.{i}.")
                sees = None
                if decoder is not None and spec["kind"] == "decoded":
                    sees = Decoder(decoder, whitening, tuple(shape), spec["pictures"])
                    sees.check()
                network = _rebuilt(spec, shape, learned, mixture, sees)
                network.to(whitening.loc.dtype)
                figures = {
                    k: float(entry[k]) for k in ("log_normalizer", "log_normalizer_stderr", "gain", "gain_stderr")
                }
                diagnostics = _figures(entry["diagnostics"])
                stages.append(Stage(network.eval().requires_grad_(False), **figures, diagnostics=diagnostics))
            normalizer = _normalizer_from_json(config["normalizer"])
            if not math.isfinite(normalizer.value):
                raise ValueError("the log normaliser is not finite")
            info = _figures(config.get("info") or {})
            ladder = Ladder(start, [stage.network for stage in stages], cover)
            if base is None:
                # Parts may each be whole and not fit one another.
                with torch.no_grad():
                    centre = whitening.loc.new_zeros(2, len(whitening.loc))
                    weights = [part.log_prob(centre) for part in (start, ladder.start)]
                    value = start.log_prob(centre) + ladder.log_potential(centre) - normalizer.value
                    if torch.stack([value, *weights]).isnan().any():
                        raise ValueError("its density is not a number")
            return cls(start, stages, whitening, shape, normalizer, info, cover)
        except (CheckpointError, MissingExtraError):
            raise
        except (LatentPriorError, *UNFIT) as error:
            line = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{where}: configuration and tensors do not fit together ({line})") from None


def _rebuilt(
    spec: Mapping[str, Any],
    shape: Sequence[int],
    weights: Mapping[str, Tensor],
    mixture: MixtureBase | None,
    decoder: Decoder | None,
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
        float(entry["value"]),
        float(entry["stderr"]),
        float(entry["ess"]),
        str(entry["source"]),
        bracket or None,
    )
