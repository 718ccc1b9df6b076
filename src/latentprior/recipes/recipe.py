"""Training recipes: what ``latentprior train`` reads from YAML, checked key by key before any work begins."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..baselines import RIVALS
from ..density.whitening import Kind
from ..errors import LatentPriorError, MissingExtraError
from ..fitting.settings import StageSettings
from ..models.model import LatentVariableModel
from ..training.config import AutoencoderConfig, TrainingConfig

__all__ = [
    "BY_SHAPE",
    "METHODS",
    "OURS",
    "FitConfig",
    "NetworkConfig",
    "Recipe",
    "changed",
    "filled",
    "read_recipe",
    "recipe_for",
    "recipe_names",
    "rival",
    "to_yaml",
]

Method = Literal[
    "joint", "two-phase", "alternating", "vae", "rae", "sri", "lebm", "ncp-vae", "two-stage-vae", "gmm", "flow"
]
METHODS: tuple[str, ...] = get_args(Method)
OURS, RIVAL_METHODS = METHODS[:3], METHODS[3:]
WITHOUT_AUTOENCODER = ("joint", "sri", "lebm")
FILE_BYTES = 1 << 20
"""Most bytes of a recipe's file."""
BY_SHAPE: Mapping[tuple[int, ...], str] = {(1, 28, 28): "mnist", (3, 32, 32): "cifar10", (3, 64, 64): "celeba64"}
"""The network family that suits images of a shape; ``mlp`` suits any other."""
T = TypeVar("T")


@dataclass(frozen=True)
class NetworkConfig:
    """Decoder and encoder: arguments of :func:`~latentprior.models.networks.network_spec`.

    Parameters
    ----------
    family : str
        Name of the network family.
    latent_dim : int, optional
        Coordinates of a latent; None takes the family's own number.
    width : int, optional
        Channels, or units, that the layers' sizes are multiples of; None takes the family's own number.
    """

    family: str = "mlp"
    latent_dim: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class FitConfig:
    """How the prior of a two-phase run is learned: options of :func:`latentprior.fit`.

    Parameters
    ----------
    base : str
        Name of the base density: ``normal``, ``gmm``, ``gmm:K``, ``gmm-lowrank``, ``copula`` or ``flow``.
    max_stages : int
        Most stages of the ladder.
    time_budget : float, optional
        Seconds for the prior; those of the autoencoder do not count.
    validation : float
        Share of the latents that is held out.
    whitening : str, optional
        How latents are standardised; None takes the base's own kind.
    settings : StageSettings
        Settings of a stage's learning.
    """

    base: str = "gmm"
    max_stages: int = 20
    time_budget: float | None = None
    validation: float = 0.1
    whitening: Kind | None = None
    settings: StageSettings = field(default_factory=StageSettings)

    def __post_init__(self) -> None:
        """Raise now what :func:`latentprior.fit` would raise after the autoencoder is learned."""
        if not re.fullmatch(r"normal|copula|flow|gmm(-lowrank)?(:0*[1-9]\d*)?", self.base):
            raise LatentPriorError(
                f"unknown base {self.base!r}: choose normal, gmm, gmm:K, gmm-lowrank, copula or flow"
            )
        if self.max_stages < 0 or not 0 < self.validation < 1:
            raise LatentPriorError("max_stages must be 0 or more, validation above 0 and below 1")
        if self.time_budget is not None and self.time_budget < 0:
            raise LatentPriorError(f"time_budget must be 0 seconds or more, got {self.time_budget}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run but images, seed and device.

    Parameters
    ----------
    method : str
        ``joint`` is :func:`~latentprior.training.joint.train`; ``two-phase`` is
        :func:`~latentprior.training.two_phase.train_two_phase`; ``alternating`` is
        :func:`~latentprior.training.alternating.train_alternating`; any other of ``METHODS`` is a rival of
        :mod:`latentprior.baselines`.
    network : NetworkConfig
        The networks.
    sigma : float
        Standard deviation of a pixel around the decoder's mean.
    encoder : bool, optional
        Whether the model has an encoder. None gives one to those methods that begin with an autoencoder. SRI and LEBM
        leave it out.
    image_size : int, optional
        Side, in pixels, of the centre square that images are cut and resized to; None keeps their size.
    joint : TrainingConfig
        Settings of joint and alternating learning.
    autoencoder : AutoencoderConfig
        Settings of the autoencoder that two-phase and alternating learning begin with.
    fit : FitConfig
        Settings of the prior of two-phase and alternating learning.
    rivals : mapping
        By method, options of the rivals' own configurations at this recipe's scale.
    rival : mapping
        Options of the rival that ``method`` names; they come before those in ``rivals``.
    """

    method: Method = "joint"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    sigma: float = 0.3
    encoder: bool | None = True
    image_size: int | None = None
    joint: TrainingConfig = field(default_factory=TrainingConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    rivals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rival: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise :class:`LatentPriorError` for numbers that no image or density can have, and for unknown rivals."""
        if not 0 < self.sigma < math.inf:
            raise LatentPriorError(f"sigma must be positive and finite, got {self.sigma}")
        if self.image_size is not None and self.image_size < 1:
            raise LatentPriorError(f"image_size must be 1 or more, got {self.image_size}")
        if self.rival and self.method in OURS:
            raise LatentPriorError(
                f"rival: method {self.method!r} has no such settings, use {self.method!r}'s own section"
            )
        for method, options in self.rivals.items():
            if method not in RIVAL_METHODS:
                raise LatentPriorError(f"unknown rival {_short(method)}: choose one of {', '.join(RIVAL_METHODS)}")
            filled(_config_of(method), options, f"rivals.{method}")
        self.rival_config()

    @property
    def has_encoder(self) -> bool:
        """Whether the model is made with an encoder."""
        return self.method not in WITHOUT_AUTOENCODER if self.encoder is None else self.encoder

    def rival_config(self) -> Any:
        """The configuration that the rival of this method takes; None for the methods that are no rivals."""
        if self.method in OURS:
            return None
        return filled(_config_of(self.method), {**self.rivals.get(self.method, {}), **self.rival}, "rival")


def _config_of(method: str) -> type[Any]:
    hints = get_type_hints(rival(method))
    kind: type[Any]
    (kind,) = (choice for choice in get_args(hints["config"]) if choice is not types.NoneType)
    return kind


def rival(method: str) -> Callable[..., LatentVariableModel]:
    """Return the training function of a rival.

    Parameters
    ----------
    method : str
        The name that recipes give it.
    """
    return RIVALS[{"gmm": "latent_gmm", "flow": "latent_flow"}.get(method, method.replace("-", "_"))]


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes in this package: a data set of the paper, at ``cpu`` or ``paper`` scale.

    Those with ``alternating`` begin with an autoencoder; the others learn decoder and ladder together at once. In
    each, ``method`` chooses a row of the paper's tables: any of ``METHODS``, on the same networks.

    Examples
    --------
    >>> "mnist-cpu" in recipe_names()
    True
    """
    folder = resources.files(__package__)
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def recipe_for(image_shape: Sequence[int] = (), *, several: bool = False) -> str:
    """Name of the recipe at ``cpu`` scale for images of a shape.

    Parameters
    ----------
    image_shape : sequence of int
        Shape (C, H, W) of one image.
    several : bool
        Whether several processes learn together, for which only joint learning serves.

    Examples
    --------
    >>> recipe_for((1, 28, 28)), recipe_for((3, 8, 8)), recipe_for((1, 28, 28), several=True)
    ('mnist-alternating-cpu', 'mlp-alternating-cpu', 'mnist-cpu')
    """
    return f"{BY_SHAPE.get(tuple(image_shape), 'mlp')}{'' if several else '-alternating'}-cpu"


def read_recipe(source: str | Path) -> Recipe:
    """Read a recipe by its name in :func:`recipe_names`, or from a YAML file (extra ``images``).

    Parameters
    ----------
    source : str or Path
        The name, or the path of a file. A file leaves out what keeps its default.

    Raises
    ------
    LatentPriorError
        For a file that is absent or no YAML, an unknown key, or a value of another type; the error names it.
    """
    name = str(source)
    if name in recipe_names():
        text = (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(source)
        if not path.is_file():
            raise LatentPriorError(f"{name}: no such file, nor a recipe of this package ({', '.join(recipe_names())})")
        if path.stat().st_size > FILE_BYTES:
            raise LatentPriorError(f"{name}: too large to be a recipe")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LatentPriorError(f"{name}: cannot be read as text ({type(error).__name__})") from None
    document = _yaml(text, name)
    try:
        return filled(Recipe, {} if document is None else document)
    except LatentPriorError as error:
        raise LatentPriorError(f"{name}: {error}") from None


def changed(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Return the recipe with other settings.

    Parameters
    ----------
    recipe : Recipe
        The recipe, which stays as it is.
    settings : sequence of str
        Texts ``key=value``, keys as in ``joint.steps``, values as in YAML.

    Raises
    ------
    LatentPriorError
        For a text of another form, an unknown key, or a value of another type.

    Examples
    --------
    >>> changed(Recipe(), ["joint.steps=7", "encoder=false"]).joint.steps
    7
    """
    document = asdict(recipe)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise LatentPriorError(f"--set {setting}: give key=value, as in joint.steps=500")
        *parents, last = key.strip().split(".")
        place = document
        for parent in parents:
            below = place.get(parent)
            # The check below refuses a name that is no section, and tells its nearest neighbour.
            place[parent] = place = dict(below) if isinstance(below, dict) else {}
        place[last] = _yaml(value, f"--set {key}")
    return filled(Recipe, document)


def to_yaml(recipe: Recipe) -> str:
    """Return every setting of a recipe as YAML that :func:`read_recipe` takes.

    Parameters
    ----------
    recipe : Recipe
        The recipe.
    """
    text: str = _module().safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)
    return text


def filled(kind: type[T], document: Any, where: str = "") -> T:
    """Make a dataclass of a mapping, its own defaults where keys are absent.

    Parameters
    ----------
    kind : type
        The dataclass.
    document : mapping
        Values by field name; a mapping for a field that is a dataclass itself.
    where : str
        Where the mapping stands in the whole document, for error messages.

    Raises
    ------
    LatentPriorError
        For an unknown key, with the nearest known one, and for a value of another type.
    """
    if not isinstance(document, Mapping):
        raise LatentPriorError(f"{where or 'a recipe'}: give a mapping of settings, got {_short(document)}")
    hints = get_type_hints(kind)
    names = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in document:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
            raise LatentPriorError(f"unknown key {_short(f'{prefix}{key}')}: did you mean {prefix}{near}?")
    values = {key: _value(hints[key], value, f"{prefix}{key}") for key, value in document.items()}
    try:
        return kind(**values)
    except LatentPriorError as error:
        raise LatentPriorError(f"{where}: {error}" if where else str(error)) from None


def _value(hint: Any, value: Any, name: str) -> Any:
    """Check one value against its annotation; whole numbers and texts such as ``1e-3`` count as floats."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in choices:
            return None
        (hint,) = (choice for choice in choices if choice is not types.NoneType)
        return _value(hint, value, name)
    if origin is Literal:
        if not isinstance(value, str) or value not in choices:
            raise LatentPriorError(f"{name}: unknown value {_short(value)}, choose one of {', '.join(choices)}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return filled(hint, value, name)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise LatentPriorError(f"{name}: give a mapping of settings, got {_short(value)}")
        return dict(value)
    if hint is float:
        # YAML 1.1 takes 1e-3, without a point, for text.
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            number = float(value) if numeric or isinstance(value, str) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise LatentPriorError(f"{name}: give a finite number, got {_short(value)}")
        return number
    if type(value) is not hint:
        kind = {bool: "true or false", int: "a whole number", str: "a text"}[hint]
        raise LatentPriorError(f"{name}: give {kind}, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    # reprlib looks at a few entries only: aliases in YAML can stand for more than memory holds.
    return reprlib.repr(value)


def _yaml(text: str, name: str) -> Any:
    yaml = _module()
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LatentPriorError(f"{name}: no YAML that can be read ({' '.join(str(error).split())[:160]})") from None


def _module() -> Any:
    try:
        import yaml
    except ImportError:
        raise MissingExtraError("recipes of training", "images") from None
    return yaml
