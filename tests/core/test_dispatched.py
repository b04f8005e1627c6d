"""A model that does not fit whole runs from its dispatch: some parts in VRAM, the others in RAM, a few at a time in both."""

from __future__ import annotations

import pytest
from scenes import Scene, error_of, got
from worlds import part, spec

from modelcache.core.explain import explain
from modelcache.core.machine import Budgets
from modelcache.core.messages import Done, WantBudget, WantCopy, WantDown, WantGone
from modelcache.errors import LeaseCycleError, ModelTooLargeError
from modelcache.move import LoadedFacts, MoveKind, PartFacts
from modelcache.spec import ModelSpec
from modelcache.tier import Tier


def dispatched(
    name: str, device: int, offloaded: tuple[int, ...], onload: int, **facts: object
) -> tuple[ModelSpec, LoadedFacts]:
    """`device` segments of 1 byte on the device, segments of the sizes in `offloaded` kept off it."""
    parts: tuple[PartFacts, ...] = (part(f"{name}.off", *offloaded, offloaded=True),)
    if device:
        parts = (part(f"{name}.on", *[1] * device), *parts)
    return spec(name, **facts), LoadedFacts(parts, 0, "Net", onload_bytes=onload)


def whole(name: str, size: int) -> tuple[ModelSpec, LoadedFacts]:
    return spec(name), LoadedFacts((part(name, *[1] * size),), 0, "Net")


def test_it_is_charged_what_is_on_the_device_and_what_is_brought_in_at_a_time():
    scene = Scene(Budgets(ram=20, vram=6), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("big")
    assert scene.state("big") == "ready"
    assert scene.machine.books.vram.resident_bytes == 3 + 2
    assert scene.machine.books.ram.resident_bytes == 3 + 6
    scene.check()


def test_it_is_brought_up_whole_when_it_fits():
    scene = Scene(Budgets(ram=20, vram=9), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("big")
    assert scene.machine.books.vram.resident_bytes == 9
    assert not scene.machine.books.models["big"].is_dispatched


@pytest.mark.parametrize(("vram", "needed"), [(4, 5), (1, 5)])
def test_it_is_too_large_only_if_what_its_dispatch_needs_exceeds_the_budget(vram, needed):
    scene = Scene(Budgets(ram=20, vram=vram), whole("a", 1), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("a")
    caller = scene.lease("big")
    scene.settle()
    error = error_of(caller)
    assert isinstance(error, ModelTooLargeError)
    assert (error.tier, error.needed_bytes) == ("vram", needed)
    assert "brought in at a time 2 B" in str(error)
    assert scene.state("a") == "ready"
    # What it needs is known now: the next request is refused at once, until the budget has grown to it.
    assert isinstance(error_of(scene.lease("big")), ModelTooLargeError)
    scene.ask(WantBudget(Tier.VRAM, needed))
    scene.use("big")
    assert scene.machine.books.vram.resident_bytes == needed


def test_a_registered_size_above_the_budget_refuses_no_loader_that_may_dispatch():
    scene = Scene(Budgets(ram=20, vram=6), dispatched("big", 3, (2, 2, 2), 2, size_bytes=9))
    scene.use("big")
    assert scene.state("big") == "ready"


def test_ram_must_hold_all_that_stays_there():
    scene = Scene(Budgets(ram=5, vram=6), dispatched("big", 3, (2, 2, 2), 2))
    caller = scene.lease("big")
    scene.settle()
    error = error_of(caller)
    assert isinstance(error, ModelTooLargeError)
    assert (error.tier, error.needed_bytes) == ("ram", 6)


def test_idle_it_gives_its_room_for_weights_brought_in_before_any_of_its_own():
    scene = Scene(Budgets(ram=30, vram=6), dispatched("big", 3, (2, 2, 2), 2), whole("small", 3))
    scene.use("big")
    scene.moved.clear()
    scene.use("small")
    assert scene.given_up() == []
    scene.use("big")
    assert scene.given_up() == [("trim", "small")]


def test_its_bytes_on_the_device_are_given_up_whole_for_however_little():
    scene = Scene(Budgets(ram=30, vram=6), dispatched("big", 3, (2, 2, 2), 2), whole("small", 4))
    scene.use("big")
    scene.moved.clear()
    scene.use("small")
    assert [(m.part, m.kind, m.after.vram) for m in scene.moved if m.part.startswith("big")] == [
        ("big.on", MoveKind.TRIM, 0)
    ]
    assert scene.machine.books.vram.resident_bytes == 4
    assert scene.machine.books.parts["big.off"].ram == 0
    scene.use("big")
    assert scene.state("big") == "ready"


def test_another_models_request_parks_it_and_its_own_brings_it_back():
    scene = Scene(Budgets(ram=30, vram=6), dispatched("big", 3, (2, 2, 2), 2), whole("other", 6))
    for _ in range(3):
        scene.use("big", "other")
        assert scene.machine.books.vram.resident_bytes == 6
        scene.check()


def test_it_is_leased_once_at_a_time_whatever_was_asked_for():
    scene = Scene(Budgets(ram=30, vram=6), dispatched("big", 3, (2, 2, 2), 2, concurrency=4))
    first = scene.get("big")
    second = scene.lease("big")
    scene.settle()
    assert second.answer is None
    scene.leave(first)
    scene.settle()
    assert got(second)


def test_whole_again_it_is_leased_as_often_as_was_asked_for():
    scene = Scene(Budgets(ram=30, vram=9), dispatched("big", 3, (2, 2, 2), 2, concurrency=2))
    scene.get("big")
    scene.get("big")


def test_evicted_to_disk_it_comes_back_to_its_dispatch():
    scene = Scene(Budgets(ram=30, vram=6), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("big")
    down = scene.ask(WantDown("big", Tier.DISK, None))
    scene.settle()
    assert isinstance(down.answer, Done)
    assert (scene.machine.books.vram.resident_bytes, scene.machine.books.ram.resident_bytes) == (0, 0)
    scene.use("big")
    assert scene.machine.books.vram.resident_bytes == 5


def test_when_ram_is_short_it_leaves_and_is_not_used_half():
    scene = Scene(Budgets(ram=10, vram=6), dispatched("big", 3, (2, 2, 2), 2), whole("other", 6))
    for _ in range(2):
        scene.use("big", "other")
        scene.check()


def test_after_a_larger_budget_it_comes_up_whole():
    scene = Scene(Budgets(ram=30, vram=6), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("big")
    scene.ask(WantBudget(Tier.VRAM, 12))
    scene.settle()
    scene.use("big")
    assert scene.machine.books.models["big"].is_dispatched  # it is up: nothing is moved for nothing
    scene.ask(WantDown("big", Tier.RAM, None))
    scene.settle()
    scene.use("big")
    assert not scene.machine.books.models["big"].is_dispatched
    assert scene.machine.books.vram.resident_bytes == 9


def test_after_a_smaller_budget_it_runs_from_its_dispatch():
    scene = Scene(Budgets(ram=30, vram=9), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("big")
    scene.ask(WantBudget(Tier.VRAM, 6))
    scene.settle()
    assert scene.machine.books.vram.resident_bytes <= 6
    scene.use("big")
    assert scene.machine.books.models["big"].is_dispatched
    assert scene.machine.books.vram.resident_bytes == 5
    scene.check()


@pytest.mark.parametrize("first", ["big.on", "big.off"])
def test_prefetched_to_ram_its_parts_arrive_in_any_order(first):
    scene = Scene(Budgets(ram=30, vram=6), dispatched("big", 3, (2, 2, 2), 2))
    copy = scene.ask(WantCopy("big", Tier.RAM))
    scene.do(("load", "big"))
    scene.do(("move", first))
    assert copy.answer is None
    scene.settle()
    assert isinstance(copy.answer, Done)
    assert scene.state("big") == "parked"
    assert all(not part.covered_by for part in scene.machine.books.parts.values())
    scene.use("big")


def test_nothing_on_the_device_is_a_dispatch_too():
    scene = Scene(Budgets(ram=30, vram=3), dispatched("big", 0, (2, 2, 2), 2))
    scene.use("big")
    assert scene.machine.books.vram.resident_bytes == 2


def test_unregistered_it_leaves_nothing():
    scene = Scene(Budgets(ram=30, vram=6), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("big")
    scene.ask(WantGone("big", None))
    scene.settle()
    assert (scene.machine.books.vram.resident_bytes, scene.machine.books.ram.resident_bytes) == (0, 0)
    assert not scene.machine.books.parts


def test_explain_says_how_it_runs():
    scene = Scene(Budgets(ram=30, vram=6), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("big")
    words = explain(scene.machine, "big")
    assert "it does not fit whole, so it runs from the dispatch it came with: 6 B stay in RAM" in words


def test_on_a_machine_without_an_accelerator_it_is_whole_in_ram():
    scene = Scene(Budgets(ram=9, top=Tier.RAM), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("big")
    assert scene.machine.books.ram.resident_bytes == 9
    assert not scene.machine.books.models["big"].is_dispatched


def test_beside_a_pinned_neighbour_it_runs_from_its_dispatch():
    scene = Scene(Budgets(ram=40, vram=12), whole("pinned", 6), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("pinned")
    scene.pin("pinned", Tier.VRAM)
    scene.use("big")
    assert scene.machine.books.models["big"].is_dispatched
    assert scene.machine.books.vram.resident_bytes == 6 + 5


def test_two_that_fit_whole_one_by_one_fit_together_from_their_dispatches():
    scene = Scene(Budgets(ram=40, vram=10), dispatched("a", 3, (2, 2, 2), 2), dispatched("b", 3, (2, 2, 2), 2))
    scene.use("a", "b")
    assert not scene.machine.books.models["b"].is_dispatched
    scene.get("a", "b")
    assert scene.machine.books.vram.resident_bytes == 10


def test_a_ram_budget_below_the_sum_of_its_parts_is_enough_if_the_device_part_can_be_read_again():
    scene = Scene(Budgets(ram=6, vram=6), dispatched("big", 3, (2, 2, 2), 2))
    scene.use("big")
    assert scene.state("big") == "ready"
    assert scene.machine.books.ram.resident_bytes == 6


def test_two_callers_who_want_what_the_other_one_holds_are_told_of_the_circle():
    scene = Scene(Budgets(ram=60, vram=12), dispatched("a", 3, (8, 8), 2), dispatched("b", 3, (8, 8), 2))
    first, second = scene.lease("a", holder=0), scene.lease("b", holder=1)
    scene.settle()
    assert got(first)
    assert got(second)
    scene.lease("b", holder=0)
    last = scene.lease("a", holder=1)
    scene.settle()
    assert isinstance(error_of(last), LeaseCycleError)


def test_whoever_waits_while_a_budget_is_lowered_gets_it_in_its_other_form():
    scene = Scene(Budgets(ram=60, vram=12), dispatched("big", 3, (2, 2, 2), 2), whole("other", 4), whole("large", 12))
    scene.use("big")
    held = scene.get("other")
    waits = scene.lease("large", holder="someone")
    late = scene.lease("big", holder="late")
    scene.ask(WantBudget(Tier.VRAM, 8))
    scene.settle()
    scene.leave(held)
    scene.settle()
    assert isinstance(error_of(waits), ModelTooLargeError)
    assert got(late), late.answer
    assert scene.machine.books.models["big"].is_dispatched
