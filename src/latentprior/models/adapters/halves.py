"""The two halves of a foreign autoencoder, as networks that speak images in [-1, 1]."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import LatentPriorError

__all__ = ["AdaptedDecoder", "AdaptedEncoder", "Range", "rescaled", "weight_of"]

Range = tuple[float, float]


class Half(nn.Module):
    """One half of a foreign autoencoder: its part, the method that is called, and the affine map of its latents."""

    shift: Tensor
    factor: Tensor
    latent_shape: torch.Size
    image_shape: torch.Size

    def __init__(self, part: Any, image_range: Range, method: str = "__call__") -> None:
        super().__init__()
        low, high = image_range
        if not -math.inf < low < high < math.inf:
            raise LatentPriorError(f"image_range {image_range} must be (low, high), finite, low < high")
        self.part, self.method, self.image_range = part, method, (float(low), float(high))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("factor", torch.ones(()))

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, *args: Any, **options: Any) -> None:
        # Moments may have been measured after the network was made, so they take the shape that was saved.
        for name in ("shift", "factor"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.shift.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def run(self, inputs: Tensor) -> Any:
        """Call the foreign part in its own floating type."""
        like = weight_of(self.part)
        return getattr(self.part, self.method)(inputs if like is None else inputs.to(like.dtype))


class AdaptedEncoder(Half):
    r"""A foreign encoder: images ``(n, C, H, W)`` in [-1, 1] to means, or to means and standard deviations.

    :math:`m' = (m - \text{shift}) \cdot \text{factor}` and :math:`s' = s \, |\text{factor}|`,
    each ``(n, *latent_shape)``.
    """

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images in [-1, 1] to ``(mean, scale)``, or to means where no scale is known."""
        low, high = self.image_range
        mean, scale = _posterior(self.run(x * ((high - low) / 2) + (high + low) / 2))
        mean = (mean.to(x.dtype) - self.shift.to(x.dtype)) * self.factor.to(x.dtype)
        return mean if scale is None else (mean, scale.to(x.dtype) * self.factor.abs().to(x.dtype))


class AdaptedDecoder(Half):
    r"""A foreign decoder: latents ``(n, *latent_shape)`` to images ``(n, C, H, W)``, clamped to [-1, 1].

    :math:`z'` is decoded at :math:`z' / \text{factor} + \text{shift}`; differentiable in the latents.
    """

    def forward(self, z: Tensor) -> Tensor:
        """Map latents to images in [-1, 1]."""
        low, high = self.image_range
        x = _image(self.run(z / self.factor.to(z.dtype) + self.shift.to(z.dtype))).to(z.dtype)
        return ((x - (high + low) / 2) / ((high - low) / 2)).clamp(-1, 1)


H = TypeVar("H", bound=Half)


def rescaled(half: H, shift: Tensor, factor: Tensor) -> H:
    """Return the same part under another affine map of its latents."""
    other = type(half)(half.part, half.image_range, half.method)
    other.shift, other.factor = shift, factor
    other.latent_shape, other.image_shape = half.latent_shape, half.image_shape
    return other.train(half.training)


def weight_of(part: Any) -> Tensor | None:
    """Return a floating weight of a module, or of a method's module, for its type and device, if it has one."""
    module = part if isinstance(part, nn.Module) else getattr(part, "__self__", None)
    if not isinstance(module, nn.Module):
        return None
    return next((v for v in (*module.parameters(), *module.buffers()) if v.is_floating_point()), None)


def _posterior(output: Any) -> tuple[Tensor, Tensor | None]:
    """Read means and standard deviations from what encoders return."""
    output = getattr(output, "latent_dist", output)
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple | list) and len(output) == 2 and all(isinstance(v, Tensor) for v in output):
        return output[0], output[1]
    for name in ("mean", "latents", "latent", "embedding"):
        mean = getattr(output, name, None)
        if isinstance(mean, Tensor):
            log_variance = getattr(output, "log_covariance", None)
            if isinstance(log_variance, Tensor):
                return mean, (0.5 * log_variance).exp()
            scale = getattr(output, "stddev", getattr(output, "std", None))
            return mean, scale if isinstance(scale, Tensor) else None
    raise LatentPriorError(
        f"the encoder returned {type(output).__name__}: return a tensor, (mean, scale) or a torch Distribution"
    )


def _image(output: Any) -> Tensor:
    for candidate in (output, getattr(output, "sample", None), getattr(output, "reconstruction", None)):
        if isinstance(candidate, Tensor):
            return candidate
    raise LatentPriorError(f"the decoder returned {type(output).__name__}: return a tensor of images")
