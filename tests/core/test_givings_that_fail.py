"""What was to be given up stays, or is not gone yet: nobody counts on its room, and it is asked again after a while."""

from __future__ import annotations

from scenes import Scene, error_of, got, model

from modelcache.core.machine import LEFT_ALONE_S, Budgets
from modelcache.core.messages import MoveDone, WantCopy, WantDown
from modelcache.errors import BudgetExhaustedError, DeviceMemoryError, MoveError
from modelcache.move import Moved
from modelcache.tier import Tier


def test_what_was_to_move_into_the_room_of_another_stays_when_that_stays():
    scene = Scene(
        Budgets(ram=90, vram=70, disk=40),
        model("a", 10, 10, 10),
        model("b", 10, 10),
        model("c", 10, 10, 10, readable=False),
        model("d", 10, 10, 10, 10),
    )
    scene.ask(WantCopy("c", Tier.RAM))
    scene.settle()
    scene.use("a", "b")
    scene.lease("d")
    while "c" not in scene.moves:
        assert scene.step()
    scene.move_fails("c", MoveError("c", "ram", "disk", "no space left on the device"))
    # The device refuses d although the books have room, so others must go: b into the RAM that a gives up.
    while "d" not in scene.moves or scene.machine.books.parts["d"].is_cold:
        assert scene.step()
    assert scene.where("d") == (0, 0)
    scene.move_fails("d", DeviceMemoryError("d", "sim:0", 40, 0))
    waits = [name for name in scene.machine.flights.pending if scene.machine.books.parts[name].flight.needs.ram]
    assert waits == ["b"], {n: scene.where(n) for n in "abcd"}
    for part in list(scene.moves):
        scene.writes_are_kept(part)
    scene.settle()
    scene.machine.validate()


def test_what_could_not_be_given_up_is_asked_again_after_a_while():
    scene = Scene(Budgets(ram=30, vram=20, disk=20), model("a", 20, readable=False), model("b", 20))
    scene.use("a")
    refused = scene.lease("b")
    while "a" not in scene.moves:
        assert scene.step()
    while "a" in scene.moves:
        scene.move_fails("a", MoveError("a", "ram", "disk", "no space left on the device"))
        if not scene.moves:
            scene.settle()
    assert isinstance(error_of(refused), BudgetExhaustedError)
    again = scene.lease("b")
    scene.settle()
    assert isinstance(error_of(again), BudgetExhaustedError)
    scene.at(scene.now_s + LEFT_ALONE_S)
    served = scene.lease("b")
    scene.settle()
    assert got(served)


def test_a_second_try_after_the_device_refused_waits_until_what_was_given_up_is_gone():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2), model("c", 2))
    scene.use("a", "b")
    caller = scene.lease("c")
    scene.step()  # its load
    scene.step()  # disk -> RAM
    scene.move_fails("c", DeviceMemoryError("c", "sim:0", 2, 0))
    # By the books there is room for c at once, and there was before.
    assert scene.machine.books.vram.free_bytes >= 2
    assert list(scene.moves) == ["a"]
    scene.do(("move", "a"))
    scene.gates_answer()
    assert list(scene.moves) == ["c"]
    scene.settle()
    assert got(caller)


def test_a_second_try_does_not_wait_for_what_stays_after_all():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2), model("c", 2))
    scene.use("a", "b")
    caller = scene.lease("c")
    scene.step()  # its load
    scene.step()  # disk -> RAM
    scene.move_fails("c", DeviceMemoryError("c", "sim:0", 2, 0))
    scene.move_fails("a", MoveError("a", "vram", "ram", "broke"))
    assert list(scene.moves) == ["c"]
    scene.settle()
    assert got(caller)


def test_the_end_of_a_move_told_twice_does_not_end_the_next_before_it_begins():
    scene = Scene(Budgets(ram=3, vram=4), model("a", 1, 1), model("b", 1, 1), model("c", 1, 1))
    scene.use("a", "b")
    scene.ask(WantDown("a", Tier.RAM, None))
    scene.ask(WantDown("b", Tier.RAM, None))
    waits = list(scene.machine.flights.pending)
    assert waits, {name: scene.where(name) for name in "ab"}
    before = scene.machine.books.parts[waits[0]].copy()
    scene.event(MoveDone(waits[0], before.generation, Moved(0, 0.0)))
    assert scene.machine.books.parts[waits[0]].residency == before.residency
    assert waits[0] in scene.machine.flights.pending or waits[0] in scene.moves
    scene.settle()
    scene.machine.validate()
