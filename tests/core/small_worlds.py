"""Small worlds of which every state can be visited: a few models, callers and budgets, and what may happen to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from worlds import World, part, spec

from modelcache.core.machine import Budgets
from modelcache.core.messages import (
    Closing,
    Pinned,
    Registered,
    WantBudget,
    WantCopy,
    WantDown,
    WantGone,
    WantLease,
    WantRoom,
)
from modelcache.move import LoadedFacts
from modelcache.tier import Tier


def lease(*names: str) -> WantLease:
    return WantLease(names, None)


def early(*names: str) -> WantLease:
    return WantLease(names, None, early=True)


def inner(holder: int, *names: str) -> WantLease:
    """Asked for by a caller who may still hold what he had before."""
    return WantLease(names, holder)


def facts(*parts, concurrency: int = 0) -> LoadedFacts:
    return LoadedFacts(parts, concurrency, "Net")


def three_models(n: int = 3, *, readable: bool = True, concurrency: int = 0, **kw) -> dict:
    return {
        name: (spec(name, size_bytes=2, **kw), facts(part(name, 1, 1, readable=readable), concurrency=concurrency))
        for name in "abcd"[:n]
    }


def shared() -> dict:
    common = part("common", 1)
    return {
        "a": (spec("a", size_bytes=2), facts(common, part("a", 1))),
        "b": (spec("b", size_bytes=2), facts(common, part("b", 1))),
        "c": (spec("c", size_bytes=2), facts(part("c", 1, 1))),
    }


def dispatched(name: str, *, on: int, off: int, onload: int, readable: bool = True) -> tuple:
    parts = (
        part(f"{name}.on", *[1] * on, readable=readable),
        part(f"{name}.off", off - 1, 1, readable=readable, offloaded=True),
    )
    return spec(name), LoadedFacts(parts, 0, "Net", onload_bytes=onload)


WORLDS: dict[str, Callable[[], World]] = {
    "two of three fit, one failure, one leaves": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(),
        [(lease("a"), lease("b")), (lease("b"), lease("c")), (lease("c"),)],
        failures=1,
        cancels=1,
    ),
    "ram holds two, vram one": lambda: World(
        Budgets(ram=4, vram=2, disk=6),
        three_models(readable=False),
        [(lease("a"), lease("b")), (lease("b"),), (lease("c"),)],
        failures=1,
    ),
    "writes are found": lambda: World(
        Budgets(ram=4, vram=3, disk=6),
        three_models(),
        [(lease("a"), lease("b")), (lease("c"), lease("a"))],
        writes=2,
        failures=1,
    ),
    "one lease at a time": lambda: World(
        Budgets(ram=4, vram=2),
        three_models(2, concurrency=1),
        [(lease("a"), lease("b")), (lease("a"),), (lease("b"), lease("a"))],
        cancels=1,
    ),
    "workspaces": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(3, workspace_bytes=1),
        [(lease("a"), lease("b")), (lease("b"), lease("a")), (lease("c"),)],
    ),
    "shared part": lambda: World(
        Budgets(ram=5, vram=3),
        shared(),
        [(lease("a"), lease("c")), (lease("b"),), (lease("c"),)],
        cancels=1,
    ),
    "several at once": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(),
        [(lease("a", "b"),), (lease("b", "c"),), (lease("a"), lease("c"))],
        cancels=1,
    ),
    "operators interfere": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(),
        [
            (lease("a"), lease("b")),
            (lease("c"),),
            (WantDown("a", Tier.RAM, None), WantGone("b", None)),
        ],
    ),
    "room and budgets": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(2),
        [
            (lease("a"), lease("b")),
            (WantRoom(Tier.VRAM, 2, hold=True), WantBudget(Tier.VRAM, 2)),
            (WantCopy("b", Tier.VRAM), lease("a")),
        ],
        failures=1,
    ),
    "memory gets short for a while": lambda: World(
        Budgets(ram=5, vram=3, disk=2),
        {**three_models(1), "b": (spec("b", size_bytes=2), facts(part("b", 1, 1, readable=False)))},
        [
            (lease("a"), lease("b")),
            (WantBudget(Tier.RAM, 1, "short"), WantBudget(Tier.RAM, 9, "over")),
            (lease("b"), WantBudget(Tier.VRAM, 2, "others")),
        ],
        failures=1,
    ),
    "one proves too large, and grows into a budget": lambda: World(
        Budgets(ram=6, vram=4),
        {**three_models(2), "c": (spec("c"), facts(part("c", 3, 2)))},
        [
            (lease("c"), lease("a"), lease("c")),
            (WantBudget(Tier.VRAM, 5), lease("b")),
            (lease("c"), WantGone("c", None)),
        ],
        failures=1,
    ),
    "writes are looked for beforehand": lambda: World(
        Budgets(ram=6, vram=3, check_after_s=1.0),
        three_models(2),
        [(lease("a"), lease("b")), (lease("b"), lease("a"), WantGone("b", None))],
        writes=1,
    ),
    "one runs from its dispatch": lambda: World(
        Budgets(ram=6, vram=3),
        {**three_models(1), "d": dispatched("d", on=1, off=3, onload=1)},
        [(lease("a"), lease("d")), (lease("d"), lease("a")), (WantCopy("d", Tier.RAM), lease("d"))],
        failures=1,
        cancels=1,
    ),
    "a dispatch changes its form with the budget": lambda: World(
        Budgets(ram=7, vram=4, disk=4),
        {**three_models(1), "d": dispatched("d", on=1, off=3, onload=1, readable=False)},
        [
            (lease("d"), lease("a")),
            (WantBudget(Tier.VRAM, 3), lease("d"), WantBudget(Tier.VRAM, 4)),
            (lease("d"), WantDown("d", Tier.RAM, None)),
        ],
        writes=1,
    ),
    "calls start while the last segments arrive": lambda: World(
        Budgets(ram=6, vram=3, check_after_s=None),
        three_models(2),
        [(early("a"), early("b")), (early("b"), lease("a")), (WantDown("a", Tier.RAM, None),)],
        failures=1,
        cancels=1,
    ),
    "the same with a shared part and a workspace": lambda: World(
        Budgets(ram=6, vram=4),
        {name: (replace(found, workspace_bytes=1), facts) for name, (found, facts) in shared().items()},
        [(early("a"), early("c")), (early("b"), WantGone("a", None))],
        failures=1,
    ),
    "host only, with workspaces": lambda: World(
        Budgets(ram=6, top=Tier.RAM),
        three_models(3, workspace_bytes=2),
        [(lease("a"), lease("b")), (lease("b"), lease("c")), (lease("c"),)],
        cancels=1,
    ),
    "host only": lambda: World(
        Budgets(ram=4, top=Tier.RAM),
        three_models(3, workspace_bytes=0),
        [(lease("a"), lease("b")), (lease("b"), lease("c")), (lease("c"),)],
        failures=1,
        cancels=1,
    ),
    "whoever holds one asks for another": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(),
        [(lease("a"), inner(0, "b")), (lease("b"), inner(1, "c")), (lease("c"), inner(2, "a"))],
        cancels=1,
    ),
    "two hold one each and ask for the other's, one at a time": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(3, concurrency=1),
        [(lease("a"), inner(0, "b")), (lease("b"), inner(1, "a")), (lease("c"),)],
        failures=1,
    ),
    "holders ask for room, and to park": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(),
        [
            (lease("a"), WantRoom(Tier.VRAM, 2, hold=True, holder=0)),
            (WantRoom(Tier.VRAM, 2, hold=True, holder=1), inner(1, "b")),
            (lease("c"), WantDown("a", Tier.RAM, 2)),
        ],
    ),
    "the device runs out of memory": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(),
        [(lease("a"), lease("c")), (lease("b"), lease("a")), (lease("c"),)],
        ooms=2,
        cancels=1,
    ),
    "the device is lost": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(),
        [(lease("a"), lease("b")), (lease("b"), lease("c")), (lease("c"),)],
        poisons=1,
    ),
    "the cache closes": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(),
        [(lease("a"), lease("b")), (lease("b"), lease("c")), (lease("c"), Closing())],
        failures=1,
    ),
    "parking waits for room in RAM, and ends are told twice": lambda: World(
        Budgets(ram=3, vram=4),
        three_models(),
        [
            (lease("a"), lease("c")),
            (lease("b"), WantDown("a", Tier.RAM, None)),
            (lease("c"), WantDown("b", Tier.RAM, None)),
        ],
        failures=1,
        lates=1,
    ),
    "written with little RAM and no disk": lambda: World(
        Budgets(ram=4, vram=4),
        three_models(),
        [(lease("a"), lease("c")), (lease("b"), lease("a")), (lease("c"),)],
        writes=2,
    ),
    "written without a twin in RAM, and RAM is full": lambda: World(
        Budgets(ram=4, vram=4, disk=2),
        three_models(),
        [(lease("a"), lease("c")), (lease("b"), lease("a")), (lease("c"),)],
        writes=2,
    ),
    "written after it was spilled": lambda: World(
        Budgets(ram=4, vram=2, disk=2),
        three_models(2, readable=False),
        [
            (lease("a"), WantDown("a", Tier.DISK, None), lease("a")),
            (WantDown("a", Tier.RAM, None), WantDown("a", Tier.DISK, None)),
            (lease("b"),),
        ],
        writes=2,
    ),
    "one leaves and comes again": lambda: World(
        Budgets(ram=5, vram=3),
        shared(),
        [
            (lease("a"), WantGone("a", None), Registered(shared()["a"][0])),
            (lease("b"), lease("a")),
            (lease("c"),),
        ],
        failures=1,
    ),
    "two that share a part leave, and the device is lost": lambda: World(
        Budgets(ram=5, vram=3),
        shared(),
        [
            (lease("a"), WantGone("a", None), Registered(shared()["a"][0])),
            (lease("b"), WantGone("b", None)),
            (lease("c"),),
        ],
        poisons=1,
    ),
    "pinned for a while": lambda: World(
        Budgets(ram=6, vram=4),
        three_models(),
        [
            (lease("a"), lease("b")),
            (lease("c"), lease("b")),
            (Pinned("a", Tier.VRAM), WantCopy("a", Tier.VRAM), Pinned("a", None)),
        ],
    ),
    "everything at once": lambda: World(
        Budgets(ram=4, vram=3, disk=2),
        {**three_models(1), "b": (spec("b", size_bytes=2), facts(part("b", 1, 1, readable=False)))},
        [
            (lease("a"), WantGone("a", None)),
            (lease("b"), WantBudget(Tier.VRAM, 2), lease("a")),
        ],
        failures=1,
        cancels=1,
        writes=1,
        ooms=1,
        lates=1,
    ),
}

#: How many states each has, rounded down: fewer, and something is no longer explored.
NUM_STATES = {
    "two of three fit, one failure, one leaves": 72_000,
    "ram holds two, vram one": 6_400,
    "writes are found": 11_000,
    "one lease at a time": 8_300,
    "workspaces": 7_400,
    "shared part": 40_000,
    "several at once": 14_000,
    "operators interfere": 2_200,
    "room and budgets": 6_300,
    "memory gets short for a while": 6_600,
    "one proves too large, and grows into a budget": 28_000,
    "writes are looked for beforehand": 37_000,
    "one runs from its dispatch": 83_000,
    "a dispatch changes its form with the budget": 11_000,
    "calls start while the last segments arrive": 36_000,
    "the same with a shared part and a workspace": 52_000,
    "host only, with workspaces": 14_000,
    "host only": 40_000,
    "whoever holds one asks for another": 120_000,
    "two hold one each and ask for the other's, one at a time": 47_000,
    "holders ask for room, and to park": 30_000,
    "the device runs out of memory": 120_000,
    "the device is lost": 9_500,
    "the cache closes": 34_000,
    "parking waits for room in RAM, and ends are told twice": 87_000,
    "written with little RAM and no disk": 25_000,
    "written without a twin in RAM, and RAM is full": 45_000,
    "written after it was spilled": 4_600,
    "one leaves and comes again": 120_000,
    "two that share a part leave, and the device is lost": 67_000,
    "pinned for a while": 2_400,
    "everything at once": 37_000,
}
