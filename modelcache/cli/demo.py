"""``modelcache demo``: real models share too little VRAM, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

modelcache demo

modelcache demo --out report --synthetic

Ends with 0 when every check holds, 1 when one does not."""


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the page and the trace.", metavar="FOLDER")] = Path(
        "demo-report"
    ),
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Use generated weights although the real ones are there.")
    ] = False,
) -> None:
    """Run the embedded demo: models share too little VRAM, compared with delete-and-reload, and check itself."""
    # Imports torch, which takes seconds.
    from modelcache.demo import run

    raise typer.Exit(run(out=out, synthetic=synthetic))
