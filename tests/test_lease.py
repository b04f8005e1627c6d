"""Leases: returned exactly once, whoever drops, closes, interrupts or takes them over."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from interrupts import interrupted

from modelcache.errors import LeaseClosedError
from modelcache.lease import (
    FIRST_USE_S,
    FirstUseLease,
    FirstUses,
    Lease,
    Leases,
    SeveralLeases,
    SoleLease,
    current_holder,
)
from modelcache.runtime.gate import Gate


class Model:
    """Any object."""


@pytest.fixture
def gate() -> Gate:
    gate = Gate()
    gate.open_()
    return gate


TICKS = itertools.count(1)


def take(gate: Gate, *, kind: type[Lease] = Lease, told: list[str] | None = None, site: str | None = None) -> Any:
    tick = next(TICKS)
    lease = kind("flux", gate, tick, None if told is None else told.append, Model(), site=site)
    assert gate.enter(tick, "me")
    return lease


# --- misuse -----------------------------------------------------------------------------------------------------------


def test_a_returned_lease_gives_its_model_no_more(gate: Gate):
    lease = take(gate)
    lease.close()

    with pytest.raises(LeaseClosedError, match="'flux' was already returned; take a new one"):
        lease.model
    with pytest.raises(LeaseClosedError), lease:
        pass


def test_a_second_return_does_nothing(gate: Gate):
    gate.watched = True
    told: list[str] = []
    lease = take(gate, told=told)
    other = take(gate)

    lease.close()
    lease.close()

    assert gate.num_leases == 1
    assert told == ["flux"]
    other.close()


def test_a_lease_dropped_open_is_returned_and_says_where_it_was_taken(gate: Gate):
    take(gate, site="app.py:12").close()
    lease = take(gate, site="app.py:12")

    with pytest.warns(ResourceWarning, match=r"a lease on 'flux', taken at app.py:12, was dropped") as caught:
        del lease

    assert len(caught) == 1
    assert gate.num_leases == 0


def test_a_lease_dropped_open_tells_who_waits_for_it(gate: Gate):
    told: list[str] = []
    lease = take(gate, told=told)
    gate.close()

    with pytest.warns(ResourceWarning):
        del lease

    assert told == ["flux"]


def test_a_lease_dropped_before_it_got_in_is_silent():
    gate = Gate()
    lease = Lease("flux", gate, 1, None, Model())
    assert not gate.enter(1, "me")

    del lease

    assert gate.num_leases == 0


def run_to_the_end(thread: threading.Thread) -> None:
    thread.start()
    thread.join()
    gc.collect()


def test_a_lease_held_by_a_thread_that_died_is_returned(gate: Gate):
    def die_holding_one() -> None:
        lease = take(gate)
        assert lease.is_open

    thread = threading.Thread(target=die_holding_one)
    with pytest.warns(ResourceWarning, match="'flux'"):
        run_to_the_end(thread)

    assert gate.num_leases == 0


def test_a_lease_is_returned_when_its_block_raises(gate: Gate):
    with pytest.raises(ZeroDivisionError), take(gate):
        1 / 0  # noqa: B018

    assert gate.num_leases == 0


# --- ordinary use -----------------------------------------------------------------------------------------------------


def test_a_lease_yields_the_raw_model_and_is_returned_after_the_block(gate: Gate):
    lease = take(gate)

    with lease as model:
        assert isinstance(model, Model)
        assert model is lease.model
        assert gate.num_leases == 1
        assert repr(lease) == "<Lease 'flux' open>"

    assert gate.num_leases == 0
    assert not lease.is_open
    assert repr(lease) == "<Lease 'flux' returned>"


def test_a_returned_lease_lets_go_of_the_model(gate: Gate):
    lease = take(gate)
    model = weakref.ref(lease.model)

    lease.close()

    assert model() is None


@pytest.mark.parametrize(
    ("closed", "watched", "expected"), [(False, False, []), (True, False, ["flux"]), (False, True, ["flux"])]
)
def test_a_return_is_told_only_at_a_closed_or_watched_gate(
    gate: Gate, closed: bool, watched: bool, expected: list[str]
):
    told: list[str] = []
    lease = take(gate, told=told)
    gate.closed, gate.watched = closed, watched

    lease.close()

    assert told == expected


def test_a_lease_can_be_returned_from_another_thread(gate: Gate):
    lease = take(gate)
    thread = threading.Thread(target=lease.close)
    thread.start()
    thread.join()

    assert gate.num_leases == 0


def test_a_lease_made_before_its_model_was_loaded_is_filled_later():
    gate = Gate()
    lease = Lease("flux", gate, 1, None, None)
    gate.admit(1, "me")
    model = Model()

    lease.fill(model)

    with lease as got:
        assert got is model
    lease.fill(model)
    assert not lease.is_open


# --- the first-use lease ----------------------------------------------------------------------------------------------


class Hourglass:
    """The clock of the first uses, and the one who calls at its times."""

    def __init__(self, told: list[str] | None = None) -> None:
        self.now_s = 0.0
        self.alarms: list[tuple[float, Callable[[], None]]] = []
        self.num_alarms = 0
        self.uses = FirstUses(lambda: self.now_s, self.at_latest, None if told is None else told.append)

    def at_latest(self, in_s: float, ring: Callable[[], None]) -> None:
        self.num_alarms += 1
        self.alarms.append((self.now_s + in_s, ring))

    def advance(self, by_s: float) -> None:
        self.now_s += by_s
        due = [(at_s, ring) for at_s, ring in self.alarms if at_s <= self.now_s]
        self.alarms = [alarm for alarm in self.alarms if alarm not in due]
        for _, ring in due:
            ring()

    def take(self, gate: Gate, told: list[str] | None = None) -> FirstUseLease:
        lease: FirstUseLease = take(gate, kind=FirstUseLease, told=told)
        self.uses.limit(lease)
        return lease


@pytest.fixture
def glass() -> Hourglass:
    return Hourglass()


def test_a_first_use_lease_that_ended_cannot_be_taken_over(gate: Gate, glass: Hourglass):
    ended, closed = glass.take(gate), glass.take(gate)
    closed.close()
    glass.advance(FIRST_USE_S)

    assert ended.take_over("a call") is None
    assert closed.take_over("a call") is None
    assert gate.num_leases == 0


def test_a_first_use_lease_that_was_never_limited_is_returned_when_dropped(gate: Gate):
    lease = take(gate, kind=FirstUseLease)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del lease

    assert gate.num_leases == 0


def test_a_first_use_lease_dropped_open_is_returned_without_a_word(gate: Gate, glass: Hourglass):
    lease = glass.take(gate)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del lease

    assert gate.num_leases == 0
    assert not glass.uses._claims


def test_a_first_use_lease_that_ended_is_dropped_without_a_word(gate: Gate, glass: Hourglass):
    lease = glass.take(gate)
    glass.advance(FIRST_USE_S)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del lease

    assert gate.num_leases == 0


def test_a_first_use_lease_taken_over_outlives_its_time(gate: Gate, glass: Hourglass):
    first = glass.take(gate)
    model = first.model

    lease = first.take_over("a call")
    glass.advance(FIRST_USE_S)

    assert gate.holders() == ("a call",)
    assert lease is not None
    assert lease.model is model
    lease.close()
    assert gate.num_leases == 0


def test_a_first_use_lease_is_taken_over_once(gate: Gate, glass: Hourglass):
    first = glass.take(gate)

    lease = first.take_over("one")
    assert lease is not None
    with lease as model:
        assert isinstance(model, Model)
        assert first.take_over("another") is None
        assert gate.holders() == ("one",)

    assert gate.num_leases == 0


def test_taking_over_at_a_limit_of_one_needs_no_second_place(gate: Gate, glass: Hourglass):
    gate.limit = 1
    lease = glass.take(gate).take_over("a call")

    assert lease is not None
    with lease:
        assert gate.num_leases == 1


def test_a_lease_taken_over_and_dropped_warns(gate: Gate, glass: Hourglass):
    lease = glass.take(gate).take_over("a call")
    assert lease is not None

    with pytest.warns(ResourceWarning, match="'flux'"):
        del lease

    assert gate.num_leases == 0


def test_first_uses_end_each_in_its_own_time(gate: Gate, glass: Hourglass):
    first = glass.take(gate)
    glass.advance(1.0)
    second = glass.take(gate)

    glass.advance(0.5)
    assert gate.num_leases == 2
    glass.advance(0.5)
    assert gate.num_leases == 1
    assert first.take_over("a call") is None
    glass.advance(0.75)
    assert gate.num_leases == 1
    glass.advance(0.25)
    assert gate.num_leases == 0
    del second


def test_first_uses_that_are_used_at_once_share_one_alarm(gate: Gate, glass: Hourglass):
    for _ in range(100):
        lease = glass.take(gate).take_over("a call")
        assert lease is not None
        lease.close()

    assert glass.num_alarms == 1
    glass.advance(FIRST_USE_S)
    assert not glass.alarms
    kept = glass.take(gate)
    glass.advance(FIRST_USE_S)
    assert gate.num_leases == 0
    del kept


@pytest.mark.parametrize("closed", [False, True])
def test_a_first_use_that_ends_at_a_closed_gate_is_told(gate: Gate, closed: bool):
    told: list[str] = []
    glass = Hourglass(told)
    lease = glass.take(gate)
    gate.closed = closed

    glass.advance(FIRST_USE_S)

    assert told == (["flux"] if closed else [])
    del lease


def test_of_the_clock_and_a_first_use_exactly_one_gets_the_lease(gate: Gate):
    for _ in range(300):
        glass = Hourglass()
        first = glass.take(gate)
        start = threading.Barrier(2)

        def expire(glass: Hourglass = glass, start: threading.Barrier = start) -> None:
            start.wait()
            glass.advance(FIRST_USE_S)

        timer = threading.Thread(target=expire)
        timer.start()
        start.wait()
        lease = first.take_over("a call")
        timer.join()

        assert gate.num_leases == (0 if lease is None else 1)
        if lease is not None:
            lease.close()


def test_first_uses_come_and_go_while_the_clock_ends_some(gate: Gate):
    glass = Hourglass()
    is_over = threading.Event()
    taken: list[int] = []

    def use() -> None:
        num_taken = 0
        for _ in range(500):
            lease = glass.take(gate).take_over("a call")
            if lease is not None:
                num_taken += 1
                lease.close()
            glass.take(gate).close()
        taken.append(num_taken)

    def ring() -> None:
        while not is_over.is_set():
            glass.now_s += 1.0
            glass.uses._ring(glass.uses._alarm)

    ringer = threading.Thread(target=ring)
    users = [threading.Thread(target=use) for _ in range(3)]
    for thread in (ringer, *users):
        thread.start()
    for thread in users:
        thread.join()
    is_over.set()
    ringer.join()

    assert len(taken) == 3
    assert gate.num_leases == 0
    assert not glass.uses._claims


# --- several at once --------------------------------------------------------------------------------------------------


def test_several_leases_yield_their_models_in_order_and_return_together(gate: Gate):
    leases = [take(gate), take(gate)]
    models = tuple(lease.model for lease in leases)
    together = SeveralLeases(leases)

    with together as got:
        assert got == models
        assert gate.num_leases == 2
        assert repr(together) == "<Leases 'flux', 'flux'>"

    assert gate.num_leases == 0
    with pytest.raises(LeaseClosedError):
        together.models


def test_several_leases_return_together_when_the_block_raises(gate: Gate):
    with pytest.raises(ZeroDivisionError), SeveralLeases([take(gate), take(gate)]):
        1 / 0  # noqa: B018

    assert gate.num_leases == 0


def test_leases_on_one_model_are_leases_too(gate: Gate):
    sole = take(gate, kind=SoleLease)
    model = sole.model

    assert isinstance(sole, Leases)
    assert repr(sole) == "<Leases 'flux'>"
    with sole as got:
        assert got == (model,)
        assert sole.models == (model,)

    assert gate.num_leases == 0
    with pytest.raises(LeaseClosedError):
        sole.models
    with pytest.raises(LeaseClosedError), sole:
        pass


def test_leases_on_one_model_dropped_open_warn(gate: Gate):
    sole = take(gate, kind=SoleLease)

    with pytest.warns(ResourceWarning, match="'flux'"):
        del sole

    assert gate.num_leases == 0


# --- interrupts -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["lease", "closed", "first use", "dropped"])
def test_an_interrupt_at_any_bytecode_loses_no_lease_and_no_notice(kind: str):
    num_points = 0
    for after in itertools.count():
        gate, told = Gate(), []
        gate.open_()

        def use(gate: Gate = gate, told: list[str] = told) -> None:
            cls = FirstUseLease if kind == "first use" else Lease
            lease: Any = cls("flux", gate, 1, told.append, Model())
            if not gate.enter(1, "me"):
                return
            gate.watched = True
            if kind == "first use":
                Hourglass(told).uses.limit(lease)
                lease = lease.take_over("a call")
            if kind == "closed":
                lease.close()
            elif kind != "dropped":
                with lease:
                    pass

        struck = interrupted(use, after)
        assert gate.num_leases == 0, after
        assert told or not gate.watched, after
        if not struck:
            break
        num_points += 1
    assert num_points > 10


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_the_alarm_is_set_leaves_no_first_use_without_one():
    for after in itertools.count():
        glass, gate = Hourglass(), Gate()
        gate.open_()
        struck = interrupted(lambda glass=glass, gate=gate: glass.take(gate), after)
        kept = glass.take(gate)
        assert gate.num_leases == 1, after
        glass.advance(FIRST_USE_S)
        assert gate.num_leases == 0, after
        assert kept.take_over("a call") is None
        if not struck:
            break
    assert after > 20


# --- who holds it -----------------------------------------------------------------------------------------------------


def test_a_holder_is_the_thread_outside_an_event_loop():
    assert current_holder() is threading.current_thread()


def test_a_holder_inside_an_event_loop_is_the_task():
    async def ask() -> object:
        return current_holder()

    async def both() -> None:
        first, second = asyncio.create_task(ask()), asyncio.create_task(ask())
        assert await first == weakref.ref(first)
        assert await second == weakref.ref(second)

    asyncio.run(both())


def test_a_holder_in_a_loop_callback_is_the_thread():
    async def ask() -> object:
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: answer.set_result(current_holder()))
        return await answer

    assert asyncio.run(ask()) is threading.current_thread()
