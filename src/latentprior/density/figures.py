"""A prior's figures, as one JSON object and as a few lines of text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .prior import LatentPrior

__all__ = ["record", "strict_json", "text"]


def record(prior: LatentPrior) -> dict[str, Any]:
    """Every figure of a prior that can be printed: all in nats, densities in the user's coordinates."""
    ends = prior.bracket
    jacobian = float(prior.whitening.log_abs_det)
    held_out = {
        name: None if prior.info.get(name) is None else float(prior.info[name]) + jacobian
        for name in ("log_prob_base", "log_prob_held_out")
    }
    return {
        "event_shape": list(prior.event_shape),
        "base": prior.base.name,
        "stages": [
            {
                "gain": stage.gain,
                "gain_stderr": stage.gain_stderr,
                "log_normalizer": stage.log_normalizer,
                "log_normalizer_stderr": stage.log_normalizer_stderr,
                **{name: stage.diagnostics.get(name) for name in ("ess", "acceptance", "seconds")},
            }
            for stage in prior.stages
        ],
        "total_seconds": prior.info.get("total_seconds"),
        **held_out,
        "log_normalizer": prior.normalizer.value,
        "log_normalizer_stderr": prior.log_prob_stderr,
        "bracket": ends
        and {
            "forward": ends.forward.value,
            "forward_stderr": ends.forward.stderr,
            "reverse": ends.reverse.value,
            "reverse_stderr": ends.reverse.stderr,
            "width": ends.width,
        },
        "stopped": prior.info.get("stopped"),
        "versions": prior.info.get("versions"),
    }


def text(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines for people, from what :func:`record` returns."""
    stages = found["stages"]
    reason = f", ended: {found['stopped']}" if found["stopped"] else ""
    shape = tuple(found["event_shape"])
    yield f"prior on latents of shape {shape}: base {found['base']}, {_count(stages)}{reason}"
    yield ""
    if stages:
        yield "  stage       gain           log normaliser      ESS   seconds"
        for i, stage in enumerate(stages):
            gain = _with_error(stage["gain"], stage["gain_stderr"], ".3f")
            log_normalizer = _with_error(stage["log_normalizer"], stage["log_normalizer_stderr"], "+.3f")
            ess, seconds = _number(stage["ess"], ".1%"), _number(stage["seconds"], ",.1f")
            yield f"  {i:>5}   {gain:>14}   {log_normalizer:>15}   {ess:>6}   {seconds:>7}"
        yield ""
    base, ladder = found["log_prob_base"], found["log_prob_held_out"]
    if base is not None and ladder is not None:
        risen = f" ({ladder - base:+.3f})" if stages else ""
        yield f"  held-out log density   base {base:.3f}, ladder {ladder:.3f} nats{risen}"
    log_z = _with_error(found["log_normalizer"], found["log_normalizer_stderr"], ".4f")
    yield f"  log Z                  {log_z}"
    ends = found["bracket"]
    if ends:
        forward, reverse = ends["forward"], ends["reverse"]
        apart = abs(reverse - forward)
        yield f"  bracket of log Z       {forward:.4f} to {reverse:.4f}, {apart:.4f} nats apart"
    yield f"  time                   {_number(found['total_seconds'], ',.1f')} s"


def _count(stages: Sequence[object]) -> str:
    return {0: "no stages", 1: "1 stage"}.get(len(stages), f"{len(stages)} stages")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _with_error(value: float, stderr: float, form: str) -> str:
    return f"{_number(value, form)} ± {_number(stderr, form.removeprefix('+'))}"


def strict_json(found: Mapping[str, Any]) -> str:
    """One line of JSON that every parser takes: a number that is not finite becomes ``null``."""
    return json.dumps(_finite(found), allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
