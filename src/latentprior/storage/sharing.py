"""What a prior and a model share: saving to a folder, with a card if wanted, and pushing to the hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from .card_pictures import samples_png
from .cards import PICTURE, model_card
from .checkpoint import save_state, write_whole
from .hub import CARD, push_folder

__all__ = ["Shareable"]


class Shareable(ABC):
    """Saving and pushing, from a configuration (JSON) and tensors alone."""

    kind: ClassVar[str]

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (JSON) and tensors."""

    @abstractmethod
    def card_draws(self) -> dict[str, Tensor]:
        """Named draws that a card shows: rows ``(n, d)``, or images ``(n, C, H, W)`` in [-1, 1]."""

    def save_pretrained(self, folder: str | Path, *, card: bool | str = False, license: str | None = None) -> None:
        """Write ``config.json`` and a safetensors file into ``folder``, atomically; never a pickle.

        With ``card=True`` also a ``README.md``, the model card of :func:`latentprior.model_card` (its check of the
        normaliser takes seconds), and a picture of samples where matplotlib is installed (extra ``report``); with
        ``card="..."`` that text. ``license`` goes into the card: an identifier such as ``"apache-2.0"``.

        Raises :class:`~latentprior.errors.CheckpointError` for a tilted prior, or a folder that cannot be written.
        """
        self._save(Path(folder), self.state(), Path(folder).resolve().name, card, license)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        card: bool | str | None = None,
        license: str | None = None,
    ) -> Any:
        """Commit this to ``"user/name"`` on the Hugging Face hub (extra ``hub``), from where anyone can load it.

        Arguments
        ---------
        private : visibility of a repository that is created; by default the account's. One that exists is left as is.
        token : of an account that may write; by default the one that ``hf auth login`` stored.
        revision : branch, by default ``main``; it is created if need be.
        create_pr : open a pull request instead of committing.
        card : None writes a card where the repository has none, so that one edited there stays; True writes it anew,
            a text writes that, False none.
        license : identifier for a card that is written, ``"apache-2.0"`` say.

        Returns huggingface_hub's ``CommitInfo``: ``commit_url``, ``oid``, ``pr_url``.

        Raises :class:`~latentprior.errors.HubError` where the hub refuses or is not reached,
        :class:`~latentprior.errors.MissingExtraError` without the extra, and what :meth:`save_pretrained` raises.
        """
        state = self.state()

        def write(folder: Path, name: str, fresh: bool) -> None:
            self._save(folder, state, name, fresh if card is None else card, license)

        return push_folder(
            write,
            repo_id,
            self.kind,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message or f"Upload {self.kind} with latentprior",
            create_pr=create_pr,
        )

    def _save(
        self,
        folder: Path,
        state: tuple[Mapping[str, Any], Mapping[str, Tensor]],
        name: str,
        card: bool | str,
        license: str | None,
    ) -> None:
        save_state(folder, self.kind, *state)
        if card is True:
            picture = samples_png(self.card_draws())
            if picture is not None:
                write_whole(folder / PICTURE, picture)
            card = model_card(self, name=name, license=license, picture=None if picture is None else PICTURE)
        if card:
            write_whole(folder / CARD, card.encode())
