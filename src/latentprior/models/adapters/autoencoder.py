"""An encoder and a decoder that fit each other, tried and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InvalidImagesError, LatentPriorError
from .halves import AdaptedDecoder, AdaptedEncoder, rescaled, weight_of

__all__ = ["Autoencoder", "joined"]

LEAST_DEVIATION = 1e-6
"""Standard deviation, as a share of 1 + |mean|, below which a coordinate counts as one that never varies."""


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """An encoder and a decoder network over the same latents; ``LatentVariableModel`` takes them as they are.

    Parameters
    ----------
    encoder : AdaptedEncoder
        Images ``(n, *image_shape)`` in [-1, 1] to ``(mean, scale)``, each ``(n, *event_shape)``, or to means.
    decoder : AdaptedDecoder
        Latents ``(n, *event_shape)`` to images ``(n, *image_shape)`` in [-1, 1].
    event_shape : torch.Size
        Shape of one latent.
    image_shape : torch.Size
        Shape (C, H, W) of one image.
    """

    encoder: AdaptedEncoder
    decoder: AdaptedDecoder
    event_shape: torch.Size
    image_shape: torch.Size

    def encode(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Posterior means and standard deviations, or means alone where no scale is known; ``(n, *event_shape)``.

        Parameters
        ----------
        x : Tensor
            Images ``(n, *image_shape)`` in [-1, 1].
        """
        return self.encoder(x)  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        """Images ``(n, *image_shape)`` in [-1, 1]; differentiable.

        Parameters
        ----------
        z : Tensor
            Latents ``(n, *event_shape)``.
        """
        return self.decoder(z)  # type: ignore[no-any-return]

    @torch.no_grad()
    def standardised(self, images: Tensor, *, batch_size: int = 64) -> Autoencoder:
        r"""The same autoencoder with latents of mean 0 and variance 1 over ``images``.

        Moments are those of the aggregate posterior, :math:`\mathrm{var}(m) + \mathbb E[s^2]`: one pair for each
        channel of spatial latents, and one for each coordinate of flat ones. A coordinate that never varies is only
        shifted. The weights are shared with this autoencoder.

        Parameters
        ----------
        images : Tensor
            Two images or more, ``(n, *image_shape)`` in [-1, 1].
        batch_size : int
            Images that are encoded at a time.

        Raises
        ------
        InvalidImagesError
            For images of another shape, or fewer than two.
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
        deviation = torch.where(deviation > LEAST_DEVIATION * (1 + center.abs()), deviation, 1.0)
        # These latents are (z - shift) * factor of the foreign ones already.
        shift, factor = center[0] / self.encoder.factor + self.encoder.shift, self.encoder.factor / deviation[0]
        return self._rescaled(shift.float(), factor.float())

    def _rescaled(self, shift: Tensor, factor: Tensor) -> Autoencoder:
        encoder, decoder = rescaled(self.encoder, shift, factor), rescaled(self.decoder, shift, factor)
        return Autoencoder(encoder, decoder, self.event_shape, self.image_shape)


@torch.no_grad()
def joined(
    encoder: AdaptedEncoder,
    decoder: AdaptedDecoder,
    *,
    event_shape: Sequence[int] | None = None,
    image_shape: Sequence[int] | None = None,
) -> Autoencoder:
    """Join two halves that fit each other; the shape that is not given is found by trying.

    Parameters
    ----------
    encoder : AdaptedEncoder
        The half that encodes; it is put in ``eval`` mode.
    decoder : AdaptedDecoder
        The half that decodes; it is put in ``eval`` mode.
    event_shape : sequence of int, optional
        Shape of one latent.
    image_shape : sequence of int, optional
        Shape (C, H, W) of one image; it counts where there is no ``event_shape``.

    Raises
    ------
    LatentPriorError
        Where the two do not fit each other or the shape.
    """
    encoder.eval()
    decoder.eval()
    like = weight_of(decoder.part)
    device = None if like is None else like.device
    try:
        if event_shape is None:
            x = torch.zeros(1, *(image_shape or ()), device=device)
        else:
            x = decoder(torch.zeros(1, *event_shape, device=device))
        output = encoder(x)
    except LatentPriorError:
        raise
    except Exception as error:
        inputs = f"images {tuple(image_shape or ())}" if event_shape is None else f"latents {tuple(event_shape)}"
        raise LatentPriorError(f"the autoencoder fails on {inputs}: {error}; check the shapes") from error
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
    for half in (encoder, decoder):
        half.latent_shape, half.image_shape = mean.shape[1:], x.shape[1:]
    return Autoencoder(encoder, decoder, mean.shape[1:], x.shape[1:])
