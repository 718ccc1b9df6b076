"""The density that the second of two variational autoencoders defines on latents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..density.bases.base import LOG_2PI
from ..errors import CheckpointError
from ..storage.checkpoint import UNFIT
from ..storage.sized_networks import blank, built_for

__all__ = ["SkipPerceptron", "TwoStageDistribution", "posterior", "second_vae"]

LOG_SCALE_RANGE = (-7.0, 2.0)
"""Least and most of the second encoder's log standard deviations."""
BLOCK_ROWS = 1 << 15
"""Latents times draws that pass through the second decoder at a time."""


class SkipPerceptron(nn.Module):
    """Hidden ReLU layers, and a last layer that reads the input beside them: ``(n, dim)`` to ``(n, outputs)``.

    Parameters
    ----------
    dim, outputs : int
        Columns of the rows that it reads and returns.
    width : int
        Units of a hidden layer.
    depth : int
        Hidden layers.
    generator : torch.Generator
        Source of the first weights.
    """

    def __init__(self, dim: int, outputs: int, width: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        hidden = [_linear(*pair, math.sqrt(2), generator) for pair in itertools.pairwise([dim, *[width] * depth])]
        self.hidden = nn.Sequential(*itertools.chain.from_iterable((layer, nn.ReLU()) for layer in hidden))
        self.last = _linear(width + dim, outputs, 1.0, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``(n, outputs)``.

        Parameters
        ----------
        x : Tensor
            Rows ``(n, dim)``.
        """
        return self.last(torch.cat([self.hidden(x), x], 1))  # type: ignore[no-any-return]


class TwoStageDistribution(Distribution):
    r""":math:`p(z) = \int N(z; g(u), \gamma^2 I)\,N(u; 0, I)\,du`, the density that the second VAE defines.

    Parameters
    ----------
    encoder : torch.nn.Module
        Rows ``(n, d)`` to the means and log standard deviations of :math:`q(u \mid z)`, ``(n, 2 d)``.
    decoder : torch.nn.Module
        Rows u ``(n, d)`` to means of z, ``(n, d)``.
    gamma : float
        Standard deviation of z around its mean.
    noise : Tensor
        The draws :math:`\epsilon_k` of ``log_prob``, ``(K, d)``.
    event_shape : sequence of int
        Shape of one latent.

    Notes
    -----
    ``sample`` is ancestral, exact, from torch's own random state as every torch Distribution. ``log_prob`` is a
    lower bound of the log density on average, in nats, from K fixed draws :math:`\epsilon_k`:

    .. math:: \log \frac1K \sum_k \frac{N(z; g(u_k), \gamma^2 I)\,N(u_k; 0, I)}{q(u_k \mid z)},
              \quad u_k = m(z) + s(z)\,\epsilon_k

    ``(n, *event_shape)`` to ``(n,)``; differentiable, and the same at every call. Source: Dai and Wipf (ICLR 2019),
    section 4; Burda, Grosse and Salakhutdinov (2016), eq. 8, for the bound.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, gamma: float, noise: Tensor, event_shape: Sequence[int]
    ) -> None:
        super().__init__(torch.Size(), torch.Size(event_shape), validate_args=False)
        self.encoder, self.decoder, self.gamma, self.noise = encoder, decoder, gamma, noise

    @property
    def support(self) -> constraints.Constraint:
        """All of real space."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw u, then z around its image, ``(*sample_shape, *event_shape)``.

        Parameters
        ----------
        sample_shape : sequence of int
            Shape of the batch of draws.
        """
        n = math.prod(sample_shape)
        u = torch.randn(n, self.noise.shape[1], dtype=self.noise.dtype, device=self.noise.device)
        z: Tensor = self.decoder(u)
        return (z + self.gamma * torch.randn_like(z)).reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Importance-weighted lower bound, ``(*)`` nats.

        Parameters
        ----------
        value : Tensor
            Latents ``(*, *event_shape)``.
        """
        k, d = self.noise.shape
        rows = value.reshape(-1, d)
        if not len(rows):
            return value.new_zeros(value.shape[: value.ndim - len(self.event_shape)])
        bounds = torch.cat([self._bound(block) for block in rows.split(max(1, BLOCK_ROWS // k))])
        return bounds.reshape(value.shape[: value.ndim - len(self.event_shape)])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (JSON) and tensors, from which :meth:`from_state` makes the same distribution."""
        networks = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})
        config = {
            "gamma": self.gamma,
            "event_shape": list(self.event_shape),
            "width": self.encoder.width,
            "depth": self.encoder.depth,
        }
        return config, {"noise": self.noise, **networks.state_dict()}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TwoStageDistribution:
        """Rebuild from :meth:`state`.

        Parameters
        ----------
        config : mapping
            The JSON document.
        tensors : mapping
            Tensors by name.

        Raises
        ------
        CheckpointError
            Where the document and the tensors do not fit together.
        """
        try:
            weights = dict(tensors)
            noise, d = weights.pop("noise"), math.prod(config["event_shape"])
            if noise.shape[1] != d or not 0 <= config["depth"] <= len(weights) or not config["gamma"] > 0:
                raise ValueError("shapes differ")
            sizes = config["width"], config["depth"], torch.Generator()
            networks = built_for(weights, lambda: second_vae(d, *sizes))
            networks.to(noise.dtype).load_state_dict(weights)
            networks.requires_grad_(False).eval()
            gamma, shape = float(config["gamma"]), config["event_shape"]
            return cls(networks["encoder"], networks["decoder"], gamma, noise, shape)
        except UNFIT as error:
            line = " ".join(str(error).split())[:160]
            raise CheckpointError(f"configuration and tensors of the second VAE do not fit together ({line})") from None

    def _bound(self, z: Tensor) -> Tensor:
        (k, d), n = self.noise.shape, len(z)
        mean, scale = posterior(self.encoder, z)
        u = mean[:, None] + scale[:, None] * self.noise
        log_q = -0.5 * self.noise.square().sum(1) - scale.log().sum(1, keepdim=True)
        miss = (z[:, None] - self.decoder(u.reshape(n * k, d)).reshape(n, k, d)) / self.gamma
        log_joint = -0.5 * (miss.square() + u.square()).sum(2) - d * (math.log(self.gamma) + 0.5 * LOG_2PI)
        return torch.logsumexp(log_joint - log_q, 1) - math.log(k)


def second_vae(dim: int, width: int, depth: int, generator: torch.Generator) -> nn.ModuleDict:
    """Encoder and decoder of the second VAE; the encoder draws its weights first.

    Parameters
    ----------
    dim : int
        Coordinates of a latent.
    width : int
        Units of a hidden layer.
    depth : int
        Hidden layers of either half.
    generator : torch.Generator
        Source of the first weights.
    """
    return nn.ModuleDict(
        {
            "encoder": SkipPerceptron(dim, 2 * dim, width, depth, generator),
            "decoder": SkipPerceptron(dim, dim, width, depth, generator),
        }
    )


def posterior(encoder: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of :math:`q(u | z)`, each ``(n, d)``.

    Parameters
    ----------
    encoder : torch.nn.Module
        Rows ``(n, d)`` to means and log standard deviations, ``(n, 2 d)``.
    z : Tensor
        Latents ``(n, d)``.
    """
    mean, log_scale = encoder(z).chunk(2, 1)
    return mean, log_scale.clamp(*LOG_SCALE_RANGE).exp()


def _linear(fan_in: int, fan_out: int, scale: float, generator: torch.Generator) -> nn.Linear:
    layer: nn.Linear = blank(nn.Linear, fan_in, fan_out)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(fan_in), generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
