"""Images and labels out of data sets of torch and of Hugging Face."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import Dataset, TensorDataset

from ..errors import InvalidImagesError
from .pictures import IMAGE_KEYS, LABEL_KEYS, Choice, Pair, Row, columns_of, first_of, gather

__all__ = ["open_dataset"]


def open_dataset(source: Any, choice: Choice) -> Pair:
    """Read a data set, or return anything else as it is; see :func:`latentprior.data.images.read_images`."""
    is_hugging_face = type(source).__module__.partition(".")[0] == "datasets"
    if is_hugging_face and isinstance(source, Mapping):
        if choice.split not in source:
            raise InvalidImagesError(
                f"the data set has no split {choice.split!r} (it has: {', '.join(source)}): choose one of them"
            )
        source = source[choice.split]
    elif choice.split != "train":
        raise InvalidImagesError(f"the source has no parts to choose {choice.split!r} from: give that part itself")
    if is_hugging_face:
        return _gather(_rows_of_table(source, choice.key), source, choice)
    if isinstance(source, TensorDataset):
        images, *others = source.tensors
        is_labelled = bool(others) and others[0].ndim == 1 and not others[0].is_floating_point()
        return images, others[0] if is_labelled else None
    if isinstance(source, Dataset):
        return _gather(_rows_of_dataset(source, choice.key), source, choice)
    return source, None


def _gather(rows: Iterator[Row], source: Any, choice: Choice) -> Pair:
    count = choice.at_most(len(source)) if isinstance(source, Sized) else choice.limit
    return gather(itertools.islice(rows, count), count, choice.size)


def _rows_of_dataset(dataset: Any, key: str | None) -> Iterator[Row]:
    # A data set that is read by number need not end an iteration by itself.
    is_numbered = hasattr(dataset, "__len__") and not hasattr(dataset, "__iter__")
    items: Iterable[Any] = (dataset[i] for i in range(len(dataset))) if is_numbered else dataset
    for i, item in enumerate(items):
        name = f"image {i} of the data set"
        # A dict of bytes and path is itself an image, as tables store it.
        if isinstance(item, Mapping) and not {"bytes", "path"} <= set(item):
            yield Row(name, *_entry(item, key, name))
        elif isinstance(item, (tuple, list)):
            yield Row(name, item[0], item[1] if len(item) > 1 else None)
        else:
            yield Row(name, item, None)


def _entry(item: Mapping[Any, Any], key: str | None, name: str) -> tuple[Any, Any]:
    """Return the image and the label of a dict; without a key the image is its first entry or goes by its name."""
    if key is not None and key not in item:
        raise InvalidImagesError(f"{name}: no entry {key!r} (it has: {', '.join(map(str, item))}); give key=")
    label = first_of(LABEL_KEYS, item)
    image = key or first_of(IMAGE_KEYS, item) or next(iter(item))
    return item[image], None if label is None else item[label]


def _rows_of_table(table: Any, key: str | None) -> Iterator[Row]:
    import datasets

    image, label = columns_of("the data set", table.column_names, key)
    if isinstance(table.features[image], datasets.Image):
        # The library's own decoding would fetch a picture from an address; this package's never does.
        table = table.cast_column(image, datasets.Image(decode=False))
    for i, row in enumerate(table.with_format(None)):
        yield Row(f"row {i} of the data set", row[image], row[label] if label else None)
