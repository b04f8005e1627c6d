"""When budgets go down and come back: scripted readings, one after the other."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from modelcache.core.governor import (
    CALM_S,
    MAX_CALM_S,
    SETTLE_S,
    STALL_SETTLE_S,
    Change,
    Regulator,
    Standing,
    ram_ask,
    vram_ask,
)
from modelcache.stats import MemoryReading

GIB = 1 << 30
TOTAL = 100 * GIB


@dataclass
class Scripted:
    """A machine whose others use what the script says, and a cache that holds up to its budget, idle or leased."""

    configured: int = 40 * GIB
    wanted: int = 40 * GIB  # what the cache would hold if the budget allowed it
    leased: int = 0
    others: int = 0
    stalled: float | None = None
    regulator: Regulator = field(default_factory=Regulator)
    now_s: float = 0.0
    changes: list[tuple[float, Change]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.budget, self.held = self.configured, min(self.wanted, self.configured)

    def standing(self) -> Standing:
        return Standing(self.budget, self.configured, self.held, max(0, self.held - self.budget))

    def reading(self) -> MemoryReading:
        free = max(0, TOTAL - self.others - self.held)
        return MemoryReading(TOTAL, free, self.others, "memory.max", self.now_s, self.stalled, "memory.pressure")

    def second(self) -> Change | None:
        self.now_s += 1.0
        standing = self.standing()
        change = self.regulator.decide(standing, ram_ask(standing, self.reading()), self.now_s)
        if change is not None:
            self.budget = change.budget_bytes
            self.changes.append((self.now_s, change))
        self.held = max(self.leased, min(self.wanted, self.budget))
        return change

    def seconds(self, count: float) -> list[Change]:
        return [change for _ in range(int(count)) if (change := self.second()) is not None]


def test_nothing_changes_while_there_is_memory():
    machine = Scripted(others=30 * GIB)
    assert machine.seconds(600) == []


def test_above_the_high_mark_idle_memory_is_given_up_down_to_the_low_mark():
    machine = Scripted(others=30 * GIB)
    machine.seconds(10)
    machine.others = 55 * GIB
    (change,) = machine.seconds(5)
    assert change.budget_bytes == pytest.approx(25 * GIB, abs=2)
    assert change.why == "95% of the 100.0 GiB of RAM are in use, above 90%"
    assert change.source == "memory.max"
    assert (machine.held + machine.others) / TOTAL <= 0.80
    assert machine.seconds(600) == []


def test_between_the_marks_nothing_happens_in_either_direction():
    machine = Scripted(others=45 * GIB)
    assert machine.seconds(60) == []
    machine.budget = machine.held = 30 * GIB
    machine.others = 51 * GIB
    assert machine.seconds(600) == []


def test_a_budget_comes_back_to_what_was_configured_after_a_quiet_while_and_never_above():
    machine = Scripted(others=55 * GIB)
    machine.seconds(5)
    assert machine.budget < machine.configured
    machine.others = 10 * GIB
    assert machine.seconds(CALM_S) == []
    assert [change.budget_bytes for change in machine.seconds(5)] == [machine.configured]
    assert machine.seconds(1000) == []


def test_a_quiet_while_begins_anew_when_it_is_disturbed():
    machine = Scripted(others=55 * GIB)
    machine.seconds(5)
    machine.others = 10 * GIB
    machine.seconds(CALM_S - 1)
    machine.stalled = 5.0
    assert machine.second() is None
    machine.stalled = 0.0
    assert machine.seconds(CALM_S) == []
    assert len(machine.seconds(2)) == 1


def test_a_reading_that_is_missing_begins_the_quiet_while_anew_and_changes_nothing():
    machine = Scripted(others=55 * GIB)
    machine.seconds(5)
    lowered = machine.budget
    machine.others = 10 * GIB
    machine.seconds(CALM_S - 1)
    machine.regulator.missed()
    assert machine.seconds(CALM_S) == []
    assert machine.budget == lowered


def test_a_part_of_the_budget_comes_back_when_there_is_room_for_a_part():
    machine = Scripted(others=65 * GIB)
    machine.seconds(5)
    machine.others = 50 * GIB
    (change,) = machine.seconds(CALM_S + 5)
    assert change.budget_bytes == pytest.approx(30 * GIB, abs=4)
    assert machine.seconds(600) == []


def test_a_budget_that_memory_could_not_hold_is_lowered_before_it_is_used():
    machine = Scripted(configured=96 * GIB, wanted=10 * GIB, others=20 * GIB)
    (change,) = machine.seconds(5)
    assert change.budget_bytes == pytest.approx(70 * GIB, abs=2)
    assert change.why.startswith("with the budget full, 116% of the 100.0 GiB of RAM would be in use")
    assert machine.held == 10 * GIB
    assert machine.seconds(600) == []


def test_stalls_lower_the_budget_step_by_step_no_faster_than_they_are_averaged():
    machine = Scripted(others=20 * GIB, stalled=40.0)
    machine.seconds(2 * STALL_SETTLE_S + 1)
    times = [at_s for at_s, _ in machine.changes]
    assert [round(change.budget_bytes / GIB) for _, change in machine.changes] == [35, 30, 25]
    assert times == [1.0, 1.0 + STALL_SETTLE_S, 1.0 + 2 * STALL_SETTLE_S]
    assert machine.changes[0][1].source == "memory.pressure"
    assert "40% of the last 10 s" in machine.changes[0][1].why
    machine.stalled = 0.0
    assert [change.budget_bytes for change in machine.seconds(CALM_S + 5)] == [machine.configured]


def test_stalls_lower_by_a_step_below_what_is_held_and_leave_one_step():
    machine = Scripted(wanted=18 * GIB, others=20 * GIB, stalled=40.0)
    assert machine.second().budget_bytes == 13 * GIB
    machine.seconds(600)
    assert [change.budget_bytes // GIB for _, change in machine.changes] == [13, 8, 5]
    machine.stalled = 0.0
    assert [change.budget_bytes for change in machine.seconds(CALM_S + 5)] == [machine.configured]


@pytest.mark.parametrize("held", [0, 1 * GIB, 5 * GIB])
def test_stalls_of_others_take_the_budget_of_a_cache_that_holds_little_by_steps(held):
    machine = Scripted(wanted=held, others=20 * GIB, stalled=40.0)
    machine.seconds(600)
    assert [change.budget_bytes // GIB for _, change in machine.changes] == [35, 30, 25, 20, 15, 10, 5]
    assert machine.held == held


def test_a_budget_below_a_step_is_left_alone_by_stalls():
    standing = Standing(2 * GIB, 40 * GIB, 2 * GIB, 0)
    reading = MemoryReading(TOTAL, 50 * GIB, 0, "memory.max", 0.0, 40.0, "memory.pressure")
    assert Regulator().decide(standing, ram_ask(standing, reading), 1.0) is None


def test_while_leases_hold_what_a_lowering_waits_for_there_is_no_further_one():
    machine = Scripted(leased=40 * GIB, others=55 * GIB)
    machine.seconds(300)
    assert len(machine.changes) == 1
    machine.leased = 0
    machine.seconds(300)
    assert len(machine.changes) == 1
    assert (machine.held + machine.others) / TOTAL <= 0.80


def test_lowerings_that_follow_each_other_leave_the_last_one_time_to_show():
    machine = Scripted(others=55 * GIB)
    for _ in range(20):
        machine.second()
        machine.others += 1 * GIB
    times = [at_s for at_s, _ in machine.changes]
    assert len(times) > 1
    assert all(after - before >= SETTLE_S for before, after in zip(times, times[1:], strict=False))


def test_a_raise_that_does_not_last_makes_the_next_quiet_while_longer_up_to_a_bound():
    machine = Scripted(others=10 * GIB)
    pauses = []
    for _ in range(8):
        machine.others = 60 * GIB
        machine.seconds(5)
        machine.others = 10 * GIB
        began_s = machine.now_s
        while machine.budget < machine.configured:
            machine.second()
        pauses.append(machine.now_s - began_s)
    assert pauses[0] == pytest.approx(CALM_S, abs=2)
    assert all(after >= before for before, after in zip(pauses, pauses[1:], strict=False))
    assert pauses[-1] == pytest.approx(MAX_CALM_S, abs=2)
    # One raise that lasts, and the cache is as trusting as before.
    machine.seconds(5 * MAX_CALM_S)
    machine.others = 60 * GIB
    machine.seconds(5)
    machine.others = 10 * GIB
    began_s = machine.now_s
    while machine.budget < machine.configured:
        machine.second()
    assert machine.now_s - began_s == pytest.approx(CALM_S, abs=2)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_readings_the_budget_stays_in_bounds_and_changes_seldom(seed):
    chooser = random.Random(seed)
    machine = Scripted()
    for _ in range(3600):
        if chooser.random() < 0.2:
            machine.others = int(chooser.choice([0, 20, 38, 42, 55, 80, 99]) * GIB)
        if chooser.random() < 0.1:
            machine.stalled = chooser.choice([None, 0.0, 5.0, 9.9, 10.1, 80.0])
        if chooser.random() < 0.05:
            machine.leased = int(chooser.choice([0, 5, 30]) * GIB)
            machine.leased = min(machine.leased, machine.held)
        machine.second()
        assert 0 <= machine.budget <= machine.configured
    raises = sum(
        after.budget_bytes > before.budget_bytes
        for (_, before), (_, after) in zip(machine.changes, machine.changes[1:], strict=False)
    )
    assert raises <= 3600 / CALM_S
    lowerings = [
        at_s
        for (_, before), (at_s, after) in zip(machine.changes, machine.changes[1:], strict=False)
        if after.budget_bytes < before.budget_bytes
    ]
    assert all(after - before >= SETTLE_S for before, after in zip(lowerings, lowerings[1:], strict=False))


def test_noise_around_a_mark_is_no_flapping():
    chooser = random.Random(3)
    machine = Scripted(wanted=30 * GIB)
    for _ in range(3600):
        machine.others = int((60 + chooser.uniform(-3, 3)) * GIB)
        machine.second()
    # Down when a reading crossed the mark, in few steps, and nothing comes back while it is as it is.
    assert 1 <= len(machine.changes) <= 4
    budgets = [change.budget_bytes for _, change in machine.changes]
    assert budgets == sorted(budgets, reverse=True)


# --- VRAM ---------------------------------------------------------------------------------------------------------


def vram(others: int, *, total: int = 24) -> MemoryReading:
    return MemoryReading(total * GIB, 0, others * GIB, "nvml", 0.0)


def test_a_device_full_of_our_own_copies_is_as_it_should_be():
    standing = Standing(20 * GIB, 20 * GIB, 20 * GIB, 0)
    assert vram_ask(standing, vram(1), 1.0).lower_to is None


def test_what_others_take_of_the_device_is_taken_from_the_budget_and_given_back():
    regulator = Regulator()
    standing = Standing(20 * GIB, 20 * GIB, 20 * GIB, 0)
    change = regulator.decide(standing, vram_ask(standing, vram(12), 1.0), 1.0)
    assert (change.budget_bytes, change.source) == (12 * GIB, "nvml")
    assert change.why == "others hold 12.0 GiB of the device's 24.0 GiB"
    lowered = Standing(12 * GIB, 20 * GIB, 12 * GIB, 0)
    changes = [regulator.decide(lowered, vram_ask(lowered, vram(0), 1.0), float(at_s)) for at_s in range(2, 40)]
    raised = [each for each in changes if each is not None]
    assert raised[0].budget_bytes == 20 * GIB
    assert changes.index(raised[0]) == CALM_S


def test_a_share_stays_a_share_of_what_others_leave():
    standing = Standing(16 * GIB, 16 * GIB, 0, 0)
    assert vram_ask(standing, vram(14), 0.8).lower_to == 8 * GIB


def test_a_budget_set_above_the_share_stays_until_others_take_memory():
    standing = Standing(23 * GIB, 23 * GIB, 0, 0)
    assert vram_ask(standing, vram(0), 0.8).lower_to is None
    assert vram_ask(standing, vram(12), 0.8).lower_to == pytest.approx(11.5 * GIB, abs=2)


def test_a_budget_of_more_than_the_device_and_a_device_of_nothing():
    standing = Standing(30 * GIB, 30 * GIB, 0, 0)
    assert vram_ask(standing, vram(0), 0.8).lower_to == 24 * GIB
    assert vram_ask(standing, vram(0, total=0), 0.8).lower_to == 0


def test_a_little_that_others_take_is_not_worth_a_change():
    standing = Standing(20 * GIB, 20 * GIB, 0, 0)
    assert vram_ask(standing, vram(5), 1.0).lower_to is None


def test_a_device_that_others_hold_wholly_leaves_nothing():
    standing = Standing(20 * GIB, 20 * GIB, 0, 0)
    assert vram_ask(standing, vram(30), 1.0).lower_to == 0
