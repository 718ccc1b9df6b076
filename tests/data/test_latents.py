import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from latentprior import InvalidLatentsError, Latents
from latentprior.data.latents import as_latents, check_tensor, read_latents

ROWS = np.arange(24.0).reshape(4, 2, 3)


def drawn(values: Any) -> Tensor:
    latents = as_latents(values)
    return latents.draw(torch.arange(len(latents)), dtype=torch.float64)


@pytest.mark.parametrize(
    "values",
    [
        ROWS,
        ROWS.astype(np.float32),
        ROWS.astype(np.float16),
        ROWS.astype(np.longdouble),
        ROWS.astype(">f4"),
        ROWS.astype("<f8"),
        ROWS.astype(np.int64),
        ROWS.astype(">i2"),
        ROWS.astype(np.int8),
        ROWS.astype(np.uint8),
        ROWS.astype(np.uint16),
        ROWS.astype(np.uint64),
        np.asfortranarray(ROWS),
        np.repeat(ROWS, 2, axis=0)[::2],
        ROWS[::-1][::-1],
        ROWS.tolist(),
        torch.from_numpy(ROWS),
        torch.from_numpy(ROWS).half(),
        torch.from_numpy(ROWS).bfloat16(),
        torch.from_numpy(ROWS).int(),
        torch.from_numpy(ROWS).requires_grad_(True),
        torch.from_numpy(ROWS).permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch.nn.Parameter(torch.from_numpy(ROWS)),
    ],
    ids=lambda v: f"{type(v).__name__}-{getattr(v, 'dtype', '')}",
)
def test_every_kind_of_rows_reads_the_same(values: Any) -> None:
    latents = as_latents(values)
    assert len(latents) == 4
    assert latents.event_shape == (2, 3)
    assert latents.dim == 6
    assert not latents.is_posterior
    z = latents.draw(torch.tensor([3, 0, 3]))
    assert z.dtype == torch.float32
    assert not z.requires_grad
    torch.testing.assert_close(z.double(), torch.from_numpy(ROWS)[[3, 0, 3]].flatten(1))


def test_read_only_arrays_are_read() -> None:
    values = ROWS.copy()
    values.flags.writeable = False
    torch.testing.assert_close(drawn(values), torch.from_numpy(ROWS).flatten(1))


def test_draws_do_not_alias_the_callers_memory() -> None:
    values = torch.zeros(3, 2)
    z = Latents(values).draw(torch.arange(3))
    z += 1
    assert values.sum() == 0


def test_arrays_are_referenced_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", ROWS)
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    latents = Latents(mapped)
    assert latents._mean is mapped
    torch.testing.assert_close(drawn(latents), torch.from_numpy(ROWS).flatten(1))


def test_blocks_give_all_rows_in_order() -> None:
    blocks = list(Latents(ROWS).blocks(rows=3))
    assert [len(b) for b in blocks] == [3, 1]
    assert blocks[0].dtype == torch.float64
    assert torch.equal(torch.cat(blocks), torch.from_numpy(ROWS).flatten(1))


def test_posterior_draws_are_fresh_with_the_right_moments(generator: torch.Generator) -> None:
    mean, scale = torch.tensor([[1.0, -2.0], [0.0, 5.0]]), torch.tensor([[0.5, 2.0], [0.0, 1.0]])
    latents = Latents.posterior(mean, scale)
    assert latents.is_posterior
    index = torch.arange(2).repeat(20_000)
    z = latents.draw(index, generator, dtype=torch.float64).view(-1, 2, 2)
    n = len(z)
    # 4.5 standard errors of a mean, sd / sqrt(n), of a deviation sd / sqrt(2 n): 1 in 150,000.
    assert ((z.mean(0) - mean).abs() <= 4.5 * scale / math.sqrt(n) + 1e-12).all()
    assert ((z.std(0) - scale).abs() <= 4.5 * scale / math.sqrt(2 * n) + 1e-12).all()
    assert not torch.equal(latents.draw(index[:2], generator), latents.draw(index[:2], generator))
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(*(latents.draw(index, g) for g in seeds))


def test_posterior_draws_in_a_batch_are_independent(generator: torch.Generator) -> None:
    latents = Latents.posterior(torch.zeros(2, 2), torch.ones(2, 2))
    z = latents.draw(torch.arange(2).repeat(10_000), generator).view(-1, 4)
    # Off-diagonal correlations of 10,000 rows have standard error 0.01: 4.5 of them.
    assert (torch.corrcoef(z.T) - torch.eye(4)).abs().max() < 0.045


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0, 2.0], r"shape \(2,\): give \(rows, coordinates\.\.\.\), for one coordinate \(rows, 1\)"),
        (3.0, r"shape \(\)"),
        ([[]], "empty"),
        (np.zeros((0, 3)), "empty"),
        (torch.zeros(3, 0, 2), "empty"),
        ([[1.0], [2.0, 3.0]], "not one rectangular array"),
        ([["a"]], "give real numbers"),
        (np.zeros((2, 2), complex), "give real numbers"),
        (np.zeros((2, 2), bool), "give real numbers"),
        (np.zeros((2, 2), "datetime64[s]"), "give real numbers"),
        (np.array([[None, 1]]), "give real numbers"),
        (np.zeros((2, 2), [("x", float)]), "give real numbers"),
        (torch.zeros(2, 2, dtype=torch.complex64), "give real numbers"),
        (torch.zeros(2, 2, dtype=torch.bool), "give real numbers"),
        (torch.eye(2).to_sparse(), "give real numbers"),
        ({"z": 1}, "give real numbers"),
        (None, "give real numbers"),
        ([[0.0], [np.nan]], "NaN or infinite value in row 1; remove or mend"),
        (torch.tensor([[0.0], [0.0], [-torch.inf]]), "row 2"),
    ],
    ids=str,
)
def test_bad_rows_are_named(values: Any, says: str) -> None:
    with pytest.raises(InvalidLatentsError, match=says) as caught:
        as_latents(values)
    assert "\n" not in str(caught.value)


def test_bad_row_is_counted_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentprior.data.latents.BLOCK_ROWS", 4)
    values = np.zeros((11, 2))
    values[9, 1] = np.inf
    with pytest.raises(InvalidLatentsError, match="row 9"):
        Latents(values)


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (np.ones((4, 2)), "scales of latents have shape"),
        (-np.ones((4, 2, 3)), "finite and not negative"),
        (np.full((4, 2, 3), np.nan), "finite and not negative"),
        (np.ones((4, 2, 3), complex), "scales of latents have type"),
    ],
)
def test_bad_scales_are_named(scale: np.ndarray, says: str) -> None:
    with pytest.raises(InvalidLatentsError, match=says):
        Latents.posterior(ROWS, scale)


INPUTS = torch.linspace(-1, 1, 30).reshape(10, 3)


class Dictionaries(Dataset):
    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": INPUTS[i], "label": i}


class Nested(Dictionaries):
    def __getitem__(self, i: int) -> Any:
        return ({"image": INPUTS[i]}, i)


@pytest.mark.parametrize(
    "dataset",
    [INPUTS, INPUTS.numpy(), TensorDataset(INPUTS), TensorDataset(INPUTS, torch.arange(10)), Dictionaries(), Nested()],
)
@pytest.mark.parametrize("batch_size", [3, 256])
def test_encoding_every_kind_of_data_set(dataset: Any, batch_size: int) -> None:
    latents = Latents.encoded(lambda x: x[:, :2] * 2, dataset, batch_size=batch_size)
    torch.testing.assert_close(drawn(latents).float(), 2 * INPUTS[:, :2])


@pytest.mark.parametrize(
    "encoder",
    [
        lambda x: (x, x.abs()),
        lambda x: [x, x.abs()],
        lambda x: torch.distributions.Normal(x, x.abs() + 1e-30),
        lambda x: torch.distributions.Independent(torch.distributions.Normal(x, x.abs() + 1e-30), 1),
    ],
)
def test_encoders_of_posteriors(encoder: Callable[[Tensor], Any]) -> None:
    latents = Latents.encoded(encoder, INPUTS, batch_size=4)
    assert latents.is_posterior
    torch.testing.assert_close(torch.from_numpy(np.array(latents._mean)), INPUTS)
    torch.testing.assert_close(torch.from_numpy(np.array(latents._scale)), INPUTS.abs(), atol=1e-20, rtol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_encoding_runs_in_eval_mode_without_gradients_and_restores(training: bool) -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.seen: list[tuple[bool, bool]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append((self.training, torch.is_grad_enabled()))
            return self.dropout(x) * self.weight

    encoder = Encoder().train(training)
    torch.testing.assert_close(drawn(Latents.encoded(encoder, INPUTS)).float(), INPUTS)
    assert set(encoder.seen) == {(False, False)}
    assert encoder.training is training
    assert encoder.dropout.training is training


def test_modes_of_submodules_survive_encoding() -> None:
    # A frozen batch norm inside a model in training mode must stay frozen.
    encoder = torch.nn.Sequential(torch.nn.Identity(), torch.nn.BatchNorm1d(3))
    encoder.train()
    encoder[1].eval()
    Latents.encoded(encoder, INPUTS)
    assert encoder.training
    assert not encoder[1].training


def test_mode_is_restored_when_the_encoder_raises() -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    encoder = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        Latents.encoded(encoder, INPUTS)
    assert encoder.training


def test_encoding_does_not_use_the_global_generator() -> None:
    before = torch.get_rng_state()
    Latents.encoded(lambda x: x, TensorDataset(INPUTS))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("encoder", "says"),
    [
        (lambda x: "no", "returned str"),
        (lambda x: (x, x, x), "returned tuple"),
        (lambda x: x[:1], "returned 3 rows for 10 inputs"),
        (lambda x: torch.cat([x, x]), "more rows"),
        (lambda x: x[:, 0], "give \\(rows, coordinates"),
        (lambda x: (x, x - 10), "not negative"),
        (lambda x: x / 0, "NaN or infinite"),
        (lambda x: (x, torch.ones(len(x), 1)), "scale"),
        (lambda x: (x, torch.ones(len(x), 5)), "scale"),
        (lambda x: x[:, : len(x) % 4 + 1], "shape"),
    ],
)
def test_bad_encoders_are_named(encoder: Callable[[Tensor], Any], says: str) -> None:
    with pytest.raises(InvalidLatentsError, match=says):
        Latents.encoded(encoder, INPUTS, batch_size=4)


def test_empty_data_set_is_named() -> None:
    with pytest.raises(InvalidLatentsError, match="empty"):
        Latents.encoded(lambda x: x, torch.zeros(0, 3))


def test_cache_is_kept_and_temporary_folder_removed(tmp_path: Path) -> None:
    Latents.encoded(lambda x: (x, x.abs()), INPUTS, cache_dir=tmp_path / "cache")
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["mean.npy", "scale.npy"]
    latents = read_latents(tmp_path / "cache" / "mean.npy")
    torch.testing.assert_close(drawn(latents).float(), INPUTS)
    temporary = Latents.encoded(lambda x: x, INPUTS)
    folder = Path(temporary._mean.filename).parent
    assert folder.is_dir()
    del temporary
    gc.collect()
    assert not folder.exists()


def write(path: Path, **arrays: np.ndarray) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".npy":
        np.save(path, next(iter(arrays.values())))
    else:
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"z{suffix}", any_name=ROWS)
    torch.testing.assert_close(drawn(str(path)), torch.from_numpy(ROWS).flatten(1))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_choice_of_array(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", train=ROWS, test=ROWS + 1, z=ROWS + 2)
    torch.testing.assert_close(drawn(read_latents(path)), torch.from_numpy(ROWS).flatten(1))
    torch.testing.assert_close(drawn(read_latents(path, key="test")), torch.from_numpy(ROWS + 1).flatten(1))
    with pytest.raises(InvalidLatentsError, match=r"no array named 'x' \(it has: "):
        read_latents(path, key="x")
    with pytest.raises(InvalidLatentsError, match=r"several arrays .* choose one"):
        read_latents(write(tmp_path / f"b{suffix}", p=ROWS, q=ROWS))
    posterior = read_latents(write(tmp_path / f"c{suffix}", mean=ROWS, scale=ROWS, extra=ROWS))
    assert posterior.is_posterior


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "flip header"])
def test_damaged_files_give_one_line(tmp_path: Path, suffix: str, damage: str) -> None:
    path = write(tmp_path / f"z{suffix}", z=ROWS)
    blob = path.read_bytes()
    changed = {
        "truncate": blob[: len(blob) // 2],
        "empty": b"",
        "garbage": b"\x07 not a file at all" * 20,
        "flip header": bytes([blob[0] ^ 255]) + blob[1:],
    }[damage]
    path.write_bytes(changed)
    with pytest.raises(InvalidLatentsError) as caught:
        read_latents(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_arrays_are_refused_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, ("sprung",)

    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", z=np.array([[Trap()]], dtype=object))
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "d.safetensors").write_bytes(pickle.dumps(Trap()))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(InvalidLatentsError):
            read_latents(path)
    assert not (tmp_path / "sprung").exists()


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidLatentsError, match="no such file"):
        as_latents(tmp_path / "none.npy")
    with pytest.raises(InvalidLatentsError, match=r"folder|no such file"):
        as_latents(str(tmp_path))
    (tmp_path / "z.csv").write_text("1,2")
    with pytest.raises(InvalidLatentsError, match=r"give \.npy, \.npz or \.safetensors"):
        as_latents(tmp_path / "z.csv")


def test_check_tensor() -> None:
    shape, cpu = torch.Size([2, 3]), torch.device("cpu")
    z = check_tensor(ROWS, shape, cpu, torch.float32)
    assert z.shape == (4, 6)
    assert z.dtype == torch.float32
    for bad in (np.zeros((4, 3, 2)), np.zeros((4, 6)), np.zeros((2, 3)), np.zeros((1, 4, 2, 3)), 3.0):
        with pytest.raises(InvalidLatentsError, match=r"the prior expects \(n, 2, 3\)"):
            check_tensor(bad, shape, cpu, torch.float32)
