"""What the page asks of a prior or model: samples by stage, walks, scores, tilts, each as one JSON object."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..density.prior import LatentPrior
from ..errors import LatentPriorError
from ..models.interpolation import latent_path
from ..models.model import LatentVariableModel
from ..report.evidence import StageDraws, plane_limits, principal_axes, shown_stages, stage_draws
from ..report.png import data_uri, grid
from ..report.sources import load_folder
from ..runtime.seeding import derived_generator
from . import calibration as calibrations
from .calibration import Calibration
from .properties import Brightness, Classes, Towards, fit_brightness, fit_classes, tilted_draws
from .requests import Fields, Refused

__all__ = ["Explorer", "open_explorer"]

MOST_IMAGES, MOST_POINTS, MOST_STEPS = 64, 256, 24
MOST_PIXELS = 1 << 22
"""Most numbers in the images of one answer."""
MOST_SEED = 2**53 - 1
"""The largest whole number that every browser keeps exactly."""
POOL = 1024
"""Draws of the prior that tilts begin at."""
KEPT = 8
"""Sets of samples that are kept, so that the slider of stages draws once."""
BACKGROUND = 600


class Tilt(NamedTuple):
    """A way to tilt: what it does and the range of its strength."""

    text: str
    low: float
    high: float


TOWARDS = Tilt("towards the chosen one", 0.0, 5.0)
BRIGHTNESS = Tilt("brightness of the image", -5.0, 5.0)
CLASS = Tilt("one class", 0.0, 5.0)


class Explorer:
    """A prior, its model if there is one, and what scores are held against.

    Methods take the fields of a request and return what the answer's JSON holds; they raise
    :class:`~latentprior.explorer.requests.Refused`. One thread at a time may call them.
    """

    def __init__(
        self, prior: LatentPrior, model: LatentVariableModel | None, calibration: Calibration, name: str
    ) -> None:
        self.prior, self.model, self.calibration, self.name = prior, model, calibration, name
        self.dim = math.prod(prior.event_shape)
        self.stages = shown_stages(prior.ladder.length)
        self.image_shape = None if model is None else image_shape(model)
        pixels = 1 if self.image_shape is None else math.prod(self.image_shape)
        self.most = MOST_POINTS if model is None else max(2, min(MOST_IMAGES, MOST_PIXELS // pixels))
        self._kept: OrderedDict[tuple[int, int], list[StageDraws]] = OrderedDict()

    @cached_property
    def info(self) -> dict[str, Any]:
        """What the page needs to know before it asks for anything."""
        found: dict[str, Any] = {
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
            "tilts": {
                name: {"text": tilt.text, "low": tilt.low, "high": tilt.high} for name, tilt in self.tilts.items()
            },
            "classes": None if self.classes is None else self.classes.names,
            "classes_accuracy": None if self.classes is None else self.classes.accuracy,
            "most": {"n": self.most, "steps": min(MOST_STEPS, self.most), "seed": MOST_SEED},
        }  # fmt: skip
        if self.model is None:
            found["plane"] = self._plane
            found["points"] = self._points(self._background)
        return found

    def sample(self, fields: Fields) -> dict[str, Any]:
        """``n`` draws of the first ``stage`` stages by ``seed``; one seed draws stages by common random numbers."""
        n = fields.whole("n", 1, self.most, min(36, self.most))
        seed = fields.whole("seed", 0, MOST_SEED, 0)
        stage = fields.whole("stage", 0, self.stages[-1], self.stages[-1])
        fields.done()
        if stage not in self.stages:
            raise Refused(400, f"stage must be one of {', '.join(map(str, self.stages))}")
        key = (n, seed)
        if key not in self._kept:
            self._kept[key] = stage_draws(self.prior, n, seed)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        drawn = self._kept[key][self.stages.index(stage)]
        return {"stage": stage, "seed": seed, "coupled": drawn.shared, "items": self._items(drawn.z)}

    def walk(self, fields: Fields) -> dict[str, Any]:
        """``n`` latents on a path from ``start`` to ``end`` that keeps to where the prior has mass."""
        start, end = fields.latent("start", self.dim), fields.latent("end", self.dim)
        n = fields.whole("n", 2, min(MOST_STEPS, self.most), min(12, self.most))
        fields.done()
        path = latent_path(self.prior, self._latent(start), self._latent(end), n)
        return {"items": self._items(path)}

    def score(self, fields: Fields) -> dict[str, Any]:
        """Log density of a latent ``z``, and its p-value under a prior; for images see :meth:`score_image`."""
        if self.model is not None:
            raise Refused(415, "a model scores pictures: send image/png or image/jpeg")
        z = self._latent(fields.latent("z", self.dim))
        fields.done()
        (item,) = self._items(z[None])
        score = math.inf if item["log_prob"] is None else -item["log_prob"]
        return {**item, "score": _finite(score), **self._judged(score)}

    def score_image(self, x: Tensor) -> dict[str, Any]:
        """An image ``(1, C, H, W)``: reconstruction, score ``-log p(x, z)``, p-value, log density of its latent."""
        if self.model is None:
            raise Refused(415, "a prior without a decoder scores latents: send application/json with z")
        x = x.to(self.model.device, self.prior.dtype)
        z, scores = calibrations.joint_score(self.model, x)
        (item,) = self._items(z)
        score = float(scores.nan_to_num(math.inf)[0])
        error = float((self.model.decode(z).double() - x).square().mean())
        found = {"score": _finite(score), **self._judged(score), "squared_error": _finite(error)}
        return {
            "z": item["z"], "log_prob": item["log_prob"], "image": data_uri(grid(x)),
            "reconstruction": item["image"], **found,
        }  # fmt: skip

    def tilt(self, fields: Fields) -> dict[str, Any]:
        """``n`` draws of the prior tilted by a property, with the tilt's log normaliser in nats.

        ``before`` and ``after`` are means of the property: brightness in [-1, 1], the probability of the class, or
        the root mean square distance a standardised coordinate to the latent ``z``. ``r_squared`` or ``accuracy`` say
        how well the property was read off latents that did not fit it.
        """
        name = fields.one_of("property", self.tilts)
        strength = fields.real("strength", self.tilts[name].low, self.tilts[name].high)
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
        n = fields.whole("n", 1, self.most, min(36, self.most))
        seed = fields.whole("seed", 0, MOST_SEED, 0)
        fields.done()
        draws = derived_generator(self.prior.device, seed, "explorer", "tilt")
        found = tilted_draws(self.prior, self._pool, g, n, draws)
        z = self.prior.whitening.unwhiten(found.u).reshape(-1, *self.prior.event_shape)
        return {
            "property": name,
            "strength": strength,
            "log_normalizer": _finite(found.log_normalizer.value),
            "log_normalizer_stderr": _finite(found.log_normalizer.stderr),
            "before": self._property(g, self._pool[:BACKGROUND]),
            "after": self._property(g, found.u),
            "r_squared": g.r_squared if isinstance(g, Brightness) else None,
            "accuracy": g.accuracy if isinstance(g, Classes) else None,
            "items": self._items(z),
        }

    @cached_property
    def tilts(self) -> Mapping[str, Tilt]:
        """The ways to tilt that are open here, by name."""
        found = {"towards": TOWARDS}
        if self.model is not None:
            found["brightness"] = BRIGHTNESS
        if self.classes is not None:
            found["class"] = CLASS
        return found

    @cached_property
    def classes(self) -> Classes | None:
        """A regression of the calibration's labels on its latents, if there are enough of both."""
        labels = self.calibration.labels
        return None if labels is None else fit_classes(self._whitened(self.calibration.z), labels)

    @cached_property
    def _pool(self) -> Tensor:
        """Draws of the prior in standardised coordinates ``(m, d)``."""
        draws = derived_generator(self.prior.device, 0, "explorer", "pool")
        return self._whitened(self.prior.sample((POOL,), generator=draws))

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
        """What the page shows of latents ``(n, *event_shape)``: an image or a point each, and its log density."""
        densities = self.prior.log_prob(z).double().cpu().tolist()
        shown: list[Any]
        if self.model is None:
            name, shown = "point", self._points(z)
        else:
            x = self.model.decode(z)
            name, shown = "image", [data_uri(grid(x[i : i + 1])) for i in range(len(x))]
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
    def _background(self) -> Tensor:
        return self.calibration.z[:BACKGROUND]

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, first principal directions and their shares of the calibration's latents; two, or one where d is 1."""
        return principal_axes(self.calibration.z, 2)

    @cached_property
    def _plane(self) -> dict[str, Any]:
        limits = plane_limits([torch.tensor(self._points(self._background), dtype=torch.float64)])
        return {"low": limits[0].tolist(), "high": limits[1].tolist(), "shares": self._axes[2].tolist()}

    def _whitened(self, z: Tensor) -> Tensor:
        return self.prior.whitening.whiten(z.flatten(1).to(self.prior.whitening.loc))

    def _latent(self, flat: Tensor) -> Tensor:
        """One latent of the event's shape from its coordinates."""
        return flat.to(self.prior.whitening.loc).reshape(self.prior.event_shape)


@torch.no_grad()
def open_explorer(
    folder: str | Path, calibration: str | Path | None = None, *, device: torch.device | str | None = None
) -> Explorer:
    """Load a saved prior or model and score what it is calibrated with.

    ``calibration`` names images for a model, latents for a prior; without it draws of the model's own stand in.
    Raises what :func:`latentprior.write_report` raises.
    """
    folder = Path(folder)
    prior, model = load_folder(folder, device)
    found: Calibration
    if model is None:
        found = calibrations.from_prior(prior) if calibration is None else _latents(prior, Path(calibration))
    elif calibration is None:
        found = calibrations.from_model(model)
    else:
        found = calibrations.from_images(model, folder, Path(calibration), image_shape(model))
    explorer = Explorer(prior, model, found, folder.absolute().name)
    _ = explorer.info
    return explorer


def image_shape(model: LatentVariableModel) -> tuple[int, ...]:
    """Shape (C, H, W) of the images that a model makes."""
    shape: Any = getattr(model.decoder, "image_shape", None)
    if shape is None:
        shape = model.decode(torch.zeros(1, *model.event_shape, dtype=model.prior.dtype, device=model.device)).shape[1:]
    return tuple(shape)


def _latents(prior: LatentPrior, source: Path) -> Calibration:
    if source.is_dir():
        raise LatentPriorError(f"{source}: is a folder; a prior without a decoder is calibrated with latents, a file")
    return calibrations.from_latents(prior, source)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
