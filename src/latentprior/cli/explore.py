"""``latentprior explore``: a local page for a saved prior or model."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LatentPriorError
from ..runtime.progress import note, work_bar
from ..runtime.stopping import Stopped
from .options import Device, SavedFolder, WorkFailed, check_device

__all__ = ["explore"]


def explore(
    folder: SavedFolder,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            help="Images (latents, for a prior) that trained nothing, for p-values and classes.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", metavar="H", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="P", min=0, max=65535, help="Port to listen on; 0 for any.")
    ] = 7860,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", metavar="", help="Open the page in a browser.")
    ] = True,
    allow_remote: Annotated[
        bool,
        typer.Option("--allow-remote", metavar="", help="Let --host be other than this machine: anyone may then ask."),
    ] = False,
    device: Device = None,
) -> None:
    """Serve a page to sample, walk, score and tilt a saved model with; Ctrl-C ends it.

    [bold]Examples:[/]

    latentprior explore my-model --calibration demo-out/images.npz

    latentprior explore my-prior --calibration test_latents.npy --port 0 --no-browser
    """
    # Starlette and uvicorn come with an extra, which no other command needs.
    from ..explorer.explorer import open_explorer
    from ..explorer.server import Server, is_loopback

    if not is_loopback(host):
        if not allow_remote:
            raise LatentPriorError(
                f"--host {host} opens the page to other machines: leave it out, or add --allow-remote if you mean it"
            )
        note("warning", f"the page on {host} has no password: whoever reaches it can use the model and this machine")
    check_device(device)
    with work_bar(f"opening {folder}"):
        explorer = open_explorer(folder, calibration, device=device)
    try:
        with work_bar("calibrating"):
            server = Server(explorer, host, port)
    except OSError as error:
        raise WorkFailed(f"cannot listen on {host}, port {port} ({error.strerror}); choose another --port") from None
    try:
        print(f"{server.url}  p-values against {explorer.calibration.text}; Ctrl-C ends", flush=True)
        if browser:
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        server.serve()
    except Stopped:
        # Nothing is lost: this is how a page ends.
        pass
    finally:
        server.close()
