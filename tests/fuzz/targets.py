"""What is fuzzed: readers of files from elsewhere. Each takes bytes and lets only the package's named errors pass.

``seeds`` are whole files, from which mutations start. A target raises :class:`AssertionError` for a message of several
lines, a trap that was sprung or a file that was left behind; anything else that escapes is a finding as well.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

import latentprior as lp
from latentprior.data.images import read_images
from latentprior.data.latents import read_latents
from latentprior.density.figures import record, strict_json, text
from latentprior.errors import LatentPriorError
from latentprior.models.networks import build_decoder, build_encoder, network_spec
from latentprior.recipes.recipe import read_recipe
from latentprior.storage.checkpoint import _checksum, load_state

SPRUNG: list[str] = []
LIMIT = 1 << 20


class Trap:
    """Whoever unpickles it is found out."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return SPRUNG.append, ("a pickle was opened",)


class Target(NamedTuple):
    name: str
    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]


def run(target: Target, folder: Path, data: bytes) -> LatentPriorError | None:
    """Feed bytes to a target in ``folder``; returns the named error, or None where they were read."""
    before = set(folder.iterdir())
    SPRUNG.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(folder, data[:LIMIT])
            found = None
        except LatentPriorError as error:
            found = error
    assert not SPRUNG, SPRUNG
    assert found is None or "\n" not in str(found), str(found)
    assert found is None or len(str(found)) < 2_000
    left = set(folder.iterdir()) - before - {folder / "fuzzed"}
    assert not left, left
    return found


def _file(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    def feed(folder: Path, data: bytes) -> object:
        place = folder / "fuzzed"
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
        return read(place / name)

    return feed


# Saved priors and models: the first half of the input is the JSON, and its digests are mended, or nothing past them
# would ever be reached.


def _small_prior() -> lp.LatentPrior:
    z = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).exp()
    settings = lp.StageSettings(width=4, depth=1, steps=100, batch_size=64, average=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prior = lp.fit(z, base="gmm:2", max_stages=1, settings=settings, validation=z[:30])
        if not prior.stages:
            ratio = settings.spec((2,), True)
            network = lp.density.ratios.build_ratio(ratio, torch.Generator().manual_seed(0), prior.base)
            stage = lp.Stage(network, 0.1, 0.1, 0.1, 0.01, {"ess": 0.5, "seconds": 1.0})
            prior = prior.with_ladder(prior.ladder.extended(stage))
    return prior


def _pair(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    return json.dumps(config).encode() + b"\0" + save({k: v.contiguous() for k, v in tensors.items()})


def _saved(kind: str, data: bytes, place: Path, *, mended: bool) -> None:
    text, _, blob = data.partition(b"\0")
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    digest = hashlib.sha256(blob).hexdigest()
    name = f"{kind}-{digest[:16]}.safetensors"
    (place / name).write_bytes(blob)
    if mended:
        try:
            document = json.loads(text)
            head = {"format": "latentprior", "format_version": 1, "kind": kind, "weights": name, "sha256": digest}
            document = {**head, **document, "weights": name, "sha256": digest}
            text = json.dumps({**document, "checksum": _checksum(document)}).encode()
        except (ValueError, TypeError, RecursionError):
            pass
    (place / "config.json").write_bytes(text)


def _read_prior(folder: Path, data: bytes) -> object:
    _saved("prior", data, folder / "fuzzed", mended=True)
    prior = lp.LatentPrior.from_pretrained(folder / "fuzzed")
    found = record(prior)
    strict_json(found)
    list(text(found))
    with torch.no_grad():
        assert prior.log_prob(torch.zeros(3, *prior.event_shape)).shape == (3,)
    return prior


def _read_model(folder: Path, data: bytes) -> object:
    _saved("model", data, folder / "fuzzed", mended=True)
    model = lp.LatentVariableModel.from_pretrained(folder / "fuzzed")
    with torch.no_grad():
        return model.decode(torch.zeros(2, *model.event_shape))


def _read_state(folder: Path, data: bytes) -> object:
    _saved("prior", data, folder / "fuzzed", mended=False)
    return load_state(folder / "fuzzed", "prior")


def _prior_seeds(folder: Path) -> list[bytes]:
    return [_pair(*_small_prior().state())]


def _model_seeds(folder: Path) -> list[bytes]:
    spec = network_spec("mlp", latent_dim=2, width=4, image_shape=(1, 2, 2))
    g = torch.Generator().manual_seed(0)
    return [_pair(*lp.LatentVariableModel(build_decoder(spec, g), encoder=build_encoder(spec, g)).state())]


def _state_seeds(folder: Path) -> list[bytes]:
    _small_prior().save_pretrained(folder / "fuzzed")
    (blob,) = (folder / "fuzzed").glob("*.safetensors")
    return [(folder / "fuzzed" / "config.json").read_bytes() + b"\0" + blob.read_bytes()]


# Arrays and images.


def _arrays() -> dict[str, np.ndarray]:
    return {"mean": np.ones((3, 2), np.float32), "scale": np.ones((3, 2), np.float16)}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _npy_seeds(folder: Path) -> list[bytes]:
    trap = np.array([[Trap(), Trap()]], dtype=object)
    return [_npy(_arrays()["mean"]), _npy(np.arange(6).reshape(3, 2)), _npy(trap), pickle.dumps(Trap())]


def _npz_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for arrays in (_arrays(), {"z": np.array([[Trap()]], dtype=object)}):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        seeds.append(buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../escaped.npy", _npy(_arrays()["mean"]))
    return [*seeds, buffer.getvalue()]


def _safetensors_seeds(folder: Path) -> list[bytes]:
    huge = (1 << 62).to_bytes(8, "little") + b"{}"
    return [save({"z": torch.ones(3, 2), "i": torch.arange(4)}), huge, pickle.dumps(Trap())]


def _image_seeds(folder: Path) -> list[bytes]:
    buffer = io.BytesIO()
    np.savez(buffer, x_train=np.zeros((3, 4, 4), np.uint8), y_train=np.arange(3))
    return [buffer.getvalue()]


def _idx_seeds(folder: Path) -> list[bytes]:
    return [bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 3]) + bytes(18)]


def _recipe_seeds(folder: Path) -> list[bytes]:
    return [
        b"method: joint\nnetwork: {family: mlp, width: 8}\njoint: {steps: 5}\n",
        b"a: &a [*a, *a]\nb: !!python/object/apply:os.system [exit]\n",
    ]


TARGETS = {
    target.name: target
    for target in (
        Target("state", _state_seeds, _read_state),
        Target("prior", _prior_seeds, _read_prior),
        Target("model", _model_seeds, _read_model),
        Target("npy", _npy_seeds, _file("z.npy", read_latents)),
        Target("npz", _npz_seeds, _file("z.npz", read_latents)),
        Target("safetensors", _safetensors_seeds, _file("z.safetensors", read_latents)),
        Target("images", _image_seeds, _file("x.npz", read_images)),
        Target("idx", _idx_seeds, _file("train-images-idx3-ubyte", read_images)),
        Target("recipe", _recipe_seeds, _file("recipe.yaml", read_recipe)),
    )
}

# Mutations: of bytes, and of the meaning of JSON.

NASTY: list[Any] = [
    None, True, -1, 0, 10**9, 10**400, 1e308, -1e308, "", "x" * 1000, "../../x", "/etc/passwd", "nan", [], {}, [[]],
    [-1], [10**9, 10**9], {"": None}, "os.system", 0.5,
]  # fmt: skip


def mutated(seed: bytes, draws: random.Random) -> bytes:
    """A copy with a few changes: flipped bits, cuts, repeats, digits; or, in JSON before a null byte, other values."""
    head, separator, tail = seed.partition(b"\0")
    if separator and draws.random() < 0.6:
        try:
            document = json.loads(head)
        except (ValueError, RecursionError):
            document = None
        if isinstance(document, dict) and document:
            return json.dumps(_changed(document, draws)).encode() + separator + tail
    data = bytearray(seed)
    for _ in range(draws.choice((1, 1, 2, 4, 16))):
        if not data:
            break
        # Headers are short and decide most.
        at = draws.randrange(min(len(data), draws.choice((64, 256, 1 << 20))))
        what = draws.randrange(6)
        if what == 0:
            data[at] ^= 1 << draws.randrange(8)
        elif what == 1:
            data[at] = draws.randrange(256)
        elif what == 2:
            del data[at:]
        elif what == 3:
            del data[at : at + draws.randrange(1, 9)]
        elif what == 4:
            data[at:at] = bytes(draws.choice(b"0129-[]{}\"',:\xff\x00") for _ in range(draws.randrange(1, 20)))
        else:
            data[at:at] = data[at : at + draws.randrange(1, 200)]
    return bytes(data)


def _changed(document: Any, draws: random.Random) -> Any:
    places = list(_places(document))
    for _ in range(draws.choice((1, 1, 1, 2, 3))):
        # What an earlier change has cut off may be changed too: it does no harm.
        owner, key = draws.choice(places)
        what = draws.randrange(5)
        try:
            if what == 0:
                del owner[key]
            elif what == 1 and isinstance(owner[key], (int, float)):
                owner[key] = draws.choice((-owner[key], owner[key] * 10**6, owner[key] + 1, str(owner[key])))
            elif what == 2:
                nested: Any = 0
                for _ in range(draws.choice((3, 50, 400))):
                    nested = [nested]
                owner[key] = nested
            else:
                owner[key] = draws.choice(NASTY)
        except (KeyError, IndexError, TypeError):
            continue
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from _places(entry)


def corpus(name: str) -> list[Path]:
    """Inputs that once were findings: they stay mended."""
    return sorted((Path(__file__).parent / "corpus" / name).glob("*"))


def seconds() -> float:
    """How long a search lasts; ``LATENTPRIOR_FUZZ_SECONDS``."""
    return float(os.environ.get("LATENTPRIOR_FUZZ_SECONDS", "60"))
