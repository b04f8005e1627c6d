"""One event for each committed move, and counts of where models were found."""

from __future__ import annotations

import pytest
from scenes import Scene, model
from worlds import part

from modelcache.core.machine import Budgets
from modelcache.core.records import Part
from modelcache.move import Move, Moved, MoveKind, Reason, Residency
from modelcache.runtime.story import Story
from modelcache.tier import Tier


def scene_with_everything():
    return Scene(Budgets(ram=99, vram=4), model("ready", 2), model("parked", 2), model("cold", 2), model("unloaded", 2))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ((0, 3), (0, 0), ("stage", Tier.DISK, Tier.RAM, 60)),
        ((1, 0), (3, 0), ("promote", Tier.RAM, Tier.VRAM, 50)),
        ((3, 0), (1, 0), ("trim", Tier.VRAM, Tier.RAM, 50)),
        ((3, 0), (3, 2), ("shed", Tier.RAM, Tier.VRAM, 30)),
        ((3, 1), (0, 3), ("evict", Tier.VRAM, Tier.DISK, 60)),
        ((0, 0), (0, 3), ("evict", Tier.RAM, Tier.DISK, 60)),
    ],
)
def test_an_event_says_what_went_from_where_to_where_and_how_much(before, after, told):
    made = Part(part("p", 10, 20, 30), Tier.VRAM, models=["m"])
    move = Move("p", 1, Residency(*before), Residency(*after), 3, reason=Reason.LRU, on_behalf_of="x")
    event = Story().tell(scene_with_everything().machine, made, move, Moved(7, 0.5), 3.0, 0.25)
    assert (str(event.kind), event.source, event.target, event.size_bytes) == told
    assert (event.model, event.copied_bytes, event.seconds, event.at_s) == ("m", 7, 0.5, 3.0)
    assert (event.reason, event.on_behalf_of) == (Reason.LRU, "x")
    assert event.wait_s == (0.25 if event.kind in (MoveKind.STAGE, MoveKind.PROMOTE) else 0.0)


def test_hits_are_counted_by_where_the_model_was_found():
    scene = scene_with_everything()
    scene.use("cold", "parked", "ready", "unloaded", "ready")
    story = Story()
    story.arrived(scene.machine, ("ready", "unloaded"), 2)
    counters = story.counters(drawn_ticks=2 + 2 + 40)
    assert counters.vram_hits >= 40
    assert scene.states()["parked"] == "parked"
    story.arrived(scene.machine, ("parked", "nobody"), 1)
    assert story.counters(0).ram_hits == 1


def test_first_loads_are_hits_of_the_disk():
    story = Story()
    story.arrived(scene_with_everything().machine, ("cold",), 1)
    assert story.counters(2).disk_hits == 1
    assert story.counters(2).vram_hits == 0


def test_victims_are_told_once_with_the_promotion_they_made_room_for():
    scene, story = scene_with_everything(), Story()
    a = Part(part("a", 1), Tier.VRAM, models=["a"])
    b = Part(part("b", 1), Tier.VRAM, models=["b"])
    trim = Move("a", 1, Residency(1, 0), Residency(0, 0), 1, reason=Reason.LRU, on_behalf_of="b")
    up = Move("b", 1, Residency(0, 0), Residency(1, 0), 1, on_behalf_of="b")
    assert story.evicted_for(story.tell(scene.machine, a, trim, Moved(0, 0.0), 0.0, 0.0)) == ()
    event = story.tell(scene.machine, b, up, Moved(0, 0.0), 0.0, 0.0)
    assert story.evicted_for(event) == ("a",)
    assert story.evicted_for(event) == ()


def test_timeouts_and_refusals_are_counted():
    story = Story()
    story.count("timeouts")
    story.count("refusals")
    story.count("refusals")
    counters = story.counters(0)
    assert (counters.timeouts, counters.refusals) == (1, 2)
