"""A small model whose images mean something, saved, and images that it was not trained on."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

import latentprior as lp
from latentprior.explorer.explorer import open_explorer
from latentprior.explorer.server import Server
from latentprior.generator.networks import build_encoder, build_generator, network_spec


def squares(n, seed=0):
    """Squares of random place and brightness ``(n, 8, 8)``, and 1 where they stand in the right half."""
    draws = np.random.default_rng(seed)
    x = np.zeros((n, 8, 8), np.uint8)
    places = draws.integers(0, 6, (n, 2))
    for image, (row, column) in zip(x, places, strict=True):
        image[row : row + 3, column : column + 3] = draws.integers(120, 256)
    return x, (places[:, 1] >= 3).astype(np.int64)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folder with ``model``, ``prior``, ``images.npz`` (images and labels) and ``z.npy``."""
    folder = tmp_path_factory.mktemp("explored")
    draws = torch.Generator().manual_seed(0)
    spec = network_spec("mlp", latent_dim=3, width=64, image_shape=(1, 8, 8))
    generator, encoder = build_generator(spec, draws), build_encoder(spec, draws)
    model = lp.LatentVariableModel(generator, encoder=encoder, sigma=0.2)
    x = torch.from_numpy(squares(600, 1)[0]).float()[:, None] / 127.5 - 1
    parameters = [*generator.requires_grad_(True).parameters(), *encoder.requires_grad_(True).parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(300):
        mean = encoder(x)[0]
        loss = nn.functional.mse_loss(generator(mean), x) + 1e-3 * mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for network in (generator, encoder):
        network.eval().requires_grad_(False)
    z = encoder(x)[0]
    settings = lp.StageSettings(width=32, depth=1, steps=200, batch_size=128, average=0.98, bound=1.5)
    # Noise, as of a posterior: the latents of these few squares lie on a sheet.
    latents = lp.Latents.posterior(z, 0.4 * z.std(0).expand_as(z))
    model.prior = lp.fit(latents, base="normal", max_stages=2, settings=settings)
    assert model.prior.stages
    model.save_pretrained(folder / "model")
    model.prior.save_pretrained(folder / "prior")
    pixels, labels = squares(300, 2)
    np.savez(folder / "images.npz", images=pixels, labels=labels)
    np.save(folder / "z.npy", encoder(torch.from_numpy(pixels).float()[:, None] / 127.5 - 1)[0].numpy())
    return folder


@pytest.fixture(scope="session")
def model_explorer(saved):
    return open_explorer(saved / "model", saved / "images.npz")


@pytest.fixture(scope="session")
def prior_explorer(saved):
    return open_explorer(saved / "prior", saved / "z.npy")


@pytest.fixture(scope="session")
def served():
    """Function that serves an explorer until the session ends, and returns the server."""
    servers = []

    def call(explorer, **options):
        server = Server(explorer, port=0, **options)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return server

    yield call
    for server, thread in servers:
        server.shutdown()
        server.close()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def model_server(model_explorer, served):
    return served(model_explorer)


@pytest.fixture(scope="session")
def prior_server(prior_explorer, served):
    return served(prior_explorer)
