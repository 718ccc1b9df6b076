import errno
import json
import os
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import latentprior
from latentprior import CheckpointError
from latentprior.storage import checkpoint
from latentprior.storage.checkpoint import load_state, locked, read_config, save_state

OLD = {"a": torch.arange(6.0).reshape(2, 3)}
NEW = {"a": torch.ones(2, 3), "b": torch.tensor(3.0, dtype=torch.float64)}


def edit(folder: Path, **changes: Any) -> None:
    """Change the configuration as its writer might have written it, with the checksum that it then has."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**config, "checksum": checkpoint._checksum(config)}))


def tensor_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_state(tmp_path, "prior", {"number": 1}, OLD)
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits, and some none")
def test_a_folder_in_which_names_would_be_too_long_is_refused_before_the_run(tmp_path: Path) -> None:
    left = os.pathconf("/", "PC_PATH_MAX") - 30 - len(os.fsencode(tmp_path))
    with pytest.raises(CheckpointError, match="File name too long"), locked(tmp_path / ("d/" * (left // 2))):
        pass
    with pytest.raises(CheckpointError, match="File name too long"), locked(tmp_path / ("d" * 300)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_round_trip_keeps_config_tensors_and_types(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        "half": torch.randn(3, generator=torch.Generator().manual_seed(0)).half(),
        "transposed": torch.arange(6).reshape(2, 3).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "with gradient": torch.ones(2, requires_grad=True),
    }
    save_state(tmp_path / "deep" / "folder", "prior", {"nested": {"x": [1, 2.5, None, "é"]}}, tensors)
    config, back = load_state(tmp_path / "deep" / "folder", "prior")
    assert config["nested"] == {"x": [1, 2.5, None, "é"]}
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value.detach())


def test_only_two_files_remain_after_many_saves(tmp_path: Path) -> None:
    for i in range(4):
        save_state(tmp_path, "fit", {"i": i}, {"a": torch.tensor([i])})
    assert len(list(tmp_path.iterdir())) == 2
    assert load_state(tmp_path, "fit")[0]["i"] == 3


def test_saving_leaves_files_of_others_alone(saved: Path) -> None:
    mine = saved / "prior-of-mine.safetensors"
    mine.write_bytes(b"precious")
    save_state(saved, "prior", {}, NEW)
    assert mine.read_bytes() == b"precious"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_tensors_are_damaged(saved: Path, share: float) -> None:
    path = tensor_file(saved)
    blob = path.read_bytes()
    path.write_bytes(blob[: int(share * len(blob))])
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(saved, "prior")


def test_any_flipped_bit_of_the_tensors_is_noticed(saved: Path) -> None:
    path = tensor_file(saved)
    blob = path.read_bytes()
    for position in range(0, len(blob), 7):
        path.write_bytes(blob[:position] + bytes([blob[position] ^ 4]) + blob[position + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            load_state(saved, "prior")


def test_any_flipped_bit_of_the_configuration_is_noticed(tmp_path: Path) -> None:
    save_state(tmp_path, "prior", {"log_normalizer": 1.25, "name": "normal"}, OLD)
    path = tmp_path / "config.json"
    blob = path.read_bytes()
    unnoticed = []
    for position in range(len(blob)):
        path.write_bytes(blob[:position] + bytes([blob[position] ^ 1]) + blob[position + 1 :])
        try:
            config, _ = load_state(tmp_path, "prior")
        except CheckpointError:
            continue
        if (config.get("log_normalizer"), config.get("name")) != (1.25, "normal"):
            unnoticed.append(position)
    assert not unnoticed, f"{len(unnoticed)} of {len(blob)} flips change what is read and raise nothing"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[1, 2]", "not written by latentprior"),
        ("null", "not written by latentprior"),
        ("{}", "not written by latentprior"),
        ('{"format": "other"}', "not written by latentprior"),
        ('{"format": "latentprior", "kind": "fit"}', "holds a 'fit', not a 'prior'"),
        ("[" * 200_000, "damaged"),
        ("\udcff", "damaged"),
    ],
)
def test_foreign_configurations(saved: Path, text: str, says: str) -> None:
    (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=says) as caught:
        load_state(saved, "prior")
    assert "\n" not in str(caught.value)


def test_huge_configuration_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CONFIG_LIMIT", 10)
    with pytest.raises(CheckpointError, match="too large"):
        read_config(saved, "prior")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_versions_name_the_cure(saved: Path, version: object) -> None:
    edit(saved, format_version=version)
    with pytest.raises(CheckpointError, match=r"format version .* use the latentprior release that wrote it"):
        load_state(saved, "prior")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", 3, None, "weights.pt", ".."]
)
def test_tensor_file_stays_in_its_folder(saved: Path, name: object) -> None:
    edit(saved, weights=name)
    with pytest.raises(CheckpointError, match="names no proper tensor file"):
        load_state(saved, "prior")


def test_null_byte_in_the_name_of_the_tensor_file(saved: Path) -> None:
    edit(saved, weights="a\0.safetensors")
    with pytest.raises(CheckpointError, match="its tensor file cannot be read"):
        load_state(saved, "prior")


@pytest.mark.parametrize("digest", [None, "", 0, "0" * 64])
def test_digest_must_fit(saved: Path, digest: object) -> None:
    edit(saved, sha256=digest)
    with pytest.raises(CheckpointError, match=r"differs from the one in config\.json"):
        load_state(saved, "prior")


class Trap:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("sprung",)


def test_pickles_are_refused_and_never_executed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tensor_file(saved)
    path.write_bytes(pickle.dumps(Trap()))
    import hashlib

    edit(saved, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(CheckpointError, match=r"\.safetensors: damaged \((?!its checksum)"):
        load_state(saved, "prior")
    (saved / "config.json").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(saved, "prior")
    assert not (tmp_path / "sprung").exists()


def test_absent_things(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no saved prior \(config.json is absent\)"):
        load_state(tmp_path / "nowhere", "prior")
    tensor_file(saved).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(saved, "prior")


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save"):
        save_state(tmp_path / "file", "prior", {}, OLD)
    with pytest.raises(CheckpointError, match="cannot save"):
        save_state(tmp_path / "file" / "below", "prior", {}, OLD)


@pytest.mark.parametrize("failing", [1, 2])
def test_full_disk_keeps_the_old_state(saved: Path, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2 * failing - 1:  # each file is flushed, then its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_state(saved, "prior", {"number": 2}, NEW)
    monkeypatch.undo()
    config, tensors = load_state(saved, "prior")
    assert config["number"] == 1
    assert torch.equal(tensors["a"], OLD["a"])
    assert not list(saved.glob("*.partial")) + list(saved.glob(".*.partial"))


@pytest.mark.parametrize("rename", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_around_a_rename_leaves_old_or_new(
    saved: Path, rename: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == rename and when == "before":
            raise KeyboardInterrupt
        real(source, target)
        if len(calls) == rename:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_state(saved, "prior", {"number": 2}, NEW)
    monkeypatch.undo()
    config, tensors = load_state(saved, "prior")
    committed = (rename, when) == (2, "after")
    assert config["number"] == (2 if committed else 1)
    assert torch.equal(tensors["a"], (NEW if committed else OLD)["a"])
    save_state(saved, "prior", {"number": 3}, NEW)
    assert {p.suffix for p in saved.iterdir()} == {".json", ".safetensors"}
    assert len(list(saved.iterdir())) == 2


def test_kill_while_old_tensors_are_removed_leaves_new(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, real = set(saved.glob("*.safetensors")), Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path in old:
            raise KeyboardInterrupt
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        save_state(saved, "prior", {"number": 2}, NEW)
    monkeypatch.undo()
    assert load_state(saved, "prior")[0]["number"] == 2


def test_leftovers_of_a_killed_process_go_with_the_next_save(saved: Path) -> None:
    # SIGKILL runs no clean-up: what it leaves must not pile up.
    (saved / ".config.json.12345.partial").write_bytes(b"half")
    save_state(saved, "prior", {}, NEW)
    assert len(list(saved.iterdir())) == 2


def test_numbers_that_json_cannot_hold_are_an_error_of_ours(saved: Path) -> None:
    with pytest.raises(CheckpointError):
        save_state(saved, "prior", {"gain": float("nan")}, NEW)
    assert load_state(saved, "prior")[0]["number"] == 1


def test_a_folder_says_which_version_wrote_it(saved: Path) -> None:
    written_by = f"latentprior {latentprior.__version__}"
    assert read_config(saved, "prior")["written_by"] == written_by
    edit(saved, format_version=7, written_by="latentprior 9.9")
    with pytest.raises(CheckpointError, match=r"format version 7, .* release that wrote it \('latentprior 9\.9'\)$"):
        load_state(saved, "prior")


@pytest.mark.parametrize("depth", [100, 900, 5_000, 100_000])
def test_nested_configurations_are_damaged_at_any_depth(saved: Path, depth: int) -> None:
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text(text.replace('"number": 1', '"number": ' + "[" * depth + "]" * depth))
    with pytest.raises(CheckpointError, match=r"damaged|too deeply"):
        load_state(saved, "prior")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_put_in_place_of_what_is_written_lead_nowhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / ".lock").symlink_to(victim)
    with pytest.raises(CheckpointError, match="cannot save"), locked(hostile):
        pass
    (hostile / f".config.json.{os.getpid()}.partial").symlink_to(victim)
    save_state(hostile, "prior", {"number": 1}, OLD)
    assert load_state(hostile, "prior")[0]["number"] == 1
    assert victim.read_text() == "mine"


def test_a_folder_is_one_runs_only(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with locked(folder):
        with pytest.raises(CheckpointError, match=r"another run is writing there; .*choose another folder"):
            locked(folder).__enter__()
        save_state(folder, "fit", {}, OLD)
    assert not (folder / ".lock").exists()
    with locked(folder), locked(None):
        pass
    with locked(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save"), locked(tmp_path / "file"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "a"), locked(tmp_path / "a"):
        save_state(tmp_path / "a", "prior", {"number": 1}, OLD)
    assert load_state(tmp_path / "a", "prior")[0]["number"] == 1


def test_locks_that_killed_processes_left_keep_nobody_out(saved: Path) -> None:
    for name in (".lock", ".save.lock"):
        (saved / name).touch()
    with locked(saved):
        save_state(saved, "prior", {"number": 2}, NEW)
    assert sorted(path.suffix for path in saved.iterdir()) == [".json", ".safetensors"]


def test_savers_and_readers_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    save_state(tmp_path, "prior", {"writer": -1}, {"a": torch.full((8,), -1.0)})
    ended = threading.Event()

    def write(number: int) -> None:
        for i in range(25):
            save_state(tmp_path, "prior", {"writer": 100 * number + i}, {"a": torch.full((8,), 100.0 * number + i)})

    def read() -> int:
        n = 0
        while not ended.is_set():
            config, tensors = load_state(tmp_path, "prior")
            assert (tensors["a"] == config["writer"]).all()
            n += 1
        return n

    with ThreadPoolExecutor(3) as pool:
        reader, writers = pool.submit(read), [pool.submit(write, k) for k in range(2)]
        for writer in writers:
            writer.result()
        ended.set()
        assert reader.result() > 0
    assert len(list(tmp_path.iterdir())) == 2


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize("inside", [lambda value: value, lambda value: {"a": [1, {"b": value}]}])
def test_what_is_nested_too_deeply_is_neither_saved_nor_read(tmp_path: Path, inside: Callable[[Any], Any]) -> None:
    # The document itself is the first of the levels.
    room = checkpoint.MOST_NESTED - 1 - (3 if isinstance(inside([]), dict) else 0)
    save_state(tmp_path, "prior", {"info": inside(nested(room))}, {})
    assert read_config(tmp_path, "prior")["info"] == inside(nested(room))
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="64 deep"):
        save_state(tmp_path, "prior", {"info": inside(nested(room + 1))}, {})
    assert (tmp_path / "config.json").read_bytes() == before
    document = {**json.loads(before), "info": inside(nested(room + 1))}
    document["checksum"] = checkpoint._checksum(document)
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="too deeply"):
        read_config(tmp_path, "prior")
