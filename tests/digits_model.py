"""A small model of scikit-learn's digits, for tests that look at pages."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import latentprior as lp
from latentprior.generator.networks import build_encoder, build_generator, network_spec

DIM = 6


def digits():
    """Pixels ``(1797, 8, 8)`` uint8 and classes ``(1797,)``, in random order."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return pixels[order], found.target[order].astype(np.int64)


def as_images(pixels):
    """``(n, 1, 8, 8)`` in [-1, 1]."""
    return torch.from_numpy(pixels).float()[:, None] / 127.5 - 1


def digits_model(rows=1200, steps=200, settings=None, max_stages=2):
    """An autoencoder of the first ``rows`` digits under a ladder from a normal."""
    draws = torch.Generator().manual_seed(0)
    spec = network_spec("mlp", latent_dim=DIM, width=128, image_shape=(1, 8, 8))
    generator, encoder = build_generator(spec, draws), build_encoder(spec, draws)
    x = as_images(digits()[0][:rows])
    parameters = [p for network in (generator, encoder) for p in network.requires_grad_(True).parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(steps):
        batch = x[torch.randint(rows, (256,), generator=draws)]
        mean = encoder(batch)[0]
        # Noise in the latent keeps neighbours alike, as in a VAE.
        noise = 0.3 * torch.randn(mean.shape, generator=draws)
        loss = nn.functional.mse_loss(generator(mean + noise), batch) + 2e-3 * mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for network in (generator, encoder):
        network.eval().requires_grad_(False)
    z = encoder(x)[0]
    settings = settings or lp.StageSettings(width=64, depth=1, steps=300, batch_size=256, average=0.98, bound=2)
    latents = lp.Latents.posterior(z, torch.full_like(z, 0.3))
    prior = lp.fit(latents, base="normal", max_stages=max_stages, settings=settings)
    assert prior.stages
    return lp.LatentVariableModel(generator, prior, sigma=0.3, encoder=encoder)
