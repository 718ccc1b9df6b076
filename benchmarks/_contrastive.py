"""Features of digits that nobody labelled: a small convolutional network that tells deformed copies of images apart.

SimCLR (Chen et al. 2020): two deformed copies of an image are to lie close to each other on the sphere, and far from
those of the other images of the batch. The deformations keep a digit's identity: rotation, scale, shear, shift, smooth
bending, thinner and thicker strokes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

__all__ = ["ContrastiveConfig", "ContrastiveNetwork", "Projection", "contrastive_loss", "deformed", "train_contrastive"]

SIZE = 28


@dataclass(frozen=True)
class ContrastiveConfig:
    """Size and learning of the network, chosen with digits 3 and 8 held out."""

    width: int = 32
    """Channels of the first of three layers; each further one has twice as many."""
    dim: int = 128
    steps: int = 1500
    batch_size: int = 128
    temperature: float = 1.0
    learning_rate: float = 3e-3
    warmup: int = 50
    half: bool = True
    """Whether the network runs in bfloat16: much faster on processors that have it, far slower on others."""


class ContrastiveNetwork(nn.Module):
    """Images ``(n, 1, 28, 28)`` in [0, 1] to features ``(n, dim)`` of length 1; ``head`` serves the loss alone."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(1, w, 5, 2, 2, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.Conv2d(2 * w, 4 * w, 3, 2, 1, bias=False), nn.BatchNorm2d(4 * w), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * w, dim, bias=False), nn.BatchNorm1d(dim),
        )  # fmt: skip
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 64))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x.contiguous(memory_format=torch.channels_last)).float(), dim=1)

    def projected(self, x: Tensor) -> Tensor:
        """Return the vectors that the loss compares, ``(n, 64)`` of length 1."""
        return F.normalize(self.head(self.body(x.contiguous(memory_format=torch.channels_last))).float(), dim=1)

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> Tensor:
        """Features of uint8 images ``(n, 28, 28)``, undeformed."""
        return torch.cat([self(scaled(block)) for block in np.array_split(pixels, 1 + len(pixels) // 1000)])


def scaled(pixels: np.ndarray) -> Tensor:
    """uint8 ``(n, 28, 28)`` to ``(n, 1, 28, 28)`` in [0, 1]."""
    return torch.from_numpy(pixels).float().div(255)[:, None]


def deformed(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random copy of each image ``(n, 1, 28, 28)`` in [0, 1]; the ranges are those of handwriting, no digit turns."""
    n = len(x)

    def uniform(reach: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * reach

    angle, shear = uniform(math.radians(20)), uniform(0.2)
    across, down = uniform(0.2).exp(), uniform(0.2).exp()
    c, s = angle.cos(), angle.sin()
    first = torch.stack([c * across, s * across], 1)
    second = torch.stack([(shear * c - s) * down, (c + shear * s) * down], 1)
    shift = torch.stack([uniform(0.15), uniform(0.15)], 1)
    grid = F.affine_grid(torch.stack([first, second, shift], 2), list(x.shape), align_corners=False)
    knots = torch.randn(n, 2, 5, 5, generator=generator) * 0.08
    bend = F.interpolate(knots, size=SIZE, mode="bicubic", align_corners=True)
    y = F.grid_sample(x, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    # Thicker strokes are a share of the maximum over neighbours, thinner ones of the minimum.
    share = uniform(0.5)[:, None, None, None]
    thick = F.max_pool2d(y, 3, 1, 1)
    thin = -F.max_pool2d(-y, 2, 1, 1)[:, :, :SIZE, :SIZE]
    return torch.where(share > 0, y + share * (thick - y), y - share * (thin - y))


def contrastive_loss(z: Tensor, temperature: float) -> Tensor:
    r"""NT-Xent: rows i and i + n of ``(2n, k)`` are a pair, all others are negatives.

    .. math:: -\frac1{2n} \sum_i \log \frac{e^{z_i \cdot z_{i'} / t}}{\sum_{j \ne i} e^{z_i \cdot z_j / t}}
    """
    likeness = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    return F.cross_entropy(likeness, torch.arange(len(z)).roll(len(z) // 2))


def train_contrastive(pixels: np.ndarray, config: ContrastiveConfig, *, seed: int) -> ContrastiveNetwork:
    """Learn from uint8 images ``(n, 28, 28)``, without labels; AdamW, its rate falling to zero on a cosine."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ContrastiveNetwork(config.width, config.dim).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=1e-3)
    for step in tqdm(range(config.steps), desc="contrastive features", mininterval=5):
        slow = min(1.0, (step + 1) / config.warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * slow
        x = scaled(pixels[torch.randint(len(pixels), (config.batch_size,), generator=generator).numpy()])
        copies = torch.cat([deformed(x, generator), deformed(x, generator)])
        with torch.autocast("cpu", torch.bfloat16, enabled=config.half):
            z = network.projected(copies)
        loss = contrastive_loss(z, config.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return network.eval()


@dataclass(frozen=True)
class Projection:
    """The ``dim`` principal axes of features, in units of the first one's standard deviation: axes keep their ratios.

    Whitened axes would count the noise of the last ones as much as what tells digits apart.
    """

    center: Tensor
    axes: Tensor

    @classmethod
    def of(cls, rows: Tensor, dim: int) -> Projection:
        """The axes of ``(n, k)`` rows."""
        center = rows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((rows - center).double().T))
        return cls(center, (vectors[:, -dim:].flip(1) / values[-1].sqrt()).float())

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows - self.center) @ self.axes
