"""How odd a score is: conformal p-values against data of the user, or else against samples of the model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import Images, read_images
from ..data.latents import as_latents
from ..density.prior import LatentPrior
from ..errors import InvalidImagesError, InvalidLatentsError
from ..models.model import ROWS, LatentVariableModel
from ..recipes.model_folders import image_size
from ..runtime.seeding import derived_generator

__all__ = ["Calibration", "from_images", "from_latents", "from_model", "from_prior", "inferred", "joint_score"]

ROWS_ENCODED, ROWS_CLIMBED = 2000, 200
"""Most images: with an encoder, and where each latent is climbed to."""


@dataclass(frozen=True)
class Calibration:
    """Scores ``(m,)`` to hold a new one against, sorted; ``text`` says of what, ``data`` whether of the user's rows.

    ``z`` are the latents ``(m, *event_shape)``, ``labels`` their classes if known.
    """

    scores: Tensor
    text: str
    data: bool
    z: Tensor
    labels: Tensor | None = None

    def p_value(self, score: float) -> float:
        r""":math:`(1 + \#\{i : s_i \ge s\}) / (m + 1)`: small for odd rows, 1 / (m + 1) at the least.

        For a row drawn like the m others :math:`P(p \le \alpha) \le \alpha` (Vovk, Gammerman and Shafer 2005).
        """
        return float(1 + (self.scores >= score).sum()) / (len(self.scores) + 1)


def inferred(model: LatentVariableModel, x: Tensor) -> Tensor:
    """Latents of images: the encoder's mean, or the most probable one where there is no encoder."""
    if model.encoder is not None:
        return model.infer(x, method="encoder")
    return model.infer(x, method="map", generator=derived_generator(model.device, 0, "explorer", "starts"))


def joint_score(model: LatentVariableModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of images and their scores ``-log p(x, z)`` in nats, ``(n,)`` float64 on the CPU."""
    z = inferred(model, x)
    return z, model.anomaly_score(x, kind="joint", z=z).double().cpu()


def from_images(model: LatentVariableModel, folder: Path, source: Path, shape: tuple[int, ...]) -> Calibration:
    """Score images of a source, of its split ``test`` if it has one: images that trained nothing calibrate."""
    pictures, part = _held_out(source, image_size(folder))
    if pictures.shape != shape:
        raise InvalidImagesError(
            f"{source}: images have shape {pictures.shape}, the model makes {shape}; give images like those that it "
            "was trained on"
        )
    most = ROWS_CLIMBED if model.encoder is None else ROWS_ENCODED
    order = torch.randperm(len(pictures), generator=derived_generator(torch.device("cpu"), 0, "explorer", "images"))
    chosen = pictures.subset(order[:most])
    parts = [joint_score(model, x) for x in chosen.batches(ROWS, device=model.device)]
    return _made(parts, f"images of {source.name}{part}", True, chosen.labels)


def from_model(model: LatentVariableModel) -> Calibration:
    r"""Score draws of the model, :math:`x = g(z) + \sigma\varepsilon`: odd for the model, if not for the data."""
    most = ROWS_CLIMBED if model.encoder is None else ROWS_ENCODED // 2
    draws = derived_generator(model.device, 0, "explorer", "calibration")
    z = model.prior.sample((most,), generator=draws, **model.sampler)
    parts = []
    for block in z.split(ROWS):
        x = model.decode(block)
        noise = torch.randn(x.shape, generator=draws, device=x.device, dtype=x.dtype)
        parts.append(joint_score(model, x + model.sigma * noise))
    return _made(parts, "samples of the model with its pixel noise", False)


def from_latents(prior: LatentPrior, source: Path) -> Calibration:
    """Score latents of a file by ``-log p(z)``."""
    latents = as_latents(source)
    if latents.event_shape != prior.event_shape:
        raise InvalidLatentsError(
            f"{source}: rows have shape {tuple(latents.event_shape)}, the prior was learned on "
            f"{tuple(prior.event_shape)}; give latents of the same decoder"
        )
    draws = derived_generator(torch.device("cpu"), 0, "explorer", "latents")
    rows = torch.randperm(len(latents), generator=draws)[:ROWS_ENCODED]
    z = latents.draw(rows, draws, dtype=prior.dtype).reshape(-1, *prior.event_shape).to(prior.device)
    return _made([(z, -prior.log_prob(z).double().cpu())], f"rows of {source.name}", True)


def from_prior(prior: LatentPrior) -> Calibration:
    """Score draws of the prior by ``-log p(z)``."""
    z = prior.sample((ROWS_ENCODED,), generator=derived_generator(prior.device, 0, "explorer", "calibration"))
    return _made([(z, -prior.log_prob(z).double().cpu())], "samples of the prior", False)


def _made(parts: list[tuple[Tensor, Tensor]], text: str, data: bool, labels: Tensor | None = None) -> Calibration:
    z, scores = (torch.cat(some) for some in zip(*parts, strict=True))
    scores = scores.nan_to_num(torch.inf).sort().values
    return Calibration(scores, f"{len(scores):,} {text}", data, z, labels)


def _held_out(source: Path, size: int | None) -> tuple[Images, str]:
    # A lone file of images has no parts, whatever its name.
    if source.is_dir() or source.suffix in (".npz", ".safetensors"):
        with contextlib.suppress(InvalidImagesError):
            return read_images(source, size=size, split="test"), " (test)"
    return read_images(source, size=size), ""
