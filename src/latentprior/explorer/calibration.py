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
from ..report.sources import check_images_fit, check_latents_fit, may_have_parts
from ..runtime.seeding import derived_generator

__all__ = ["Calibration", "joint_score", "model_calibration", "prior_calibration"]

MAX_ROWS = 2000
"""The images or latents that a p-value is held against: it can then be as small as 1 / 2,001."""
MAX_ROWS_WITHOUT_ENCODER = 200
"""The same where an optimiser has to find the latent of each image, which takes far longer."""
MAX_MODEL_DRAWS = 1000
"""The draws of a model with an encoder that stand in for images: decoding them takes time as well."""


@dataclass(frozen=True)
class Calibration:
    """Scores ``(m,)`` in ascending order that a new one is held against; ``text`` says whose they are.

    ``data`` is true for scores of the user's data, false for those of draws. The latents ``z``, ``(m, *event_shape)``,
    and their classes have an order of their own.
    """

    scores: Tensor
    text: str
    data: bool
    z: Tensor
    labels: Tensor | None = None

    def p_value(self, score: float) -> float:
        r"""Return :math:`(1 + \#\{i : s_i \ge s\}) / (m + 1)`, which is small for odd rows.

        For a row drawn like the m others :math:`P(p \le \alpha) \le \alpha` (Vovk, Gammerman and Shafer 2005).
        """
        return float(1 + (self.scores >= score).sum()) / (len(self.scores) + 1)


def joint_score(model: LatentVariableModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents of images ``(n, C, H, W)``, and their scores ``-log p(x, z)`` in nats on the CPU, ``(n,)``.

    The latents are the encoder's means, or the most probable ones where there is no encoder.
    """
    if model.encoder is not None:
        z = model.infer(x, method="encoder")
    else:
        z = model.infer(x, method="map", generator=derived_generator(model.device, 0, "explorer", "starts"))
    return z, model.anomaly_score(x, kind="joint", z=z).double().cpu()


def model_calibration(model: LatentVariableModel, folder: Path, source: Path | None) -> Calibration:
    r"""Score images of a source by ``-log p(x, z)``, or else draws :math:`x = g(z) + \sigma\varepsilon` of the model.

    P-values against draws say what is odd for the model, not what is odd for the data. The recipe in the folder may
    name the size of images; of a source in splits the split ``test`` is read.
    """
    if source is not None:
        images, split = _held_out(source, image_size(folder))
        check_images_fit(model, images, source)
        most = MAX_ROWS_WITHOUT_ENCODER if model.encoder is None else MAX_ROWS
        order = torch.randperm(len(images), generator=derived_generator(torch.device("cpu"), 0, "explorer", "images"))
        chosen = images.subset(order[:most])
        parts = [joint_score(model, x) for x in chosen.batches(ROWS, device=model.device)]
        return _sorted(parts, f"images of {source.name}{split}", True, chosen.labels)
    most = MAX_ROWS_WITHOUT_ENCODER if model.encoder is None else MAX_MODEL_DRAWS
    draws = derived_generator(model.device, 0, "explorer", "calibration")
    z = model.prior.sample((most,), generator=draws, **model.sampler)
    parts = []
    for block in z.split(ROWS):
        x = model.decode(block)
        noise = torch.randn(x.shape, generator=draws, device=x.device, dtype=x.dtype)
        parts.append(joint_score(model, x + model.sigma * noise))
    return _sorted(parts, "samples of the model with its pixel noise", False)


def prior_calibration(prior: LatentPrior, source: Path | None) -> Calibration:
    """Score latents of a file by ``-log p(z)``, or else draws of the prior."""
    if source is None:
        z = prior.sample((MAX_ROWS,), generator=derived_generator(prior.device, 0, "explorer", "calibration"))
        return _sorted([(z, -prior.log_prob(z).double().cpu())], "samples of the prior", False)
    if source.is_dir():
        raise InvalidLatentsError(f"{source}: is a folder; a prior without a decoder takes latents, one file")
    latents = as_latents(source)
    check_latents_fit(prior, latents, source)
    draws = derived_generator(torch.device("cpu"), 0, "explorer", "latents")
    rows = torch.randperm(len(latents), generator=draws)[:MAX_ROWS]
    z = latents.draw(rows, draws, dtype=prior.dtype).reshape(-1, *prior.event_shape).to(prior.device)
    return _sorted([(z, -prior.log_prob(z).double().cpu())], f"rows of {source.name}", True)


def _sorted(parts: list[tuple[Tensor, Tensor]], text: str, data: bool, labels: Tensor | None = None) -> Calibration:
    z, scores = (torch.cat(some) for some in zip(*parts, strict=True))
    scores = scores.nan_to_num(torch.inf).sort().values
    return Calibration(scores, f"{len(scores):,} {text}", data, z, labels)


def _held_out(source: Path, size: int | None) -> tuple[Images, str]:
    if may_have_parts(source):
        with contextlib.suppress(InvalidImagesError):
            return read_images(source, size=size, split="test"), " (test)"
    return read_images(source, size=size), ""
