"""A measured figure, and the table of figures that every benchmark prints and writes."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from modelcache import __version__


@dataclass(frozen=True)
class Figure:
    what: str
    ours: str
    reference: str
    ratio: str
    limit: str
    holds: bool
    spread: str
    rounds: tuple[float, ...] = ()


def spread(found: Sequence[float]) -> str:
    return f"{min(found):.2f} to {max(found):.2f}"


def present(script: str, description: str | None, measure: Callable[[], list[Figure]], notes: str = "") -> int:
    """Measure, print, and write down if asked; the exit code is 1 when a figure is missed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.md")
    options = parser.parse_args()
    began_load = os.getloadavg()[0]
    figures = measure()
    header = ("figure", "ours", "reference", "ratio", "limit", "", "spread")
    rows = [(f.what, f.ours, f.reference, f.ratio, f.limit, "ok" if f.holds else "MISSED", f.spread) for f in figures]
    lines = ["| " + " | ".join(row) + " |" for row in (header, tuple("---" for _ in header), *rows)]
    print("\n".join(lines))
    if options.write:
        machine = (
            f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, torch "
            f"{torch.__version__}, modelcache {__version__}, {time.strftime('%Y-%m-%d')}; "
            f"load average {began_load:.1f} before the run"
        )
        text = f"# {options.write}\n\n`python benchmarks/{script} --write {options.write}` on {machine}.\n\n"
        text += f"{notes}\n\n" * bool(notes) + "\n".join(lines) + "\n"
        rounds = [f"- {f.what}: {', '.join(f'{each:.2f}' for each in f.rounds)}" for f in figures if f.rounds]
        text += "\nEvery round, in the unit of its row:\n\n" + "\n".join(rounds) + "\n"
        Path(__file__).with_name("results").joinpath(f"{options.write}.md").write_text(text, encoding="utf-8")
    return 0 if all(figure.holds for figure in figures) else 1
