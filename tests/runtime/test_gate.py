"""The gate over every interleaving of the shared reads and writes of three threads, one operation each.

An operation is the real code that a caller runs (the hit of the front door, which has the steps of `Gate.enter` in it,
`Gate.enter` itself, and each way a lease is returned), run on a gate whose fields are traced: one step performs one
shared access and stops before the next. A stopped operation is continued by running it again from its start with the
answers its accesses had before, so no thread is needed and every schedule is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from modelcache import door as doors
from modelcache.door import Entry, FrontDoor
from modelcache.lease import FirstUseLease, FirstUses, Lease, SoleLease
from modelcache.runtime.gate import Gate
from modelcache.runtime.holders import Sites


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
    claims: dict[int, object] = field(default_factory=dict)

    def copy(self) -> Memory:
        return Memory(dict(self.open), self.closed, self.watched, self.limit, self.tick, dict(self.claims))


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


class TracedDict:
    """A dictionary that threads share, each of its steps one access: the open leases, or the claims on first uses."""

    def __init__(self, tape: Tape, which: str, prefix: str = "") -> None:
        self.tape, self.which, self.prefix = tape, which, prefix

    @property
    def shared(self) -> dict[int, object]:
        shared: dict[int, object] = getattr(self.tape.memory, self.which)
        return shared

    def __setitem__(self, tick: int, value: object) -> None:
        self.tape.access(f"{self.prefix}put {tick}", lambda: self.shared.__setitem__(tick, value))

    def pop(self, tick: int, default: object) -> object:
        # The default stands for "was not there"; it is another object in each run, so it is not recorded itself.
        found = self.tape.access(f"{self.prefix}pop {tick}", lambda: (self.shared.pop(tick, TracedDict),))[0]
        return default if found is TracedDict else found

    def items(self) -> list[tuple[int, object]]:
        items: list[tuple[int, object]] = self.tape.access(f"{self.prefix}items", lambda: list(self.shared.items()))
        return items

    def __len__(self) -> int:
        return self.tape.access(f"{self.prefix}len", lambda: len(self.shared))


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

    open = property(lambda self: TracedDict(self.tape, "open"))
    closed, watched = traced("closed"), traced("watched")
    limit, tick = traced("limit"), traced("tick")


class Unfinalized:
    """A lease whose interrupted copies, left behind by each stopped step, do nothing on collection."""

    __slots__ = ()

    def __del__(self) -> None:
        pass


class UnfinalizedLease(Unfinalized, Lease):
    __slots__ = ()


class UnfinalizedSoleLease(Unfinalized, SoleLease):
    __slots__ = ()


class UnfinalizedFirstUseLease(Unfinalized, FirstUseLease):
    __slots__ = ()


@pytest.fixture(autouse=True)
def _unfinalized(monkeypatch: pytest.MonkeyPatch) -> None:
    # The one kind of lease that the front door is not given.
    monkeypatch.setattr(doors, "FirstUseLease", UnfinalizedFirstUseLease)


class Refused(Exception):
    """The front door went on to ask the driver."""


class NoDriver:
    """What the front door needs for a hit, with a chosen tick."""

    is_forked = False

    def __init__(self, tick: int) -> None:
        self.next_tick = lambda: tick
        self.told: list[str] = []
        self.lease_returned = self.told.append
        self.now_s = lambda: 0.0
        self.sites = Sites()
        self.at_fork: list[Callable[[], None]] = []

    def at_latest(self, in_s: float, act: Callable[[], None]) -> None:
        pass

    def is_loading_here(self, thread: int) -> None:
        del thread

    def ask(self, *args: object, **kwargs: object) -> None:
        raise Refused


MODEL = object()
Operation = Callable[[Gate], Any]
WAYS_IN = ("gate", "lease", "sole", "first use")
WAYS_OUT = ("close", "block", "sole block", "finalizer", "first use dropped")


def entering(tick: int, way: str = "gate") -> Operation:
    def enter(gate: Gate) -> bool:
        if way == "gate":
            return gate.enter(tick, "holder")
        door = FrontDoor(NoDriver(tick), SimpleNamespace(object_of=lambda _name: MODEL), object, KeyError, str)  # type: ignore[arg-type]
        door.entries["m"] = entry = Entry("m", gate)
        entry.model = MODEL
        try:
            if way == "first use":
                door.first_use("m", None)
            else:
                door.lease("m", None, UnfinalizedSoleLease if way == "sole" else UnfinalizedLease)
        except Refused:
            return False
        return True

    return enter


def leaving(tick: int, way: str = "close") -> Operation:
    def leave(gate: Gate) -> bool:
        told: list[str] = []
        kind = {"sole block": UnfinalizedSoleLease, "first use dropped": UnfinalizedFirstUseLease}.get(
            way, UnfinalizedLease
        )
        lease = kind("m", gate, tick, told.append, MODEL)
        match way:
            case "close":
                lease.close()
            case "block" | "sole block":
                with lease:
                    pass
            case _:
                # The body of the finalizer, and not the warning after it.
                lease._give_back()
        return bool(told)

    return leave


def taking_over(tick: int) -> Operation:
    def take_over(gate: Gate) -> bool:
        lease = UnfinalizedFirstUseLease("m", gate, tick, None, MODEL)
        lease._claims = claims_of(gate)
        return lease.take_over("a call") is not None

    return take_over


def ending_first_uses(gate: Gate) -> bool:
    told: list[str] = []
    uses = FirstUses(lambda: 5.0, lambda _in_s, _act: None, told.append)
    uses._claims = claims_of(gate)
    # What the claims hold of the gate is made here: it has to be the one of this run.
    uses._claims.items = lambda: [(tick, (0.0, gate, "m")) for tick, _ in claims_of(gate).items()]
    uses._end_due()
    return bool(told)


def claims_of(gate: Any) -> Any:
    return TracedDict(gate.tape, "claims", "claim ")


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
    operations: tuple[Operation, ...],
    memory: Memory,
    gate_type: type[TracedGate] = TracedGate,
    *,
    by_state: bool = False,
) -> Iterator[Ending]:
    """Every order in which the shared accesses of the operations can happen.

    `by_state`: of those that come to the same state on the way, one is gone on with; its trace is one of several.
    """
    seen: set[str] = set()

    def explore(
        memory: Memory, answers: dict[int, list[Any]], results: dict[int, Any], trace: tuple[tuple[int, str], ...]
    ) -> Iterator[Ending]:
        if by_state:
            state = repr((memory, sorted(answers.items()), sorted(results.items())))
            if state in seen:
                return
            seen.add(state)
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


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("ways", list(itertools.combinations_with_replacement(WAYS_IN, 2)))
def test_a_gate_seen_idle_by_its_closer_lets_nobody_in_by_any_way(ways: tuple[str, str], limit: int, figure):
    operations = (closing, entering(1, ways[0]), entering(2, ways[1]))
    endings = list(schedules(operations, Memory(limit=limit), by_state=True))
    figure("interleavings", "two ways into a gate that closes, by states", len(endings))
    for ending in endings:
        assert not idle_with_a_lease_in(ending, 0, (1, 2)), ending
        assert sorted(ending.memory.open) == [tick for tick in (1, 2) if ending.results[tick]], ending
        assert ending.memory.tick in {0, *ending.memory.open}, ending


@pytest.mark.parametrize("way", WAYS_IN)
def test_going_by_states_finds_what_going_by_orders_finds(way: str):
    def outcomes(*, by_state: bool) -> set[str]:
        operations = (closing, entering(1, way), leaving(7, "block"))
        endings = schedules(operations, Memory(open={7: "holder"}), by_state=by_state)
        return {repr((sorted(ending.results.items()), ending.memory)) for ending in endings}

    assert outcomes(by_state=True) == outcomes(by_state=False)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("limit", [0, 1])
def test_a_gate_seen_idle_by_its_closer_lets_nobody_in(limit: int, figure):
    num_schedules = 0
    for ending in schedules((closing, entering(1), entering(2)), Memory(limit=limit)):
        num_schedules += 1
        assert not idle_with_a_lease_in(ending, 0, (1, 2)), ending
        inside = [tick for tick in (1, 2) if ending.results[tick]]
        assert sorted(ending.memory.open) == inside, ending
    assert num_schedules > 500
    figure("interleavings", "two callers and a closer, every order", num_schedules)


def test_a_gate_seen_idle_has_lost_the_lease_that_was_in_it():
    for ending in schedules((closing, entering(1), leaving(7)), Memory(open={7: "holder"})):
        assert not idle_with_a_lease_in(ending, 0, (1,)), ending
        if ending.results[0] == 0:
            assert not ending.memory.open, ending
            assert ending.when(2, "pop 7") < ending.when(0, "len"), ending


@pytest.mark.parametrize("way", WAYS_OUT)
def test_a_closer_who_saw_a_lease_is_told_when_it_returns(way: str):
    for ending in schedules((closing, leaving(7, way), entering(1)), Memory(open={7: "holder"})):
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
def test_any_three_operations_leave_the_gate_whole(operations: tuple[str, ...], figure):
    made = tuple(
        {"enter": entering(thread), "leave": leaving(7), "close": closing, "open": opening}[operation]
        for thread, operation in enumerate(operations)
    )
    num_orders = 0
    for num_orders, ending in enumerate(schedules(made, Memory(open={7: "holder"})), start=1):  # noqa: B007
        expected = {
            thread for thread, operation in enumerate(operations) if operation == "enter" and ending.results[thread]
        }
        assert set(ending.memory.open) == expected | ({7} if "leave" not in operations else set()), ending
        if "open" not in operations and operations.count("close") == 1:
            closer = operations.index("close")
            enterers = tuple(thread for thread, operation in enumerate(operations) if operation == "enter")
            assert not idle_with_a_lease_in(ending, closer, enterers), ending
    figure("interleavings", "any three operations, every order", num_orders)


@pytest.mark.parametrize("ways", list(itertools.combinations_with_replacement(WAYS_IN, 2)))
def test_two_callers_at_a_limit_of_one_are_never_both_let_in(ways: tuple[str, str]):
    outcomes = set()
    operations = (entering(1, ways[0]), entering(2, ways[1]), opening)
    for ending in schedules(operations, Memory(limit=1), by_state=True):
        assert len(ending.memory.open) <= 1, ending
        outcomes.add((ending.results[0], ending.results[1]))
    assert outcomes == {(True, False), (False, True), (False, False)}


def test_a_lease_leaves_once_however_many_return_it():
    def leave(gate: Gate) -> bool:
        return gate.leave(7)

    for ending in schedules((leave, leave, leave), Memory(open={7: None})):
        assert sorted(ending.results.values()) == [False, False, True], ending


def test_of_two_first_uses_and_the_clock_exactly_one_gets_the_lease():
    winners = set()
    memory = Memory(open={7: None}, claims={7: "ends"})
    for ending in schedules((taking_over(7), taking_over(7), ending_first_uses), memory, by_state=True):
        won = [thread for thread in (0, 1) if ending.results[thread]]
        assert len(won) <= 1, ending
        assert ending.memory.open == ({7: "a call"} if won else {}), ending
        assert not ending.memory.claims, ending
        winners.add(tuple(won))
    assert winners == {(0,), (1,), ()}


def test_a_closer_who_saw_a_first_use_is_told_when_the_clock_ends_it():
    memory = Memory(open={7: None}, claims={7: "ends"})
    for ending in schedules((closing, ending_first_uses, taking_over(7)), memory):
        if not ending.results[2] and ending.when(1, "pop 7") > ending.when(0, "len"):
            assert ending.results[1], ending


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
