"""``modelcache plan``: what a configuration would do, from safetensors headers alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelcache import (
    ConfigError,
    Effective,
    Tier,
    WeightsError,
    load_config,
    parse_bytes,
    parse_rate,
    planned_budgets,
    weights_bytes,
)
from modelcache.cli.config_commands import DEFAULT_FILE
from modelcache.cli.forecast import Amount, as_json, draw, forecast
from modelcache.cli.output import Exit, complain, complain_about, data_console, write_json
from modelcache.cli.planning import PlannedModel

#: Taken where nothing was measured: a PCIe 4.0 x16 link with page-locked memory, and an NVMe disk.
_LINK = Amount(24_000_000_000, "assumed: PCIe 4.0 x16, page-locked")
_DISK = Amount(2_500_000_000, "assumed: NVMe")

EPILOG = """Examples:

modelcache plan modelcache.yaml

modelcache plan modelcache.yaml --vram 24GiB --ram 64GiB --link 50GB/s

Ends with 0, or with 3 when a model cannot come up or its files cannot be read."""


def plan(
    file: Annotated[Path, typer.Argument(help="The configuration.", metavar="FILE")] = DEFAULT_FILE,
    *,
    vram: Annotated[str | None, typer.Option(help="A budget in place of budgets.vram.", metavar="SIZE")] = None,
    ram: Annotated[str | None, typer.Option(help="A budget in place of budgets.ram.", metavar="SIZE")] = None,
    link: Annotated[str | None, typer.Option(help="Speed from RAM to VRAM.", metavar="SIZE/s")] = None,
    disk: Annotated[str | None, typer.Option(help="Speed from disk to RAM.", metavar="SIZE/s")] = None,
    json: Annotated[bool, typer.Option("--json", help="Write the forecast as JSON.")] = False,
) -> None:
    """Say which models fit together, what each switch gives up, and how long it takes. Loads nothing."""
    try:
        found = load_config(str(file), cli={"budgets.ram": ram})
        top_tier, top, ram_amount = _budgets(found, vram)
        speeds = _speed("--link", link, _LINK), _speed("--disk", disk, _DISK)
    except ConfigError as error:
        complain_about(error.findings)
        raise typer.Exit(Exit.USAGE) from error
    what = forecast(tuple(_planned(found)), top_tier=top_tier, top=top, ram=ram_amount, link=speeds[0], disk=speeds[1])
    if json:
        write_json(as_json(what))
    else:
        draw(what, data_console())
    for problem in what.problems:
        complain(problem)
    raise typer.Exit(Exit.PROBLEMS if what.problems else Exit.OK)


def _budgets(found: Effective, vram: str | None) -> tuple[str, Amount, Amount]:
    """The top tier and the two budgets; a VRAM size that is given stands for a card that need not be here."""
    got = planned_budgets(found)
    ram = Amount(got.ram_bytes, _how(got.lines, "budgets.ram"))
    if vram is not None:
        return "vram", Amount(_size("--vram", vram), "--vram"), ram
    if got.top is Tier.RAM:
        return "ram", ram, ram
    return "vram", Amount(got.vram_bytes, _how(got.lines, "budgets.vram")), ram


def _how(lines: tuple[str, ...], key: str) -> str:
    line = next((line for line in lines if line.startswith(key)), "")
    return line.partition(": ")[2] or "given"


def _size(option: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        complain(f"{option}: {error}")
        raise typer.Exit(Exit.USAGE) from None


def _speed(option: str, text: str | None, assumed: Amount) -> Amount:
    if text is None:
        return assumed
    try:
        return Amount(int(parse_rate(text)), option)
    except ValueError as error:
        complain(f"{option}: {error}")
        raise typer.Exit(Exit.USAGE) from None


def _planned(found: Effective) -> list[PlannedModel]:
    planned = []
    for spec in found.specs:
        size, source, problem = spec.size_bytes, "size", ""
        place = spec.loader.options.get("weights") or spec.loader.options.get("path")
        if size is None and place is not None:
            dtype = spec.loader.options.get("dtype")
            try:
                size = weights_bytes(str(place), dtype=None if dtype in (None, "auto") else str(dtype), name=spec.name)
                source = "headers"
            except WeightsError as error:
                problem = str(error)
        if size is None:
            source = "unknown"
        pin = None if spec.pin is None else str(spec.pin)
        planned.append(PlannedModel(spec.name, size, source, spec.workspace_bytes, pin, problem))
    return planned
