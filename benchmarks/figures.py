"""A measured figure, and the table of figures that every benchmark prints and writes."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    #: More about the same run, by heading: a second table.
    more: Mapping[str, str] = field(default_factory=dict)
    #: What the figures of one picture have in common, in words.
    title: str = ""


@dataclass(frozen=True)
class Setup:
    """What a run is asked for beside its figures.

    Attributes:
        device: ``"simulated"`` or ``"cuda:0"``.
        scale: Of all sizes; 0 is as large as the machine has room for, but no larger than 1.
        is_quick: A quarter of the size and two rounds, to see that it works.
        methods: Words of the labels of those that take part; everybody if there are none.
    """

    device: str = "simulated"
    scale: float = 0.0
    is_quick: bool = False
    methods: tuple[str, ...] = ()

    @property
    def num_rounds(self) -> int:
        return 2 if self.is_quick else 7


def absent(what: str, why: str) -> Figure:
    """A row for what could not be measured; it says why."""
    return Figure(what, why, "-", "-", "shown", holds=True, spread="-")


def spread(found: Sequence[float]) -> str:
    return f"{min(found):.2f} to {max(found):.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, tuple("---" for _ in header), *rows))


def tables(figures: Sequence[Figure]) -> str:
    """One of all figures, and one more of what else is known about those that say so."""
    header = ("figure", "ours", "reference", "ratio", "limit", "", "spread")
    rows = [(f.what, f.ours, f.reference, f.ratio, f.limit, "ok" if f.holds else "MISSED", f.spread) for f in figures]
    text = table(header, rows)
    wide: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for figure in figures:
        if figure.more:
            wide.setdefault(tuple(figure.more), []).append((figure.what, *figure.more.values()))
    for keys, found in wide.items():
        text += "\n\n" + table(("figure", *keys), found)
    return text


def results() -> Path:
    return Path(__file__).with_name("results")


def present(
    script: str,
    description: str | None,
    measure: Callable[..., list[Figure]],
    notes: str = "",
    *,
    setup: bool = False,
    plot: Callable[[Sequence[Figure], Path], None] | None = None,
) -> int:
    """Measure, print, and write down if asked; the exit code is 1 when a figure is missed.

    Args:
        setup: `measure` takes a `Setup`, and the command line has its options.
        plot: Draws the figures into a file beside the results.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.md, and a plot if there is one")
    if setup:
        parser.add_argument("--device", default="simulated", help="simulated or cuda:0")
        parser.add_argument("--scale", type=float, default=0.0, help="of all sizes; as large as there is room for")
        parser.add_argument("--quick", action="store_true", help="small and few, to see that it works")
        parser.add_argument("--methods", default="", help="words of their labels, with commas: who takes part")
    options = parser.parse_args()
    began_load = os.getloadavg()[0]
    if setup:
        methods = tuple(word for word in options.methods.split(",") if word)
        figures = measure(Setup(options.device, options.scale, options.quick, methods))
    else:
        figures = measure()
    text = tables(figures)
    print(text)
    if options.write:
        machine = (
            f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, torch "
            f"{torch.__version__}, modelcache {__version__}, {time.strftime('%Y-%m-%d')}; "
            f"load average {began_load:.1f} before the run"
        )
        page = f"# {options.write}\n\n`python benchmarks/{script} {' '.join(sys.argv[1:])}` on {machine}.\n\n"
        page += f"{notes}\n\n" * bool(notes) + text + "\n"
        rounds = [f"- {f.what}: {', '.join(f'{each:.2f}' for each in f.rounds)}" for f in figures if f.rounds]
        if plot is not None and importlib.util.find_spec("matplotlib") is not None:
            plot(figures, results() / f"{options.write}.png")
            page += f"\n![the same figures]({options.write}.png)\n"
        page += "\nEvery round, in the unit of its row:\n\n" + "\n".join(rounds) + "\n"
        (results() / f"{options.write}.md").write_text(page, encoding="utf-8")
    return 0 if all(figure.holds for figure in figures) else 1
