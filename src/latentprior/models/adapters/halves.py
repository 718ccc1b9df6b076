"""The two halves of a foreign autoencoder, as networks that speak images in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import LatentPriorError

__all__ = ["AdaptedDecoder", "AdaptedEncoder", "Range", "call_itself", "rescaled", "weight_of"]

Range = tuple[float, float]


class Half(nn.Module):
    """One half of a foreign autoencoder: its part, how to call it, and the affine map of its latents.

    Parameters
    ----------
    part : object
        The foreign network.
    call : callable
        Calls ``part`` on a tensor.
    image_range : tuple of float
        Least and most value of a pixel, as the part has it.

    Raises
    ------
    LatentPriorError
        For an ``image_range`` that is no finite interval.
    """

    shift: Tensor
    factor: Tensor
    latent_shape: torch.Size
    image_shape: torch.Size

    def __init__(self, part: Any, call: Callable[[Any, Tensor], Any], image_range: Range) -> None:
        super().__init__()
        low, high = image_range
        if not -math.inf < low < high < math.inf:
            raise LatentPriorError(f"image_range {image_range} must be (low, high), finite, low < high")
        self.part = part
        self.call = call
        self.image_range = (float(low), float(high))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("factor", torch.ones(()))

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, *args: Any, **options: Any) -> None:
        # Moments may have been measured after the network was made, so they take the shape that was saved.
        for name in ("shift", "factor"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.shift.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def run(self, inputs: Tensor) -> Any:
        """Call the foreign part in its own floating type.

        Parameters
        ----------
        inputs : Tensor
            Images or latents, as the part takes them.
        """
        like = weight_of(self.part)
        return self.call(self.part, inputs if like is None else inputs.to(like.dtype))


class AdaptedEncoder(Half):
    r"""A foreign encoder: images ``(n, C, H, W)`` in [-1, 1] to means, or to means and standard deviations.

    :math:`m' = (m - \text{shift}) \cdot \text{factor}` and :math:`s' = s \, |\text{factor}|`, each
    ``(n, *latent_shape)``.

    Parameters
    ----------
    part : object
        The foreign encoder.
    call : callable
        Calls ``part`` on a tensor of images.
    image_range : tuple of float
        Least and most value of a pixel, as the encoder takes it.
    """

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images to ``(mean, scale)``, or to means where no scale is known.

        Parameters
        ----------
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].
        """
        low, high = self.image_range
        mean, scale = _posterior(self.run(x * ((high - low) / 2) + (high + low) / 2))
        mean = (mean.to(x.dtype) - self.shift.to(x.dtype)) * self.factor.to(x.dtype)
        return mean if scale is None else (mean, scale.to(x.dtype) * self.factor.abs().to(x.dtype))


class AdaptedDecoder(Half):
    r"""A foreign decoder: latents ``(n, *latent_shape)`` to images ``(n, C, H, W)``, clamped to [-1, 1].

    :math:`z'` is decoded at :math:`z' / \text{factor} + \text{shift}`; differentiable in the latents.

    Parameters
    ----------
    part : object
        The foreign decoder.
    call : callable
        Calls ``part`` on a tensor of latents.
    image_range : tuple of float
        Least and most value of a pixel, as the decoder makes it.
    """

    def forward(self, z: Tensor) -> Tensor:
        """Map latents to images in [-1, 1].

        Parameters
        ----------
        z : Tensor
            Latents ``(n, *latent_shape)``.
        """
        low, high = self.image_range
        x = _image(self.run(z / self.factor.to(z.dtype) + self.shift.to(z.dtype))).to(z.dtype)
        return ((x - (high + low) / 2) / ((high - low) / 2)).clamp(-1, 1)


H = TypeVar("H", bound=Half)


def rescaled(half: H, shift: Tensor, factor: Tensor) -> H:
    """Return the same part under another affine map of its latents.

    Parameters
    ----------
    half : Half
        The half to change; it stays as it is.
    shift, factor : Tensor
        The new map, which broadcasts over latents.
    """
    other = type(half)(half.part, half.call, half.image_range)
    other.shift, other.factor = shift, factor
    other.latent_shape, other.image_shape = half.latent_shape, half.image_shape
    return other.train(half.training)


def call_itself(part: Any, inputs: Tensor) -> Any:
    """Call a part as it is.

    Parameters
    ----------
    part : callable
        The foreign network.
    inputs : Tensor
        Images or latents.
    """
    return part(inputs)


def weight_of(part: Any) -> Tensor | None:
    """Return a floating weight of a module, whose type and device are the module's; None where there is none.

    Parameters
    ----------
    part : object
        A module, or a method of one.
    """
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
