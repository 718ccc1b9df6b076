"""Download folders from the Hugging Face hub, and push folders to it (extra ``hub``)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import CheckpointError, HubError, MissingExtraError

__all__ = ["find_folder", "push_folder"]

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
DIGEST = "[0-9a-f]" * 16
"""Pattern of the sixteen digits in the name of a tensor file, both for ``re`` and for the hub's file names."""
CARD = "README.md"


def find_folder(
    source: str | Path,
    kind: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder ``source``, or the snapshot of ``"user/name"`` on the hub if there is no such folder.

    Only ``config.json`` and ``KIND-<digest>.safetensors`` of a snapshot are downloaded, whatever else it holds. The
    options are those of :meth:`latentprior.LatentPrior.from_pretrained`.

    Raises
    ------
    CheckpointError
        If ``source`` is neither a folder nor a repository on the hub.
    MissingExtraError
        If ``source`` is no folder and the extra is not installed.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or not NAME.fullmatch(source):
        raise CheckpointError(
            f"{source}: no such folder, so it holds no saved {kind}; "
            'give the folder that save_pretrained wrote, or "user/name" on the hub'
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError(f"{source} is no folder here; loading it from the hub", "hub") from None
    try:
        snapshot = snapshot_download(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=["config.json", f"{kind}-{DIGEST}.safetensors"],
            library_name="latentprior",
            library_version=__version__,
        )
    except Exception as error:  # The client's errors are those of the HTTP library of its release.
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{source}: no such folder, and no {kind} of that name{at} on the hub ({_line(error)}); "
            "check the path or the name, the revision and the token"
        ) from error
    return Path(snapshot)


def push_folder(
    write: Callable[[Path, str, bool], None],
    repo_id: str,
    kind: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str,
    create_pr: bool = False,
) -> Any:
    """Commit what ``write`` puts into a folder to a repository on the hub, and return huggingface_hub's ``CommitInfo``.

    There is one commit, which also deletes the tensor files of this kind that it replaces: a reader gets old or new.

    ``write(folder, name, is_new)`` fills the folder; it gets the full name of the repository, and whether that has no
    card yet. The other parameters, and what is raised, are those of :meth:`Shareable.push_to_hub`.
    """
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    except ImportError:
        raise MissingExtraError(f"pushing to {repo_id} on the hub", "hub") from None
    api = HfApi(token=token, library_name="latentprior", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="latentprior-") as name:
        folder = Path(name)
        try:
            full = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(full, branch=revision, exist_ok=True)
            files_before = api.list_repo_files(full, revision=revision if not create_pr else None)
        except Exception as error:
            raise _refused(repo_id, error) from error
        write(folder, full, CARD not in files_before)
        files = sorted(folder.iterdir())
        stale = {entry for entry in files_before if re.fullmatch(rf"{kind}-{DIGEST}\.safetensors", entry)}
        stale -= {path.name for path in files}
        operations = [CommitOperationAdd(path.name, path) for path in files]
        try:
            # upload_folder may spread a folder over several commits.
            return api.create_commit(
                full,
                [*operations, *(CommitOperationDelete(entry) for entry in sorted(stale))],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        except Exception as error:
            raise _refused(repo_id, error) from error


def _refused(repo_id: str, error: Exception) -> HubError:
    return HubError(
        f"{repo_id}: cannot push to the hub ({_line(error)}); "
        "check the name, the network, and that your token may write (`hf auth login`)"
    )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
