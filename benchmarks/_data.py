"""Latents that the benchmarks learn from; nothing here is needed by the package or its tests."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from latentprior.models.adapters import Autoencoder
from latentprior.models.pretrained import taesd_from_safetensors

__all__ = [
    "SETS", "LatentSet", "cifar32", "cifar64", "cifar128", "cifarpca40", "data_folder", "image_cache", "load_set",
    "mnist16", "pca50", "taef2", "taef512", "vae20",
]  # fmt: skip


def data_folder() -> Path:
    """The folder with ``latents_mnist16.npz`` and ``pretrained/``; set LATENTPRIOR_DATA to point elsewhere."""
    here = Path(__file__).resolve().parents[1]
    return Path(os.environ.get("LATENTPRIOR_DATA", here.parent / "shared" / "data"))


def image_cache() -> Path:
    """The folder with ``mnist.npz`` and ``cifar10.npz`` (x_train, y_train, x_test, y_test; uint8)."""
    return Path(os.environ.get("LATENTPRIOR_IMAGES", Path.home() / ".cache" / "latentprior"))


@dataclass(frozen=True)
class LatentSet:
    """Train, validation and test rows; ``scale`` arrays are posterior standard deviations where known."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    train_scale: np.ndarray | None = None
    validation_scale: np.ndarray | None = None


def mnist16() -> LatentSet:
    """Latents of a 16-d MNIST VAE: 55k train, 5k validation, 10k test."""
    archive = np.load(data_folder() / "latents_mnist16.npz")
    return LatentSet("mnist16", archive["train"][:55_000], archive["train"][55_000:], archive["test"])


def vae20() -> LatentSet:
    """The classic 784-400-20 MNIST VAE: posterior means and scales of train, one draw a test image."""
    weights = load_file(data_folder() / "pretrained" / "vae20_mnist.safetensors")
    images = np.load(image_cache() / "mnist.npz")

    def encode(x: np.ndarray) -> tuple[Tensor, Tensor]:
        flat = torch.from_numpy(x).flatten(1).float() / 255
        h = torch.relu(flat @ weights["fc1.weight"].T + weights["fc1.bias"])
        mean = h @ weights["fc21.weight"].T + weights["fc21.bias"]
        log_var = h @ weights["fc22.weight"].T + weights["fc22.bias"]
        return mean, (0.5 * log_var).exp()

    return _posterior_set("vae20", encode(images["x_train"]), encode(images["x_test"]), 5_000)


def cifar64(dim: int = 64, epochs: int = 8) -> LatentSet:
    """A conv VAE on CIFAR-10, trained here once and cached: posterior means and scales."""
    path = image_cache() / f"cifar_vae{dim}.npz"
    if not path.exists():
        _train_cifar_vae(path, dim, epochs)
    a = np.load(path)
    pairs = [(torch.from_numpy(a[f"{part}_mean"]), torch.from_numpy(a[f"{part}_scale"])) for part in ("train", "test")]
    return _posterior_set(f"cifar{dim}", pairs[0], pairs[1], 5_000)


def cifar128() -> LatentSet:
    """As :func:`cifar64`, with 128 dimensions."""
    return cifar64(128)


def cifar32() -> LatentSet:
    """As :func:`cifar64`, with 32 dimensions and four epochs; held aside, no default was chosen on it."""
    return cifar64(32, epochs=4)


def pca50() -> LatentSet:
    """MNIST pixels on their first 50 principal components, 55k train."""
    return _components("pca50", "mnist", 50)


def cifarpca40() -> LatentSet:
    """CIFAR-10 pixels on their first 40 principal components, 45k train; held aside, no default was chosen on it."""
    return _components("cifarpca40", "cifar10", 40)


def _components(name: str, images: str, k: int) -> LatentSet:
    archive = np.load(image_cache() / f"{images}.npz")
    train, test = (archive[f"x_{part}"].reshape(len(archive[f"x_{part}"]), -1) / 255 for part in ("train", "test"))
    centre = train.mean(0)
    axes = np.linalg.eigh(np.cov(train.T))[1][:, : -k - 1 : -1]
    z, held = (((x - centre) @ axes).astype(np.float32) for x in (train, test))
    return LatentSet(name, z[:-5000], z[-5000:], held)


def taef512() -> LatentSet:
    """Codes of CIFAR-10 under TAEF2, 32 x 4 x 4, encoded here once and cached: 45k train, 5k validation, 10k test."""
    path = image_cache() / "cifar_taef2.npz"
    if not path.exists():
        autoencoder, images = taef2(), np.load(image_cache() / "cifar10.npz")
        _save(path, {part: _encoded(autoencoder, images[f"x_{part}"]) for part in ("train", "test")})
    a = np.load(path)
    return LatentSet("taef512", a["train"][:45_000], a["train"][45_000:], a["test"])


def taef2() -> Autoencoder:
    """The foreign autoencoder of the data folder, for images ``(n, 3, 32, 32)`` in [-1, 1]."""
    folder = data_folder() / "pretrained"
    return taesd_from_safetensors(folder / "taef2_encoder.safetensors", folder / "taef2_decoder.safetensors")


@torch.no_grad()
def _encoded(autoencoder: Autoencoder, pixels: np.ndarray) -> np.ndarray:
    """In bfloat16, which takes a third of the time; its rounding is part of the codes."""
    encoder = autoencoder.encoder.to(memory_format=torch.channels_last)
    codes = []
    for block in tqdm(np.array_split(pixels, -(-len(pixels) // 100)), desc="TAEF2 codes", mininterval=5):
        x = torch.from_numpy(block).permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory
        with torch.autocast("cpu", torch.bfloat16):
            codes.append(encoder(x).float().contiguous().numpy())
    return np.concatenate(codes)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Written whole or not at all: two runs may make the same set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}_{path.name}")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def _posterior_set(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], held_out: int) -> LatentSet:
    mean, scale = (v.numpy() for v in train)
    noise = torch.randn(test[0].shape, generator=torch.Generator().manual_seed(0))
    drawn = (test[0] + test[1] * noise).numpy()
    k = len(mean) - held_out
    return LatentSet(name, mean[:k], mean[k:], drawn, scale[:k], scale[k:])


class CifarVAE(nn.Module):
    """A small convolutional VAE for 32 x 32 x 3 images in [-1, 1]."""

    def __init__(self, dim: int, width: int = 32) -> None:
        super().__init__()
        w = width
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.SiLU(),
            nn.Flatten(), nn.Linear(64 * w, 2 * dim),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(dim, 64 * w), nn.SiLU(), nn.Unflatten(1, (4 * w, 4, 4)),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(w, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.encoder(x).chunk(2, 1)
        return mean, log_scale.clamp(-7, 2).exp()


def _train_cifar_vae(path: Path, dim: int, epochs: int) -> None:
    images = np.load(image_cache() / "cifar10.npz")

    def scaled(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory

    torch.manual_seed(0)
    model = CifarVAE(dim).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train, sigma = torch.from_numpy(images["x_train"]), 0.15
    for epoch in range(epochs):
        for index in tqdm(torch.randperm(len(train)).split(128), desc=f"CIFAR-10 VAE, epoch {epoch + 1}/{epochs}"):
            x = scaled(train[index].numpy())
            mean, scale = model.encode(x)
            z = mean + scale * torch.randn_like(mean)
            kl = (0.5 * (mean**2 + scale**2 - 1) - scale.log()).sum(1).mean()
            loss = (model.decoder(z) - x).square().sum((1, 2, 3)).mean() / (2 * sigma**2) + kl
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - epoch / epochs) + 1e-5
    arrays = {}
    with torch.no_grad():
        for part in ("train", "test"):
            pairs = [model.encode(scaled(block)) for block in np.array_split(images[f"x_{part}"], 100)]
            arrays[f"{part}_mean"] = torch.cat([m for m, _ in pairs]).numpy()
            arrays[f"{part}_scale"] = torch.cat([s for _, s in pairs]).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.decoder.state_dict().items()}, path.with_suffix(".safetensors"))
    _save(path, arrays)


SETS = {
    "mnist16": mnist16, "vae20": vae20, "cifar64": cifar64, "cifar128": cifar128, "taef512": taef512,
    "cifar32": cifar32, "pca50": pca50, "cifarpca40": cifarpca40,
}  # fmt: skip


def load_set(name: str) -> LatentSet:
    """A set of :data:`SETS`."""
    return SETS[name]()


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description="Make and cache a set of latents.")
    ask.add_argument("name", choices=list(SETS))
    made = load_set(ask.parse_args().name)
    print(made.name, made.train.shape, made.validation.shape, made.test.shape)
