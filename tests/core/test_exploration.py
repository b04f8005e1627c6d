"""Every reachable state of small worlds: more than a million, all with the `Machine` that ships.

There are 36 explorations of 2,000 to 127,000 states each; `NUM_STATES` has the least of every world.

In each state the books of every tier balance and agree with what the data plane has allocated (I4, I7); nothing that is
leased moves, and nothing is leased that is not whole on its tier or on its way out (I1-I3); a move or load runs once at
a time and its end changes no other (I8, I11); a request that is refused for want of room took nothing from anybody, as
long as nothing failed (I6). From each state, if nothing more goes wrong and nobody new comes, every way ends, and
where it ends nobody waits (I12, I15): there is no deadlock, no lost wake-up and no taking in turns for ever.
"""

from __future__ import annotations

import time

import pytest
from core.exploration import Exploration
from core.small_worlds import NUM_STATES, WORLDS
from worlds import World

from modelcache.core import wants


def explore(world: World) -> int:
    began_s = time.process_time()
    found = Exploration(world).run()
    took_s = max(time.process_time() - began_s, 1e-3)
    print(
        f"{len(found):,} states and {found.num_steps:,} steps, {len(found) / took_s:,.0f} states a second of one core"
    )
    return len(found)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", WORLDS)
def test_every_reachable_state_keeps_every_promise(name: str, figure) -> None:
    num_states = explore(WORLDS[name]())
    figure("states", name, num_states)
    assert num_states >= NUM_STATES[name], "the machine does less than it did, or more of it is taken for the same"


def test_there_are_a_million_states_of_all_worlds() -> None:
    assert NUM_STATES.keys() == WORLDS.keys()
    assert sum(NUM_STATES.values()) >= 1_000_000


OVERTAKEN = [
    "several at once",
    "operators interfere",
    "room and budgets",
    "one lease at a time",
    "two hold one each and ask for the other's, one at a time",
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", OVERTAKEN)
def test_the_same_holds_where_models_are_kept_for_whoever_was_overtaken_once(name: str, figure, monkeypatch) -> None:
    # As it ships, a model is kept only after many hits: more than a small world can have.
    monkeypatch.setattr(wants, "MAX_OVERTAKEN", 1)
    num_states = explore(WORLDS[name]())
    figure("states", f"{name}, kept for who was overtaken", num_states)
    assert num_states > 100
