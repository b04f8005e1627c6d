"""The hit path: from a name to a lease, without the lock where the gate is open.

Covers leases of one model and of several, for threads and for tasks. What a lease is is in `lease`, who decides in
`runtime`.
"""

from __future__ import annotations

import sys
import threading
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from threading import current_thread
from typing import Any, TypeVar, cast

from modelcache.core.messages import Want, WantLease
from modelcache.errors import CacheClosedError, ForkedCacheError, UnknownModelError
from modelcache.lease import (
    AskedLease,
    FirstUseLease,
    FirstUses,
    Lease,
    Leases,
    SeveralLeases,
    current_holder,
    running_loop,
)
from modelcache.runtime.driver import Driver
from modelcache.runtime.gate import Gate
from modelcache.runtime.ports import Mover

L = TypeVar("L", bound=Lease)


class Entry:
    """What the hit path knows of one model. `model` is set by its first lease."""

    __slots__ = ("gate", "model", "name")

    def __init__(self, name: str, gate: Gate) -> None:
        self.name = name
        self.gate = gate
        self.model: Any = None


class FrontDoor:
    """Leases for the cache and for its handles; implements `handle.Door`.

    Args:
        driver: Asked when a gate is closed.
        mover: The data plane; asked for objects, and around calls that start early.
        execution_device: The device calls run on.
        unknown: Makes the error about a name nobody registered.
        describe: Where a model is, in words.
        with_sites: Note where each lease is taken.
    """

    def __init__(
        self,
        driver: Driver,
        mover: Mover,
        execution_device: Callable[[], object],
        unknown: Callable[[str], UnknownModelError],
        describe: Callable[[str], str],
        *,
        with_sites: bool = False,
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self._driver = driver
        self._mover, self._object_of = mover, mover.object_of
        self._execution_device = execution_device
        self._device: object = None
        self._unknown = unknown
        self._describe = describe
        self._with_sites, self._sites = with_sites, driver.sites
        self._next_tick = driver.next_tick
        self._on_return = driver.lease_returned
        self._first_uses = FirstUses(driver.now_s, driver.at_latest, driver.lease_returned)
        driver.at_fork.append(self._first_uses.forget)
        self.is_closed = False

    # --- what handles ask -----------------------------------------------------------------------------------------

    def acquire(self, name: str, *, early: bool = False) -> Lease:
        """A lease on the usable model; blocks until it is had, or its last weights are on their way."""
        return self.lease(name, None, early=early)

    def object_of(self, name: str) -> Any:
        """The object the loader built."""
        entry = self.entry(name)
        return self._object_of(name) if entry.model is None else entry.model

    def has_weights(self, name: str, model: object) -> bool:
        """Whether the weights of a handle's model can be read where they are."""
        entry = self.entries.get(name)
        return entry is not None and entry.model is model and self._mover.has_bytes(name)

    def execution_device(self, name: str) -> object:
        """The device that calls run on: one for the life of the cache, and asked for on each call."""
        del name
        if self._device is None:
            self._device = self._execution_device()
        return self._device

    def state_of(self, name: str) -> str:
        """Where it is, in words."""
        return self._describe(name)

    def is_ready(self, name: str) -> bool:
        """A lease would be had at once."""
        entry = self.entries.get(name)
        return entry is not None and not entry.gate.closed

    # --- leases ---------------------------------------------------------------------------------------------------

    def entry(self, name: str) -> Entry:
        """The entry of a registered model.

        Raises:
            UnknownModelError: It is not registered.
            CacheClosedError: The cache was closed.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise self.refusal() or self._unknown(name)
        return entry

    def refusal(self) -> CacheClosedError | None:
        """Why nothing can be had any more, if so."""
        if self._driver.is_forked:
            return ForkedCacheError()
        return CacheClosedError() if self.is_closed else None

    def require_open(self) -> None:
        """Do nothing while leases can be had.

        No frame keeps the error: it would keep those of its caller, and all that they hold, until the garbage collector
        came by.

        Raises:
            CacheClosedError: The cache was closed.
            ForkedCacheError: It belongs to another process.
        """
        if self.refusal() is not None:
            raise self.refusal() or CacheClosedError

    def lease(self, name: str, timeout_s: float | None, kind: type[L] = Lease, *, early: bool = False) -> L:  # type: ignore[assignment]
        """A lease for the caller. A hit is all in here: each call more would cost a tenth of it."""
        try:
            entry = self.entries[name]
        except KeyError:
            entry = self.entry(name)
        # The model is read once: another caller's first lease may set it at any moment.
        gate, tick, model = entry.gate, self._next_tick(), entry.model
        holder = current_thread() if running_loop() is None else current_holder()
        # The lease exists before the gate knows of it, so an interrupt in between loses nothing.
        lease = kind(entry.name, gate, tick, self._on_return, model)
        if self._with_sites:
            self._note_site(lease, tick)
        # `Gate.enter`, written out.
        gate.open[tick] = holder
        if gate.closed or (gate.limit and len(gate.open) > gate.limit):
            lease.close()
            if early:
                (asked,) = self._ask((name,), timeout_s, AskedLease, holder, early=True)
                return cast("L", asked)
            (lease,) = self._ask((name,), timeout_s, kind, holder)
            return lease
        gate.tick = tick
        if model is None:
            self._fill(entry, lease)
        return lease

    def first_use(self, name: str, timeout_s: float | None) -> FirstUseLease:
        """A lease that ends by itself if nobody takes it over; the same steps as `lease`."""
        try:
            entry = self.entries[name]
        except KeyError:
            entry = self.entry(name)
        gate, tick, model = entry.gate, self._next_tick(), entry.model
        lease = FirstUseLease(entry.name, gate, tick, self._on_return, model)
        if self._with_sites:
            self._note_site(lease, tick)
        gate.open[tick] = None
        if gate.closed or (gate.limit and len(gate.open) > gate.limit):
            lease.close()
            (lease,) = self._ask((name,), timeout_s, FirstUseLease, None)
        else:
            gate.tick = tick
            if model is None:
                self._fill(entry, lease)
        self._first_uses.limit(lease)
        return lease

    def _note_site(self, lease: Lease, tick: int) -> None:
        lease.note_site(_site())
        self._sites.note(tick, lease)

    def _fill(self, entry: Entry, lease: Lease) -> None:
        """Nobody has leased it yet: a prefetch has opened the gate."""
        entry.model = self._object_of(entry.name)
        lease.fill(entry.model)

    def shut(self) -> frozenset[str]:
        """Let nobody in any more, once the driver has stopped; the models that somebody still has leased."""
        self._first_uses.end()
        gates = self._driver.gates.copy()
        for gate in gates.values():
            gate.close()  # a driver that met a bug may have left one open
        self.entries.clear()
        return frozenset(name for name, gate in gates.items() if gate.num_leases)

    def settle(self, name: str) -> None:
        """Wait until weights that are on their way are there; no-op otherwise, and once closed."""
        entry = self.entries.get(name)
        if entry is not None and entry.gate.closed and self.refusal() is None:
            self._mover.settle(name)

    def call(self, name: str) -> AbstractContextManager[None]:
        """Around a call under a lease that had to be asked for."""
        return self._mover.call(name)

    def limit_first_use(self, lease: FirstUseLease) -> None:
        """Let it end after its time."""
        self._first_uses.limit(lease)

    def many(self, names: tuple[str, ...], timeout_s: float | None) -> Leases:
        """Leases on several models, all or none; whoever waits for them holds none of them."""
        holder = current_holder()
        entered = self._enter_all(names, holder)
        return SeveralLeases(entered or self._ask(names, timeout_s, Lease, holder))

    def _enter_all(self, names: tuple[str, ...], holder: object) -> list[Lease] | None:
        leases: list[Lease] = []
        # An unknown name is refused before anything is leased.
        for entry in [self.entry(name) for name in names]:
            lease = self._enter(entry, Lease, holder)
            if lease is None:
                for taken in leases:
                    taken.close()
                return None
            leases.append(lease)
        return leases

    def _enter(self, entry: Entry, kind: type[L], holder: object) -> L | None:
        gate, tick, model = entry.gate, self._next_tick(), entry.model
        # The lease exists before the gate knows of it, as in `lease`.
        lease = kind(entry.name, gate, tick, self._on_return, model)
        if self._with_sites:
            self._note_site(lease, tick)
        if gate.enter(tick, holder):
            if model is None:
                self._fill(entry, lease)
            return lease
        lease.close()
        return None

    def _ask(
        self, names: tuple[str, ...], timeout_s: float | None, kind: type[L], lend_to: object, *, early: bool = False
    ) -> tuple[L, ...]:
        self.require_open()
        leases: tuple[L, ...] = self._driver.ask(
            self._want(names, early=early), timeout_s, self._lender(kind), lend_to, wasted_ticks=len(names)
        )
        return leases

    def _want(self, names: tuple[str, ...], *, early: bool = False) -> WantLease:
        return WantLease(names, current_holder(), self._driver.is_loading_here(threading.get_ident()), early)

    def _lender(self, kind: type[L]) -> Callable[[str, Gate, int], L]:
        site = _site() if self._with_sites else None

        def lend(name: str, gate: Gate, tick: int) -> L:
            entry = self.entries.get(name)
            model = self._object_of(name)
            if entry is not None and entry.gate is gate:
                entry.model = model
            lease = kind(name, gate, tick, self._on_return, model, site)
            if site is not None:
                self._sites.note(tick, lease)
            return lease

        return lend

    # --- the same for tasks ---------------------------------------------------------------------------------------

    async def alease(self, names: tuple[str, ...], timeout_s: float | None, kind: type[L]) -> tuple[L, ...]:
        """Leases for the running task, which waits without blocking its loop."""
        holder = None if kind is FirstUseLease else current_holder()
        if len(names) == 1:
            lease = self._enter(self.entry(names[0]), kind, holder)
            if lease is not None:
                return (lease,)
        for name in names:
            self.entry(name)
        leases: tuple[L, ...] = await self.await_answer(
            self._want(names), timeout_s, self._lender(kind), holder, wasted_ticks=len(names) == 1
        )
        return leases

    async def await_answer(
        self,
        want: Want,
        timeout_s: float | None,
        lend: Callable[[str, Gate, int], Any] | None = None,
        lend_to: object = None,
        *,
        wasted_ticks: int = 0,
    ) -> Any:
        """Want something and wait for it in a task; a task that is cancelled leaves and loses nothing."""
        self.require_open()
        loop = get_running_loop()
        woken = loop.create_future()
        waiter = self._driver.waiter(partial(_wake, loop, woken))
        try:
            self._driver.post(want, waiter, timeout_s, lend, lend_to, wasted_ticks=wasted_ticks)
            await woken
        except BaseException:
            self._driver.leave(waiter)
            raise
        return waiter.result()


def _wake(loop: AbstractEventLoop, woken: Any) -> None:
    """Wake a task from the driver's thread. A loop that is closed has nobody left to wake."""
    try:
        loop.call_soon_threadsafe(_set, woken)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _set(woken: Any) -> None:
    if not woken.done():
        woken.set_result(None)


def _site() -> str:
    """Where outside this package the present call was made."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("modelcache."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
