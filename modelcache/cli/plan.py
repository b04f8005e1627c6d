"""``modelcache plan``: what a configuration would do, from safetensors headers alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from modelcache import (
    Effective,
    PlannedBudgets,
    Tier,
    WeightsError,
    parse_bytes,
    parse_rate,
    planned_budgets,
    weights_bytes,
)
from modelcache.cli.config_commands import load
from modelcache.cli.forecast import Amount, Forecast, as_json, draw, forecast
from modelcache.cli.output import Exit, complain, data_console, note, write_json
from modelcache.cli.planning import PlannedModel

#: Taken where nothing is known: a PCIe 4.0 x16 link with page-locked memory, and an NVMe disk.
_LINK = Amount(25_000_000_000, "assumed: PCIe 4.0 x16, page-locked memory")
_DISK = Amount(2_500_000_000, "assumed: one NVMe disk; 'modelcache doctor --disk' measures yours")

EPILOG = """Examples:

modelcache plan modelcache.yaml

modelcache plan modelcache.yaml --vram 24GiB --ram 64GiB --link 50GB/s

modelcache plan --json

Sizes given with --vram and --ram need not be those of this machine.

Ends with 0, or with 3 when a model cannot come up or its files cannot be read."""


@dataclass(frozen=True, slots=True)
class _Given:
    """What the command line says, read; `None` is not said."""

    vram_bytes: int | None
    ram_bytes: int | None
    link_rate: int | None
    disk_rate: int | None


def plan(
    file: Annotated[
        Path | None, typer.Argument(help="The configuration. Default: modelcache.yaml.", metavar="FILE")
    ] = None,
    *,
    vram: Annotated[str | None, typer.Option(help="Plan with this much VRAM.", metavar="SIZE")] = None,
    ram: Annotated[str | None, typer.Option(help="Plan with this much RAM.", metavar="SIZE")] = None,
    link: Annotated[str | None, typer.Option(help="Speed from RAM to VRAM.", metavar="SIZE/s")] = None,
    disk: Annotated[str | None, typer.Option(help="Speed from disk to RAM.", metavar="SIZE/s")] = None,
    json: Annotated[bool, typer.Option("--json", help="Write the forecast as JSON.")] = False,
) -> None:
    """Say which models fit together, what each switch gives up, and how long it takes. Loads nothing."""
    given = _Given(
        _read("--vram", vram, parse_bytes),
        _read("--ram", ram, parse_bytes),
        _read("--link", link, parse_rate),
        _read("--disk", disk, parse_rate),
    )
    found = load(file, _stand_ins(given))
    budgets = planned_budgets(found)
    for line in budgets.lines:
        if line.startswith("device ") and given.vram_bytes is None:
            note(line)
    if (policy := found.settings.policy.evict) != "lru":
        note(f"the forecast gives up the least recently used first; policy.evict is {policy}, which may choose others")
    what = _forecast(found, budgets, given)
    if json:
        write_json(as_json(what))
    else:
        draw(what, data_console())
    for problem in what.problems:
        complain(problem)
    raise typer.Exit(Exit.PROBLEMS if what.problems else Exit.OK)


def _read(option: str, text: str | None, read: Callable[[str], int]) -> int | None:
    if text is None:
        return None
    try:
        return read(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _stand_ins(given: _Given) -> dict[str, object]:
    """What to put over the file, so that a size for another machine is not held against this one."""
    over: dict[str, object] = {}
    if given.vram_bytes is not None:
        over["device"] = "host_only"
    if given.ram_bytes is not None:
        over |= {"budgets.ram": "auto", "budgets.page_locked": "auto"}
    return over


def _forecast(found: Effective, budgets: PlannedBudgets, given: _Given) -> Forecast:
    ram = Amount(budgets.ram_bytes, _how(budgets, "budgets.ram"))
    if given.ram_bytes is not None:
        ram = Amount(given.ram_bytes, "--ram")
    link = _LINK if budgets.link_bytes_per_s is None else Amount(budgets.link_bytes_per_s, budgets.link)
    if given.link_rate is not None:
        link = Amount(given.link_rate, "--link")
    top_tier, top = "vram", Amount(budgets.vram_bytes, _how(budgets, "budgets.vram"))
    if given.vram_bytes is not None:
        top = Amount(given.vram_bytes, "--vram")
    elif budgets.top is Tier.RAM:
        top_tier, top = "ram", ram
    disk = _DISK if given.disk_rate is None else Amount(given.disk_rate, "--disk")
    return forecast(
        tuple(_planned(found)),
        top_tier=top_tier,
        top=top,
        ram=ram,
        link=link,
        disk=disk,
        segment_bytes=found.settings.segment,
    )


def _how(budgets: PlannedBudgets, key: str) -> str:
    line = next((line for line in budgets.lines if line.startswith(f"{key} ")), "")
    return line.partition(": ")[2] or "as given"


def _planned(found: Effective) -> Iterator[PlannedModel]:
    for spec in found.specs:
        size_bytes, size_from, problem = spec.size_bytes, "size", ""
        options = spec.loader.options
        place, dtype = options.get("weights") or options.get("path"), options.get("dtype")
        if size_bytes is None:
            size_from = "unknown"
            if place is not None:
                try:
                    size_bytes = weights_bytes(
                        str(place), dtype=None if dtype in {None, "auto"} else str(dtype), name=spec.name
                    )
                    size_from = "headers"
                except WeightsError as error:
                    problem = str(error)
        yield PlannedModel(
            spec.name,
            size_bytes,
            size_from,
            spec.workspace_bytes,
            pin=None if spec.pin is None else str(spec.pin),
            problem=problem,
            priority=spec.priority.rank,
        )
