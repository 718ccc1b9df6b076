"""Coverage-guided search by atheris: ``python tests/fuzz/fuzz.py TARGET [-max_total_time=60]``.

Needs the extra ``fuzz`` (CPython 3.11 or newer, Linux). Findings go to ``crash-*`` in the working folder: mend them,
then keep them in ``corpus/TARGET``. Half of the mutations are those of ``targets.py``, half libFuzzer's own.
"""

import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["latentprior", "numpy.lib", "safetensors", "yaml"]):
    import targets


def main() -> None:
    """Search one target."""
    name, options = sys.argv[1], sys.argv[2:]
    target = targets.TARGETS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        seeds = folder.parent / f"{folder.name}-seeds"
        seeds.mkdir()
        for i, seed in enumerate([*target.seeds(folder), *(path.read_bytes() for path in targets.corpus(name))]):
            (seeds / str(i)).write_bytes(seed)

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            draws = random.Random(seed)
            changed = targets.mutated(data, draws) if draws.random() < 0.5 else atheris.Mutate(data, most)
            return changed[:most]

        def one(data: bytes) -> None:
            targets.run(target, folder, data)

        atheris.Setup([sys.argv[0], f"-max_len={1 << 16}", *options, str(seeds)], one, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
