"""The gate over every interleaving of the shared reads and writes of three threads, one operation each.

An operation is the real code of `Gate` (and of `Lease.close` for leaving), run on a gate whose fields are traced: one
step performs one shared access and stops before the next. A stopped operation is continued by running it again from its
start with the answers its accesses had before, so no thread is needed and every schedule is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from modelcache.lease import Lease
from modelcache.runtime.gate import Gate


class Stop(BaseException):
    """The step is over: the operation wants a second shared access."""


@dataclass
class Memory:
    """What the threads share."""

    open: dict[int, object] = field(default_factory=dict)
    closed: bool = False
    watched: bool = False
    limit: int = 0
    tick: int = 0

    def copy(self) -> Memory:
        return Memory(dict(self.open), self.closed, self.watched, self.limit, self.tick)


class Tape:
    """The accesses of one operation: those already made are answered from the record, one more is made for real."""

    def __init__(self, memory: Memory, answers: list[Any]) -> None:
        self.memory, self.answers = memory, answers
        self.position, self.made = 0, None

    def access(self, what: str, perform: Callable[[], Any]) -> Any:
        if self.position == len(self.answers):
            if self.made is not None:
                raise Stop
            self.made = what
            self.answers.append(perform())
        self.position += 1
        return self.answers[self.position - 1]


class TracedOpen:
    """The dictionary of open leases, each of its steps one access."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __setitem__(self, tick: int, holder: object) -> None:
        self.tape.access(f"put {tick}", lambda: self.tape.memory.open.__setitem__(tick, holder))

    def pop(self, tick: int, default: object) -> object:
        # The default stands for "was not there"; it is another object in each run, so it is not recorded itself.
        found = self.tape.access(f"pop {tick}", lambda: (self.tape.memory.open.pop(tick, TracedOpen),))[0]
        return default if found is TracedOpen else found

    def __len__(self) -> int:
        return self.tape.access("len", lambda: len(self.tape.memory.open))


def traced(name: str) -> property:
    def read(gate: Any) -> Any:
        return gate.tape.access(f"read {name}", lambda: getattr(gate.tape.memory, name))

    def write(gate: Any, value: Any) -> None:
        gate.tape.access(f"{name} = {value}", lambda: setattr(gate.tape.memory, name, value))

    return property(read, write)


class TracedGate(Gate):
    """The real methods on traced fields."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    open = property(lambda self: TracedOpen(self.tape))
    closed, watched = traced("closed"), traced("watched")
    limit, tick = traced("limit"), traced("tick")


class UnfinalizedLease(Lease):
    """A lease whose interrupted copies, left behind by each stopped step, do nothing on collection."""

    __slots__ = ()

    def __del__(self) -> None:
        pass


Operation = Callable[[Gate], Any]


def entering(tick: int) -> Operation:
    return lambda gate: gate.enter(tick, "holder")


def leaving(tick: int) -> Operation:
    def leave(gate: Gate) -> bool:
        told: list[str] = []
        UnfinalizedLease("m", gate, tick, told.append, object()).close()
        return bool(told)

    return leave


def closing(gate: Gate) -> int:
    """What the driver does before a trim; a busy gate is watched, then opened again."""
    gate.close()
    num_leases = gate.num_leases
    if num_leases:
        gate.watched = True
        gate.open_()
    return num_leases


def opening(gate: Gate) -> None:
    gate.open_()


@dataclass
class Ending:
    """One complete schedule: every access in order, what each operation answered, and the memory after it."""

    trace: tuple[tuple[int, str], ...]
    results: dict[int, Any]
    memory: Memory

    def when(self, thread: int, what: str) -> int:
        return self.trace.index((thread, what))


def schedules(
    operations: tuple[Operation, ...], memory: Memory, gate_type: type[TracedGate] = TracedGate
) -> Iterator[Ending]:
    """Every order in which the shared accesses of the operations can happen."""

    def explore(
        memory: Memory, answers: dict[int, list[Any]], results: dict[int, Any], trace: tuple[tuple[int, str], ...]
    ) -> Iterator[Ending]:
        if len(results) == len(operations):
            yield Ending(trace, results, memory)
        for thread in answers.keys() - results.keys():
            after, record, ended = memory.copy(), list(answers[thread]), dict(results)
            tape = Tape(after, record)
            try:
                ended[thread] = operations[thread](gate_type(tape))
            except Stop:
                pass
            assert tape.made is not None
            yield from explore(after, {**answers, thread: record}, ended, (*trace, (thread, tape.made)))

    yield from explore(memory, {thread: [] for thread in range(len(operations))}, {}, ())


def idle_with_a_lease_in(ending: Ending, closer: int, enterers: tuple[int, ...]) -> bool:
    """The one thing that must never be: the driver saw an idle gate, nobody opened it, and a caller is inside."""
    return ending.results[closer] == 0 and any(ending.results[thread] for thread in enterers)


class ReadsFirst(TracedGate):
    """A gate that gets the order wrong."""

    def enter(self, tick: int, holder: object) -> bool:
        if self.closed:
            return False
        self.open[tick] = holder
        return True


def test_the_enumeration_finds_a_gate_that_reads_before_it_publishes():
    endings = schedules((closing, entering(1), entering(2)), Memory(), ReadsFirst)

    assert any(idle_with_a_lease_in(ending, 0, (1, 2)) for ending in endings)


def test_the_enumeration_finds_a_driver_that_watches_after_it_opens():
    def careless(gate: Gate) -> int:
        gate.close()
        num_leases = gate.num_leases
        if num_leases:
            gate.open_()
            gate.watched = True
        return num_leases

    endings = schedules((careless, leaving(7)), Memory(open={7: "holder"}))

    assert any(ending.results == {0: 1, 1: False} for ending in endings)


def test_the_enumeration_tries_every_order():
    # Opening is one write each: three threads of one access have 3! orders.
    assert len(list(schedules((opening, opening, opening), Memory()))) == 6


@pytest.mark.timeout(120)
@pytest.mark.parametrize("limit", [0, 1])
def test_a_gate_seen_idle_by_its_closer_lets_nobody_in(limit: int):
    num_schedules = 0
    for ending in schedules((closing, entering(1), entering(2)), Memory(limit=limit)):
        num_schedules += 1
        assert not idle_with_a_lease_in(ending, 0, (1, 2)), ending
        inside = [tick for tick in (1, 2) if ending.results[tick]]
        assert sorted(ending.memory.open) == inside, ending
    assert num_schedules > 500


def test_a_gate_seen_idle_has_lost_the_lease_that_was_in_it():
    for ending in schedules((closing, entering(1), leaving(7)), Memory(open={7: "holder"})):
        assert not idle_with_a_lease_in(ending, 0, (1,)), ending
        if ending.results[0] == 0:
            assert not ending.memory.open, ending
            assert ending.when(2, "pop 7") < ending.when(0, "len"), ending


def test_a_closer_who_saw_a_lease_is_told_when_it_returns():
    for ending in schedules((closing, leaving(7), entering(1)), Memory(open={7: "holder"})):
        if ending.when(1, "pop 7") > ending.when(0, "len"):
            assert ending.results[1], ending
            assert ending.memory.watched, ending


def test_an_opener_beside_a_closer_lets_callers_in_only_after_its_own_write():
    for ending in schedules((closing, opening, entering(1)), Memory(closed=True)):
        opened, closed = ending.when(1, "closed = False"), ending.when(0, "closed = True")
        if opened < closed and ending.results[0] == 0:
            assert not ending.results[2], ending
        if ending.results[2]:
            assert ending.when(2, "read closed") > min(opened, closed), ending


@pytest.mark.parametrize(
    "operations", list(itertools.combinations_with_replacement(("enter", "leave", "close", "open"), 3))
)
def test_any_three_operations_leave_the_gate_whole(operations: tuple[str, ...]):
    made = tuple(
        {"enter": entering(thread), "leave": leaving(7), "close": closing, "open": opening}[operation]
        for thread, operation in enumerate(operations)
    )
    for ending in schedules(made, Memory(open={7: "holder"})):
        expected = {
            thread for thread, operation in enumerate(operations) if operation == "enter" and ending.results[thread]
        }
        assert set(ending.memory.open) == expected | ({7} if "leave" not in operations else set()), ending
        if "open" not in operations and operations.count("close") == 1:
            closer = operations.index("close")
            enterers = tuple(thread for thread, operation in enumerate(operations) if operation == "enter")
            assert not idle_with_a_lease_in(ending, closer, enterers), ending


def test_two_callers_at_a_limit_of_one_are_never_both_let_in():
    outcomes = set()
    for ending in schedules((entering(1), entering(2), opening), Memory(limit=1)):
        assert len(ending.memory.open) <= 1, ending
        outcomes.add((ending.results[0], ending.results[1]))
    assert outcomes == {(True, False), (False, True), (False, False)}


def test_a_lease_leaves_once_however_many_return_it():
    def leave(gate: Gate) -> bool:
        return gate.leave(7)

    for ending in schedules((leave, leave, leave), Memory(open={7: None})):
        assert sorted(ending.results.values()) == [False, False, True], ending


def test_a_new_gate_is_closed():
    gate = Gate()

    assert not gate.enter(1, "me")
    assert gate.num_leases == 0
    assert gate.tick == 0


def test_a_full_gate_refuses_and_keeps_who_is_inside():
    gate = Gate()
    gate.open_()
    gate.limit = 1

    assert gate.enter(1, "me")
    assert not gate.enter(2, "you")
    assert gate.holders() == ("me",)
    assert gate.tick == 1


def test_the_driver_admits_through_a_closed_gate():
    gate = Gate()
    gate.admit(5, "me")

    assert gate.num_leases == 1
    assert gate.tick == 5
    gate.admit(3, "you")
    assert gate.tick == 5


def test_a_tick_that_never_entered_does_not_leave():
    gate = Gate()

    assert not gate.leave(1)


def test_a_lease_without_a_holder_leaves_like_any_other():
    gate = Gate()
    gate.admit(1, None)

    assert gate.leave(1)
    assert not gate.leave(1)
