"""``latentprior push``: a saved prior or model to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from ..density.bases import DistributionBase
from ..density.figures import strict_json
from ..errors import LatentPriorError
from ..report.sources import load_folder
from .options import AsJson, SavedFolder

__all__ = ["push"]


def push(
    folder: SavedFolder,
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository; it is created if there is none.")],
    private: Annotated[
        bool, typer.Option("--private", metavar="", help="Make a repository that is created private.")
    ] = False,
    revision: Annotated[str | None, typer.Option("--revision", metavar="R", help="Branch, by default main.")] = None,
    message: Annotated[str | None, typer.Option("--message", metavar="M", help="Message of the commit.")] = None,
    licensed: Annotated[
        str | None, typer.Option("--license", metavar="L", help="Identifier for the card that is written: mit, say.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Push a prior or a model to the Hugging Face hub, with a model card where there is none.

    The token is that of [bold]hf auth login[/] or of HF_TOKEN.

    [bold]Example:[/] latentprior push prior user/my-prior --private
    """
    prior, model = load_folder(folder, None)
    if isinstance(prior.base, DistributionBase):
        raise LatentPriorError(
            f"{folder}: its prior stands on a Distribution that is not pushed with it, so that nobody could load it"
        )
    done = (model or prior).push_to_hub(
        name, private=private or None, revision=revision, commit_message=message, license=licensed
    )
    if as_json:
        print(strict_json({"repository": name, "url": done.commit_url, "commit": done.oid}))
    else:
        print(f"{folder} pushed: {done.commit_url}")
