"""Scars of those who wait: wake-ups lost, given to the wrong one, or never due. Ollama and llama.cpp."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from benches import Bench, Call
from scars.playing import Play, benched, playing

from modelcache.errors import LeaseTimeoutError, UnknownModelError

#: How long a model is kept from whoever waits for its room, at most: 8 leases overtake it, and its moves take 3 s each.
SERVED_WITHIN_S = 25.0


@pytest.fixture
def scar(figure):
    """Count a scar, once."""
    return lambda name: figure("scars", name, 1)


def test_s02_hits_wait_for_nobody_elses_eviction(scar):
    """Ollama #15126 and #14578 (March 2026): requests for loaded models stood behind an eviction for another one.

    Here a hit asks nobody, so no time passes in it whatever moves meanwhile; and a request that finds room takes it
    while an earlier one waits for its own.
    """
    for seed in range(30):
        with playing(seed, vram=60) as play:
            play.add("hot", pin="vram")
            play.add("a", "b", "c", "d")
            play.caller("first", lambda play=play: play.use("hot"))
            play.run()

            def hit(play: Play = play) -> None:
                for _ in range(30):
                    before_s = play.now_s
                    with play.cache.lease_many("hot"):
                        assert play.now_s == before_s, "a hit has waited"
                    play.spend(0.3)

            play.caller("hits", hit)
            for name in "abcd":
                play.caller(f"wants {name}", *(lambda name=name, play=play: play.use(name, 0.1) for _ in range(2)))
            play.run()
    with benched(vram=50) as bench:
        bench.add("a", "b", "c")
        bench.add("small", size=10)
        bench.use("a", "b")
        with bench.mover.hold("trim", "a") as hold:
            large = bench.call(lambda: bench.cache.get("c")(lambda: "served"))
            assert hold.wait_reached()
            assert bench.cache.get("small", timeout=60)(lambda: "served") == "served"
            assert large.thread.is_alive()
        assert large.result() == "served"
    scar("S02")


def want_its_room(play: Play) -> None:
    play.use("other")


def evict_it(play: Play) -> None:
    play.cache.evict("busy")


def load_it_anew(play: Play) -> None:
    play.cache.unregister("busy")
    while True:
        try:
            play.add("busy")
        except ValueError as error:
            assert "still leased" in str(error)
            play.spend(0.1)
        else:
            return


def test_s03_a_model_that_is_never_idle_makes_room_all_the_same(scar):
    """Ollama #14407 (February 2026): a reload waited for a reference count that steady load never let reach zero.

    Here whoever was overtaken eight times, and whoever gives a model up by name, has new leases wait behind it.
    """
    ways: tuple[Callable[[Play], None], ...] = (want_its_room, evict_it, load_it_anew)
    for seed in range(12):
        for way in ways:
            with playing(seed) as play:
                play.add("busy", "other")
                done: list[float] = []

                def load(shift_s: float, play: Play = play, done: list[float] = done) -> None:
                    play.spend(shift_s)
                    while not done:
                        try:
                            play.use("busy", 1.0)
                        except UnknownModelError:
                            play.spend(0.1)

                def ask(way: Callable[[Play], None] = way, play: Play = play, done: list[float] = done) -> None:
                    play.spend(12.0)
                    asked_s = play.now_s
                    way(play)
                    done.append(play.now_s - asked_s)

                play.caller("steady 1", lambda load=load: load(0.0))
                play.caller("steady 2", lambda load=load: load(0.5))
                play.caller("asks", ask)
                play.run()
                assert done[0] <= SERVED_WITHIN_S, f"{way.__name__} took {done[0]} s"
    scar("S03")


def test_s04_the_end_of_one_eviction_wakes_nobody_who_needs_more_than_it_freed(scar):
    """Ollama #17318 (July 2026): "unloaded" carried no name, so a waiter took another model's for its own.

    It then planned with figures from before its own model was gone. Here every end of a move names its part and its
    generation, and a move up starts when its bytes are confirmed free, whoever freed them.
    """
    for slow, quick in (("ac", "bd"), ("bd", "ac")):
        for seed in range(10):
            with playing(seed, vram=40, steps_s=(0.0,)) as play:
                play.add("a", "c", size=30)
                play.add("b", "d", size=10)
                play.caller("first", lambda play=play: play.use("a"), lambda play=play: play.use("b"))
                play.run()
                mover, before_s = play.mover, play.now_s
                mover.takes_s = {("trim", slow[0]): 5.0, ("trim", quick[0]): 1.0, ("promote", quick[1]): 1.0}
                play.caller("wants c", lambda play=play: play.use("c"))
                play.caller("wants d", lambda play=play: play.spend(0.5), lambda play=play: play.use("d"))
                play.run()
                begins_s = [mover.began_s["promote", name] - before_s for name in (quick[1], slow[1])]
                # "d" asks half a second later.
                assert begins_s == ([1.5, 5.0] if quick == "bd" else [1.0, 5.5]), begins_s
    scar("S04")


def test_s08_of_two_who_wait_for_one_place_both_get_it(scar):
    """llama.cpp #28443 (September 2026): two requests waited for one freed slot, and the loser was queued for ever.

    Both had chosen the same idle model and asked for its unload; only one woke to a free slot, and nobody woke the other
    again. Here every ticket is looked at after every event, and what it waits for is found anew each time.
    """
    for seed in range(60):
        with playing(seed) as play:
            play.add("a", "b", "c", "d")
            play.caller("first", lambda play=play: play.use("a"))
            play.run()
            for name in "bcd":
                play.caller(f"wants {name}", lambda name=name, play=play: play.use(name, 0.5))
            play.run()
            assert [play.count("promote", name) for name in "bcd"] == [1, 1, 1]
    scar("S08")


def test_s09_models_that_exclude_each_other_take_turns(scar):
    """llama.cpp #22284 (April 2026): A was evicted for B and B for A, over and over, and neither served anybody.

    Here an earlier ticket's models are not given up for a later one, and a model that came up serves before it may go.
    """
    for seed in range(16):
        with playing(seed, vram=40) as play:
            play.add("a", "b", "c", "d")

            def together(*names: str, play: Play = play) -> None:
                for _ in range(2):
                    with play.cache.lease_many(*names) as models:
                        for model in models:
                            model()

            pairs = ("ab", "cd", "bc", "da")
            for names in pairs:
                play.caller(f"wants {names}", lambda names=names, together=together: together(*names))
            for name in "ac":
                play.caller(f"wants {name}", *(lambda name=name, play=play: play.use(name) for _ in range(2)))
            play.run()
            wanted = 2 * (2 * len(pairs) + 2)
            brought = sum(play.count("promote", name) for name in "abcd")
            assert brought <= wanted, f"{brought} moves up for {wanted} leases"
    scar("S09")


def time_is_up(bench: Bench) -> tuple[Call, Callable[[], None]]:
    caller = bench.call(lambda: bench.cache.get("b", timeout=1.0))

    def leave() -> None:
        bench.pool.settle(num_callers=1)
        bench.pass_time(1.0)
        assert isinstance(caller.failure(), LeaseTimeoutError)

    return caller, leave


def is_cancelled(bench: Bench) -> tuple[Call, Callable[[], None]]:
    loop = asyncio.new_event_loop()
    task = loop.create_task(bench.cache.aget("b")._handle())

    def serve() -> None:
        try:
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        finally:
            loop.close()

    caller = bench.call(serve)

    def leave() -> None:
        loop.call_soon_threadsafe(task.cancel)
        caller.result()
        assert task.cancelled()

    return caller, leave


def test_s12_whoever_stops_waiting_stops_nobody_else(scar):
    """llama.cpp #28829 (September 2026): a client went away while its model waited for room, and the router was stuck.

    "Resource deadlock would occur" until the next restart, with `/health` at 200. Here whoever leaves is taken out of the
    queue with what was claimed for him, and what moves for him lands for whoever comes next.
    """
    for step in ("load", "trim", "promote"):
        for goes in (time_is_up, is_cancelled):
            with benched(vram=20) as bench:
                bench.add("a", "b", "c")
                bench.use("a")
                with bench.mover.hold(step, "a" if step == "trim" else "b") as hold:
                    _, leave = goes(bench)
                    assert hold.wait_reached()
                    bench.pool.settle()
                    behind = bench.call(lambda bench=bench: bench.cache.get("c")(lambda: "served"))
                    leave()
                    assert bench.cache._driver.is_sound
                assert behind.result() == "served"
                assert bench.cache.status().num_waiting == 0
                assert bench.cache.get("b", timeout=60)(lambda: "served") == "served"
                assert bench.mover.num_calls("load", "b") == 1
                assert bench.cache.health().is_ready
                bench.validate()
    scar("S12")
