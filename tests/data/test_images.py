import gzip
import io
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from latentprior.data.images import Images, read_images
from latentprior.data.latents import Latents
from latentprior.errors import InvalidImagesError, LatentPriorError, MissingExtraError

Image = pytest.importorskip("PIL.Image")

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
LABELS = [3, 0, 1, 1, 2]


def normalised(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy((pixels.astype(np.float64) / 127.5 - 1).astype(np.float32))


def everything(images: Images) -> Tensor:
    return images.batch(torch.arange(len(images)))


def assert_pixels(images: Images, pixels: np.ndarray, labels: list[int] | None = None) -> None:
    """``pixels`` are (n, H, W) or (n, H, W, 3)."""
    wanted = normalised(pixels)
    wanted = wanted[:, None] if pixels.ndim == 3 else wanted.permute(0, 3, 1, 2)
    assert images.shape == tuple(wanted.shape[1:])
    x = everything(images)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, wanted, rtol=0, atol=1e-6)
    assert images.labels is None if labels is None else images.labels.tolist() == labels
    assert images.labels is None or images.labels.dtype == torch.int64


def refused(source: Any, says: str, **options: Any) -> None:
    with pytest.raises(InvalidImagesError, match=says) as caught:
        read_images(source, **options)
    assert "\n" not in str(caught.value)


# Arrays and tensors


def test_normalisation_is_exact_at_both_ends_and_in_the_middle() -> None:
    x = everything(Images(np.array([[[0, 255, 51, 204]]], np.uint8)))
    assert x.shape == (1, 1, 1, 4)
    assert x.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6, 0.6], abs=1e-7)
    assert x.min() == -1
    assert x.max() == 1


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("pixels", "wanted"),
    [
        (PIXELS, PIXELS),
        (PIXELS[:, None], PIXELS),
        (PIXELS[..., None], PIXELS),
        (COLOUR, COLOUR),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR),
        (COLOUR[::-1, ::-1][::-1, ::-1], COLOUR),
    ],
    ids=["nhw", "n1hw", "nhw1", "nhwc", "nchw", "strides"],
)
def test_every_layout_reads_the_same(pixels: np.ndarray, wanted: np.ndarray, as_tensor: bool) -> None:
    assert_pixels(Images(torch.from_numpy(pixels.copy()) if as_tensor else pixels, labels=LABELS), wanted, LABELS)


@given(n=st.integers(1, 4), c=st.sampled_from([1, 3]), h=st.integers(1, 9), w=st.integers(1, 9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_shapes(n: int, c: int, h: int, w: int, data: Any) -> None:
    pixels = np.random.default_rng(n * h + w).integers(0, 256, (n, c, h, w), dtype=np.uint8)
    images = Images(pixels)
    assert (len(images), *images.shape) == pixels.shape
    torch.testing.assert_close(everything(images), normalised(pixels), rtol=0, atol=1e-6)
    if h not in (1, 3):
        assert torch.equal(everything(Images(pixels.transpose(0, 2, 3, 1))), everything(images))
    index = data.draw(st.lists(st.integers(-n, n - 1), max_size=5))
    assert torch.equal(images.batch(index), everything(images)[index])
    size = data.draw(st.integers(1, 10))
    assert images.resized(size).shape == (c, size, size)


def test_both_layouts_fit_then_channels_come_first() -> None:
    assert Images(np.zeros((2, 3, 5, 3), np.uint8)).shape == (3, 5, 3)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", torch.bfloat16])
def test_floats_in_range_pass_unchanged(dtype: Any) -> None:
    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 1, 3, 4)
    x = np.round(x * 64) / 64
    source = torch.from_numpy(x).to(dtype) if isinstance(dtype, torch.dtype) else x.astype(dtype)
    found = everything(Images(source))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(x))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.zeros((2, 2)), r"shape \(2, 2\): give floats \(n, C, H, W\)"),
        (np.zeros((2, 2, 2)), r"floats \(n, C, H, W\)"),
        (np.zeros((2, 5, 5, 3)), r"floats \(n, C, H, W\)"),
        (np.zeros((2, 5, 5, 4), np.uint8), "C = 1 or 3"),
        (np.zeros((4,), np.uint8), "give uint8"),
        (np.uint8(3), "give uint8"),
        (np.zeros((2, 1, 5, 5), np.int64), "have type int64: give uint8 pixels"),
        (np.zeros((2, 1, 5, 5), np.uint16), "have type uint16"),
        (np.zeros((2, 1, 5, 5), bool), "have type bool"),
        (torch.zeros(2, 1, 5, 5, dtype=torch.complex64), "have type torch.complex64"),
        (np.zeros((0, 5, 5), np.uint8), "empty"),
        (np.zeros((2, 1, 0, 5), np.uint8), "empty"),
        (np.full((2, 1, 2, 2), 255.0), r"floats from 255 to 255; give them in \[-1, 1\], or uint8"),
        (np.full((2, 1, 2, 2), -1.1), "floats from -1.1"),
        (torch.tensor([[[[0.0, 0.5]]]]), r"look like \[0, 1\]; give x \* 2 - 1"),
        (torch.tensor([[[[0.0, -torch.inf]]]]), "NaN or infinite"),
        (np.array([[[[0.0, np.nan]]]]), "NaN or infinite"),
        ([[1], [2, 3]], "not one rectangular array"),
        ("digits", "no such file or folder"),
        (None, "have type object"),
        ({"image": 1}, "have type object"),
    ],
    ids=str,
)
def test_what_is_no_set_of_images_is_named(source: Any, says: str) -> None:
    refused(source, says)


@pytest.mark.parametrize("labels", [[1, 2], [0.5] * 5, ["a"] * 5, np.zeros((5, 2), int), [True] * 5])
def test_labels_that_do_not_fit_are_named(labels: Any) -> None:
    with pytest.raises(InvalidImagesError, match="give one integer for each of 5"):
        Images(PIXELS, labels=labels)


def test_labels_in_a_column_are_flattened() -> None:
    assert_pixels(Images(PIXELS, labels=np.array(LABELS, np.uint8)[:, None]), PIXELS, LABELS)


def test_arrays_are_referenced_and_batches_are_copies() -> None:
    images = Images(PIXELS)
    assert images._source is PIXELS
    before = PIXELS.copy()
    images.batch(torch.arange(5)).add_(1)
    assert np.array_equal(PIXELS, before)
    floats = torch.tensor([[[[-1.0, 1.0]]]])
    Images(floats).batch([0]).zero_()
    assert floats.abs().sum() == 2


def test_subsets_share_pixels_and_pick_labels() -> None:
    images = Images(PIXELS, labels=LABELS)
    assert_pixels(images.subset([4, 0]), PIXELS[[4, 0]], [2, 3])
    assert_pixels(images.subset(images.labels == 1), PIXELS[2:4], [1, 1])
    part = images.subset(slice(1, None)).subset(torch.tensor([-1, 0], dtype=torch.int32))
    assert_pixels(part, PIXELS[[4, 1]], [2, 0])
    assert part._source is PIXELS
    assert_pixels(images, PIXELS, LABELS)
    with pytest.raises(InvalidImagesError, match="no image chosen"):
        images.subset([])
    for wrong in ([5], [[0, 1]], [0.5], torch.ones(4, dtype=torch.bool)):
        with pytest.raises(IndexError):
            images.subset(wrong)


def test_images_are_a_data_set() -> None:
    images = Images(PIXELS)
    assert torch.equal(images[-1], everything(images)[4])
    assert len(list(images)) == 5
    with pytest.raises(IndexError, match="no image 5 among 5"):
        images[5]
    assert torch.equal(torch.cat(list(DataLoader(images, 2, generator=torch.Generator()))), everything(images))
    latents = Latents.encoded(lambda x: x.flatten(1), images, batch_size=2)
    assert torch.equal(latents.draw(torch.arange(5)), everything(images).flatten(1))


def test_batches_give_every_image_once_in_order() -> None:
    images = Images(PIXELS)
    batches = list(images.batches(2))
    assert [len(x) for x in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), everything(images))
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(LatentPriorError, match="whole number of at least 1"):
            list(images.batches(wrong))  # type: ignore[arg-type]


def test_resizing_cuts_the_centre_and_averages() -> None:
    pixels = np.zeros((1, 4, 8), np.uint8)
    pixels[:, :, 2:4], pixels[:, :, 4:6], pixels[:, :, :2], pixels[:, :, 6:] = 100, 200, 7, 9
    images = Images(pixels, labels=[5]).resized(4)
    assert_pixels(images, pixels[:, :, 2:6], [5])
    # The triangle over four source pixels weighs the near two 3/8 each, the far two 1/8, renormalised at the border.
    assert_pixels(images.resized(2), np.array([[[114, 186]] * 2]).astype(np.uint8), [5])
    assert images.resized(4) is images


def test_resizing_keeps_flat_colours_subsets_and_floats() -> None:
    flat = np.broadcast_to(np.array([0, 77, 255], np.uint8), (3, 5, 7, 3))
    for size in (1, 4, 11):
        assert_pixels(Images(flat).subset([0, 2]).resized(size), np.broadcast_to(flat[0, 0, 0], (2, size, size, 3)))
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    small = everything(Images(x).resized(4))
    assert small.shape == (1, 1, 4, 4)
    assert small.mean().item() == pytest.approx(0, abs=1e-6)
    for wrong in (0, 2.5):
        with pytest.raises(LatentPriorError, match="whole number"):
            Images(flat).resized(wrong)  # type: ignore[arg-type]


def test_resizing_by_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = everything(Images(COLOUR).resized(3))
    monkeypatch.setattr("latentprior.data.images.BLOCK_IMAGES", 2)
    assert torch.equal(everything(Images(COLOUR).resized(3)), whole)


# Array files


def test_npy_is_mapped_and_stays_lazy(tmp_path: Path) -> None:
    # 1.2 GB of zeros, a hole on disk: reading it all would not go unnoticed.
    shape = (100_000, 64, 64, 3)
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=shape)
    mapped[-1] = 255
    mapped.flush()
    del mapped
    tracemalloc.start()
    images = read_images(tmp_path / "x.npy")
    assert isinstance(images._source, np.memmap)
    assert (len(images), images.shape) == (shape[0], (3, 64, 64))
    assert everything(images.subset([0, -1])).mean((1, 2, 3)).tolist() == [-1, 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def save_safetensors(path: Path, **arrays: np.ndarray) -> None:
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)


@pytest.mark.parametrize(("suffix", "save"), [("npz", np.savez), ("safetensors", save_safetensors)])
def test_archives(tmp_path: Path, suffix: str, save: Callable[..., None]) -> None:
    path, labels = tmp_path / f"a.{suffix}", np.array(LABELS, np.uint8)
    save(path, x_train=PIXELS, y_train=labels, x_test=PIXELS[:2], y_test=labels[:2])
    assert_pixels(read_images(path), PIXELS, LABELS)
    assert_pixels(read_images(str(path), split="test"), PIXELS[:2], LABELS[:2])
    assert_pixels(read_images(path, key="x_test"), PIXELS[:2], LABELS[:2])
    assert_pixels(read_images(path, limit=3), PIXELS[:3], LABELS[:3])
    assert read_images(path, size=3, limit=99).shape == (1, 3, 3)
    refused(path, r"no images of split 'val' \(it has: .*x_train", split="val")
    refused(path, "no array named 'z'", key="z")
    save(path, test_images=COLOUR, test_labels=labels)
    assert_pixels(read_images(path, split="test"), COLOUR, LABELS)
    refused(path, "no images of split 'train'")
    save(path, images=COLOUR, labels=labels)
    assert_pixels(read_images(path), COLOUR, LABELS)
    refused(path, "no images of split 'test'", split="test")
    save(path, faces=COLOUR)
    assert_pixels(read_images(path), COLOUR)
    save(path, faces=COLOUR, dogs=COLOUR)
    refused(path, "choose an array with key=")
    assert_pixels(read_images(path, key="dogs"), COLOUR)
    save(path, images=PIXELS, labels=labels[:3])
    refused(path, "give one integer for each of 5")


class Trap:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_object_arrays_are_never_unpickled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    trap = np.array([Trap()], dtype=object)
    (np.save if suffix == "npy" else np.savez)(path, trap)
    refused(path, "holds Python objects")


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt", "x.pkl", "data_batch_1", "x.safetensors", "x.parquet"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(pickle.dumps({"data": Trap()}))
    refused(tmp_path / name, "pickle|damaged|Python objects")


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors"])
def test_cut_array_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    {"x.npy": np.save, "x.npz": lambda p, x: np.savez_compressed(p, x=x)}.get(
        name, lambda p, x: save_safetensors(p, x=x)
    )(path, PIXELS)
    whole = path.read_bytes()
    for keep in (0, 3, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        refused(path, f"{name}: damaged|{name}: holds Python objects or is damaged")


def test_changed_bytes_in_an_archive_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=PIXELS)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("x.npy").header_offset
    data = bytearray(path.read_bytes())
    data[start + 250] ^= 255
    path.write_bytes(data)
    refused(path, "damaged")


def test_a_named_file_is_all_of_itself(tmp_path: Path) -> None:
    for name in ("x.npy", "x-test.npy"):
        np.save(tmp_path / name, PIXELS)
    assert_pixels(read_images(tmp_path / "x-test.npy"), PIXELS)
    assert_pixels(read_images(tmp_path / "x-test.npy", split="test"), PIXELS)
    refused(tmp_path / "x.npy", "not known as 'test'", split="test")
    refused(PIXELS, "no parts to choose 'test' from", split="test")


def test_unknown_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2,3")
    refused(tmp_path / "x.csv", "unknown kind of file")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "unknown kind of file")
    refused(tmp_path / "absent.npy", "no such file or folder")


# IDX and CIFAR-10


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_and_folders(tmp_path: Path, packed: bool) -> None:
    end = ".gz" if packed else ""
    for part, rows in (("train", slice(None)), ("t10k", slice(2))):
        for name, array in (("images-idx3", PIXELS[rows]), ("labels-idx1", np.array(LABELS, np.uint8)[rows])):
            data = idx(array)
            (tmp_path / f"{part}-{name}-ubyte{end}").write_bytes(gzip.compress(data) if packed else data)
    images = read_images(tmp_path / f"train-images-idx3-ubyte{end}")
    assert_pixels(images, PIXELS, LABELS)
    assert isinstance(images._source, np.memmap) is not packed
    assert_pixels(read_images(tmp_path), PIXELS, LABELS)
    assert_pixels(read_images(tmp_path, split="test"), PIXELS[:2], LABELS[:2])
    assert_pixels(read_images(tmp_path / f"t10k-images-idx3-ubyte{end}", split="test"), PIXELS[:2], LABELS[:2])
    refused(tmp_path / f"train-images-idx3-ubyte{end}", "not known as 'test'", split="test")
    refused(tmp_path, "no images of split 'val'", split="val")
    refused(tmp_path / f"train-labels-idx1-ubyte{end}", "give the file of the images")
    (tmp_path / f"train-labels-idx1-ubyte{end}").unlink()
    assert_pixels(read_images(tmp_path), PIXELS)


def test_labels_of_another_count_or_damaged_are_named(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(PIXELS))
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(4, np.uint8)))
    refused(tmp_path, r"train-labels-idx1-ubyte: \(4,\) labels for 5 images")
    labels.write_bytes(idx(np.zeros(5, np.uint8))[:-1])
    refused(tmp_path, "train-labels-idx1-ubyte: truncated")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (idx(PIXELS)[:-1], "truncated or damaged"),
        (idx(PIXELS) + b"x", "truncated or damaged"),
        (idx(PIXELS)[:16], "truncated or damaged"),
        (idx(PIXELS, kind=13), "type 0x0d; only bytes"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "truncated|damaged"),
        (idx(PIXELS[:0]), "empty"),
        (b"PK" + idx(PIXELS), "unknown kind of file"),
    ],
    ids=["short", "long", "header", "type", "huge", "none", "foreign"],
)
def test_damaged_idx_files_are_named(tmp_path: Path, data: bytes, says: str, packed: bool) -> None:
    path = tmp_path / ("images-idx3-ubyte.gz" if packed else "images-idx3-ubyte")
    path.write_bytes(gzip.compress(data) if packed else data)
    refused(path, says)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "images-idx3-ubyte.gz"
    whole = gzip.compress(idx(PIXELS))
    for data in (whole[:-12], b"plain", whole[:30] + b"\xff\xff" + whole[32:]):
        path.write_bytes(data)
        refused(path, "images-idx3-ubyte.gz: damaged")


def cifar(pixels: np.ndarray, labels: list[int]) -> bytes:
    return b"".join(bytes([k]) + x.transpose(2, 0, 1).tobytes() for k, x in zip(labels, pixels, strict=True))


def test_cifar_batches(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "data_batch_1.bin").write_bytes(cifar(pixels[:3], LABELS[:3]))
    (tmp_path / "data_batch_2.bin").write_bytes(cifar(pixels[3:], LABELS[3:]))
    (tmp_path / "test_batch.bin").write_bytes(cifar(pixels[1:2], LABELS[1:2]))
    (tmp_path / "batches.meta.txt").write_text("airplane\n")
    assert_pixels(read_images(tmp_path), pixels, LABELS)
    assert_pixels(read_images(tmp_path, split="test"), pixels[1:2], LABELS[1:2])
    batch = read_images(tmp_path / "data_batch_1.bin")
    assert_pixels(batch, pixels[:3], LABELS[:3])
    assert isinstance(batch._source, np.memmap)
    refused(tmp_path, "no images of split 'val'", split="val")
    whole = (tmp_path / "data_batch_2.bin").read_bytes()
    for data, says in (
        (whole[:-1], "data_batch_2.bin: truncated or no CIFAR-10 batch"),
        (b"", "truncated"),
        (b"\x0b" + whole[1:], "label 11 in a CIFAR-10 batch"),
    ):
        (tmp_path / "data_batch_2.bin").write_bytes(data)
        refused(tmp_path, says)


def test_the_python_version_of_cifar_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Trap()}))
    refused(tmp_path, r"Python version of CIFAR-10 \(data_batch_1\).*give the binary version")
    refused(tmp_path / "data_batch_1", "Python pickle, never opened; give the binary version")


# Pictures


def grey_files(folder: Path, pixels: np.ndarray = PIXELS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, x in enumerate(pixels):
        Image.fromarray(x).save(folder / f"{k}.png")


def test_folder_of_pictures(tmp_path: Path) -> None:
    grey_files(tmp_path)
    (tmp_path / "readme.txt").write_text("not a picture")
    (tmp_path / "._0.png").write_bytes(b"junk")
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs" / "0.png").write_bytes(b"junk")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "0.png").write_bytes(b"junk")
    assert_pixels(read_images(tmp_path), PIXELS)
    assert_pixels(read_images(tmp_path, limit=2), PIXELS[:2])
    assert torch.equal(everything(read_images(tmp_path, size=3)), everything(read_images(tmp_path).resized(3)))
    refused(tmp_path, "no images of split 'test'", split="test")


def test_subfolders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    grey_files(tmp_path / "dog", PIXELS[2:4])
    grey_files(tmp_path / "ant" / "deeper", PIXELS[:2])
    grey_files(tmp_path / "yak", PIXELS[4:])
    (tmp_path / "bee").mkdir()
    assert_pixels(read_images(tmp_path), PIXELS, [0, 0, 1, 1, 2])
    # Evenly spread: the first three files would be two classes.
    assert_pixels(read_images(tmp_path, limit=3), PIXELS[[0, 1, 3]], [0, 0, 1])
    assert_pixels(read_images(tmp_path, limit=2), PIXELS[[0, 2]], [0, 1])
    grey_files(tmp_path, PIXELS[:1])
    refused(tmp_path, "pictures both beside and in subfolders")


def test_subfolders_may_be_splits(tmp_path: Path) -> None:
    grey_files(tmp_path / "train" / "a", PIXELS[:2])
    grey_files(tmp_path / "train" / "b", PIXELS[2:])
    grey_files(tmp_path / "test", PIXELS[:1])
    assert_pixels(read_images(tmp_path), PIXELS, [0, 0, 1, 1, 1])
    assert_pixels(read_images(tmp_path, split="test"), PIXELS[:1])
    refused(tmp_path, r"no images of split 'val' \(it has: test, train\)", split="val")


def test_empty_folders_are_named(tmp_path: Path) -> None:
    refused(tmp_path, "holds no pictures")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, "holds no pictures")


def test_unequal_sizes_need_a_size(tmp_path: Path) -> None:
    grey_files(tmp_path, PIXELS[:2])
    Image.fromarray(PIXELS[2][:3]).save(tmp_path / "2.png")
    refused(tmp_path, r"2\.png: is 3 x 6 uint8, the first image 4 x 6 uint8; make them alike, or give a size")
    assert read_images(tmp_path, size=3).shape == (1, 3, 3)
    assert_pixels(read_images(tmp_path, size=3).subset([2]), PIXELS[2:3, :3, 1:4])
    assert torch.equal(everything(read_images(tmp_path, size=3))[:2], everything(Images(PIXELS[:2]).resized(3)))


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in ("png", "jpg", "gif", "webp", "bmp", "tiff"):
        folder = tmp_path / kind
        folder.mkdir()
        path = folder / f"a.{kind}"
        Image.fromarray(big).save(path)
        whole = path.read_bytes()
        assert read_images(folder).shape == (3, 64, 64)
        for data in (whole[: len(whole) // 2], whole[:10], b"", b"junk" * 100):
            path.write_bytes(data)
            refused(folder, rf"a\.{kind}: damaged or not a picture")


def test_hostile_pictures_never_escape_the_named_error(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    for kind in ("png", "gif", "tiff", "jpg"):
        file = io.BytesIO()
        Image.fromarray(COLOUR[0]).save(file, {"jpg": "jpeg"}.get(kind, kind))
        path = tmp_path / f"a.{kind}"
        for _ in range(40):
            data = bytearray(file.getvalue())
            for at in random.integers(0, len(data), 4):
                data[at] = random.integers(0, 256)
            path.write_bytes(data)
            try:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
                    assert len(read_images(tmp_path)) == 1
            except InvalidImagesError as error:
                assert f"a.{kind}" in str(error)  # noqa: PT017
        path.unlink()


def one(tmp_path: Path, image: Any, name: str = "a.png", **options: Any) -> np.ndarray:
    """The pixels of one saved picture, (H, W) or (H, W, 3)."""
    image.save(tmp_path / name, **options)
    x = (everything(read_images(tmp_path))[0] + 1) * 127.5
    (tmp_path / name).unlink()
    return x.squeeze(0).permute(*((1, 2, 0) if len(x) == 3 else (0, 1))).round().byte().numpy()


def test_modes_of_pictures(tmp_path: Path) -> None:
    grey, colour = PIXELS[0], COLOUR[0]
    bits = (grey > 128).astype(np.uint8) * 255
    assert np.array_equal(one(tmp_path, Image.fromarray(grey)), grey)
    assert np.array_equal(one(tmp_path, Image.fromarray(colour)), colour)
    assert np.array_equal(one(tmp_path, Image.fromarray(bits).convert("1")), bits)
    assert np.array_equal(one(tmp_path, Image.fromarray(bits).convert("1"), "a.pbm"), bits)
    palette = Image.fromarray(grey % 3).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 9, 7, 8, 255])
    colours = np.array([[0, 0, 0], [255, 0, 9], [7, 8, 255]], np.uint8)
    indexed = np.asarray(palette)
    assert np.array_equal(one(tmp_path, palette), colours[indexed])
    assert np.array_equal(one(tmp_path, palette, "a.gif"), colours[indexed])
    clear = one(tmp_path, palette, transparency=1)
    colours[1] = 255
    assert np.array_equal(clear, colours[indexed])
    deep = grey.astype(np.uint16) * 257
    assert np.array_equal(one(tmp_path, Image.fromarray(deep)), grey)
    assert np.array_equal(one(tmp_path, Image.fromarray(deep), "a.tiff"), grey)
    assert np.array_equal(one(tmp_path, Image.fromarray(colour).convert("CMYK"), "a.tiff"), colour)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "a.tiff")
    refused(tmp_path, r"a\.tiff: has 32-bit pixels")


def test_transparent_pixels_show_white(tmp_path: Path) -> None:
    alpha = np.where(np.arange(24).reshape(4, 6) % 2 == 0, 255, 0).astype(np.uint8)
    solid = alpha[..., None] == 255
    rgba = Image.fromarray(np.concatenate([COLOUR[0], alpha[..., None]], -1))
    assert np.array_equal(one(tmp_path, rgba), np.where(solid, COLOUR[0], 255))
    la = Image.fromarray(np.stack([PIXELS[0], alpha], -1))
    assert la.mode == "LA"
    assert np.array_equal(one(tmp_path, la), np.where(solid[..., 0], PIXELS[0], 255))
    half = Image.fromarray(np.full((2, 2, 4), [0, 0, 0, 51], np.uint8))
    assert np.array_equal(one(tmp_path, half), np.full((2, 2, 3), 204))


def test_pictures_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    assert np.array_equal(one(tmp_path, Image.fromarray(PIXELS[0]), exif=exif), np.rot90(PIXELS[0], -1))


@pytest.mark.parametrize("grey_first", [True, False])
def test_grey_among_colour_becomes_colour(tmp_path: Path, grey_first: bool) -> None:
    names = "ab" if grey_first else "ba"
    Image.fromarray(PIXELS[0]).save(tmp_path / f"{names[0]}.png")
    Image.fromarray(COLOUR[0]).save(tmp_path / f"{names[1]}.png")
    pair = [np.repeat(PIXELS[0][..., None], 3, -1), COLOUR[0]]
    assert_pixels(read_images(tmp_path), np.stack(pair if grey_first else pair[::-1]))


def test_many_pictures_go_to_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey_files(tmp_path / "in")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("latentprior.data.pictures.MEMORY_BYTES", 10)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "out"))
    images = read_images(tmp_path / "in", size=3)
    assert isinstance(images._source, np.memmap)
    assert torch.equal(everything(images), everything(Images(PIXELS).resized(3)))
    assert len(list((tmp_path / "out").rglob("images.npy"))) == 1
    del images
    assert not list((tmp_path / "out").iterdir())


def test_pictures_without_pillow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey_files(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"latentprior\[images\]"):
        read_images(tmp_path)


# Data sets


class Rows(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


class Stream(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


PICTURES = [Image.fromarray(x) for x in COLOUR]


@pytest.mark.parametrize("kind", [Rows, Stream])
@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (PICTURES, None),
        (list(zip(PICTURES, LABELS, strict=True)), LABELS),
        ([{"image": x, "label": k} for x, k in zip(PICTURES, LABELS, strict=True)], LABELS),
        ([{"pixels": x, "labels": torch.tensor(k)} for x, k in zip(PICTURES, LABELS, strict=True)], LABELS),
        ([(torch.from_numpy(x), np.int64(k)) for x, k in zip(COLOUR, LABELS, strict=True)], LABELS),
        ([(torch.from_numpy(x).permute(2, 0, 1),) for x in COLOUR], None),
        ([[x, "name"] for x in COLOUR], None),
        ([(normalised(x).permute(2, 0, 1), k) for x, k in zip(COLOUR, LABELS, strict=True)], LABELS),
    ],
    ids=["pil", "pil-label", "dict", "first-entry", "tensor", "one-tuple", "list", "float"],
)
def test_torch_data_sets(rows: list[Any], labels: list[int] | None, kind: Any) -> None:
    assert_pixels(read_images(kind(rows)), COLOUR, labels)
    assert_pixels(read_images(kind(rows), limit=2), COLOUR[:2], None if labels is None else labels[:2])
    # Bytes are rounded after resizing, floats are not.
    small, wanted = everything(read_images(kind(rows), size=2)), everything(Images(COLOUR).resized(2))
    torch.testing.assert_close(small, wanted, rtol=0, atol=0.501 / 127.5)


def test_long_streams_grow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 2, 2), dtype=np.uint8)
    assert_pixels(read_images(Stream(list(zip(pixels, range(600), strict=True)))), pixels, list(range(600)))


def test_data_sets_choose_an_entry_by_key() -> None:
    rows = Rows([{"image": PIXELS[0], "mask": PIXELS[1]}])
    assert_pixels(read_images(rows), PIXELS[:1])
    assert_pixels(read_images(rows, key="mask"), PIXELS[1:2])
    refused(rows, r"no entry 'depth' \(it has: image, mask\)", key="depth")


def test_tensor_data_sets_are_referenced() -> None:
    pixels = torch.from_numpy(PIXELS)
    images = read_images(TensorDataset(pixels, torch.tensor(LABELS)))
    assert_pixels(images, PIXELS, LABELS)
    assert images._source.data_ptr() == pixels.data_ptr()
    assert read_images(TensorDataset(pixels, torch.rand(5, generator=torch.Generator()))).labels is None


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "the source is empty"),
        ([PIXELS[0], PIXELS[1][:2]], "image 1 of the data set: is 2 x 6"),
        ([PIXELS[0], normalised(PIXELS[:1])], "image 1 of the data set: is 4 x 6 float32"),
        ([PIXELS[0].astype(int)], r"image 0 of the data set: has type torch.int64"),
        ([normalised(COLOUR[0])], r"floats \(C, H, W\)"),
        ([(normalised(PIXELS[:1]) + 1) / 2], r"look like \[0, 1\]"),
        (["text"], "is no image"),
        ([None], "is no image"),
        ([[[1], [2, 3]]], "has type|is no image"),
    ],
    ids=str,
)
def test_data_sets_without_images_are_named(rows: list[Any], says: str) -> None:
    refused(Rows(rows), says)


def test_reading_images_again() -> None:
    images = Images(COLOUR, labels=LABELS)
    assert read_images(images) is images
    assert_pixels(read_images(images, limit=2), COLOUR[:2], LABELS[:2])
    for option in ({"limit": 0}, {"size": 0}, {"size": 1.5}):
        with pytest.raises(LatentPriorError, match="whole number of at least 1"):
            read_images(images, **option)  # type: ignore[arg-type]


# Hugging Face data sets and Parquet


def encoded(image: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def test_hugging_face_data_sets() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=4), "text": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict({"img": PICTURES, "label": LABELS, "text": ["t"] * 5}, features=features)
    assert_pixels(read_images(table), COLOUR, LABELS)
    assert_pixels(read_images(table.with_format("torch"), limit=2), COLOUR[:2], LABELS[:2])
    assert_pixels(read_images(table.remove_columns("label").rename_column("img", "photo"), key="photo"), COLOUR)
    splits = datasets.DatasetDict({"train": table, "test": table.select([1])})
    assert_pixels(read_images(splits), COLOUR, LABELS)
    assert_pixels(read_images(splits, split="test"), COLOUR[1:2], LABELS[1:2])
    refused(splits, r"no split 'val' \(it has: train, test\)", split="val")
    refused(table, "no parts to choose", split="test")
    refused(table.remove_columns("img"), r"no column 'image' \(it has: label, text\)")
    refused(table, "row 0 of the data set: is no image", key="text")


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"image": [encoded(x) for x in PICTURES], "label": LABELS}

    def write(name: str, part: slice = slice(None), **columns: Any) -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({k: v[part] for k, v in (columns or rows).items()}), tmp_path / name)
        return tmp_path / name

    path = write("one.parquet")
    assert_pixels(read_images(path), COLOUR, LABELS)
    assert_pixels(read_images(path, limit=2), COLOUR[:2], LABELS[:2])
    assert read_images(path, size=3).shape == (3, 3, 3)
    refused(path, "not known as 'test'", split="test")
    refused(path, r"no column 'depth' \(it has: image, label\)", key="depth")
    assert_pixels(read_images(write("two.parquet", photo=[x["bytes"] for x in rows["image"]]), key="photo"), COLOUR)
    bad = [rows["image"][0], {"bytes": b"junk", "path": None}]
    refused(write("bad.parquet", image=bad), r"bad\.parquet, row 1: damaged or not a picture")
    # An address in a table is not followed.
    far = [{"bytes": None, "path": "https://example.org/a.png"}]
    refused(write("far.parquet", image=far), r"far\.parquet, row 0: no such file")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, r"one\.parquet: damaged")


def test_folders_of_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"image": PICTURES, "label": LABELS}).cast_column("image", datasets.Image())
    (tmp_path / "data").mkdir()
    for name, part in (("train-00000-of-00002", range(3)), ("train-00001-of-00002", range(3, 5)), ("test-0", [1])):
        table.select(part).to_parquet(tmp_path / "data" / f"{name}.parquet")
    assert_pixels(read_images(tmp_path), COLOUR, LABELS)
    assert_pixels(read_images(tmp_path, split="test"), COLOUR[1:2], LABELS[1:2])
    assert_pixels(read_images(tmp_path, limit=4), COLOUR[:4], LABELS[:4])
    refused(tmp_path, "no images of split 'val'", split="val")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"latentprior\[datasets\]"):
        read_images(tmp_path)
