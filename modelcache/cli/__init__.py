"""The command line: demo, doctor, config, plan, ab. A guest: it uses public names of `modelcache` only."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command named on the command line and end the process with its exit code."""
    try:
        from modelcache.cli.app import app

        app()
    except KeyboardInterrupt:
        # Before or after a command; during one, the framework answers with the same code.
        sys.exit(130)
