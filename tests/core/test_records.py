"""What the facts of a part and a model amount to, and which moves may start there."""

from __future__ import annotations

import pytest
from worlds import part, spec

from modelcache.core.ledger import Account, Room
from modelcache.core.records import TRANSITIONS, Books, Flight, Loading, Model, Part, State
from modelcache.errors import InvalidTransitionError
from modelcache.move import Move, MoveKind, Residency
from modelcache.tier import Tier


def part_at(vram, ram, *, top=Tier.VRAM):
    made = Part(part("p", 10, 20, 30), top)
    made.vram, made.ram = vram, ram
    return made


@pytest.mark.parametrize(
    ("vram", "ram", "state"),
    [
        (0, 3, State.COLD),
        (0, 0, State.PARKED),
        (1, 0, State.PARTIAL),
        (2, 1, State.PARTIAL),
        (3, 0, State.READY),
        (3, 3, State.READY),
    ],
)
def test_two_numbers_are_a_state(vram, ram, state):
    assert part_at(vram, ram).state is state


def test_without_an_accelerator_what_ram_holds_whole_is_ready():
    assert part_at(0, 0, top=Tier.RAM).state is State.READY
    assert part_at(0, 3, top=Tier.RAM).state is State.COLD


@pytest.mark.parametrize(("vram", "ram", "room"), [(0, 3, Room()), (2, 1, Room(30, 50)), (3, 0, Room(60, 60))])
def test_a_residency_is_charged_segment_by_segment(vram, ram, room):
    made = part_at(vram, ram)
    assert made.room(made.residency) == room


def move(before, after, n=3):
    return Move("p", 1, Residency(*before), Residency(*after), n)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ((0, 3), (0, 0), MoveKind.STAGE),
        ((0, 0), (3, 0), MoveKind.PROMOTE),
        ((1, 0), (3, 0), MoveKind.PROMOTE),
        ((3, 0), (1, 0), MoveKind.TRIM),
        ((3, 3), (0, 0), MoveKind.TRIM),
        ((3, 0), (3, 2), MoveKind.SHED),
        ((3, 0), (0, 3), MoveKind.EVICT),
        ((0, 0), (0, 3), MoveKind.EVICT),
    ],
)
def test_a_move_is_what_its_ends_say_and_leads_there(before, after, kind):
    made, what = part_at(*before), move(before, after)
    assert what.kind is kind
    made.begin(what)
    made.arrive(what)
    assert made.residency == Residency(*after)


def test_a_move_from_elsewhere_or_of_a_kind_that_may_not_start_is_a_bug_with_its_story():
    with pytest.raises(InvalidTransitionError, match="p cannot take promote in parked"):
        part_at(0, 0).begin(move((1, 0), (3, 0)))
    with pytest.raises(InvalidTransitionError) as caught:
        part_at(0, 3).begin(move((0, 3), (3, 3)))
    assert caught.value.story


def test_every_state_at_rest_but_failed_can_be_left():
    assert {state for state, _ in TRANSITIONS} == {State.COLD, State.PARKED, State.PARTIAL, State.READY}
    assert {state for ends in TRANSITIONS.values() for state in ends} <= set(State)


def test_what_is_moving_says_so_once_it_has_started():
    made = part_at(3, 0)
    made.flight = Flight(move((3, 0), (0, 0)), Room(), Room(60), 1)
    assert made.state is State.READY
    made.flight.started = True
    assert made.state is State.TRIMMING
    assert made.resting_state is State.READY


def test_what_can_be_read_again_follows_source_and_image_file():
    made = Part(part("p", 1, readable=True), Tier.VRAM)
    assert made.rereadable
    made.source_stale = True
    assert not made.rereadable
    made.has_image = True
    assert made.rereadable


def test_a_copy_of_a_part_shares_nothing_that_changes():
    made = part_at(1, 0)
    made.flight = Flight(move((1, 0), (3, 0)), Room(50), Room(), 7)
    twin = made.copy()
    twin.models.append("x")
    twin.flight.started = True
    assert made.models == []
    assert not made.flight.started
    assert twin.room(twin.residency) == made.room(made.residency)


def test_a_model_is_in_the_state_of_its_part_that_is_furthest_from_ready():
    books = Books(Tier.VRAM, Account(99), Account(99), Account(0))
    model = Model(spec("m"), parts=("p", "q"))
    books.models["m"] = model
    assert books.state_of(model) is State.COLD
    model.loading = Loading.LOADING
    assert books.state_of(model) is State.STAGING
    model.loading = Loading.FAILED
    assert books.state_of(model) is State.FAILED
    model.loading = Loading.LOADED
    books.parts = {"p": part_at(3, 0), "q": part_at(3, 3)}
    assert books.state_of(model) is State.READY
    assert books.is_up(model)
    books.parts["q"] = part_at(0, 0)
    assert books.state_of(model) is State.PARTIAL
    books.parts["p"] = part_at(0, 0)
    assert books.state_of(model) is State.PARKED
    books.parts["p"] = part_at(0, 3)
    assert books.state_of(model) is State.COLD


def test_parts_of_several_models_come_once_each_in_order():
    books = Books(Tier.VRAM, Account(99), Account(99), Account(0))
    books.parts = {name: Part(part(name, 1), Tier.VRAM) for name in "pqr"}
    books.models = {"a": Model(spec("a"), parts=("p", "q")), "b": Model(spec("b"), parts=("p", "r"))}
    assert [each.facts.part for each in books.parts_of(("a", "b"))] == ["p", "q", "r"]
