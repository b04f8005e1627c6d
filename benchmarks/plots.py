"""Pictures of the tables, drawn where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from figures import Figure

OURS, THEIRS, INK = "#1f6f8b", "#b8c4cc", "#22313a"
LOG_FROM = 8.0  # where the largest value is so many times the smallest, the axis is logarithmic


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _low_high(figure: Figure) -> tuple[float, float] | None:
    """The spread, where it is one of ratios: a spread in a unit names it, and has no place on this axis."""
    return (min(figure.rounds), max(figure.rounds)) if figure.rounds and figure.spread[-1:].isdigit() else None


def _bars(axes: object, figures: Sequence[Figure], labels: Sequence[str], ours: Sequence[bool]) -> None:
    """One bar a figure, its spread as a line; the value stands at the end."""
    values = [_number(figure.ratio) or 0.0 for figure in figures]
    spreads = [_low_high(figure) or (value, value) for figure, value in zip(figures, values, strict=True)]
    reach = [max(value, high) for value, (_, high) in zip(values, spreads, strict=True)]
    positive = [value for value in values if value > 0]
    is_log = bool(positive) and max(positive) / min(positive) >= LOG_FROM
    base = min(0.5, *(value / 2 for value in positive)) if is_log else 0.0
    rows = range(len(figures), 0, -1)
    colours = [OURS if mine else THEIRS for mine in ours]
    axes.barh(rows, [value - base for value in values], left=base, color=colours, height=0.68)
    for row, value, (low, high) in zip(rows, values, spreads, strict=True):
        if high > low:
            axes.plot([max(low, base), high], [row, row], color=INK, linewidth=1)
        axes.text(max(value, high), row, f"  {value:.3g}", va="center", fontsize=8, color=INK)
    if is_log:
        axes.set_xscale("log")
        axes.set_xlim(base, max(reach) * 2.2)
    else:
        axes.set_xlim(0, max(1.1, max(reach) * 1.2))
    axes.set_yticks(list(rows), labels, fontsize=8)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def _save(picture: object, path: Path) -> None:
    import matplotlib.pyplot as plt

    picture.savefig(path, dpi=110)
    plt.close(picture)


def _canvas(
    num_rows: int, num_columns: int, height: float, heights: Sequence[int] | None = None
) -> tuple[object, Sequence[object]]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    size = (8.4 if num_columns == 1 else 6.4 * num_columns, height)
    picture, axes = plt.subplots(
        num_rows, num_columns, figsize=size, squeeze=False, layout="constrained", height_ratios=heights
    )
    return picture, list(axes.flat)


def ratios(figures: Sequence[Figure], path: Path) -> None:
    """One axis for all rows that have a ratio to the same kind of reference."""
    groups: dict[str, list[Figure]] = {}
    for figure in figures:
        if _number(figure.ratio) is not None:
            groups.setdefault(figure.reference.partition("(")[2].rstrip(")"), []).append(figure)
    height = sum(0.32 * len(found) + 0.7 for found in groups.values()) + 0.8
    picture, axes = _canvas(len(groups), 1, height, [len(found) + 2 for found in groups.values()])
    for ax, (reference, found) in zip(axes, groups.items(), strict=True):
        _bars(ax, found, [figure.what for figure in found], ["modelcache" in f.what or len(groups) > 1 for f in found])
        ax.set_title(f"over: {reference}", fontsize=9, loc="left", color=INK)
    picture.suptitle(path.stem.partition("_2core")[0].replace("_", " ") + ": ratios (dotted: 1)", fontsize=11)
    picture.supxlabel("ratio; bar and number: median of rounds; line: least to most of all rounds", fontsize=8)
    _save(picture, path)


def bars_by_workload(figures: Sequence[Figure], path: Path) -> None:
    """One panel a workload: a switch over one flat copy of the model's bytes, one bar a method."""
    groups: dict[str, list[Figure]] = {}
    for figure in figures:
        if _number(figure.ratio) is not None:
            groups.setdefault(figure.what.partition(" ")[0], []).append(figure)
    rows = -(-len(groups) // 2)
    picture, axes = _canvas(rows, 2, rows * 2.5 + 0.5)
    for ax in axes[len(groups) :]:
        ax.set_visible(False)
    for ax, (key, found) in zip(axes, groups.items(), strict=False):
        labels = [figure.what.partition(" ")[2] for figure in found]
        _bars(ax, found, labels, ["modelcache" in label for label in labels])
        ax.set_title(f"{key}: {found[0].title}" if found[0].title else key, fontsize=9, loc="left", color=INK)
    picture.suptitle("A switch over one flat copy of the model's bytes: less is better, 1 is the link", fontsize=11)
    picture.supxlabel("ratio; bar and number: median of rounds; line: least to most of all rounds", fontsize=8)
    _save(picture, path)
