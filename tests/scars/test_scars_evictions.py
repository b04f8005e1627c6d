"""Scars of evictions that race with requests: Ollama, llama-swap, llama.cpp, InvokeAI."""

from __future__ import annotations

import random
from functools import partial

import pytest
from scars.playing import Play, benched, playing

from modelcache import unwrap

#: On the clock of a process that has run for thirty hours.
THIRTY_HOURS_S = 108_000.0


@pytest.fixture
def scar(figure):
    """Count a scar, once."""
    return lambda name: figure("scars", name, 1)


def come_late(play: Play) -> None:
    play.spend(play.random.choice((0.0, 0.1, 1.0, 2.0)))
    play.use("old", 0.5)


def test_s01_a_model_on_its_way_out_is_not_brought_back_by_a_late_request(scar):
    """Ollama #17408 (July 2026): 5.5 hours of outage behind a green `/api/tags`.

    A request that took the fast path overwrote the mark by which the scheduler had chosen its model for eviction, and
    the scheduler waited for ever for an unload that nobody would do any more. Here only the driver opens a gate: whoever
    comes after it was closed waits for the model's next time, and whoever came before makes the driver plan again.
    """
    for seed in range(60):
        with playing(seed) as play:
            play.add("old", "new")
            play.caller("first", lambda: play.use("old"))
            play.run()
            play.caller("loader", lambda: play.use("new"))
            for number in range(3):
                play.caller(f"late-{number}", *(partial(come_late, play) for _ in range(2)))
            play.run()
    scar("S01")


def test_s06_an_idle_unload_that_meets_a_request_stops_nobody(scar):
    """llama-swap #946 (July 2026): after 30 hours of uptime a whole group was dead, and `/health` said OK.

    A request arrived about a second after the idle time had run out; nothing of that group was ever started again. Here
    parking for idleness is given up the moment a lease is seen, and keeps nothing away from anybody.
    """
    for seed in range(40):
        # Nothing but the waiting takes time, so that requests and the end of the idle time are at the same instant.
        with playing(seed, vram=40, steps_s=(0.0,), idle_s=120.0) as play:
            play.scheduler.now_s = THIRTY_HOURS_S
            play.add("a", "b", "c")

            def come_and_go(play: Play = play) -> None:
                for _ in range(6):
                    play.spend(play.random.choice((30.0, 120.0, 120.0, 150.0, 150.0)))
                    play.use(play.random.choice("aab"))

            for number in range(4):
                play.caller(f"caller-{number}", come_and_go)
            play.caller("same group", lambda play=play: play.spend(700.0), lambda play=play: play.use("c"))
            play.run()
            play.caller("last", *(lambda name=name, play=play: play.use(name) for name in "abc"))
            play.run()
    scar("S06")


def test_s07_a_model_serves_whoever_had_it_loaded_before_it_may_go(scar):
    """llama.cpp #28698 and #29217 (September 2026): evicted between "loaded" and "leased".

    With room for one model, a queued request evicted the one just loaded before the request it had been loaded for was
    proxied to it; in a variant a request joined an instance that was being stopped. Here the lease is granted in the
    step that makes the model usable, and what is on its way out is waited for, not joined.
    """
    for seed in range(60):
        with playing(seed) as play:
            play.add("a", "b", "c")
            for name in "abc":
                play.caller(f"wants {name}", lambda name=name, play=play: play.use(name))
            play.run()
            for name in "abc":
                assert [play.count(step, name) for step in ("load", "stage", "promote")] == [1, 1, 1], name
            for number, name in enumerate("abcab"):
                play.caller(f"joins {number}", lambda name=name, play=play: play.use(name, 0.2))
            play.run()
    scar("S07")


def test_s10_a_model_that_is_loading_is_no_victim(scar):
    """llama.cpp #25528 (July 2026): the router chose a model that was LOADING, and killed it after ten seconds.

    Here what moves, and what somebody's move counts on, is not among the candidates: whoever needs its room waits.
    """
    for step in ("load", "stage", "promote"):
        for ask in ("get", "prefetch"):
            with benched(vram=40, ram=20) as bench:
                bench.add("a", "b")
                with bench.mover.hold(step, "a") as hold:
                    loading = bench.call(lambda bench=bench, ask=ask: getattr(bench.cache, ask)("a"))
                    assert hold.wait_reached()
                    other = bench.call(lambda bench=bench: bench.cache.get("b")(lambda: "served"))
                    if step == "load":
                        # It has no bytes yet that anybody could be in need of.
                        assert other.result() == "served"
                    bench.pool.settle(num_callers=(ask == "get") + (step != "load"))
                    assert bench.cache._driver.is_sound
                    assert [bench.mover.num_calls(move, "a#0") for move in ("trim", "shed", "evict")] == [0, 0, 0]
                got = loading.result()
                if ask == "get":
                    assert got(lambda: "served") == "served"
                assert other.result() == "served"
                assert [bench.mover.num_calls("load", "a"), bench.mover.num_calls("stage", "a#0") <= 1] == [1, True]
                del got, loading
                bench.validate()
    scar("S10")


def test_s11_a_model_in_use_is_no_victim(scar):
    """llama.cpp #21678 (April 2026): the router stopped a model in the middle of an answer to start another one.

    Here a plan takes only what nobody leases, and its gates are closed and read once more before anything moves.
    """
    for seed in range(60):
        with playing(seed) as play:
            play.add("busy", "next", "last")
            for number in range(2):
                play.caller(f"computes {number}", lambda play=play: play.use("busy", 5.0))
            for name in ("next", "last"):
                play.caller(f"wants {name}", lambda name=name, play=play: play.use(name, 1.0))
            play.run()
    scar("S11")


def test_s17_what_get_returned_can_be_used_whatever_happened_since(scar):
    """InvokeAI #7513: `load`, then `lock`, and a `KeyError` where the model was dropped in between.

    Here `get` returns a handle that keeps the model in place for its first use, and every later use takes a lease, which
    brings the model back where it must.
    """
    for seed in range(40):
        with playing(seed) as play:
            play.add("a", "b")
            weights = random.Random("a#0 0").randbytes(20)

            def two_steps(play: Play = play, weights: bytes = weights) -> None:
                handle = play.cache.get("a")
                for _ in range(3):
                    play.spend(play.random.choice((0.0, 1.0, 3.0)))
                    assert handle(lambda: unwrap(handle).weights) == weights
                    with handle as model:
                        model(lambda: play.spend(0.5))

            play.caller("user", two_steps)
            play.caller("other", *(lambda play=play: play.use("b") for _ in range(3)))
            play.caller("operator", lambda play=play: play.spend(1.5), lambda play=play: play.cache.evict("a"))
            play.run()
    scar("S17")


@pytest.mark.parametrize("step", ["trim", "stage", "promote"])
def test_while_somebody_waits_in_vain_health_is_not_green(step):
    """The second half of Ollama #17408, llama-swap #946 and llama.cpp #28829: hours of outage that no check saw."""
    with benched(vram=20) as bench:
        bench.add("a", "b")
        bench.use("a")
        with bench.mover.hold(step) as hold:
            waiting = bench.call(lambda: bench.cache.get("b")(lambda: "served"))
            assert hold.wait_reached()
            bench.pool.settle(num_callers=1)
            assert bench.cache.health().is_ready
            bench.pass_time(10.0)
            health = bench.cache.health()
            assert not health.is_ready
            assert health.oldest_wait_s == 10.0
            assert any(step in words for words in health.stalled)
        assert waiting.result() == "served"
        assert bench.cache.health().is_ready
