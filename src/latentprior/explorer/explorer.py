"""Answers to what the page asks of a prior or model: samples by stage, walks, scores and tilts, as JSON objects."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..density.prior import LatentPrior
from ..models.interpolation import latent_path
from ..models.model import LatentVariableModel
from ..report.evidence import plane_limits, principal_axes, shown_stages, stage_draws
from ..report.sources import load_folder
from ..runtime.seeding import derived_generator
from ..storage.pictures import data_uri, picture_grid
from .calibration import Calibration, joint_score, model_calibration, prior_calibration
from .properties import Brightness, Classes, Towards, fit_brightness, fit_classes, tilted_draws
from .requests import Fields, Refused

__all__ = ["Explorer", "open_explorer"]

# The page shows 40 images or 200 points and walks of 10 steps; the limits leave room for other programs.
MAX_IMAGES = 64
MAX_POINTS = 256
MAX_STEPS = 24
MAX_PIXELS = 1 << 22
"""The numbers in the images of one answer, 16 MiB of float32."""
MAX_SEED = 2**53 - 1
"""The largest whole number that JavaScript keeps exactly."""
DEFAULT_SAMPLES = 36
DEFAULT_STEPS = 12
TILT_PARTICLES = 1024
"""The draws of the prior that tilts begin at; properties.ISLANDS divides it."""
MAX_SAMPLE_SETS = 8
"""The sets of samples that are remembered, so that the slider of stages draws once for all its positions."""
BACKGROUND_POINTS = 600
"""The latents that are shown behind the samples, and those that the mean of a property is taken over."""
TILTS: dict[str, dict[str, Any]] = {
    "towards": {"text": "towards the chosen one", "low": 0.0, "high": 5.0},
    "brightness": {"text": "brightness of the image", "low": -5.0, "high": 5.0},
    "class": {"text": "one class", "low": 0.0, "high": 5.0},
}
"""The ways to tilt: what the page calls them, and the smallest and the largest strength."""


class Explorer:
    """Answers the page for one prior, with its model if there is one.

    The methods take the fields of a request, return the content of the answer's JSON and raise
    :class:`~latentprior.explorer.requests.Refused`. Only one thread at a time may call them.
    """

    def __init__(
        self, prior: LatentPrior, model: LatentVariableModel | None, calibration: Calibration, name: str
    ) -> None:
        self.prior, self.model, self.calibration, self.name = prior, model, calibration, name
        self.dim = math.prod(prior.event_shape)
        self.stages = shown_stages(prior.ladder.length)
        self.image_shape = None if model is None else model.image_shape
        pixels = 1 if self.image_shape is None else math.prod(self.image_shape)
        self.max_samples = MAX_POINTS if model is None else max(2, min(MAX_IMAGES, MAX_PIXELS // pixels))
        self._draws = lru_cache(MAX_SAMPLE_SETS)(partial(stage_draws, prior))

    @cached_property
    def info(self) -> dict[str, Any]:
        """What the page needs to know before it asks for anything."""
        content: dict[str, Any] = {
            "kind": "prior" if self.model is None else "model",
            "name": self.name,
            "event_shape": list(self.prior.event_shape),
            "image_shape": None if self.image_shape is None else list(self.image_shape),
            "base": self.prior.base.name,
            "stages": self.stages,
            "log_prob_stderr": self.prior.log_prob_stderr,
            "calibration": {
                "n": len(self.calibration.scores), "data": self.calibration.data, "text": self.calibration.text
            },
            "tilts": self.tilts,
            "classes": None if self.classes is None else self.classes.names,
            "classes_accuracy": None if self.classes is None else self.classes.accuracy,
            "most": {"n": self.max_samples, "steps": min(MAX_STEPS, self.max_samples), "seed": MAX_SEED},
        }  # fmt: skip
        if self.model is None:
            points = self._points(self.calibration.z[:BACKGROUND_POINTS])
            low, high = plane_limits([torch.tensor(points, dtype=torch.float64)]).tolist()
            content["plane"] = {"low": low, "high": high, "shares": self._axes[2].tolist()}
            content["points"] = points
        return content

    def sample(self, fields: Fields) -> dict[str, Any]:
        """Draw ``n`` rows of the first ``stage`` stages; one ``seed`` draws all stages by common random numbers."""
        n = fields.whole("n", 1, self.max_samples, min(DEFAULT_SAMPLES, self.max_samples))
        seed = fields.whole("seed", 0, MAX_SEED, 0)
        stage = fields.whole("stage", 0, self.stages[-1], self.stages[-1])
        fields.done()
        if stage not in self.stages:
            raise Refused(400, f"stage must be one of {', '.join(map(str, self.stages))}")
        drawn = self._draws(n, seed)[self.stages.index(stage)]
        return {"stage": stage, "seed": seed, "coupled": drawn.shared, "items": self._items(drawn.z)}

    def walk(self, fields: Fields) -> dict[str, Any]:
        """Return a path of ``n`` latents from ``start`` to ``end`` that keeps to where the prior has mass."""
        start, end = fields.latent("start", self.dim), fields.latent("end", self.dim)
        n = fields.whole("n", 2, min(MAX_STEPS, self.max_samples), min(DEFAULT_STEPS, self.max_samples))
        fields.done()
        path = latent_path(self.prior, self._latent(start), self._latent(end), n)
        return {"items": self._items(path)}

    def score(self, fields: Fields) -> dict[str, Any]:
        """Return the log density of a latent ``z`` and its p-value; :meth:`score_image` scores an image."""
        if self.model is not None:
            raise Refused(415, "a model scores pictures: send image/png or image/jpeg")
        z = self._latent(fields.latent("z", self.dim))
        fields.done()
        (item,) = self._items(z[None])
        score = math.inf if item["log_prob"] is None else -item["log_prob"]
        return {**item, "score": _finite(score), **self._judged(score)}

    def score_image(self, x: Tensor) -> dict[str, Any]:
        """Return the reconstruction of an image ``(1, C, H, W)`` in [-1, 1], its score ``-log p(x, z)`` and p-value."""
        if self.model is None:
            raise Refused(415, "a prior without a decoder scores latents: send application/json with z")
        x = x.to(self.model.device, self.prior.dtype)
        z, scores = joint_score(self.model, x)
        (item,) = self._items(z)
        score = float(scores.nan_to_num(math.inf)[0])
        error = float((self.model.decode(z).double() - x).square().mean())
        return {
            "z": item["z"],
            "log_prob": item["log_prob"],
            "image": data_uri(picture_grid(x)),
            "reconstruction": item["image"],
            "score": _finite(score),
            **self._judged(score),
            "squared_error": _finite(error),
        }

    def tilt(self, fields: Fields) -> dict[str, Any]:
        """Draw from the prior tilted by a property, and return the log normaliser of the tilt in nats.

        ``before`` and ``after`` are means of the property: the brightness in [-1, 1], the probability of the class, or
        the root mean square distance of a standardised coordinate from that of the latent ``z``. ``r_squared`` and
        ``accuracy`` say how well the property was read off latents that did not fit it.
        """
        name = fields.one_of("property", self.tilts)
        strength = fields.real("strength", TILTS[name]["low"], TILTS[name]["high"])
        g: nn.Module
        if name == "towards":
            z = self._latent(fields.latent("z", self.dim))
            g = Towards(self.prior.whitening.whiten(z.reshape(1, -1)), strength)
        elif name == "brightness":
            g = self._brightness.at(strength)
        else:
            assert self.classes is not None
            label = fields.whole("class", self.classes.names[0], self.classes.names[-1])
            if label not in self.classes.names:
                raise Refused(400, f"class must be one of {', '.join(map(str, self.classes.names))}")
            g = self.classes.at(label, strength)
        n = fields.whole("n", 1, self.max_samples, min(DEFAULT_SAMPLES, self.max_samples))
        seed = fields.whole("seed", 0, MAX_SEED, 0)
        fields.done()
        draws = derived_generator(self.prior.device, seed, "explorer", "tilt")
        tilted = tilted_draws(self.prior, self._pool, g, n, draws)
        z = self.prior.whitening.unwhiten(tilted.u).reshape(-1, *self.prior.event_shape)
        return {
            "property": name,
            "strength": strength,
            "log_normalizer": _finite(tilted.log_normalizer.value),
            "log_normalizer_stderr": _finite(tilted.log_normalizer.stderr),
            "before": self._property(g, self._pool[:BACKGROUND_POINTS]),
            "after": self._property(g, tilted.u),
            "r_squared": g.r_squared if isinstance(g, Brightness) else None,
            "accuracy": g.accuracy if isinstance(g, Classes) else None,
            "items": self._items(z),
        }

    @cached_property
    def tilts(self) -> dict[str, dict[str, Any]]:
        """Those of :data:`TILTS` that are possible here."""
        possible = {"towards": True, "brightness": self.model is not None, "class": self.classes is not None}
        return {name: tilt for name, tilt in TILTS.items() if possible[name]}

    @cached_property
    def classes(self) -> Classes | None:
        """A regression of the calibration's labels on its latents, if there are enough of both."""
        labels = self.calibration.labels
        return None if labels is None else fit_classes(self._whitened(self.calibration.z), labels)

    @cached_property
    def _pool(self) -> Tensor:
        """Draws of the prior in standardised coordinates ``(m, d)``."""
        draws = derived_generator(self.prior.device, 0, "explorer", "pool")
        return self._whitened(self.prior.sample((TILT_PARTICLES,), generator=draws))

    @cached_property
    def _brightness(self) -> Brightness:
        return fit_brightness(self._pool, self._bright(self._pool))

    def _bright(self, u: Tensor) -> Tensor:
        """Mean pixel of the decoded latents, ``(n, d) -> (n,)``."""
        assert self.model is not None
        z = self.prior.whitening.unwhiten(u).reshape(-1, *self.prior.event_shape)
        return self.model.decode(z).flatten(1).mean(1)

    def _property(self, g: nn.Module, u: Tensor) -> float | None:
        if isinstance(g, Towards):
            return _finite(float((u - g.centre).square().mean(1).sqrt().mean()))
        if isinstance(g, Classes):
            return _finite(float(g.log_probability(u).exp().mean()))
        return _finite(float(self._bright(u).mean()))

    def _judged(self, score: float) -> dict[str, Any]:
        return {"p_value": self.calibration.p_value(score), "calibration": self.calibration.text}

    def _items(self, z: Tensor) -> list[dict[str, Any]]:
        """Return what the page shows of each latent in ``(n, *event_shape)``: an image or a point, its log density."""
        densities = self.prior.log_prob(z).double().cpu().tolist()
        shown: list[Any]
        if self.model is None:
            name, shown = "point", self._points(z)
        else:
            x = self.model.decode(z)
            name, shown = "image", [data_uri(picture_grid(x[i : i + 1])) for i in range(len(x))]
        rows = z.flatten(1).double().cpu().tolist()
        return [
            # Nine digits give back a float32 exactly.
            {"z": [float(f"{v:.9g}") for v in row], "log_prob": _finite(density), name: picture}
            for row, density, picture in zip(rows, densities, shown, strict=True)
        ]

    def _points(self, z: Tensor) -> list[list[float]]:
        mean, directions, _ = self._axes
        points = (z.flatten(1).double().cpu() - mean) @ directions
        return [[float(f"{v:.5g}") for v in row] for row in points.tolist()]

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, the first two principal directions (one if d is 1), and their shares for the calibration."""
        return principal_axes(self.calibration.z, 2)

    def _whitened(self, z: Tensor) -> Tensor:
        return self.prior.whitening.whiten(z.flatten(1).to(self.prior.whitening.loc))

    def _latent(self, flat: Tensor) -> Tensor:
        """One latent of the event's shape from its coordinates."""
        return flat.to(self.prior.whitening.loc).reshape(self.prior.event_shape)


@torch.no_grad()
def open_explorer(
    folder: str | Path, calibration: str | Path | None = None, *, device: torch.device | str | None = None
) -> Explorer:
    """Load a saved prior or model, and score the images or latents that new ones are held against.

    Without ``calibration`` draws of the model or prior stand in. The errors are those of
    :func:`latentprior.write_report`.
    """
    folder = Path(folder)
    prior, model = load_folder(folder, device)
    source = None if calibration is None else Path(calibration)
    scores = prior_calibration(prior, source) if model is None else model_calibration(model, folder, source)
    explorer = Explorer(prior, model, scores, folder.absolute().name)
    _ = explorer.info
    return explorer


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
