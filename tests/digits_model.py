"""A small model of scikit-learn's digits, for tests that look at pages."""

import numpy as np
import torch
from sklearn.datasets import load_digits

import latentprior as lp
from latentprior.models.networks import build_decoder, build_encoder, network_spec

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


def digits_model(rows=1200, steps=300, max_stages=2):
    """A VAE of the first ``rows`` digits under a ladder from a normal."""
    draws = torch.Generator().manual_seed(0)
    spec = network_spec("mlp", latent_dim=DIM, width=64, image_shape=(1, 8, 8))
    model = lp.LatentVariableModel(build_decoder(spec, draws), encoder=build_encoder(spec, draws))
    settings = lp.StageSettings(width=64, depth=1, steps=300, batch_size=256, average=0.98, bound=2)
    config = lp.AutoencoderConfig(steps=steps)
    lp.train_two_phase(
        model, lp.Images(digits()[0][:rows]), config, base="normal", max_stages=max_stages, settings=settings
    )
    assert model.prior.stages
    return model
