"""Looking for writes beforehand: when it happens, what it spares, and how long its answer holds."""

from __future__ import annotations

import pytest
from scenes import Scene, model
from worlds import spec

from modelcache.core.machine import Budgets
from modelcache.core.messages import Closing, WantCopy, WantDown
from modelcache.move import LoadedFacts, MoveKind
from modelcache.tier import Tier

BUDGETS = Budgets(ram=20, vram=4, check_after_s=1.0)


def is_looking(scene: Scene) -> bool:
    """Let time pass as long as somebody is due; whether a look has begun."""
    while scene.machine.checks.due and scene.looking is None:
        scene.do(("time passes", 0))
        scene.gates_answer()
    return scene.looking is not None


def look(scene: Scene, how: str = "find clean") -> None:
    """Every look that is due, one after the other."""
    while is_looking(scene):
        scene.do((how, scene.looking))
        scene.settle()


def checks_of(scene: Scene, kind: MoveKind) -> list[bool]:
    return [move.check for move in scene.moved if move.kind is kind]


def test_a_copy_found_unwritten_is_given_up_without_another_look():
    scene = Scene(BUDGETS, model("a", 2), model("b", 3))
    scene.use("a")
    look(scene)
    scene.use("b")
    assert checks_of(scene, MoveKind.TRIM) == [False]


@pytest.mark.parametrize("how", ["written", "used", "never"])
def test_one_that_was_written_to_or_used_since_is_looked_at(how):
    scene = Scene(BUDGETS, model("a", 2), model("b", 3))
    scene.writes = 1
    scene.use("a")
    if how != "never":
        look(scene, "find written" if how == "written" else "find clean")
    if how == "used":
        scene.leave(scene.hit("a"))
    scene.use("b")
    assert checks_of(scene, MoveKind.TRIM) == [True]


def test_a_use_while_it_is_looked_at_makes_the_answer_worthless():
    scene = Scene(BUDGETS, model("a", 2), model("b", 3))
    scene.use("a")
    assert is_looking(scene)
    scene.leave(scene.hit("a"))
    scene.do(("find clean", "a"))
    scene.settle()
    scene.use("b")
    assert checks_of(scene, MoveKind.TRIM) == [True]


def test_a_move_while_it_is_looked_at_makes_the_answer_worthless():
    scene = Scene(BUDGETS, model("a", 2), model("b", 3))
    scene.use("a")
    assert is_looking(scene)
    scene.use("b")
    scene.do(("find clean", "a"))
    scene.settle()
    scene.use("a", "b")
    assert checks_of(scene, MoveKind.TRIM) == [True, True, True]


def test_what_comes_up_again_is_looked_at_again():
    scene = Scene(BUDGETS, model("a", 2), model("b", 3))
    scene.use("a")
    look(scene)
    scene.use("b")
    scene.ask(WantCopy("a", Tier.VRAM))
    scene.settle()
    scene.use("b")
    assert checks_of(scene, MoveKind.TRIM) == [False, True, True]


def test_what_leaves_every_tier_is_always_looked_at():
    scene = Scene(BUDGETS, model("a", 2))
    scene.use("a")
    look(scene)
    scene.ask(WantDown("a", Tier.DISK, None))
    scene.settle()
    assert checks_of(scene, MoveKind.EVICT) == [True]


def test_nobody_is_looked_at_while_leased_or_used_all_the_time():
    scene = Scene(BUDGETS, model("a", 2))
    held = scene.get("a")
    assert not is_looking(scene)
    scene.leave(held)
    scene.leave(scene.hit("a"))  # between being due and the time having come
    scene.do(("time passes", 0))
    scene.gates_answer()
    assert scene.looking is None
    assert is_looking(scene)


def test_once_looked_at_only_the_next_use_makes_it_due_again():
    scene = Scene(BUDGETS, model("a", 2))
    scene.use("a")
    look(scene)
    assert not scene.machine.checks.due
    assert scene.gates["a"].watched
    scene.leave(scene.hit("a"))
    assert scene.machine.checks.due
    assert not scene.gates["a"].watched


def test_the_least_recently_used_is_looked_at_first_and_one_at_a_time():
    scene = Scene(BUDGETS, model("a", 2), model("b", 2))
    scene.use("b", "a")
    assert is_looking(scene)
    assert scene.looking == "b"
    scene.do(("find clean", "b"))
    scene.settle()
    assert is_looking(scene)
    assert scene.looking == "a"


def test_without_a_time_nobody_looks():
    scene = Scene(Budgets(ram=20, vram=4), model("a", 2))
    scene.use("a")
    assert not is_looking(scene)
    assert not scene.gates["a"].watched


def test_on_a_machine_without_an_accelerator_nobody_looks():
    scene = Scene(Budgets(ram=20, top=Tier.RAM, check_after_s=1.0), model("a", 2))
    scene.use("a")
    assert not is_looking(scene)
    assert not scene.gates["a"].watched  # or every hit would tell of itself for nothing


def test_a_model_without_bytes_is_never_watched():
    scene = Scene(BUDGETS, (spec("a"), LoadedFacts((), 0, "Net")))
    scene.use("a")
    assert not is_looking(scene)
    assert not scene.gates["a"].watched


def test_a_closed_cache_looks_at_nothing_more():
    scene = Scene(BUDGETS, model("a", 2))
    scene.use("a")
    scene.event(Closing())
    assert not is_looking(scene)
