"""Scars of records that were wrong and waits that could not end: Ollama, LocalAI, LMCache, surogate."""

from __future__ import annotations

import pytest
from scars.playing import Play, playing

from modelcache.errors import BudgetExhaustedError, ModelTooLargeError, UnknownModelError
from modelcache.testing import FakeModel


@pytest.fixture
def scar(figure):
    """Count a scar, once."""
    return lambda name: figure("scars", name, 1)


def test_s05_what_ends_late_does_not_end_its_successor(scar):
    """Ollama #10819 (May 2025): a queued unload event deleted another runner, loaded since under the same name.

    Here a name can be registered again once everything of its former self has ended, and every end of a load or a move
    carries the generation it belongs to.
    """
    for seed in range(40):
        with playing(seed, vram=40) as play:
            models: list[FakeModel] = []

            def register(play: Play = play, models: list[FakeModel] = models) -> None:
                number = len(models)
                models.append(model := FakeModel(20 + number))
                play.cache.register("a", lambda: model, size=20 + number)

            def churn(play: Play = play, register=register) -> None:
                for _ in range(3):
                    play.spend(play.random.choice((0.0, 0.1, 1.0, 4.0)))
                    play.cache.unregister("a")
                    while "a" not in play.cache:
                        try:
                            register()
                        except ValueError as error:
                            assert "still leased" in str(error)
                            models.pop()
                            play.spend(0.1)

            def use(play: Play = play, models: list[FakeModel] = models) -> None:
                for _ in range(5):
                    first = len(models) - 1
                    try:
                        model = play.use("a", 0.5)
                    except UnknownModelError:
                        play.spend(0.1)
                    else:
                        assert model in models[max(0, first) :], "a model that was unregistered before it was asked for"

            register()
            play.add("b")
            play.caller("operator", churn)
            for number in range(2):
                play.caller(f"user-{number}", use)
            play.caller("other", *(lambda play=play: play.use("b") for _ in range(3)))
            play.run()
            play.caller("last", lambda play=play: play.use("a"))
            play.run()
            assert play.mover.object_of("a") is models[-1]
    scar("S05")


def test_s13_whoever_waits_until_a_model_is_idle_holds_no_lock(scar):
    """LocalAI #10578 (June 2026): the watchdog waited for "not busy" with the loader's lock in its hand.

    The call that it waited for was stuck, so nothing was ever loaded again. Here to wait is to stand in the queue: what
    needs nothing of that model goes on, and whoever looks gets an answer.
    """
    for seed in range(20):
        with playing(seed, vram=60) as play:
            play.add("stuck", "a", "b", "c")
            play.caller("hangs", lambda play=play: play.use("stuck", 1000.0))

            def go_on(play: Play = play) -> None:
                play.spend(20.0)
                for name in "abc":
                    play.use(name)
                    assert play.cache.info("stuck").num_leases == 1
                    assert play.cache.status().num_waiting >= 1
                    assert play.cache.health().oldest_wait_s is not None
                assert play.now_s < 60.0, "somebody has waited for the model that hangs"

            for number, what in enumerate((play.cache.park, play.cache.evict)):
                play.caller(f"operator-{number}", lambda play=play: play.spend(10.0), lambda what=what: what("stuck"))
            play.caller("others", go_on)
            play.run()
            assert play.cache.info("stuck").state != "ready"
    scar("S13")


def test_s15_a_wait_that_nothing_could_end_is_refused(scar):
    """LMCache #2942 (April 2026): with nothing that could be evicted, an allocation slept and tried again for ever.

    Here what stands in the way for good (pins, copies that no file holds) is told at once, with its reason.
    """
    with playing(1, vram=60, ram=100) as play:
        play.add("pinned", size=40, pin="vram")
        play.add("new", size=30)
        play.add("only-here", size=20, reload=False)
        play.caller("first", lambda: play.use("pinned"), lambda: play.use("only-here"))
        play.run()
        switches, before_s = play.scheduler.num_switches, play.now_s

        def ask() -> None:
            with pytest.raises(BudgetExhaustedError, match="pinned, or in no file"):
                play.use("new")
            with pytest.raises(BudgetExhaustedError, match="pinned"), play.cache.reserve(vram=30):
                pass
            with pytest.raises(BudgetExhaustedError, match="pinned"):
                play.cache.free(ram=90)

        play.caller("asks", ask)
        play.run()
        assert play.scheduler.num_switches - switches < 300
        # The load of "new" is all that took time.
        assert play.now_s - before_s <= 3.0
        play.caller("operator", lambda: play.cache.unpin("pinned"), lambda: play.use("new"))
        play.run()
    scar("S15")


def test_s16_nobody_is_given_up_for_what_will_not_fit(scar):
    """surogate #140 (September 2026): models were put to sleep one by one before it was known whether that suffices.

    In the end all of them slept and the target was refused. Here a plan is complete before anybody goes, or nobody does.
    """
    for reject in (False, True):
        with playing(2, vram=40, steps_s=(0.0,), when_full="reject" if reject else "wait") as play:
            play.add("a", "b", size=10)
            play.add("busy", size=20)
            play.add("larger", size=30)
            play.add("huge", size=41)
            play.caller("first", lambda play=play: play.use("a"), lambda play=play: play.use("b"))
            play.run()
            play.caller("busy", lambda play=play: play.use("busy", 10.0))

            def ask(play: Play = play, reject: bool = reject) -> None:
                play.spend(1.0)
                with pytest.raises(ModelTooLargeError):
                    play.use("huge")
                if reject:
                    with pytest.raises(BudgetExhaustedError, match="busy"):
                        play.use("larger")
                else:
                    play.use("larger")

            def look(play: Play = play) -> None:
                play.spend(9.0)
                for name in ("a", "b"):
                    assert play.cache.info(name).state == "ready"
                    assert play.count("trim", name) == 0

            play.caller("asks", ask)
            play.caller("looks", look)
            play.run()
    scar("S16")
