"""Autoencoders from elsewhere as one thing: an encoder and a generator that speak images in [-1, 1]."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InvalidImagesError, LatentPriorError

__all__ = [
    "AdaptedEncoder",
    "AdaptedGenerator",
    "Autoencoder",
    "from_any",
    "from_callables",
    "from_diffusers",
    "from_pythae",
]

Range = tuple[float, float]


class _Half(nn.Module):
    """One half of a foreign autoencoder: its part, how to call it, and the affine map of its latents."""

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
        # Moments are measured later than a network is made: their saved shape counts.
        for name in ("shift", "factor"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.shift.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def run(self, inputs: Tensor) -> Any:
        """Call the foreign part in its own floating type."""
        like = _weight(self.part)
        return self.call(self.part, inputs if like is None else inputs.to(like.dtype))


class AdaptedEncoder(_Half):
    r"""A foreign encoder: images ``(n, C, H, W)`` in [-1, 1] to means, or to means and standard deviations.

    :math:`m' = (m - \text{shift}) \cdot \text{factor}` and :math:`s' = s \, |\text{factor}|`, each
    ``(n, *latent_shape)``.
    """

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images in [-1, 1] to ``(mean, scale)``, or to means where no scale is known."""
        low, high = self.image_range
        mean, scale = _posterior(self.run(x * ((high - low) / 2) + (high + low) / 2))
        mean = (mean.to(x.dtype) - self.shift.to(x.dtype)) * self.factor.to(x.dtype)
        return mean if scale is None else (mean, scale.to(x.dtype) * self.factor.abs().to(x.dtype))


class AdaptedGenerator(_Half):
    r"""A foreign decoder: latents ``(n, *latent_shape)`` to images ``(n, C, H, W)``, clamped to [-1, 1].

    :math:`z'` is decoded at :math:`z' / \text{factor} + \text{shift}`; differentiable in the latents.
    """

    def forward(self, z: Tensor) -> Tensor:
        """Map latents to images in [-1, 1]."""
        low, high = self.image_range
        x = _image(self.run(z / self.factor.to(z.dtype) + self.shift.to(z.dtype))).to(z.dtype)
        return ((x - (high + low) / 2) / ((high - low) / 2)).clamp(-1, 1)


H = TypeVar("H", bound=_Half)


def _rescaled(half: H, shift: Tensor, factor: Tensor) -> H:
    """Return the same part under another affine map of its latents."""
    other = type(half)(half.part, half.call, half.image_range)
    other.shift, other.factor = shift, factor
    other.latent_shape, other.image_shape = half.latent_shape, half.image_shape
    return other.train(half.training)


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """An encoder and a generator network over the same latents; ``LatentVariableModel`` takes them as they are.

    Arguments
    ---------
    encoder : images ``(n, *image_shape)`` in [-1, 1] to ``(mean, scale)``, each ``(n, *event_shape)``, or to means.
    generator : latents ``(n, *event_shape)`` to images ``(n, *image_shape)`` in [-1, 1].
    """

    encoder: AdaptedEncoder
    generator: AdaptedGenerator
    event_shape: torch.Size
    image_shape: torch.Size

    def encode(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Posterior means and standard deviations of images in [-1, 1], or means alone where no scale is known."""
        return self.encoder(x)  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        """Images in [-1, 1] of latents ``(n, *event_shape)``; differentiable."""
        return self.generator(z)  # type: ignore[no-any-return]

    @torch.no_grad()
    def standardised(self, images: Tensor, *, batch_size: int = 64) -> Autoencoder:
        r"""The same autoencoder with latents of mean 0 and variance 1 over ``images``.

        Moments are those of the aggregate posterior, :math:`\mathrm{var}(m) + \mathbb E[s^2]`, one pair a channel of
        spatial latents and one a coordinate of flat ones. A coordinate that never varies is only shifted. The weights
        are shared with this autoencoder. Raises :class:`InvalidImagesError` for fewer than two images.
        """
        if not isinstance(images, Tensor) or images.shape[1:] != self.image_shape or len(images) < 2:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InvalidImagesError(
                f"latents are standardised over a tensor (n, {', '.join(map(str, self.image_shape))}) of two images or "
                f"more, not {shape}"
            )
        means, spread = [], []
        for batch in images.split(batch_size):
            output = self.encode(batch)
            mean, scale = (output, torch.zeros_like(output)) if isinstance(output, Tensor) else output
            means.append(mean.double())
            spread.append(scale.double().square())
        m, s2 = torch.cat(means), torch.cat(spread)
        across = (0, 2, 3) if m.ndim == 4 else (0,)
        # The spatial axes stay, with length 1: the moments then broadcast over latents.
        center = m.mean(across, keepdim=True)
        deviation = ((m - center).square().mean(across, keepdim=True) + s2.mean(across, keepdim=True)).sqrt()
        deviation = torch.where(deviation > 1e-6 * (1 + center.abs()), deviation, 1.0)
        # These latents are (z - shift) * factor of the foreign ones already.
        shift, factor = center[0] / self.encoder.factor + self.encoder.shift, self.encoder.factor / deviation[0]
        return self._rescaled(shift.float(), factor.float())

    def _rescaled(self, shift: Tensor, factor: Tensor) -> Autoencoder:
        encoder, generator = _rescaled(self.encoder, shift, factor), _rescaled(self.generator, shift, factor)
        return Autoencoder(encoder, generator, self.event_shape, self.image_shape)


def from_callables(
    encode: Callable[[Tensor], Any],
    decode: Callable[[Tensor], Any],
    *,
    event_shape: Sequence[int],
    image_range: Range = (-1.0, 1.0),
) -> Autoencoder:
    """An autoencoder from two callables; give modules rather than their methods, so that ``.to(device)`` moves them.

    Arguments
    ---------
    encode : images ``(n, C, H, W)`` in ``image_range`` to a tensor, to ``(mean, standard deviation)`` (not a log
        variance), or to a :class:`torch.distributions.Distribution`.
    decode : latents ``(n, *event_shape)`` to a tensor of images in ``image_range``.
    event_shape : shape of one latent. Both callables are tried once; modules are put in ``eval`` mode.

    Raises :class:`LatentPriorError` where the two do not fit each other or ``event_shape``.

    Examples
    --------
    >>> flat, square = torch.nn.Flatten(), torch.nn.Unflatten(1, (1, 2, 2))
    >>> from_callables(flat, square, event_shape=(4,), image_range=(0, 1)).image_shape
    torch.Size([1, 2, 2])
    """
    encoder, generator = AdaptedEncoder(encode, _call, image_range), AdaptedGenerator(decode, _call, image_range)
    return _tried(encoder, generator, event_shape=event_shape)


def from_diffusers(vae: Any, *, image_shape: Sequence[int] | None = None) -> Autoencoder:
    r"""An ``AutoencoderKL``, ``AutoencoderTiny`` or another diffusers autoencoder of images.

    Such models store factors that their ``encode`` and ``decode`` do not apply; here they are applied:
    :math:`z' = (z - \text{shift\_factor}) \cdot \text{scaling\_factor}`, or with moments per channel in the
    configuration :math:`z' = (z - \text{latents\_mean}) \cdot \text{scaling\_factor} / \text{latents\_std}`. Where they
    are absent or do not suit your images, measure them: :meth:`Autoencoder.standardised`. Half-precision weights
    are called in their own type.

    Arguments
    ---------
    vae : the model; put in ``eval`` mode. Its weights are referenced, not copied.
    image_shape : (C, H, W) of the images you will use; the configuration's ``in_channels`` and ``sample_size`` by
        default. One image of it is encoded to learn the latents' shape.
    """
    if image_shape is None:
        size = _setting(vae, "sample_size")
        if size is None:
            raise LatentPriorError(
                f"{type(vae).__name__} does not say what images it takes: give image_shape=(C, H, W)"
            )
        height, width = (size, size) if isinstance(size, int) else size
        image_shape = (_setting(vae, "in_channels") or 3, height, width)
    plain = _from_methods(vae, (-1.0, 1.0), image_shape=image_shape)
    return plain._rescaled(*_stored_moments(vae, plain.event_shape))


def from_pythae(model: Any, *, image_range: Range = (0.0, 1.0)) -> Autoencoder:
    """A pythae model: ``encoder(x).embedding`` and ``.log_covariance``, ``decoder(z).reconstruction``.

    pythae's decoders end in a sigmoid and its images lie in [0, 1]; give another ``image_range`` for networks of
    your own. The model is put in ``eval`` mode. Raises :class:`LatentPriorError` for something else.
    """
    if not (callable(getattr(model, "encoder", None)) and callable(getattr(model, "decoder", None))):
        raise LatentPriorError(f"{type(model).__name__} has no encoder and decoder: give a pythae autoencoder")
    encoder = AdaptedEncoder(model.encoder, _call, image_range)
    generator = AdaptedGenerator(model.decoder, _call, image_range)
    return _tried(encoder, generator, event_shape=(int(model.latent_dim),))


def from_any(
    obj: Any,
    *,
    image_shape: Sequence[int] | None = None,
    event_shape: Sequence[int] | None = None,
    image_range: Range | None = None,
) -> Autoencoder:
    """Adapt what is given, by what it has: an :class:`Autoencoder`, a diffusers or pythae model, or two callables.

    Accepted are ``(encode, decode)`` pairs and objects with ``encode`` and ``decode`` methods (both need
    ``event_shape``), diffusers autoencoders (``image_shape`` where theirs is not yours) and pythae models. Raises
    :class:`LatentPriorError` for anything else.
    """
    if isinstance(obj, Autoencoder):
        return obj
    bounds = image_range or (-1.0, 1.0)
    if isinstance(obj, tuple | list) and len(obj) == 2 and all(map(callable, obj)):
        return from_callables(*obj, event_shape=_needed(event_shape), image_range=bounds)
    if callable(getattr(obj, "encode", None)) and callable(getattr(obj, "decode", None)):
        if _setting(obj, "latent_channels") is not None or _setting(obj, "scaling_factor") is not None:
            return from_diffusers(obj, image_shape=image_shape)
        return _from_methods(obj, bounds, event_shape=_needed(event_shape))
    if all(hasattr(obj, name) for name in ("encoder", "decoder", "latent_dim")):
        return from_pythae(obj, image_range=image_range or (0.0, 1.0))
    raise LatentPriorError(
        f"{type(obj).__name__} is no autoencoder known here: give a diffusers or pythae model, an object with "
        "encode and decode, or a pair (encode, decode) with event_shape"
    )


def _needed(event_shape: Sequence[int] | None) -> Sequence[int]:
    if event_shape is None:
        raise LatentPriorError("this autoencoder does not say what its latents look like: give event_shape")
    return event_shape


def _call(part: Any, inputs: Tensor) -> Any:
    return part(inputs)


def _call_encode(part: Any, x: Tensor) -> Any:
    return part.encode(x)


def _call_decode(part: Any, z: Tensor) -> Any:
    return part.decode(z)


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


def _weight(part: Any) -> Tensor | None:
    """Return a floating weight of a module, or of the module whose method is given; it tells type and device."""
    module = part if isinstance(part, nn.Module) else getattr(part, "__self__", None)
    if not isinstance(module, nn.Module):
        return None
    return next((v for v in (*module.parameters(), *module.buffers()) if v.is_floating_point()), None)


def _without(obj: Any, *names: str) -> Any:
    """Return a view of a module that lacks some children, so that encoder and generator own no weight in common."""
    if not isinstance(obj, nn.Module):
        return obj
    view = copy.copy(obj)
    view._modules = {name: child for name, child in obj._modules.items() if name not in names}
    return view


def _from_methods(
    obj: Any,
    image_range: Range,
    *,
    event_shape: Sequence[int] | None = None,
    image_shape: Sequence[int] | None = None,
) -> Autoencoder:
    encoder = AdaptedEncoder(_without(obj, "decoder", "post_quant_conv", "quantize"), _call_encode, image_range)
    generator = AdaptedGenerator(_without(obj, "encoder", "quant_conv"), _call_decode, image_range)
    return _tried(encoder, generator, event_shape=event_shape, image_shape=image_shape)


@torch.no_grad()
def _tried(
    encoder: AdaptedEncoder,
    generator: AdaptedGenerator,
    *,
    event_shape: Sequence[int] | None = None,
    image_shape: Sequence[int] | None = None,
) -> Autoencoder:
    """Join two halves that fit each other; the shape that is not given is found by trying."""
    encoder.eval()
    generator.eval()
    like = _weight(generator.part)
    device = None if like is None else like.device
    try:
        if event_shape is None:
            x = torch.zeros(1, *(image_shape or ()), device=device)
        else:
            x = generator(torch.zeros(1, *event_shape, device=device))
        output = encoder(x)
    except LatentPriorError:
        raise
    except Exception as error:
        given = f"images {tuple(image_shape or ())}" if event_shape is None else f"latents {tuple(event_shape)}"
        raise LatentPriorError(f"the autoencoder fails on {given}: {error}; check the shapes") from error
    mean, scale = (output, None) if isinstance(output, Tensor) else output
    if x.ndim != 4:
        raise LatentPriorError(f"images of the autoencoder have shape {tuple(x.shape)}: they must be (n, C, H, W)")
    if event_shape is not None and mean.shape[1:] != torch.Size(event_shape):
        raise LatentPriorError(
            f"the encoder returns latents {tuple(mean.shape[1:])}, the decoder takes {tuple(event_shape)}: "
            "give the two halves of one autoencoder"
        )
    if scale is not None and (scale.shape != mean.shape or not (scale >= 0).all()):
        raise LatentPriorError(
            "the encoder's second output is no standard deviation of the first: return (mean, scale), scale >= 0 and "
            "of the same shape; from a log variance, exp(v / 2)"
        )
    for half in (encoder, generator):
        half.latent_shape, half.image_shape = mean.shape[1:], x.shape[1:]
    return Autoencoder(encoder, generator, mean.shape[1:], x.shape[1:])


def _setting(vae: Any, name: str) -> Any:
    config = getattr(vae, "config", None)
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _stored_moments(vae: Any, event_shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the shift and factor that a diffusers configuration stores, ready to broadcast over latents."""
    means, deviations, scaling = (_setting(vae, name) for name in ("latents_mean", "latents_std", "scaling_factor"))
    if means is None or deviations is None:
        means, deviations = _setting(vae, "shift_factor") or 0.0, 1.0
    shift = torch.as_tensor(means, dtype=torch.float32).flatten()
    factor = (1.0 if scaling is None else scaling) / torch.as_tensor(deviations, dtype=torch.float32).flatten()
    fits = {len(shift), len(factor)} <= {1, event_shape[0]}
    if not fits or not torch.isfinite(shift).all() or not torch.isfinite(factor).all() or (factor == 0).any():
        raise LatentPriorError(
            f"{type(vae).__name__}'s configuration stores latent factors that do not fit {event_shape[0]} channels: "
            "mend scaling_factor, shift_factor, latents_mean and latents_std"
        )
    trailing = (1,) * (len(event_shape) - 1)
    like = _weight(vae)
    device = None if like is None else like.device
    return shift.view(-1, *trailing).to(device), factor.view(-1, *trailing).to(device)
