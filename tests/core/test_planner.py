"""Who gives what for whom: the order, as literal lists; complete sets or nobody; no more than needed."""

from __future__ import annotations

import pytest
from scenes import Scene, error_of, got, model
from worlds import part

from modelcache.core.machine import Budgets
from modelcache.core.messages import WantDown
from modelcache.core.policy import CostAware
from modelcache.errors import BudgetExhaustedError
from modelcache.move import MoveKind, Residency
from modelcache.tier import Tier


def scene_of(budgets, *models, used=""):
    scene = Scene(budgets, *models)
    scene.use(*used)
    scene.given_up()
    return scene


def test_the_longest_unused_goes_first_and_only_as_many_as_needed():
    scene = scene_of(Budgets(ram=99, vram=8), *(model(name, 2) for name in "abcdef"), used="abcd")
    scene.use("a")
    scene.get("e")
    assert scene.given_up() == [("trim", "b")]
    scene.get("f")
    assert scene.given_up() == [("trim", "c")]


def test_a_victim_gives_tail_segments_and_only_as_many_as_needed():
    scene = scene_of(Budgets(ram=99, vram=10), model("a", 1, 1, 1, 1, 1, 1), model("b", 2, 2, 2), used="ab")
    assert scene.where("a") == (4, 0)
    assert scene.state("a") == "partial"
    scene.use("a")
    assert (scene.where("a"), scene.where("b")) == ((6, 0), (2, 0))


def test_coming_back_costs_only_what_is_missing():
    scene = scene_of(Budgets(ram=99, vram=10), model("a", 1, 1, 1, 1, 1, 1), model("b", 2, 2, 2), used="ab")
    scene.moved.clear()
    scene.use("a")
    up = [move for move in scene.moved if move.kind is MoveKind.PROMOTE]
    assert [(move.before, move.after) for move in up] == [(Residency(4, 0), Residency(6, 0))]


def test_nobody_goes_unless_what_goes_suffices():
    scene = scene_of(Budgets(ram=99, vram=6), model("a", 2), model("b", 2), model("c", 5), used="a")
    holder = scene.get("b")
    caller = scene.lease("c")
    scene.settle()
    assert caller.answer is None
    assert scene.given_up() == []
    scene.leave(holder)
    scene.settle()
    assert scene.given_up() == [("trim", "a"), ("trim", "b")]


def test_a_busy_gate_found_while_closing_reopens_all_and_plans_again():
    scene = scene_of(Budgets(ram=99, vram=4), model("a", 2), model("b", 2), model("c", 2), used="ab")
    # Somebody slips into the victim between the plan and the closing of its gate.
    scene.slips_in = "a"
    caller = scene.lease("c")
    scene.settle()
    assert got(caller)
    assert scene.states() == {"a": "ready", "b": "parked", "c": "ready"}


def test_twins_in_ram_of_what_vram_holds_go_before_whole_copies():
    scene = scene_of(Budgets(ram=8, vram=8), model("a", 1, 1, 1, 1), model("b", 1, 1, 1, 1), model("c", 4), used="ab")
    scene.get("c")
    # VRAM: a, unused for longest, as far as needed. RAM: what VRAM goes on holding of b, and nobody's only copy.
    assert sorted(scene.given_up()) == [("shed", "b"), ("trim", "a")]
    assert scene.states() == {"a": "parked", "b": "ready", "c": "ready"}


def test_only_the_head_that_is_needed_is_shed():
    scene = scene_of(Budgets(ram=6, vram=9), model("a", 1, 1, 1, 1), model("b", 3), used="a")
    scene.get("b")
    assert scene.given_up() == [("shed", "a")]
    assert scene.where("a") == (4, 1)


def test_what_can_be_read_again_is_dropped_and_the_rest_is_spilled():
    scene = scene_of(Budgets(ram=4, vram=2, disk=9), model("a", 2), model("b", 2, readable=False), model("c", 2))
    scene.use("b", "a")
    scene.moved.clear()
    scene.use("c")
    evicted = {move.part: move.write_image for move in scene.moved if move.kind is MoveKind.EVICT}
    assert evicted == {"b": True}
    scene.moved.clear()
    scene.use("b")
    evicted = {move.part: move.write_image for move in scene.moved if move.kind is MoveKind.EVICT}
    assert evicted == {"a": False}


def test_without_a_disk_budget_what_nothing_could_bring_back_stays_and_another_goes():
    scene = scene_of(Budgets(ram=4, vram=2), model("once", 2, readable=False), model("b", 2), model("c", 2))
    scene.use("once", "b", "c")
    assert scene.states() == {"once": "parked", "b": "cold", "c": "ready"}


def test_what_is_pinned_to_ram_may_lose_vram_but_not_ram():
    scene = scene_of(Budgets(ram=4, vram=2), model("a", 2, pin=Tier.RAM), model("b", 2), model("c", 2))
    scene.use("a", "b", "c")
    assert scene.states() == {"a": "parked", "b": "cold", "c": "ready"}


def test_a_trim_whose_bytes_ram_lacks_takes_room_there_in_the_same_plan():
    scene = scene_of(Budgets(ram=4, vram=6), model("a", 1, 1, 1, 1), model("b", 2), model("c", 4), used="ab")
    assert scene.where("a")[1] > 0, "RAM gave up what VRAM holds"
    scene.use("c")
    ram = scene.machine.books.ram
    assert ram.resident_bytes <= 4
    assert scene.state("c") == "ready"


def test_a_workspace_goes_before_segments():
    scene = scene_of(
        Budgets(ram=99, vram=10), model("a", 3, workspace_bytes=3), model("b", 2, workspace_bytes=2), used="ab"
    )
    scene2 = scene_of(Budgets(ram=99, vram=8), model("a", 3, workspace_bytes=3), model("b", 4), used="ab")
    assert scene.states() == {"a": "ready", "b": "ready"}
    assert scene2.given_up() == []
    assert scene2.where("a") == (1, 0)
    assert scene2.gates["a"].closed
    assert scene2.machine.books.vram.resident_bytes == 7
    scene2.use("a")
    assert scene2.machine.books.vram.resident_bytes <= 8


def test_a_part_held_by_two_goes_only_when_both_are_idle():
    common = part("common", 2)
    models = [model("a", parts=(common, part("a", 1))), model("b", parts=(common, part("b", 1))), model("c", 3)]
    scene = scene_of(Budgets(ram=99, vram=4), *models, used="ab")
    holder = scene.get("b")
    caller = scene.lease("c")
    scene.settle()
    assert caller.answer is None
    assert scene.where("common") == (1, 0)
    scene.leave(holder)
    scene.settle()
    assert got(caller)


def test_writes_that_were_kept_protect_a_copy_until_its_next_use():
    scene = scene_of(Budgets(ram=99, vram=4), model("a", 2), model("b", 2), model("c", 2), model("d", 2), used="ab")
    caller = scene.lease("c")
    while "a" not in scene.moves:
        scene.step()
    scene.writes_are_kept("a")
    scene.settle()
    assert got(caller)
    assert scene.given_up() == [("trim", "b")]
    scene.leave(caller)
    scene.use("d")
    assert scene.given_up() == [("trim", "c")]
    scene.use("a")
    scene.use("b")
    assert ("trim", "d") in scene.given_up()


def test_writes_found_while_dropping_turn_the_drop_into_a_spill():
    scene = scene_of(Budgets(ram=8, vram=8, disk=8), model("a", 2), used="a")
    down = scene.ask(WantDown("a", Tier.DISK, None))
    assert not scene.moves["a"].write_image
    scene.writes_are_kept("a")
    scene.settle()
    assert scene.moved[-1].write_image
    assert scene.state("a") == "cold"
    assert down.answer is not None


def test_the_policy_asked_for_is_the_policy_used():
    models = [model("small", 1), model("large", 4), model("c", 4)]
    scene = Scene(Budgets(ram=99, vram=6), *models, policy=CostAware())
    scene.use("small", "large")
    scene.given_up()
    scene.get("c")
    assert scene.given_up() == [("trim", "large")]


@pytest.mark.parametrize("top", [Tier.VRAM, Tier.RAM])
def test_a_refusal_says_how_much_is_wanted_and_how_much_could_be_had(top):
    budgets = Budgets(ram=6, vram=6 if top is Tier.VRAM else 0, top=top, wait_when_full=False)
    scene = scene_of(budgets, model("a", 4), model("b", 4))
    scene.get("a")
    caller = scene.lease("b")
    scene.settle()
    error = error_of(caller)
    assert isinstance(error, BudgetExhaustedError)
    assert (error.tier, error.needed_bytes, error.free_bytes) == (str(top), 4, 2)
