"""Decoder and encoder networks of the latent-prior papers, rebuilt from a JSON specification."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InvalidImagesError, InvalidLatentsError, LatentPriorError
from ..storage.checkpoint import tensors_under
from ..storage.sized_networks import blank, built_for

__all__ = ["DecoderNetwork", "EncoderNetwork", "build_decoder", "build_encoder", "loaded_network", "network_spec"]

LEAKY_SLOPE = 0.2
"""Slope of the leaky ReLU for negative inputs; the papers' number."""
LOG_SCALE_RANGE = (-7.0, 2.0)
"""Least and most of the encoder's log standard deviations."""
LARGEST_SIZE = 1 << 14
"""Most coordinates, units or pixels a side that a specification may ask for."""


class _Layer(NamedTuple):
    """A transposed convolution; ``widths`` counts its output channels in widths, 0 stands for the image's."""

    widths: int
    kernel: int
    stride: int
    padding: int


class _Family(NamedTuple):
    latent_dim: int
    width: int
    image_shape: tuple[int, int, int]
    layers: tuple[_Layer, ...]


TO_4, TO_7, TO_8 = _Layer(8, 4, 1, 0), _Layer(4, 7, 1, 0), _Layer(8, 8, 1, 0)
DOUBLE_4, DOUBLE_2, DOUBLE_1, DOUBLE_TO_IMAGE = (_Layer(widths, 4, 2, 1) for widths in (4, 2, 1, 0))
SAME_TO_IMAGE = _Layer(0, 3, 1, 1)

FAMILIES = {
    "svhn": _Family(100, 64, (3, 32, 32), (TO_4, DOUBLE_4, DOUBLE_2, DOUBLE_TO_IMAGE)),
    "cifar10": _Family(128, 128, (3, 32, 32), (TO_8, DOUBLE_4, DOUBLE_2, SAME_TO_IMAGE)),
    "celeba64": _Family(100, 128, (3, 64, 64), (TO_4, DOUBLE_4, DOUBLE_2, DOUBLE_1, DOUBLE_TO_IMAGE)),
    "mnist": _Family(16, 32, (1, 28, 28), (TO_7, DOUBLE_2, DOUBLE_1, SAME_TO_IMAGE)),
    "mlp": _Family(16, 256, (1, 28, 28), ()),
}


class DecoderNetwork(nn.Module):
    r"""The mean of the generative model, :math:`g_\theta: z \mapsto x`, ``(n, d)`` to ``(n, C, H, W)`` in [-1, 1].

    Transposed convolutions (``mlp``: two hidden layers) with leaky ReLU of slope 0.2, and tanh at the end. Nothing
    is normalised over the batch: Langevin dynamics needs each latent's image to be its own.

    Parameters
    ----------
    spec : mapping
        The specification that :func:`network_spec` returns.
    generator : torch.Generator, optional
        Source of the first weights, on the CPU.

    Raises
    ------
    CheckpointError
        For a specification that no network can be made of.
    InvalidLatentsError
        When it is called with latents of another shape.

    Notes
    -----
    Weights start as :math:`\mathcal N(0, a^2 / m)`, m the number of products that one output sums, a the leaky
    ReLU's gain (1 in the last layer); biases start at 0 (He et al. 2015, section 2.2).

    Source: the generators of Pang et al. (2020) and Xiao and Han (2022), whose widths :func:`network_spec` gives;
    ``mnist`` and ``mlp`` are small ones beside them.
    """

    def __init__(self, spec: Mapping[str, Any], generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = _checked(spec)
        self.latent_shape = torch.Size([self.spec["latent_dim"]])
        self.image_shape = torch.Size(self.spec["image_shape"])
        d, w = self.spec["latent_dim"], self.spec["width"]
        if self.spec["family"] == "mlp":
            maps = _linear_maps(d, w, w, self.image_shape.numel())
            layers = [*_stacked(maps, generator), nn.Unflatten(1, self.image_shape)]
        else:
            maps, channels = [], d
            for widths, *geometry in FAMILIES[self.spec["family"]].layers:
                kernel, stride, _ = geometry
                fan_out = widths * w or self.image_shape[0]
                # The first layer spreads a single pixel: each output sees one tap of its kernel.
                taps = (kernel // stride) ** 2 if maps else 1
                conv = blank(nn.ConvTranspose2d, channels, fan_out, *geometry)
                maps.append((conv, channels * taps))
                channels = fan_out
            layers = [nn.Unflatten(1, (d, 1, 1)), *_stacked(maps, generator)]
        self.layers = _channels_last(nn.Sequential(*layers, nn.Tanh()))

    def forward(self, z: Tensor) -> Tensor:
        """Map latents to images ``(n, C, H, W)`` in [-1, 1].

        Parameters
        ----------
        z : Tensor
            Latents ``(n, d)``.
        """
        if z.shape[1:] != self.latent_shape:
            raise InvalidLatentsError(
                f"latents have shape {tuple(z.shape)}: this decoder takes (n, {self.spec['latent_dim']})"
            )
        return self.layers(z)  # type: ignore[no-any-return]


class EncoderNetwork(nn.Module):
    r"""A Gaussian posterior :math:`\mathcal N(m(x), \mathrm{diag}(s(x)^2))`: the decoder's layers in reverse.

    ``(n, C, H, W)`` in [-1, 1] to the pair ``(mean, scale)``, each ``(n, d)``, the log scale clamped to [-7, 2].
    Weights start as those of :class:`DecoderNetwork`; those of the log scale at 0, so that all scales are 1 at first.

    Parameters
    ----------
    spec : mapping
        The specification that :func:`network_spec` returns.
    generator : torch.Generator, optional
        Source of the first weights, on the CPU.

    Raises
    ------
    CheckpointError
        For a specification that no network can be made of.
    InvalidImagesError
        When it is called with images of another shape.
    """

    def __init__(self, spec: Mapping[str, Any], generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = _checked(spec)
        self.latent_shape = torch.Size([self.spec["latent_dim"]])
        self.image_shape = torch.Size(self.spec["image_shape"])
        d, w = self.spec["latent_dim"], self.spec["width"]
        if self.spec["family"] == "mlp":
            maps = _linear_maps(self.image_shape.numel(), w, w, 2 * d)
            layers = [nn.Flatten(), *_stacked(maps, generator)]
        else:
            mirrored = FAMILIES[self.spec["family"]].layers[::-1]
            outputs = [*(layer.widths * w for layer in mirrored[1:]), 2 * d]
            maps, channels = [], self.image_shape[0]
            for (_, *geometry), fan_out in zip(mirrored, outputs, strict=True):
                conv = blank(nn.Conv2d, channels, fan_out, *geometry)
                maps.append((conv, channels * geometry[0] ** 2))
                channels = fan_out
            layers = [*_stacked(maps, generator), nn.Flatten()]
        with torch.no_grad():
            maps[-1][0].weight[d:] = 0.0
        self.layers = _channels_last(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to posterior means and standard deviations, each ``(n, d)``.

        Parameters
        ----------
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].
        """
        if x.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise InvalidImagesError(f"images have shape {tuple(x.shape)}: this encoder takes (n, {expected})")
        mean, log_scale = self.layers(x).chunk(2, 1)
        return mean, log_scale.clamp(*LOG_SCALE_RANGE).exp()


def _channels_last(layers: nn.Sequential) -> nn.Sequential:
    """Order weights with channels last: convolutions this narrow then take 0.6 of the time on a CPU."""
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return layers


def _linear_maps(*sizes: int) -> list[tuple[Any, int]]:
    return [(blank(nn.Linear, *pair), pair[0]) for pair in itertools.pairwise(sizes)]


def _stacked(maps: Sequence[tuple[Any, int]], generator: torch.Generator | None) -> list[nn.Module]:
    """Initialise pairs of (layer, number of products an output sums) and put leaky ReLUs between them."""
    stack: list[nn.Module] = []
    for i, (layer, products) in enumerate(maps):
        last = i == len(maps) - 1
        gain = 1.0 if last else nn.init.calculate_gain("leaky_relu", LEAKY_SLOPE)
        nn.init.normal_(layer.weight, std=gain / math.sqrt(products), generator=generator)
        nn.init.zeros_(layer.bias)
        stack += [layer] if last else [layer, nn.LeakyReLU(LEAKY_SLOPE)]
    return stack


def network_spec(
    family: str, latent_dim: int | None = None, width: int | None = None, image_shape: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the specification of a family, with its paper's latent dimension and width where none is given.

    Parameters
    ----------
    family : {"svhn", "cifar10", "celeba64", "mnist", "mlp"}
        Name of the family. Convolutional families take any number of channels at their image size, ``mlp`` takes any
        image.
    latent_dim : int, optional
        Coordinates of a latent.
    width : int, optional
        Channels, or units, that the layers' sizes are multiples of.
    image_shape : sequence of int, optional
        Shape (C, H, W) of one image.

    Returns
    -------
    dict
        ``family``, ``latent_dim``, ``width`` and ``image_shape``; JSON.

    Raises
    ------
    LatentPriorError
        For an unknown family or numbers that do not fit it.

    Notes
    -----
    ========  ===========  =====  ================
    family    latent_dim   width  image_shape
    ========  ===========  =====  ================
    svhn      100          64     (3, 32, 32)
    cifar10   128          128    (3, 32, 32)
    celeba64  100          128    (3, 64, 64)
    mnist     16           32     (1, 28, 28)
    mlp       16           256    (1, 28, 28)
    ========  ===========  =====  ================

    Examples
    --------
    >>> network_spec("svhn", width=16)
    {'family': 'svhn', 'latent_dim': 100, 'width': 16, 'image_shape': [3, 32, 32]}
    """
    if family not in FAMILIES:
        raise LatentPriorError(f"unknown network family {family!r}: choose {', '.join(FAMILIES)}")
    default = FAMILIES[family]
    return _checked(
        {
            "family": family,
            "latent_dim": default.latent_dim if latent_dim is None else latent_dim,
            "width": default.width if width is None else width,
            "image_shape": default.image_shape if image_shape is None else image_shape,
        }
    )


def build_decoder(spec: Mapping[str, Any], generator: torch.Generator | None = None) -> DecoderNetwork:
    """Make a decoder network from a JSON specification.

    Parameters
    ----------
    spec : mapping
        ``family``, ``latent_dim``, ``width`` and ``image_shape``, as :func:`network_spec` returns them.
    generator : torch.Generator, optional
        Source of the first weights, on the CPU.

    Returns
    -------
    DecoderNetwork
        A module with ``spec``, ``latent_shape`` and ``image_shape``.

    Raises
    ------
    CheckpointError
        For a specification that no network can be made of.
    """
    return DecoderNetwork(spec, generator)


def build_encoder(spec: Mapping[str, Any], generator: torch.Generator | None = None) -> EncoderNetwork:
    """Make the encoder that mirrors a decoder of the same specification.

    Parameters
    ----------
    spec : mapping
        The specification, as :func:`network_spec` returns it.
    generator : torch.Generator, optional
        Source of the first weights, on the CPU.

    Raises
    ------
    CheckpointError
        For a specification that no network can be made of.
    """
    return EncoderNetwork(spec, generator)


def _checked(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON copy of a specification, or raise :class:`CheckpointError` if no network can be made of it."""
    if not isinstance(spec, Mapping) or set(spec) != {"family", "latent_dim", "width", "image_shape"}:
        raise CheckpointError(
            "a network specification has family, latent_dim, width and image_shape: network_spec() makes one"
        )
    family = spec["family"]
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"unknown network family {family!r}: choose {', '.join(FAMILIES)}")
    shape = spec["image_shape"]
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    numbers = [spec["latent_dim"], spec["width"], *sizes]
    if len(sizes) != 3 or not all(type(n) is int and 0 < n <= LARGEST_SIZE for n in numbers):
        raise CheckpointError(
            f"network specification {dict(spec)}: give latent_dim, width and image_shape [C, H, W] as whole numbers "
            f"from 1 to {LARGEST_SIZE}"
        )
    expected = FAMILIES[family].image_shape[1:]
    if family != "mlp" and tuple(sizes[1:]) != expected:
        raise CheckpointError(
            f"family {family!r} makes images of {expected[0]} x {expected[1]}, not {sizes[1]} x {sizes[2]}: "
            "choose another family (mlp makes any size) or resize the images"
        )
    return {"family": family, "latent_dim": spec["latent_dim"], "width": spec["width"], "image_shape": sizes}


def loaded_network(
    entry: Mapping[str, Any],
    own: nn.Module | None,
    build: Callable[..., nn.Module],
    name: str,
    tensors: Mapping[str, Tensor],
) -> nn.Module:
    """The network ``name`` of a saved model with its weights: ``own``, else one built from its specification.

    Parameters
    ----------
    entry : mapping
        What the model's configuration says of the network: its ``spec``, None for a network of the user's.
    own : torch.nn.Module or None
        The user's own network, untrained.
    build : callable
        Makes a network from a specification and a generator.
    name : str
        The network's name in the model; its tensors have names that begin so.
    tensors : mapping
        All tensors of the model by name.

    Raises
    ------
    CheckpointError
        Where the network is the user's and is not given.
    """
    if own is None and not entry["spec"]:
        raise CheckpointError(f"this model's {name} is a network of yours: pass it, from_pretrained(dir, {name}=...)")
    weights = tensors_under(tensors, f"{name}.")
    network = own if own is not None else built_for(weights, lambda: build(entry["spec"], torch.Generator()))
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
