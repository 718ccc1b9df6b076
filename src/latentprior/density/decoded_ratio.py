"""Ratios that see latents as their decoder shows them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LatentPriorError
from ..storage.sized_networks import blank
from .ratio_networks import RatioNetwork
from .whitening import Whitening

__all__ = ["DecodedNet", "StandardisedDecoder"]

PROBES, SAME = 16, 0.02
"""Numbers of one picture that tell a decoder from others, and by how much they may differ, in standard deviations."""
SMALLEST = 4
"""Width of a map that is convolved no further."""


class StandardisedDecoder(nn.Module):
    r"""Standardised latents to standardised pictures, :math:`x = (g(T^{-1} u) - m) / s`: ``(n, d) -> (n, C, H, W)``.

    Arguments
    ---------
    decode : g, on the user's coordinates ``(n, *event_shape)``: a network, which is copied and not changed, or a
        function of torch operations; a decoder, or its first layers.
    pictures : ``shape`` (C, H, W), ``loc`` and ``scale`` of every channel and ``probe``, numbers of the picture of
        u = 0, as :meth:`describe` finds them.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        whitening: Whitening,
        event_shape: tuple[int, ...],
        pictures: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.decode = copy.deepcopy(decode).eval().requires_grad_(False) if isinstance(decode, nn.Module) else decode
        self.whitening, self.event_shape, self.pictures = whitening, tuple(event_shape), dict(pictures)
        for name in ("loc", "scale"):
            # Even where networks are sketched without memory, the decoder is there.
            value = torch.tensor([float(x) for x in pictures[name]], device=whitening.loc.device)
            self.register_buffer(name, value.to(whitening.loc.dtype)[:, None, None])

    def raw(self, u: Tensor) -> Tensor:
        """What the decoder makes, as it makes it."""
        z = self.whitening.unwhiten(u).view(-1, *self.event_shape)
        weight = next(self.decode.parameters(), None) if isinstance(self.decode, nn.Module) else None
        return self.decode(z if weight is None else z.to(weight.dtype))

    def checked(self, u: Tensor) -> Tensor:
        """What :meth:`raw` gives; raises :class:`LatentPriorError` where that is no batch of maps."""
        x = self.raw(u)
        if not isinstance(x, Tensor) or x.ndim != 4 or len(x) != len(u):
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise LatentPriorError(f"the decoder made {found} of {len(u)} latents: maps (n, C, H, W) are wanted")
        return x.to(u.dtype)

    def forward(self, u: Tensor) -> Tensor:
        """Standardised pictures."""
        return (self.raw(u).to(u.dtype) - self.loc) / self.scale

    @classmethod
    def describe(
        cls, decode: Callable[[Tensor], Tensor], whitening: Whitening, event_shape: tuple[int, ...], rows: Tensor
    ) -> StandardisedDecoder:
        """Standardise pictures of ``rows`` ``(n, d)``, and describe them in ``pictures``, for a saved file.

        Raises :class:`LatentPriorError` for a decoder whose pictures are not finite or have no gradient.
        """
        plain = cls(decode, whitening, event_shape, {"loc": [0.0], "scale": [1.0]})
        u = rows[:1].detach().clone().requires_grad_(True)
        with torch.enable_grad():
            x = plain.checked(u)
        if not x.requires_grad:
            raise LatentPriorError("pictures have no gradient in the latents: decode without torch.no_grad()")
        with torch.no_grad():
            some = torch.cat([plain.checked(block) for block in rows.split(256)])
            if not some.isfinite().all():
                raise LatentPriorError("the decoder makes pictures that are not finite")
            pictures: dict[str, Any] = {
                "shape": list(some.shape[1:]),
                "loc": some.mean((0, 2, 3)).tolist(),
                "scale": some.double().std((0, 2, 3), correction=0).clamp_min(1e-6).tolist(),
            }
            found = cls(decode, whitening, event_shape, pictures)
            found.pictures["probe"] = found.probe().tolist()
        return found

    @torch.no_grad()
    def probe(self) -> Tensor:
        """Some numbers of the picture of u = 0 ``(16,)``."""
        picture = self.checked(self.whitening.loc.new_zeros(1, len(self.whitening.loc)))
        flat = ((picture - self.loc) / self.scale).flatten()
        return flat[torch.linspace(0, len(flat) - 1, PROBES).long().to(flat.device)]

    def check(self) -> None:
        """Raise :class:`LatentPriorError` where this is not the decoder that stages have learned from."""
        found = self.probe()
        known = found.new_tensor([float(x) for x in self.pictures["probe"]])
        if known.shape != found.shape or not (found - known).abs().max() < SAME:
            raise LatentPriorError("this is not the decoder that the stages were learned with: its pictures differ")


class DecodedNet(RatioNetwork):
    """A convolutional ratio on decoded latents: ``(n, d) -> (n,)``.

    Convolutions of four by four halve the map until it is four wide, from ``maps`` channels on to four times as
    many; a hidden layer reads what is left.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        decoder: StandardisedDecoder,
        maps: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        layers: list[nn.Module] = []
        out = maps
        while min(height, breadth) > SMALLEST or not layers:
            conv: nn.Conv2d = blank(nn.Conv2d, channels, out, 4, stride=2, padding=1)
            nn.init.normal_(conv.weight, std=1 / math.sqrt(16 * channels), generator=generator)
            assert conv.bias is not None
            nn.init.normal_(conv.bias, std=0.1, generator=generator)
            layers += [conv, nn.SiLU()]
            channels, out = out, min(2 * out, 4 * maps)
            height, breadth = height // 2, breadth // 2
        self.convs = nn.Sequential(*layers)
        flat, hidden = channels * height * breadth, 4 * maps
        self.hidden: nn.Linear = blank(nn.Linear, flat, hidden)
        self.last: nn.Linear = blank(nn.Linear, hidden, 1)
        for layer in (self.hidden, self.last):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features), generator=generator)
            nn.init.zeros_(layer.bias)
        self.decoder = decoder

    def forward(self, u: Tensor) -> Tensor:
        """Log ratios in nats, not bounded yet."""
        h = self.convs(self.decoder(u)).flatten(1)
        return self.last(F.silu(self.hidden(h))).squeeze(1)  # type: ignore[no-any-return]
