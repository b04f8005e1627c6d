"""Thousands of schedules of a real cache on simulated threads, each by its seed."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from simulation.fake_world import FakeSchedule as Schedule
from simulation.reach import FAKE, LIVE
from simulation.scheduler import Livelock, Scheduler

from modelcache.core.ledger import Account
from modelcache.runtime.driver import Driver

#: Seeds that found something once.
FOUND = (
    42,  # leases on several of which one was unknown were dropped open
    18,  # a first hit beside another caller's first lease got a lease without a model
    2221,  # a written copy without a twin in RAM, and no room there: whoever needed its room waited for ever
    11054,  # the only victims could not be moved: whoever needed their room waited for ever
)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Closing with open leases is part of the play, and logged each time."""
    caplog.set_level("CRITICAL", logger="modelcache")


def play(seeds: range | tuple[int, ...], marks: Counter[str] | None = None, *, is_live: bool = False) -> None:
    for seed in seeds:
        Schedule(seed, marks, is_live=is_live).play()


def test_seeds_that_found_something_once_find_nothing():
    play(FOUND)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("chunk", range(10))
def test_every_schedule_keeps_every_promise(chunk: int, figure):
    play(range(chunk * 300, chunk * 300 + 300))
    figure("schedules", "fake mover", 300)


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chunk", range(100))
def test_a_hundred_thousand_schedules_keep_every_promise(chunk: int, figure):
    play(range(1_000_000 + chunk * 1000, 1_000_000 + chunk * 1000 + 1000))
    figure("schedules", "fake mover", 1000)


@pytest.mark.timeout(120)
def test_rare_states_are_reached(figure):
    marks: Counter[str] = Counter()
    play(range(10_000, 11_200), marks)
    assert not [mark for mark in FAKE if not marks[mark]]
    figure("reach marks", "fake mover", len(FAKE))
    figure("schedules", "fake mover", 1200)


@pytest.mark.timeout(120)
def test_once_faults_are_healed_everything_ends_and_everybody_is_served(figure):
    marks: Counter[str] = Counter()
    play(range(50_000, 50_600), marks, is_live=True)
    assert not [mark for mark in LIVE if not marks[mark]]
    assert marks["everybody served after healing"] == 600
    figure("reach marks", "fake mover, healed", len(LIVE))
    figure("schedules", "fake mover, healed", 600)


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chunk", range(20))
def test_twenty_thousand_healed_schedules_serve_everybody(chunk: int, figure):
    play(range(2_000_000 + chunk * 1000, 2_000_000 + chunk * 1000 + 1000), is_live=True)
    figure("schedules", "fake mover, healed", 1000)


def test_one_seed_is_one_schedule():
    traces = []
    for _ in range(2):
        schedule = Schedule(7)
        schedule.play()
        traces.append((schedule.scheduler.num_switches, schedule.scheduler.now_s, tuple(schedule.scheduler.trace)))
    assert traces[0] == traces[1]


# --- the simulation itself must be able to fail ------------------------------------------------------------------------


def found(seeds: range, *, is_live: bool = False) -> str:
    for seed in seeds:
        try:
            Schedule(seed, is_live=is_live).play()
        except AssertionError as error:
            return str(error)
    pytest.fail("nothing was found")


def test_a_lost_wake_up_is_found_and_the_report_says_how_to_see_it_again(monkeypatch):
    def watch(driver: Driver, name: str) -> None:
        if name in driver.gates:
            driver.gates[name].watched = True

    monkeypatch.setattr(Driver, "_watch", watch)
    report = found(range(20_000, 24_000))
    assert "nothing can happen any more, and these wait: " in report
    assert re.search(r"seed \d+ \((random|pct)\), after \d+ switches", report)
    assert "python tools/replay.py 2" in report
    assert "the last events:\n" in report
    assert re.search(r"held: vram \d+ of 40", report)


def test_bytes_that_count_as_free_too_early_are_found(monkeypatch):
    early = property(lambda self: self.budget_bytes - self.resident_bytes - self.reserved_bytes)
    monkeypatch.setattr(Account, "free_bytes", early)
    assert re.search("takes .* bytes of|the driver met a bug|InvalidTransitionError|Assertion", found(range(500)))


def test_what_goes_on_for_ever_after_healing_is_found(monkeypatch):
    monkeypatch.setattr(Schedule, "heal", lambda schedule: None)
    report = found(range(50_000, 50_200), is_live=True)
    assert re.search(r"and nothing is in its way|more than \d+ switches", report)
    assert "python tools/replay.py --live 50" in report


def test_a_livelock_is_found():
    scheduler = Scheduler(1)

    def spin() -> None:
        while True:
            scheduler.switch("spin")

    scheduler.spawn("spinner", spin)
    with pytest.raises(Livelock, match="able to run: spinner"):
        scheduler.run()
