"""The one writer of the core: events in by mailbox, one thread, one lock; instructions out to gates, links and callers.

Every change of state happens on the driver's own thread, so no frame that a Ctrl-C can tear holds a half-made one. The
lock is for those who look meanwhile, on threads that no signal handler interrupts; on the others the driver looks for
them. Nothing slow and no user code runs under it.
"""

from __future__ import annotations

import heapq
import logging
import traceback
from collections import deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from threading import get_ident
from typing import Any, assert_never

from modelcache.core.machine import Budgets, Machine
from modelcache.core.messages import (
    ArmTimer,
    Arriving,
    Asked,
    Checked,
    CloseGate,
    Closing,
    Done,
    DropImage,
    Event,
    Forget,
    Forgotten,
    GateBusy,
    GateClosed,
    Grant,
    Instruction,
    LeaseReturned,
    Left,
    LoadDone,
    LoadFailed,
    MoveDone,
    MoveFailed,
    MoveKept,
    OpenGate,
    Refuse,
    Registered,
    RoomReturned,
    StartCheck,
    StartLoad,
    StartMove,
    Tick,
    Unload,
    UnwatchGate,
    Want,
    WantCopy,
    WantLease,
    WatchGate,
)
from modelcache.core.policy import EvictionPolicy
from modelcache.errors import (
    CacheClosedError,
    ForkedCacheError,
    InvalidTransitionError,
    LeaseTimeoutError,
    LoaderError,
    ModelCacheError,
    MoveError,
)
from modelcache.move import KeptWritten, Move, MoveKind
from modelcache.runtime.gate import Gate
from modelcache.runtime.herald import Herald
from modelcache.runtime.holders import Sites
from modelcache.runtime.links import Link, survive
from modelcache.runtime.ports import Clock, Mover, Pool, Progress
from modelcache.runtime.story import Story
from modelcache.runtime.waiters import LEFT, Waiter, blocking
from modelcache.runtime.watch import Watch
from modelcache.spec import ModelSpec
from modelcache.stats import Counters
from modelcache.units import format_seconds

_LOG = logging.getLogger("modelcache.runtime")
#: How many loads run at a time; a load asked for from inside another has a thread of its own.
NUM_LOADERS = 4
#: How long closing waits for loaders that run.
GRACE_S = 4.0

#: Makes the caller's lease object: (name, gate, tick) -> lease.
Lend = Callable[[str, Gate, int], Any]


@dataclass(frozen=True, slots=True)
class _Ask:
    """A caller's want on its way to the driver."""

    want: Want
    waiter: Waiter
    deadline_s: float | None
    lend: Lend | None
    lend_to: object
    wasted_ticks: int


@dataclass(frozen=True, slots=True)
class _Leave:
    waiter: Waiter


@dataclass(frozen=True, slots=True)
class _Stop:
    wake: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Look:
    read: Callable[[Machine], Any]
    waiter: Waiter


_POKE = object()


class Driver:
    """Runs a `Machine`: the only thread that may.

    Args:
        budgets: Bytes per tier.
        mover: The data plane.
        clock: Deadlines and idle times.
        pool: Threads and their primitives.
        policy: Which copies go first.
        progress: Told how far loads and moves are.
    """

    def __init__(
        self,
        budgets: Budgets,
        mover: Mover,
        clock: Clock,
        pool: Pool,
        *,
        policy: EvictionPolicy | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._mover = mover
        self._clock = clock
        self._pool = pool
        self._progress = progress
        self._lock = pool.lock()
        self.gates: dict[str, Gate] = {}
        self._machine = Machine(budgets, self.gates, policy)
        self._mailbox = pool.mailbox(clock)
        self._tickets = count(1)
        self._waiters: dict[int, _Ask] = {}
        # Who asked and was not heard yet. Whoever looks whether all is well must see them when the thread is stuck.
        self._unheard: dict[int, Waiter] = {}
        self._timers: list[tuple[float, int, int]] = []
        self._fleeting: deque[tuple[float, Callable[[], None]]] = deque()
        self._started_s = clock.now_s()
        self._last_step_s = self._started_s
        self._step_since_s: float | None = None
        self.watch = Watch(clock)
        self._stoppers: list[Callable[[], None]] = []
        self._stop_by_s = 0.0
        self._is_ending = self._is_over = False
        self._bug: Exception | None = None
        self._is_forked = False
        self._loader_threads: dict[int, str] = {}
        self._ticks = count(1)
        self.sites = Sites()
        #: Called in a forked child, where every gate is closed by then.
        self.at_fork: list[Callable[[], None]] = []
        self.herald = Herald(pool, clock)
        self._story = Story()
        self._loads = Link("load", pool, clock, NUM_LOADERS)
        self._ups = Link("up", pool, clock, 2)
        self._downs = Link("down", pool, clock, 2)
        # Writing image files and deleting them share one worker: the room of a deleted file is free before it is used.
        self._files = Link("file", pool, clock, 1)
        self._looks = Link("look", pool, clock, 1)
        # Of futures: user code, which must neither run under the lock nor hold this thread up.
        self._callbacks = Link("callback", pool, clock, 1)
        self._ident = 0
        self._thread = pool.spawn("modelcache-driver", self._run)

    # --- what callers do, on their own threads --------------------------------------------------------------------

    @property
    def next_tick(self) -> Callable[[], int]:
        """Makes sequence numbers; one for each lease."""
        return self._ticks.__next__

    @property
    def now_s(self) -> Callable[[], float]:
        """The clock that deadlines are on."""
        return self._clock.now_s

    def tell(self, event: Event) -> None:
        """Post an event; it is taken soon. Never blocks, and safe in finalizers."""
        self._mailbox.put(event)

    def lease_returned(self, name: str) -> None:
        """What a lease calls when its gate was closed or watched."""
        self._mailbox.put(LeaseReturned(name))

    def ask(
        self,
        want: Want,
        timeout_s: float | None = None,
        lend: Lend | None = None,
        lend_to: object = None,
        *,
        wasted_ticks: int = 0,
    ) -> Any:
        """Want something and wait for it.

        Returns: What `lend` made for each name of a lease; else the `Done` instruction.

        Raises:
            LeaseTimeoutError: The deadline passed on the driver's clock.
            ModelCacheError: As the machine refused it; each caller gets an exception object of his own.
        """
        event = self._pool.event()
        waiter = blocking(next(self._tickets), self._clock.now_s(), event)
        try:
            self.post(want, waiter, timeout_s, lend, lend_to, wasted_ticks=wasted_ticks)
            event.wait()
        except BaseException:
            self.leave(waiter)
            raise
        return waiter.result()

    def waiter(self, wake: Callable[[], None]) -> Waiter:
        """A waiter whose caller waits in some other way than on a thread."""
        return Waiter(next(self._tickets), self._clock.now_s(), wake)

    def post(
        self,
        want: Want,
        waiter: Waiter,
        timeout_s: float | None,
        lend: Lend | None = None,
        lend_to: object = None,
        *,
        wasted_ticks: int = 0,
    ) -> None:
        """Want something; the waiter is woken with the answer.

        `wasted_ticks`: how many the caller drew in vain before it asked; for the counting of hits.

        Raises:
            TypeError: The timeout is no number.
            ValueError: It is not a number of seconds (NaN).
        """
        if self._is_forked:
            raise ForkedCacheError
        deadline_s = waiter.deadline_s(timeout_s)
        self._unheard[waiter.ticket] = waiter
        self._mailbox.put(_Ask(want, waiter, deadline_s, lend, lend_to, wasted_ticks))
        if self._is_over:
            waiter.offer(CacheClosedError())

    def leave(self, waiter: Waiter) -> None:
        """Stop waiting; an answer that came first is given back."""
        answer = waiter.leave()
        if answer is LEFT:
            self._mailbox.put(_Leave(waiter))
        elif isinstance(answer, tuple):
            for lease in answer:
                lease.close()

    def at_latest(self, in_s: float, act: Callable[[], None]) -> None:
        """Call `act` on the driver's thread in `in_s` seconds; for things that all last equally long, and are short."""
        self._fleeting.append((self._clock.now_s() + in_s, act))
        # Also where others wait before it: the caller who added one of them may have been interrupted here.
        self._mailbox.put(_POKE)

    def outside(self, job: Callable[[], None]) -> None:
        """Run what a user wrote: here, or on a thread of its own where here is the driver's."""
        if get_ident() != self._ident:
            job()
        elif not self._is_over:
            self._callbacks.submit(job)
        else:
            survive(job, "callback")

    def holders(self, name: str) -> tuple[str, ...]:
        """Who holds the open leases of a model, in words."""
        return self.sites.holders(self.gates[name])

    def is_loading_here(self, thread: int) -> str | None:
        """The model whose loader runs on this thread, if one does."""
        return self._loader_threads.get(thread)

    def look(self, read: Callable[[Machine], Any]) -> Any:
        """Read the machine while nothing changes it; `read` must be quick and change nothing."""
        if self._is_forked:
            raise ForkedCacheError
        if self._pool.is_interruptible() and not self._is_ending:
            return self._let_look(read)
        with self._lock:
            return read(self._machine)

    def _let_look(self, read: Callable[[Machine], Any]) -> Any:
        """The same on the driver's thread: a signal handler that closes the cache would wait for a lock held here."""
        event = self._pool.event()
        waiter = blocking(0, self._clock.now_s(), event)
        self._mailbox.put(_Look(read, waiter))
        while not event.wait(0.05):
            if self._is_ending or not self._thread.is_alive():
                return read(self._machine)
        return waiter.result()

    def glance(self, read: Callable[[Machine], Any]) -> Any:
        """Read single facts of the machine without the lock, which a thread that is stuck may hold."""
        if self._is_forked:
            raise ForkedCacheError
        return read(self._machine)

    def register(self, spec: ModelSpec) -> Gate:
        """Make the gate of a model and tell the machine; nothing is loaded."""
        if self._is_forked:
            raise ForkedCacheError
        gate = Gate()
        self.gates[spec.name] = gate
        self._mailbox.put(Registered(spec))
        return gate

    def stop(self) -> None:
        """Refuse whoever waits, let what is in flight end, stop every thread. Idempotent, from any thread.

        A loader that does not end within `GRACE_S` is left to itself, with a warning that names it.
        """
        if self._is_over or self._is_forked:
            return
        event = self._pool.event()
        self._mailbox.put(_Stop(event.set))
        while not (self._is_over or event.wait(0.05)) and self._thread.is_alive():
            pass
        self._thread.join()

    def disown(self) -> None:
        """In a forked child: the threads are the parent's. Every call fails from here on, and no hit succeeds."""
        self._is_forked = True
        # The parent's thread may have held it at the fork, and does not exist here to let it go.
        self._lock = self._pool.lock()
        for gate in self.gates.values():
            gate.close()
        for act in self.at_fork:
            act()

    @property
    def is_forked(self) -> bool:
        """This process was forked from the one that the cache belongs to."""
        return self._is_forked

    @property
    def is_sound(self) -> bool:
        """The driver's thread and its workers are alive, and it has met no bug of its own."""
        return self._bug is None and not self._is_over and self._thread.is_alive() and not self.ended_workers()

    def ended_workers(self) -> tuple[str, ...]:
        """The names of the workers that ended before the cache does; there should be none. Takes no lock."""
        links = (self._loads, self._ups, self._downs, self._files, self._looks, self._callbacks)
        names = chain.from_iterable(link.ended() for link in links)
        return () if self._stoppers else (*names, *self.herald.ended())

    def waits(self) -> tuple[float | None, float]:
        """Age of the oldest waiting request, and seconds since the last step. Takes no lock."""
        now_s = self._clock.now_s()
        waiters = [ask.waiter for ask in self._waiters.copy().values()]
        asked = [each.asked_s for each in (*waiters, *self._unheard.copy().values()) if not each.is_answered]
        return (now_s - min(asked) if asked else None), now_s - self._last_step_s

    def stalled(self, for_s: float) -> tuple[bool, tuple[str, ...]]:
        """Whether callers may wait in vain, and what gave no sign for so long, in words. Takes no lock.

        They may if the driver is stuck in one step, or if one has waited so long and what he may wait for gave no
        sign, or nothing that anybody waits for did.
        """
        now_s, since_s = self._clock.now_s(), self._step_since_s
        silent = self.watch.silent(for_s)
        words = tuple(work.silent_for(now_s - work.at_s) for work in silent)
        if since_s is not None and now_s - since_s >= for_s:
            return True, (f"the driver: in one step for {format_seconds(now_s - since_s)}", *words)
        oldest_s, _ = self.waits()
        is_quiet = now_s - self.watch.signed_s >= for_s or any(work.is_waited_for for work in silent)
        return oldest_s is not None and oldest_s >= for_s and is_quiet, words

    # --- the driver's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._ident = get_ident()
        while not self._is_over:
            self._step_since_s = None
            item = self._mailbox.get(self._next_deadline())
            now_s = self._step_since_s = self._clock.now_s()
            try:
                self._end_fleeting(now_s)
                with self._lock:
                    self._last_step_s = now_s
                    self._take(item, now_s)
                    self._expire(now_s)
            except Exception as error:
                # A bug of ours. Deciding on books that may be wrong would be worse than stopping: nobody is left
                # waiting, everything stays where it is, and `health` says so.
                _LOG.exception("the driver met a bug and decides nothing more")
                self._give_up(error)
            if self._stoppers:
                self._try_to_end(now_s)
            # An item holds models and errors; the next may be long in coming.
            del item

    def _give_up(self, error: Exception) -> None:
        self._bug = error
        bug = InvalidTransitionError("the driver", "running", type(error).__name__, (str(error),))
        bug.__cause__ = error
        for ask in self._waiters.values():
            ask.waiter.offer(own_copy(bug))
        self._waiters.clear()

    def _next_deadline(self) -> float | None:
        times = [self._timers[0][0]] if self._timers else []
        if self._fleeting:
            times.append(self._fleeting[0][0])
        # Once that is past, whatever ends says so itself: to wake for it again would be to spin.
        if self._stoppers and self._clock.now_s() < self._stop_by_s:
            times.append(self._stop_by_s)
        return min(times, default=None)

    def _end_fleeting(self, now_s: float) -> None:
        while self._fleeting and self._fleeting[0][0] <= now_s:
            _, act = self._fleeting.popleft()
            act()

    def _take(self, item: Any, now_s: float) -> None:
        if item is None or item is _POKE:
            return
        if self._bug is not None and isinstance(item, _Ask):
            item.waiter.offer(own_copy(InvalidTransitionError("the driver", "stopped by a bug", str(self._bug))))
            return
        if isinstance(item, _Ask):
            ticket = item.waiter.ticket
            self._waiters[ticket] = item
            self._unheard.pop(ticket, None)
            if isinstance(item.want, WantLease):
                self._story.arrived(self._machine, item.want.names, item.wasted_ticks)
            if item.deadline_s is not None:
                heapq.heappush(self._timers, (item.deadline_s, 0, ticket))
            self._drive(Asked(ticket, item.want), now_s)
        elif isinstance(item, _Leave):
            self._unheard.pop(item.waiter.ticket, None)
            if self._waiters.pop(item.waiter.ticket, None) is not None:
                self._drive(Left(item.waiter.ticket), now_s)
        elif isinstance(item, _Stop):
            self._stoppers.append(item.wake)
            if len(self._stoppers) == 1:
                self._stop_by_s = now_s + GRACE_S
                self._drive(Closing(), now_s)
        elif isinstance(item, MoveDone):
            self._land(item, now_s)
        elif isinstance(item, _Look):
            item.waiter.offer(_read(item.read, self._machine))
        else:
            self._drive(item, now_s)

    def _land(self, done: MoveDone, now_s: float) -> None:
        """A move was carried out: commit it, then tell of it."""
        part = self._machine.books.parts.get(done.part)
        flight = part.flight if part is not None and part.generation == done.generation else None
        # Whoever waits for this model is served, and forgotten, by what follows from the landing.
        name = flight.move.on_behalf_of if flight is not None else None
        asked = [
            ask.waiter.asked_s
            for ask in self._waiters.values()
            if isinstance(ask.want, WantLease) and name in ask.want.names
        ]
        self._drive(done, now_s)
        if part is None or flight is None:
            return
        wait_s = now_s - min(asked, default=now_s)
        event = self._story.tell(self._machine, part, flight.move, done.moved, now_s - self._started_s, wait_s)
        self.herald.publish(event, self._story.evicted_for(event))

    def _try_to_end(self, now_s: float) -> None:
        late = list(self._loader_threads.values())
        # After a bug the books may never say that nothing moves; the links end after what they are at all the same.
        is_moving = self._bug is None and not self._machine.flights.is_idle
        if is_moving or (late and now_s < self._stop_by_s):
            return
        self._is_ending = True  # nothing is decided any more
        if late:
            _LOG.warning("closed while loading models=%s; their loaders go on and their results are dropped", late)
        for link in (self._ups, self._downs, self._files, self._looks):
            for worker in link.stop():
                worker.join()
        for worker in self._loads.stop():
            worker.join(0.0 if late else None)
        self.herald.stop()
        for worker in self._callbacks.stop():
            worker.join(1.0)
        self._is_over = True
        # Whoever asked between the last look and now is in the mailbox, or sees `_is_over` himself.
        while (item := self._mailbox.get(now_s)) is not None:
            if isinstance(item, _Ask):
                self._unheard.pop(item.waiter.ticket, None)
                item.waiter.offer(CacheClosedError())
            elif isinstance(item, _Stop):
                item.wake()
        for wake in self._stoppers:
            wake()

    def _expire(self, now_s: float) -> None:
        while self._timers and self._timers[0][0] <= now_s:
            _, kind, ticket = heapq.heappop(self._timers)
            if kind == 1:
                self._drive(Tick(), now_s)
                continue
            ask = self._waiters.pop(ticket, None)
            if ask is None:
                continue
            ask.waiter.offer(self._timed_out(ask, now_s))
            self._story.count("timeouts")
            self._drive(Left(ticket), now_s)

    def _timed_out(self, ask: _Ask, now_s: float) -> LeaseTimeoutError:
        waiting = self._machine.waiting.get(ask.waiter.ticket)
        why = waiting.why if waiting is not None else ""
        held = tuple(
            f"{name} ({', '.join(self.holders(name))})"
            for name in (waiting.blocked_on if waiting is not None else ())
            if name in self.gates and self.gates[name].num_leases
        )
        label = waiting.label if waiting is not None else "the request"
        return LeaseTimeoutError(label, now_s - ask.waiter.asked_s, why or "its turn", held)

    def _drive(self, event: Event, now_s: float) -> None:
        """One event, and every instruction that follows from it, gates answered on the spot."""
        todo = deque(self._machine.handle(event, now_s))
        while todo:
            instruction = todo.popleft()
            if isinstance(instruction, CloseGate):
                gate = self.gates[instruction.name]
                gate.close()
                answer = GateBusy(instruction.name) if gate.num_leases else GateClosed(instruction.name)
                # Behind what was ordered earlier: a gate ordered open and then closed must end up closed.
                todo.extend(self._machine.handle(answer, now_s))
            else:
                self._order(instruction, now_s)

    def _order(self, instruction: Instruction, now_s: float) -> None:
        match instruction:
            case OpenGate(name, limit):
                gate = self.gates[name]
                gate.limit = limit
                gate.open_()
            case WatchGate(name):
                self._watch(name)
            case UnwatchGate(name):
                if name in self.gates:
                    self.gates[name].watched = False
            case StartLoad(name, generation):
                self._start_load(self._machine.books.models[name].spec, generation)
            case StartMove(move):
                self._start_move(move)
            case StartCheck(part):
                self._looks.submit(partial(self._look_for_writes, part))
            case DropImage(part):
                self._files.submit(partial(self._drop_image, part))
            case Forget(name):
                self.gates.pop(name, None)
                self._files.submit(partial(self._forget, name))
            case Unload(name, generation, error):
                self._loads.submit(partial(self._unload, name, generation, error))
            case Grant(ticket, names):
                self._grant(ticket, names, now_s)
            case Done(ticket):
                self._answer(ticket, instruction)
            case Refuse(ticket, error):
                self._story.count("refusals")
                self._answer(ticket, own_copy(error))
            case ArmTimer(at_s):
                heapq.heappush(self._timers, (at_s, 1, 0))
            case CloseGate():
                raise AssertionError(instruction)
            case _:
                assert_never(instruction)

    def _watch(self, name: str) -> None:
        gate = self.gates.get(name)
        if gate is None:
            return
        gate.watched = True
        if not gate.num_leases:
            # Whoever left before the flag was set told nobody.
            self._mailbox.put(LeaseReturned(name))

    def _grant(self, ticket: int, names: tuple[str, ...], now_s: float) -> None:
        ask = self._waiters.pop(ticket)
        self.watch.sign()
        assert ask.lend is not None
        leases = []
        for name in names:
            tick = next(self._ticks)
            leases.append(ask.lend(name, self.gates[name], tick))
            self.gates[name].admit(tick, ask.lend_to)
        if not ask.waiter.offer(tuple(leases)):
            for lease in leases:
                lease.close()

    def _answer(self, ticket: int, answer: object) -> None:
        ask = self._waiters.pop(ticket, None)
        if ask is None or ask.waiter.offer(answer):
            return
        if isinstance(answer, Done) and getattr(ask.want, "hold", False):
            self._mailbox.put(RoomReturned(ticket))

    # --- loads and moves, on the links' threads -------------------------------------------------------------------

    def _start_load(self, spec: ModelSpec, generation: int) -> None:
        job = partial(self._load, spec, generation)
        if self._is_asked_from_a_loader(spec.name):
            self._pool.spawn(f"modelcache-load-{spec.name}", job)
        else:
            self._loads.submit(job)

    def _is_asked_from_a_loader(self, name: str) -> bool:
        return any(
            isinstance(each.want, WantLease | WantCopy) and each.want.inside is not None and name in each.names
            for each in self._machine.waiting.values()
        )

    def _load(self, spec: ModelSpec, generation: int) -> None:
        thread = get_ident()
        self._loader_threads[thread] = spec.name
        try:
            self._require_going_on()
            with self.watch.over(f"the load of {spec.name!r}", self._progress) as work:
                facts = self._mover.load(spec, work)
            done: Event = LoadDone(spec.name, generation, facts)
        except ModelCacheError as error:
            done = LoadFailed(spec.name, generation, _without_frames(error))
        except BaseException as error:  # noqa: BLE001  The worker must survive whatever a loader raises.
            problem = f"raised {type(error).__name__}: {error}"
            done = LoadFailed(spec.name, generation, _caused(LoaderError(spec.name, str(spec.loader), problem), error))
        finally:
            del self._loader_threads[thread]
        self._mailbox.put(done)

    def _start_move(self, move: Move) -> None:
        if move.write_image:
            link = self._files
        else:
            link = self._ups if move.kind in (MoveKind.STAGE, MoveKind.PROMOTE) else self._downs
        link.submit(partial(self._move, move))

    def _move(self, move: Move) -> None:
        arriving = Arriving(move.part, move.generation)
        try:
            self._require_going_on()
            with self.watch.over(f"the {move.kind} of {move.part!r}", self._progress) as work:
                result = self._mover.move(move, work, partial(self._mailbox.put, arriving))
        except ModelCacheError as error:
            self._mailbox.put(MoveFailed(move.part, move.generation, error))
        except BaseException as error:  # noqa: BLE001  The worker must survive, and the books be put right.
            problem = f"{type(error).__name__}: {error}"
            failure = _caused(MoveError(move.part, str(move.before), str(move.after), problem), error)
            self._mailbox.put(MoveFailed(move.part, move.generation, failure))
        else:
            if isinstance(result, KeptWritten):
                self._mailbox.put(MoveKept(move.part, move.generation))
            else:
                self._mailbox.put(MoveDone(move.part, move.generation, result))

    def _require_going_on(self) -> None:
        """What was ordered before the end and comes to its turn after it is not begun: nobody waits for it any more."""
        if self._stoppers:
            raise CacheClosedError

    def _look_for_writes(self, part: str) -> None:
        is_clean = False
        try:
            with self.watch.over(f"the look for writes to {part!r}", is_waited_for=False):
                is_clean = self._mover.is_unwritten(part)
        except Exception:
            # The worker must survive; the move that gives the part up looks itself, and says what is wrong.
            _LOG.exception("failed while looking for writes to %s", part)
        self._mailbox.put(Checked(part, is_clean))

    def _drop_image(self, part: str) -> None:
        self._survive(partial(self._mover.drop_image, part), f"deleting the image file of {part}")

    def _forget(self, name: str) -> None:
        self._survive(partial(self._mover.forget, name), f"forgetting {name}")
        self._mailbox.put(Forgotten(name))

    def _unload(self, name: str, generation: int, error: Exception) -> None:
        self._survive(partial(self._mover.forget, name), f"forgetting {name}")
        self._mailbox.put(LoadFailed(name, generation, error))

    def _survive(self, job: Callable[[], None], what: str) -> None:
        try:
            with self.watch.over(what):
                job()
        except Exception:
            # The worker must survive; the books were closed when the order was given.
            _LOG.exception("failed while %s", what)

    def counters(self) -> Counters:
        """Counts since the start; hits are the leases that asked nobody."""
        # A count has no reader but its representation, and a second number to keep would not be free on the hit path.
        drawn = int(repr(self._ticks)[6:-1]) - 1
        counters: Counters = self.look(lambda _: self._story.counters(drawn))
        return counters


def _read(read: Callable[[Machine], Any], machine: Machine) -> Any:
    """What was read, or the error that whoever looks is to have: it changed nothing, and is not the driver's."""
    try:
        return read(machine)
    except BaseException as error:  # noqa: BLE001
        return error.with_traceback(None)


def own_copy(error: Exception) -> Exception:
    """An exception object for one waiter; the cause is shared, the traceback is not."""
    own = copy(error)
    own.__cause__ = error.__cause__
    return own


def _caused(error: Exception, cause: BaseException) -> Exception:
    """`error` because of `cause`."""
    error.__cause__ = cause
    return _without_frames(error)


def _without_frames(error: Exception) -> Exception:
    """The same error, the traceback of its cause kept as text: as frames it would keep their tensors alive.

    The error of a load is remembered until the next one; what the loader had built by then must not be.
    """
    if error.__cause__ is not None:
        text = "".join(traceback.format_exception(error.__cause__)).rstrip()
        error.add_note(f"The cause, as it was raised:\n{text}")
    left: list[BaseException] = [error]
    while left:
        each = left.pop()
        each.__traceback__ = None
        left += [other for other in (each.__cause__, each.__context__) if other is not None and other.__traceback__]
    return error
