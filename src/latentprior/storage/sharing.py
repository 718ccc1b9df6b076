"""A prior and a model are saved to a folder, with a card on request, and pushed to the hub, in one way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

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
        """Write ``config.json`` and a safetensors file into a folder, atomically; never a pickle.

        Parameters
        ----------
        folder : str or Path
            It is made if need be.
        card : bool or str, default False
            True also writes a ``README.md``, the model card of :func:`latentprior.model_card` (extra ``hub``; its check
            of the normaliser takes seconds), with a picture of samples where matplotlib is installed (extra
            ``report``). A text is written as it is.
        license : str, optional
            Identifier for a card that is written, for example ``"apache-2.0"``.

        Raises
        ------
        CheckpointError
            For a tilted prior, or a folder that cannot be written.
        MissingExtraError
            If ``card`` is True and the extra ``hub`` is not installed.
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
        """Commit this to a repository on the Hugging Face hub (extra ``hub``), from where anyone can load it.

        Parameters
        ----------
        repo_id : str
            The repository, ``"user/name"``; it is created if there is none.
        private : bool, optional
            Visibility of a repository that is created; by default the account's. One that exists is left as it is.
        token : str or bool, optional
            Token of an account that may write; by default the one that ``hf auth login`` stored.
        revision : str, optional
            Branch, by default ``main``; it is created if need be.
        commit_message : str, optional
            By default ``"Upload prior with latentprior"``, or ``model``.
        create_pr : bool, default False
            Whether to open a pull request instead of committing.
        card : bool or str, optional
            None writes a card where the repository has none, so that one edited there stays. True writes it anew, a
            text writes that text, False writes none.
        license : str, optional
            Identifier for a card that is written, for example ``"apache-2.0"``.

        Returns
        -------
        huggingface_hub.CommitInfo
            With ``commit_url``, ``oid`` and ``pr_url``.

        Raises
        ------
        HubError
            If the hub refuses or is not reached.
        MissingExtraError
            Without the extra ``hub``.
        CheckpointError
            For a tilted prior.
        """
        state = self.state()

        def write(folder: Path, name: str, is_new: bool) -> None:
            self._save(folder, state, name, is_new if card is None else card, license)

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
            # Here, so that a density knows neither cards nor pictures unless it is shared.
            from .card_pictures import samples_png
            from .cards import PICTURE, model_card

            picture = samples_png(self.card_draws())
            if picture is not None:
                write_whole(folder / PICTURE, picture)
            card = model_card(self, name=name, license=license, picture=None if picture is None else PICTURE)
        if card:
            write_whole(folder / CARD, card.encode())
