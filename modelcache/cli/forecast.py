"""The answer of ``modelcache plan``: a forecast as one value, drawn for people or written for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelcache import format_bytes, format_seconds
from modelcache.cli.output import table
from modelcache.cli.planning import SEGMENT_BYTES, PlannedModel, Switch, switches, together

_MOST_SETS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Amount:
    """A budget in bytes or a speed in bytes per second, and where it comes from."""

    number: int
    origin: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a configuration would do on a machine.

    Attributes:
        models: In file order.
        top_tier: Where models run: ``"vram"``, or ``"ram"`` on a machine without an accelerator.
        top: The budget of that tier.
        ram: The budget of RAM.
        link: RAM to VRAM.
        disk: Disk to RAM.
        sets: Which models can run at once.
        changes: What each switch costs.
    """

    models: tuple[PlannedModel, ...]
    top_tier: str
    top: Amount
    ram: Amount
    link: Amount
    disk: Amount
    sets: tuple[tuple[str, ...], ...]
    changes: tuple[Switch, ...]

    @property
    def weights_bytes(self) -> int:
        """Of all models whose size is known."""
        return sum(model.weights_bytes or 0 for model in self.models)

    @property
    def problems(self) -> tuple[str, ...]:
        """What cannot work, one clause each."""
        unread = [f"{model.name}: {model.problem}" for model in self.models if model.problem]
        return (*unread, *(f"{change.to}: {change.refused}" for change in self.changes if change.refused))

    @property
    def short_of_ram_bytes(self) -> int:
        """By how much the models exceed both tiers together; their rest comes from disk again."""
        held_bytes = self.ram.number + (self.top.number if self.top_tier == "vram" else 0)
        return max(0, self.weights_bytes - held_bytes)

    def to_seconds(self, size_bytes: int) -> float:
        """How long that many bytes take to the top tier, when they are in RAM (on disk, without an accelerator)."""
        return size_bytes / (self.link if self.top_tier == "vram" else self.disk).number

    def load_seconds(self, size_bytes: int) -> float:
        """How long that many bytes take from disk to RAM."""
        return size_bytes / self.disk.number


def forecast(
    models: Sequence[PlannedModel],
    *,
    top_tier: str,
    top: Amount,
    ram: Amount,
    link: Amount,
    disk: Amount,
    segment_bytes: int = SEGMENT_BYTES,
) -> Forecast:
    """Work out what fits together and what each switch costs."""
    return Forecast(
        tuple(models),
        top_tier,
        top,
        ram,
        link,
        disk,
        together(models, top.number),
        switches(models, top.number, top_tier, segment_bytes),
    )


def as_json(found: Forecast) -> dict[str, object]:
    """The forecast for programs: bytes and seconds."""
    return {
        "budgets": {
            found.top_tier: {"bytes": found.top.number, "origin": found.top.origin},
            "ram": {"bytes": found.ram.number, "origin": found.ram.origin},
        },
        "speeds": {
            "link": {"bytes_per_s": found.link.number, "origin": found.link.origin},
            "disk": {"bytes_per_s": found.disk.number, "origin": found.disk.origin},
        },
        "models": [_model_json(found, model) for model in found.models],
        "fit_together": [list(group) for group in found.sets],
        "switches": [_switch_json(found, change) for change in found.changes],
        "short_of_ram_bytes": found.short_of_ram_bytes,
        "problems": list(found.problems),
    }


def _model_json(found: Forecast, model: PlannedModel) -> dict[str, object]:
    size_bytes = model.weights_bytes
    return {
        "name": model.name,
        "weights_bytes": size_bytes,
        "size_from": model.size_from,
        "workspace_bytes": model.workspace_bytes,
        "pin": model.pin,
        "disk_to_ram_s": None if size_bytes is None else found.load_seconds(size_bytes),
        "ram_to_vram_s": None if size_bytes is None or found.top_tier != "vram" else found.to_seconds(size_bytes),
    }


def _switch_json(found: Forecast, change: Switch) -> dict[str, object]:
    return {
        "to": change.to,
        "incoming_bytes": change.incoming_bytes,
        "seconds": None if change.refused else found.to_seconds(change.incoming_bytes),
        "gives_up": [{"name": name, "bytes": size} for name, size in change.gives_up],
        "refused": change.refused or None,
    }


def draw(found: Forecast, console: Console) -> None:
    """The forecast for people."""
    tier = found.top_tier.upper()
    for line in _budget_lines(found):
        console.print(Text(line))
    console.print()
    console.print(_model_table(found))
    console.print(Text(f"\nCan run at once in {format_bytes(found.top.number)} of {tier}:", style="bold"))
    for line in _set_lines(found):
        console.print(Text(f"  {line}"))
    if found.changes:
        heading = "\nEach switch, when the models are asked for in turn (least recently used gives up first):"
        console.print(Text(heading, style="bold"))
        console.print(_switch_table(found))
    console.print(Text(f"\n{_ram_line(found)}"))


def _budget_lines(found: Forecast) -> Iterator[str]:
    if found.top_tier == "vram":
        yield f"VRAM  {format_bytes(found.top.number)}  ({found.top.origin})"
    yield f"RAM   {format_bytes(found.ram.number)}  ({found.ram.origin})"
    if found.top_tier == "vram":
        yield f"RAM -> VRAM  {found.link.number / 1e9:.1f} GB/s  ({found.link.origin}; change it with --link)"
    yield f"disk -> RAM  {found.disk.number / 1e9:.1f} GB/s  ({found.disk.origin}; change it with --disk)"


def _model_table(found: Forecast) -> Table:
    has_vram = found.top_tier == "vram"
    headings = ["Model", ">Size", "From", ">Workspace", "Pin", ">disk -> RAM"] + [">RAM -> VRAM"] * has_vram
    return table(headings, (_model_row(found, model, has_vram) for model in found.models))


def _model_row(found: Forecast, model: PlannedModel, has_vram: bool) -> list[str]:
    size_bytes = model.weights_bytes
    row = [
        model.name,
        "?" if size_bytes is None else format_bytes(size_bytes),
        model.size_from,
        format_bytes(model.workspace_bytes) if model.workspace_bytes else "-",
        model.pin or "-",
        "-" if size_bytes is None else format_seconds(found.load_seconds(size_bytes)),
    ]
    if has_vram:
        row.append("-" if size_bytes is None else format_seconds(found.to_seconds(size_bytes)))
    return row


def _set_lines(found: Forecast) -> Iterator[str]:
    known = [model.name for model in found.models if model.weights_bytes is not None]
    if not known:
        yield "no size is known before the first load; set 'size' to plan with it"
    elif not found.sets:
        yield "none of the models"
    elif len(found.sets[0]) == len(known) > 1:
        yield f"all {len(known)}: {', '.join(known)}"
    else:
        yield from (", ".join(group) for group in found.sets[:_MOST_SETS_SHOWN])
        if len(found.sets) > _MOST_SETS_SHOWN:
            yield f"and {len(found.sets) - _MOST_SETS_SHOWN} more sets (see --json)"


def _switch_table(found: Forecast) -> Table:
    rows = []
    for change in found.changes:
        if change.refused:
            rows.append([change.to, "-", "-", f"cannot come up: {change.refused}"])
            continue
        gives_up = ", ".join(f"{name} {format_bytes(size)}" for name, size in change.gives_up) or "nobody"
        seconds = format_seconds(found.to_seconds(change.incoming_bytes)) if change.incoming_bytes else "-"
        rows.append([change.to, format_bytes(change.incoming_bytes), seconds, gives_up])
    return table(["Switch to", ">Moves in", ">Takes", "Gives up first"], rows)


def _ram_line(found: Forecast) -> str:
    if not found.weights_bytes:
        return "RAM: no size is known, so nothing can be said of it."
    total = format_bytes(found.weights_bytes)
    if found.weights_bytes <= found.ram.number:
        return f"RAM: all known models together have {total}, so none is read from disk twice."
    if not found.short_of_ram_bytes:
        return f"RAM: all known models together have {total}; copies of models in VRAM are given up when RAM is short."
    return (
        f"RAM: all known models together have {total}, {format_bytes(found.short_of_ram_bytes)} more than there is "
        "room for; the least recently used come from disk again, at its speed."
    )
