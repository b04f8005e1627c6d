"""Copies of records and machines have every fact, and nothing in common that changes."""

from __future__ import annotations

import dataclasses

import pytest
from core.exploration import Exploration
from core.keys import key_of
from core.small_worlds import WORLDS
from worlds import World, part, spec

from modelcache.core.flights import Flights
from modelcache.core.ledger import Account, Room
from modelcache.core.messages import WantLease
from modelcache.core.records import Books, Flight, Model, Part, Waiting
from modelcache.move import Move, Residency
from modelcache.tier import Tier

MOVE = Move("p", 3, Residency(0, 0), Residency(2, 0), 2)
RECORDS = {
    "part": Part(part("p", 1, 2), Tier.VRAM),
    "model": Model(spec("m")),
    "waiting": Waiting(4, WantLease(("m",), None)),
    "flight": Flight(MOVE, Room(1), Room(2), 5),
    "account": Account(9),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_copy_of_a_record_has_every_fact(kind):
    made = RECORDS[kind].copy()
    for field in dataclasses.fields(made):
        odd = object()
        if field.name not in ("models", "flight"):
            setattr(made, field.name, odd)
            assert getattr(made.copy(), field.name) is odd, field.name
    assert not hasattr(made, "__dict__")


def test_a_copy_of_a_part_has_models_and_a_flight_of_its_own():
    made = Part(part("p", 1, 2), Tier.VRAM, models=["m"], flight=Flight(MOVE, Room(1), Room(2), 5, started=True))
    twin = made.copy()
    assert twin == made
    assert twin.models is not made.models
    assert twin.flight is not made.flight


def changing(owner: object) -> dict[str, object]:
    """What may change of a machine, by where it is: every container and record that can be reached from it."""
    found: dict[str, object] = {}

    def look(at: str, thing: object) -> None:
        if isinstance(thing, dict):
            found[at] = thing
            for name, each in thing.items():
                look(f"{at}[{name!r}]", each)
        elif isinstance(thing, list | set | Part | Model | Waiting | Flight | Account | Books | Flights):
            found[at] = thing
            if not isinstance(thing, list | set):
                for name in getattr(thing, "__slots__", None) or vars(thing):
                    look(f"{at}.{name}", getattr(thing, name))

    for name, each in vars(owner).items():
        if name not in ("gates", "policy", "planner", "checks"):
            look(name, each)
    return found


@pytest.mark.parametrize("name", ["operators interfere", "everything at once", "writes are looked for beforehand"])
def test_a_copy_of_a_machine_shares_nothing_that_changes(name):
    for world in some_of(WORLDS[name]()):
        twin = world.machine.copy(world.gates)
        mine, its = changing(world.machine), changing(twin)
        assert mine.keys() == its.keys()
        shared = [at for at, thing in mine.items() if thing is its[at]]
        assert not shared
        for attribute in ("due", "running"):
            assert getattr(twin.checks, attribute) == getattr(world.machine.checks, attribute)


def some_of(world: World) -> list[World]:
    """Worlds along one way, at every step of which the last that could happen did."""
    way = [world]
    while steps := list(way[-1].steps()):
        way.append(way[-1].copy())
        way[-1].do(steps[-1])
    return way


@pytest.mark.parametrize("name", ["operators interfere", "everything at once", "writes are looked for beforehand"])
def test_what_happens_to_a_copy_does_not_happen_to_the_other(name):
    for world in some_of(WORLDS[name]()):
        before = key_of(world)
        for step in list(world.steps()):
            world.copy().do(step)
            assert key_of(world) == before, step


def test_what_a_machine_gets_to_remember_later_is_copied_too():
    # Else what is explored is not what ships. `changed` is begun anew with every event.
    world = WORLDS["operators interfere"]()
    plain = {n: v for n, v in vars(world.machine).items() if v is None or isinstance(v, bool | int | float | str)}
    for attribute in plain.keys() - {"changed", "closing"}:
        odd = object()
        setattr(world.machine, attribute, odd)
        assert getattr(world.machine.copy(world.gates), attribute) is odd, attribute


def test_an_exploration_numbers_every_state_once():
    found = Exploration(WORLDS["room and budgets"]()).run()
    assert found.num_steps > len(found) > 100
