"""From the machine's records to the frozen snapshots users see. Called under the driver's lock."""

from __future__ import annotations

from collections.abc import Callable

from modelcache.core.machine import Machine
from modelcache.core.records import Loading, Model
from modelcache.stats import CacheStats, Counters, ModelStats, TierStats
from modelcache.tier import Tier

#: The name of a model -> who holds its leases, in words.
Holders = Callable[[str], tuple[str, ...]]


def cache_stats(
    machine: Machine, *, device: str, counters: Counters, names: tuple[str, ...], holders: Holders
) -> CacheStats:
    """Everything at one instant; `names` in the order to show."""
    books = machine.books
    tiers = (Tier.VRAM, Tier.RAM, Tier.DISK) if books.top is Tier.VRAM else (Tier.RAM, Tier.DISK)
    return CacheStats(
        device,
        tuple(_tier_stats(machine, tier) for tier in tiers),
        tuple(model_stats(machine, name=name, holders=holders) for name in names if name in books.models),
        len(machine.waiting),
        machine.flights.num_started,
        counters,
    )


def model_stats(machine: Machine, *, name: str, holders: Holders) -> ModelStats:
    """One model; one whose registration the machine has yet to hear of is cold."""
    model = machine.books.models.get(name)
    if model is None:
        return ModelStats(name, "", "cold", None, 0, 0, 0, 0, 0, (), None, "normal", 0)
    parts = list(machine.books.parts_of((name,)))
    gate, spec = machine.gates[name], model.spec
    return ModelStats(
        name,
        model.type_name,
        str(machine.books.state_of(model)),
        _size_bytes(machine, model),
        sum(part.room(part.residency).vram for part in parts),
        sum(part.room(part.residency).ram for part in parts),
        sum(part.image_bytes for part in parts),
        model.workspace_bytes,
        gate.num_leases,
        holders(name),
        spec.pin,
        str(spec.priority),
        gate.tick,
        str(model.error) if model.error is not None else "",
    )


def pressures(machine: Machine) -> tuple[str, ...]:
    """Which budgets are lowered for a while, and why."""
    words = (machine.books.account(tier).pressure_on(tier) for tier in (Tier.VRAM, Tier.RAM))
    return tuple(each for each in words if each)


def _size_bytes(machine: Machine, model: Model) -> int | None:
    if model.loading is not Loading.LOADED:
        return model.spec.size_bytes
    return sum(part.ram_sums[-1] for part in machine.books.parts_of((model.spec.name,)))


def _tier_stats(machine: Machine, tier: Tier) -> TierStats:
    account = machine.books.account(tier)
    return TierStats(
        tier,
        account.target_bytes,
        account.deficit_bytes,
        account.resident_bytes,
        account.reserved_bytes,
        account.draining_bytes,
        account.configured_bytes if account.pressure else 0,
        account.pressure,
    )
