"""The end-to-end run behind ``modelcache demo``: real models that share too little memory, measured and checked.

A guest: it uses public names of `modelcache` only. Importing it is cheap; torch is imported by `run`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["run"]


def run(*, synthetic: bool = False, out: str | Path = "demo-report", num_requests: int = 200, seed: int = 7) -> int:
    """Run the demo: progress on standard error, the report on standard output, two files in `out`.

    Args:
        synthetic: Use generated weights even if the real ones are installed.
        out: The folder for ``report.html``, ``switches.svg`` and ``trace.json``; made if missing.
        num_requests: How many requests each run serves.
        seed: Of the requests and of everything that is generated or trained.

    Returns:
        0 if every check passed, 1 otherwise: the exit code.
    """
    from modelcache.demo.acts import play

    return play(synthetic=synthetic, out=Path(out), num_requests=num_requests, seed=seed)
