"""Why a model is where it is, and what asking for one would do, in words. Reads the machine, changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from modelcache.core.machine import Machine
from modelcache.core.messages import WantLease
from modelcache.core.planner import Plan
from modelcache.core.records import Loading, Model, Waiting
from modelcache.tier import Tier
from modelcache.units import format_bytes


@dataclass(frozen=True, slots=True)
class Forecast:
    """What asking for some models now would do. Bytes.

    Attributes:
        names: The models asked for.
        fits: They could be usable at once, together, without waiting for anybody.
        vram_bytes: What VRAM would gain; `ram_bytes` likewise.
        gives_up: Models that would lose something on a tier, first to go first.
        problem: Why not, if they do not fit; empty otherwise.
    """

    names: tuple[str, ...]
    fits: bool
    vram_bytes: int
    ram_bytes: int
    gives_up: tuple[str, ...]
    problem: str


def forecast(machine: Machine, names: tuple[str, ...]) -> Forecast:
    """What asking for `names` together would do now."""
    models = [machine.model(name) for name in names]
    unknown = [m.spec.name for m in models if m.loading is not Loading.LOADED and m.spec.size_bytes is None]
    if unknown:
        listed = ", ".join(repr(name) for name in unknown)
        return Forecast(names, False, 0, 0, (), f"the size of {listed} is known after the first load; pass size=")
    waiting = Waiting(0x7FFFFFFF, WantLease(names, None))
    loaded = tuple(m.spec.name for m in models if m.loading is Loading.LOADED)
    needs = machine.needs_of(waiting, loaded, tuple(m for m in models if m.loading is not Loading.LOADED))
    spare = [part.facts.part for part in machine.books.parts_of(loaded)]
    result = machine.planner.plan(needs, machine.may_take(waiting), spare, names)
    if isinstance(result, Plan):
        givers = {name: None for g in result.givings for name in machine.books.parts[g.part].models}
        return Forecast(names, True, needs.vram, needs.ram, tuple(givers), "")
    problem = (
        f"needs {format_bytes(result.needed_bytes)} of {result.tier}, of which {format_bytes(result.free_bytes)} can "
        "be freed now"
    )
    return Forecast(names, False, needs.vram, needs.ram, (), problem)


def explain(machine: Machine, name: str) -> str:
    """Where a model is, what keeps it there, and what it would take to have it."""
    model = machine.model(name)
    state = machine.books.state_of(model)
    lines = [f"{name} is {state}: {_where(machine, model)}"]
    if model.error is not None and model.loading is Loading.FAILED:
        lines.append(f"its last load failed ({model.failures} in a row): {model.error}")
    gate = machine.gates[name]
    if gate.num_leases:
        lines.append(f"it is leased {gate.num_leases} time(s), so it does not move")
    if model.spec.pin is not None:
        lines.append(f"it is pinned to {model.spec.pin}: unpin it to let it go")
    if model.is_dispatched:
        held = sum(p.ram_sums[-1] for p in machine.books.parts_of((name,)) if p.top is Tier.RAM)
        lines.append(
            f"it does not fit whole, so it runs from the dispatch it came with: {format_bytes(held)} stay in RAM, of "
            f"which {format_bytes(model.onload_bytes)} at a time are brought in; one lease at a time"
        )
    lines += _what_keeps_it(machine, model)
    queued = [w for w in machine.waiting.values() if name in w.names and w.why]
    lines += [f"a request for {w.label} waits for {w.why}" for w in queued]
    if model.loading is Loading.LOADED and state.value not in ("ready", "promoting", "staging"):
        lines.append(_what_it_takes(machine, name))
    return "\n".join(lines)


def _where(machine: Machine, model: Model) -> str:
    if model.loading is not Loading.LOADED:
        size = "of unknown size" if model.spec.size_bytes is None else format_bytes(model.spec.size_bytes)
        return f"not loaded yet, {size}"
    vram = sum(p.room(p.residency).vram for p in machine.books.parts_of((model.spec.name,)))
    ram = sum(p.room(p.residency).ram for p in machine.books.parts_of((model.spec.name,)))
    return f"{format_bytes(vram)} in vram, {format_bytes(ram)} in ram"


def _what_keeps_it(machine: Machine, model: Model) -> list[str]:
    lines = []
    for part in machine.books.parts_of((model.spec.name,)):
        others = [other for other in part.models if other != model.spec.name]
        if others:
            lines.append(f"it shares {format_bytes(part.ram_sums[-1])} with {', '.join(others)}")
        if not part.rereadable and not part.is_cold:
            why = "was written to" if part.source_stale else "comes from a loader that is called once"
            can = "is spilled to an image file" if machine.planner.may_spill(part) else "stays in RAM"
            lines.append(f"its RAM copy {why}, so under pressure it {can}")
        if part.kept_tick >= 0 and part.kept_tick == machine.planner.tick_of(part):
            lines.append("it refused to be given up since its last use: its writes would be lost, or the move failed")
    return lines


def _what_it_takes(machine: Machine, name: str) -> str:
    what = forecast(machine, (name,))
    if not what.fits:
        return f"it cannot come up now: {what.problem}"
    need = what.vram_bytes if machine.books.top is Tier.VRAM else what.ram_bytes
    gives = f", and {', '.join(what.gives_up)} would give room" if what.gives_up else ""
    return f"coming up takes {format_bytes(need)} of {machine.books.top}{gives}"
