"""How a cache shows itself: a table for terminals, bars for notebooks. From snapshots only."""

from __future__ import annotations

from html import escape

from modelcache.stats import CacheStats, ModelStats, TierStats
from modelcache.tier import Tier
from modelcache.units import format_bytes

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99")


def one_line(model: ModelStats) -> str:
    """Where the best copy is and what it takes there: ``"vram 22.1 GiB"``, ``"cold"``."""
    if model.state == "ready":
        return f"{model.tier} {format_bytes(model.vram_bytes or model.ram_bytes)}"
    if model.state in ("cold", "failed"):
        return model.state
    return f"{model.state} {format_bytes(model.vram_bytes + model.ram_bytes)}"


def as_text(stats: CacheStats) -> str:
    """The table of models and tiers."""
    header = ("MODEL", "STATE", "SIZE", "VRAM", "RAM", "DISK", "LEASES", "PIN")
    rows = [header, *(_row(model) for model in stats.models)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    tiers = "   ".join(_tier_words(tier) for tier in stats.tiers)
    waiting = f"   waiting {stats.num_waiting}" if stats.num_waiting else ""
    return "\n".join([f"ModelCache on {stats.device}", *table, tiers + waiting])


def _row(model: ModelStats) -> tuple[str, ...]:
    return (
        model.name,
        model.state,
        "?" if model.size_bytes is None else format_bytes(model.size_bytes),
        *(format_bytes(size) if size else "-" for size in (model.vram_bytes, model.ram_bytes, model.disk_bytes)),
        str(model.num_leases) if model.num_leases else "-",
        "-" if model.pin is None else str(model.pin),
    )


def _tier_words(tier: TierStats) -> str:
    words = f"{str(tier.tier).upper()} {format_bytes(tier.resident_bytes)} / {format_bytes(tier.budget_bytes)}"
    moving = tier.reserved_bytes + tier.draining_bytes
    words += f" ({format_bytes(moving)} moving or held)" if moving else ""
    words += f" (lowered from {format_bytes(tier.configured_bytes)} for now)" if tier.pressure else ""
    return words + (f" ({format_bytes(tier.deficit_bytes)} over, waiting for leases)" if tier.deficit_bytes else "")


def as_html(stats: CacheStats) -> str:
    """The tiers as stacked bars over the table; no scripts, nothing from the network."""
    colour = {model.name: _COLOURS[i % len(_COLOURS)] for i, model in enumerate(stats.models)}
    bars = "".join(_bar(tier, stats.models, colour) for tier in stats.tiers if tier.budget_bytes)
    rows = "".join(
        f'<tr><td><span style="color:{colour[model.name]}">&#9632;</span> {escape(model.name)}</td>'
        + "".join(f'<td style="text-align:right">{escape(cell)}</td>' for cell in _row(model)[1:])
        + "</tr>"
        for model in stats.models
    )
    head = "".join(f"<th>{name}</th>" for name in ("model", "state", "size", "vram", "ram", "disk", "leases", "pin"))
    return (
        f'<div style="font:13px sans-serif"><b>ModelCache on {escape(stats.device)}</b>{bars}'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _bar(tier: TierStats, models: tuple[ModelStats, ...], colour: dict[str, str]) -> str:
    pieces = []
    for model in models:
        size = {Tier.VRAM: model.vram_bytes, Tier.RAM: model.ram_bytes, Tier.DISK: model.disk_bytes}[tier.tier]
        if size:
            share = 100 * size / tier.budget_bytes
            label = f"{escape(model.name)} {format_bytes(size)}"
            pieces.append(
                f'<div title="{label}" style="width:{share:.2f}%;background:{colour[model.name]};overflow:hidden;'
                f'white-space:nowrap;color:#fff;padding:2px 0">&nbsp;{label}</div>'
            )
    return (
        f'<div style="margin:4px 0">{escape(_tier_words(tier))}'
        f'<div style="display:flex;height:22px;border:1px solid #888;background:#8882">{"".join(pieces)}</div></div>'
    )
