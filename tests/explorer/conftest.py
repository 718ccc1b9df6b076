"""A model of digits and its prior, saved, and digits that they were not learned on."""

import threading

import numpy as np
import pytest

from digits_model import as_images, digits, digits_model
from latentprior.explorer.explorer import open_explorer


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folder with ``model``, ``prior``, ``images.npz`` (images and labels) and ``z.npy``."""
    folder = tmp_path_factory.mktemp("explored")
    model = digits_model()
    model.save_pretrained(folder / "model")
    model.prior.save_pretrained(folder / "prior")
    pixels, labels = (part[1200:1600] for part in digits())
    np.savez(folder / "images.npz", images=pixels, labels=labels)
    np.save(folder / "z.npy", model.encode(as_images(pixels))[0].numpy())
    return folder


@pytest.fixture(scope="session")
def model_explorer(saved):
    return open_explorer(saved / "model", saved / "images.npz")


@pytest.fixture(scope="session")
def prior_explorer(saved):
    return open_explorer(saved / "prior", saved / "z.npy")


@pytest.fixture(scope="module")
def served():
    """Function that serves an explorer until the file's tests end: other files' tests stop the clock of its loop."""
    pytest.importorskip("uvicorn")
    from latentprior.explorer.server import Server

    servers = []

    def call(explorer):
        server = Server(explorer, port=0)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        servers.append((server, thread))
        return server

    yield call
    for server, thread in servers:
        server.stop()
        thread.join(120)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def model_server(model_explorer, served):
    return served(model_explorer)


@pytest.fixture(scope="module")
def prior_server(prior_explorer, served):
    return served(prior_explorer)
