"""ModelCache: the front door. Wiring only; what is decided is decided in `core`, what moves moves in `dataplane`."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar

from modelcache.core.explain import Forecast, explain, forecast
from modelcache.core.messages import (
    Pinned,
    RoomReturned,
    Want,
    WantBudget,
    WantCopy,
    WantDown,
    WantGone,
    WantRoom,
)
from modelcache.display import as_html, as_text, one_line
from modelcache.door import Entry, FrontDoor
from modelcache.errors import LeaseError
from modelcache.futures import MoveFuture
from modelcache.handle import ModelHandle
from modelcache.lease import FirstUseLease, Lease, Leases, SoleLease, current_holder
from modelcache.registry import Registry, build_spec
from modelcache.runtime.driver import Driver
from modelcache.runtime.governor import Governor
from modelcache.runtime.herald import Subscriber
from modelcache.snapshots import cache_stats, model_stats, pressures
from modelcache.spec import ModelSpec
from modelcache.stats import CacheStats, Freed, Health, ModelStats, MoveEvent
from modelcache.tier import Tier
from modelcache.wiring import Parts, assemble, assemble_file, forked_away, read_size

_LOG = logging.getLogger("modelcache")
F = TypeVar("F", bound=Callable[..., Any])
#: How long somebody may wait while nothing gives a sign of life before the cache no longer calls itself ready.
STALL_S = 10.0


class ModelCache:
    """An LRU cache for whole PyTorch models: GPU memory over RAM over disk.

    What is not given has the value of its environment variable, such as ``MODELCACHE_BUDGETS__VRAM``, or else its
    default. Use it as a context manager, or `close` it. All methods may be called from any thread; those that take a
    model's name raise `UnknownModelError` for one that is not registered, and `CacheClosedError` after `close`.

    Args:
        vram: Budget of the device: ``"20GiB"``, ``"80%"`` (of its memory less what others hold), ``"auto"`` (80 %, the
            default), or bytes.
        ram: Budget of RAM, likewise; ``"auto"`` is half. A percentage is of the machine or the container.
        page_locked: How much of `ram` may be page-locked, for asynchronous copies.
        ram_spare: How much of `ram` is kept mapped and touched ahead of the next load; ``"auto"`` is one segment, or
            nothing where that is more than 1/32 of `ram`.
        disk: Budget of image files, for models whose loader cannot be called again; none by default.
        device: ``"auto"`` (the default: the first CUDA device, else RAM), ``"cuda:0"``, ``"simulated"``,
            ``"host_only"``, or a device object of `modelcache.testing`.
        memory: ``"allocated"``, or ``"mapped"``: a model's memory on the device comes back at the same addresses, which
            CUDA graphs and compiled models need. A device object has its own.
        policy: Which copies go first: ``"lru"`` or ``"cost"``.
        when_full: ``"wait"`` for a lease to be returned, or ``"reject"`` with `BudgetExhaustedError`.
        idle: Park a model after this long without a lease, such as ``"10m"``; a model's own `idle` wins.
        pressure: ``"watch"`` lowers budgets while memory is short or others take it, and raises them again, never above
            what was given; ``"off"`` (the default) leaves them as they are.
        max_waiters: More callers than this get `QueueFullError`.
        image_dir: Where image files go; a folder of this user's cache by default.
        segment: Bytes of a segment, the unit of moving.
        progress: Show a bar for what takes longer than two seconds, on a terminal or in a notebook.
        lease_sites: Note where each lease is taken, to name it when it leaks. Costs some microseconds a hit.

    Raises:
        ConfigError: A value cannot be used, or exceeds the machine; every problem at once.
    """

    def __init__(
        self,
        *,
        vram: int | str | None = None,
        ram: int | str | None = None,
        page_locked: int | str | None = None,
        ram_spare: int | str | None = None,
        disk: int | str | None = None,
        device: Any = None,
        memory: str | None = None,
        policy: str | None = None,
        when_full: str | None = None,
        idle: str | None = None,
        pressure: str | None = None,
        max_waiters: int | None = None,
        image_dir: str | PathLike[str] | None = None,
        segment: int | str | None = None,
        progress: bool | None = None,
        lease_sites: bool | None = None,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__", "given")}
        self._open(assemble(given))

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> ModelCache:
        """A cache as a file describes it, its models registered and its `preload` list on its way up.

        Raises:
            ConfigError: Every problem of the file, each with file, line, column and key.
        """
        parts = assemble_file(path)
        cache = cls.__new__(cls)
        cache._open(parts)
        for spec in parts.specs:
            cache._register(spec)
        for name in parts.preload:
            cache.prefetch(name)
        return cache

    @classmethod
    def _of(cls, parts: Parts) -> ModelCache:
        """A cache over parts made elsewhere: fakes, or a clock of one's own."""
        cache = cls.__new__(cls)
        cache._open(parts)
        return cache

    def _open(self, parts: Parts) -> None:
        self._parts = parts
        self._driver = Driver(
            parts.budgets, parts.mover, parts.clock, parts.pool, policy=parts.policy, progress=parts.progress
        )
        self._registry = Registry()
        self._door = FrontDoor(
            self._driver,
            parts.mover,
            parts.execution_device,
            self._registry.unknown,
            self._describe,
            with_sites=parts.lease_sites,
        )
        self._governor: Governor | None = None
        if parts.gauge is not None:
            self._governor = Governor(
                self._driver,
                parts.gauge,
                parts.clock,
                parts.pool,
                release=parts.mover.release_cached,
                vram_share=parts.vram_share,
            )
        self._close_lock = threading.Lock()
        # A name changes hands in one step for whoever registers and whoever unregisters.
        self._naming = parts.pool.lock()
        # The threads that close it now: what they run meanwhile, a signal handler or a finalizer, need not.
        self._closers: dict[int, None] = {}
        self._end_lock = threading.Lock()
        self._is_given_up = False
        self._leaving: dict[str, MoveFuture] = {}
        forked_away(self._driver)
        atexit.register(self.close)

    # --- models ---------------------------------------------------------------------------------------------------

    def register(self, name: str, loader: object = None, **options: Any) -> None:
        """Register a model; nothing is loaded.

        Loaders run on threads of the cache, several at a time. One that needs other models asks for them on the thread
        that it runs on, with `get`, `lease_many` or `prefetch`: asked for on threads of its own making, they may wait
        for this load to end, and it for them. One with ``reload=True`` must give the same bits each time; torch's
        default generator is everybody's, so ``torch.manual_seed`` does not see to that while others load. Read from
        files, or fill from a ``torch.Generator`` of the loader's own.

        Args:
            name: 1 to 64 of ``a-z 0-9 . _ -``.
            loader: A callable without arguments, a ``"pkg.module:function"`` string, or a named loader:
                ``"transformers"``, ``"sentence-transformers"`` (both with `path`), or ``"safetensors"``, which is
                meant when `model` and `weights` are given.
            **options: `size` (of weights and buffers, if known), `workspace` (what a running model needs beside its
                weights), `pin` (``"vram"`` or ``"ram"``), `priority` (``"low"``, ``"normal"``, ``"high"``), `idle`
                (``"10m"``, ``"never"``), `concurrency` (leases at a time; 0 for any number), `reload` (the callable
                may be called again, and gives the same bits), `on_write` (``"writeback"``, ``"refuse"``,
                ``"discard"``), and the options of named loaders: `path`, `dtype`, `model`, `weights`, `task`, ...

        Raises:
            ValueError: A name that is taken or not valid, or a value that cannot be used.
            TypeError: A value of the wrong type.
        """
        if "idle" not in options and self._parts.idle_s is not None:
            options["idle"] = self._parts.idle_s
        self._register(build_spec(name, loader, **options))

    def _register(self, spec: ModelSpec) -> None:
        # Before the lock, as in `unregister`.
        self._door.require_open()
        with self._naming:
            leaving = self._leaving.get(spec.name)
            if leaving is not None and not leaving.done():
                raise ValueError(f"{spec.name!r} was unregistered but is still leased; return its leases first")
            self._leaving.pop(spec.name, None)
            self._registry.add(spec)
            self._door.entries[spec.name] = Entry(spec.name, self._driver.register(spec))

    def model(self, name: str, **options: Any) -> Callable[[F], F]:
        """Decorator form of `register`: the function is the loader, and is returned unchanged."""

        def register(loader: F) -> F:
            self.register(name, loader, **options)
            return loader

        return register

    def unregister(self, name: str) -> None:
        """Forget a model and everything it holds; a leased one when its last lease is returned."""
        if self._driver.is_loading_here(threading.get_ident()) == name:
            raise LeaseError(f"the loader of {name!r} cannot unregister it; do that after its load")
        # Before the lock: in a forked child nobody may be left to let it go.
        self._door.require_open()
        with self._naming:
            entry = self._door.entry(name)
            future = self._leaving[name] = self._post(WantGone(name, current_holder()), None)
            self._registry.remove(name)
            del self._door.entries[name]
        if not entry.gate.num_leases:
            future.result()

    def names(self) -> tuple[str, ...]:
        """The registered names, in the order they came."""
        return self._registry.names()

    def __contains__(self, name: object) -> bool:
        return name in self._door.entries

    def __len__(self) -> int:
        return len(self._door.entries)

    # --- use ------------------------------------------------------------------------------------------------------

    def get(self, name: str, *, timeout: float | None = None) -> ModelHandle:
        """A handle on a model that is usable now; blocks until it is.

        Args:
            name: A registered model.
            timeout: Seconds; `None` waits.

        Raises:
            LeaseTimeoutError: It was not usable in time; names who holds what it waited for.
            ModelTooLargeError: It exceeds a whole budget; nobody was evicted for it.
            LoaderError: Its loader raised.
        """
        return ModelHandle(name, self._door, self._door.first_use(name, timeout))

    def aget(self, name: str, *, timeout: float | None = None) -> AsyncGet:
        """The same for tasks: ``await`` it for a handle, or ``async with`` it for the raw object under one lease."""
        return AsyncGet(self._door, name, timeout)

    def lease_many(self, *names: str, timeout: float | None = None) -> Leases:
        """Leases on several models at once, all or none: ``with cache.lease_many("a", "b") as (a, b):``.

        Callers who take together what they need together never wait for each other in a circle.

        Raises:
            ValueError: No name, or one twice.
        """
        if len(names) == 1:
            return self._door.lease(names[0], timeout, SoleLease)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"lease_many takes each model once and at least one, got {names!r}")
        return self._door.many(names, timeout)

    def prefetch(self, name: str, tier: Tier = Tier.VRAM) -> MoveFuture:
        """Start bringing a model up to `tier` and return at once.

        It never evicts a leased or pinned copy, yields to whoever waits for a lease, and is given up with
        `BudgetExhaustedError` when leases leave no room.
        """
        self._door.entry(name)
        return self._post(WantCopy(name, Tier(tier), self._driver.is_loading_here(threading.get_ident())), None)

    # --- explicit moves -------------------------------------------------------------------------------------------

    def pin(self, name: str, tier: Tier = Tier.VRAM) -> None:
        """Hold a model on `tier` against eviction, from when it gets there. It moves nothing: see `prefetch`."""
        self._pin(name, Tier(tier))

    def unpin(self, name: str) -> None:
        """Lift the hold."""
        self._pin(name, None)

    def _pin(self, name: str, tier: Tier | None) -> None:
        self._door.entry(name)
        self._door.require_open()
        self._driver.tell(Pinned(name, tier))

    def park(self, name: str, *, timeout: float | None = None) -> Freed:
        """Give up a model's VRAM and keep its RAM copy, once its leases are returned."""
        return self._down(name, Tier.RAM, timeout)

    def evict(self, name: str, *, to: Tier = Tier.DISK, timeout: float | None = None) -> Freed:
        """Give up a model's copies above `to`, once its leases are returned; what no file holds is written to one."""
        return self._down(name, Tier(to), timeout)

    def _down(self, name: str, tier: Tier, timeout: float | None) -> Freed:
        self._door.entry(name)
        if tier is Tier.VRAM:
            raise ValueError("a model is given up to Tier.RAM or Tier.DISK")
        return self._measured(WantDown(name, tier, current_holder()), timeout)

    def free(
        self, *, vram: int | str | None = None, ram: int | str | None = None, timeout: float | None = None
    ) -> Freed:
        """Make room now, least recently used models first.

        Raises:
            BudgetExhaustedError: That much cannot be freed; nobody was evicted.
        """
        freed = Freed(0, 0)
        for tier, size in _sizes(vram, ram):
            one = self._measured(WantRoom(tier, size, hold=False, holder=current_holder()), timeout)
            freed = Freed(freed.vram_bytes + one.vram_bytes, freed.ram_bytes + one.ram_bytes)
        return freed

    @contextmanager
    def reserve(
        self, *, vram: int | str | None = None, ram: int | str | None = None, timeout: float | None = None
    ) -> Generator[None]:
        """Hold room for other people's work for the length of the block."""
        held: list[MoveFuture] = []
        try:
            for tier, size in _sizes(vram, ram):
                future = self._post(WantRoom(tier, size, hold=True, holder=current_holder()), timeout)
                held.append(future)
                future.result()
            yield
        finally:
            for future in held:
                future.cancel()
                self._driver.tell(RoomReturned(future.ticket))

    def resize(self, *, vram: int | str | None = None, ram: int | str | None = None) -> None:
        """Change budgets. A lowered one is reached as far as leases allow; the rest follows as they are returned.

        With `pressure="watch"` these are the budgets that it lowers from and raises to.
        """
        for tier, size in _sizes(vram, ram):
            self._driver.ask(WantBudget(tier, size))

    def _post(self, want: Want, timeout: float | None) -> MoveFuture:
        self._door.require_open()
        return MoveFuture(self._driver, want, timeout)

    def _measured(self, want: Want, timeout: float | None) -> Freed:
        self._door.require_open()
        before = self._parts.measure()
        self._driver.ask(want, timeout)
        self._parts.mover.release_cached()
        after = self._parts.measure()
        return Freed(max(0, after.vram - before.vram), max(0, before.ram - after.ram))

    # --- looking; never a use -------------------------------------------------------------------------------------

    def info(self, name: str) -> ModelStats:
        """Where one model is and what it takes there."""
        self._door.entry(name)
        stats: ModelStats = self._driver.look(partial(model_stats, name=name, holders=self._driver.holders))
        return stats

    def status(self) -> CacheStats:
        """Everything at one instant."""
        counters = self._driver.counters()
        stats: CacheStats = self._driver.look(
            partial(
                cache_stats,
                device=self._parts.device_name,
                counters=counters,
                names=self.names(),
                holders=self._driver.holders,
            )
        )
        return stats if self._governor is None else replace(stats, budget_changes=self._governor.changes())

    def plan(self, *names: str) -> Forecast:
        """What asking for these models together would do now: what fits, and who would give something up."""
        for name in names:
            self._door.entry(name)
        what: Forecast = self._driver.look(partial(forecast, names=names))
        return what

    def explain(self, name: str) -> str:
        """Why a model is where it is, in words."""
        self._door.entry(name)
        words: str = self._driver.look(partial(explain, name=name))
        return words

    def events(self) -> tuple[MoveEvent, ...]:
        """The last committed moves, oldest first."""
        return self._driver.herald.events()

    def on(self, event: str, fn: Subscriber) -> Callable[[], None]:
        """Call `fn` with each committed move: ``"move"`` for all, or a kind such as ``"evict"``.

        ``"budget"`` is each `BudgetChange` that `pressure="watch"` makes; without that there are none. It runs on a
        thread of its own, and may call the cache. Returns what ends the subscription.
        """
        if event == "budget":
            return (lambda: None) if self._governor is None else self._governor.on_change(fn)
        return self._driver.herald.on(event, fn)

    def health(self) -> Health:
        """Whether the cache makes progress. It answers whatever is stuck: it waits for no lock and no thread."""
        device: str = self._driver.glance(lambda machine: "ok" if machine.poison is None else str(machine.poison))
        pressure: tuple[str, ...] = self._driver.glance(pressures)
        if self._governor is not None:
            pressure += self._governor.problems()
        oldest_s, last_step_s = self._driver.waits()
        is_stalled, stalled = self._driver.stalled(STALL_S)
        stalled += tuple(f"{name}: the thread has ended" for name in self._driver.ended_workers())
        is_ready = device == "ok" and not is_stalled and self._door.refusal() is None and self._driver.is_sound
        return Health(is_ready, oldest_s, last_step_s, device, pressure, stalled)

    def _describe(self, name: str) -> str:
        return one_line(self.info(name))

    def __repr__(self) -> str:
        if self._door.refusal() is not None:
            return "<ModelCache, closed>"
        return as_text(self.status())

    def _repr_html_(self) -> str:
        return as_html(self.status())

    # --- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything up. Idempotent, from any thread; whoever waits gets `CacheClosedError`.

        Models still leased are named in a warning. They stay whole and usable until nobody holds their objects any
        more, and take their memory until then: return leases before closing. All others have no weights after this.
        A signal handler or a finalizer may close too; within a close it returns at once.
        """
        me = threading.get_ident()
        if self._driver.is_forked or me in self._closers:
            return
        try:
            self._closers[me] = None
            with self._close_lock:
                if not self._is_given_up:
                    self._close()
        finally:
            self._closers.pop(me, None)

    def _close(self) -> None:
        if not self._door.is_closed:
            self._door.is_closed = True
            self._warn_leased()
        # Each step may be done again: whoever was interrupted in one, by a Ctrl-C, can close once more.
        if self._governor is not None:
            self._governor.stop()
        self._driver.stop()
        self._give_up_elsewhere()
        atexit.unregister(self.close)

    def _give_up_elsewhere(self) -> None:
        """On a thread of its own, where no Ctrl-C can tear it: one that comes meanwhile does not end it."""
        errors: list[BaseException] = []

        def give_up() -> None:
            try:
                self._closers[threading.get_ident()] = None
                self._give_up()
            except BaseException as error:  # noqa: BLE001  Whatever it is, it is for whoever closes.
                errors.append(error)
            finally:
                self._closers.pop(threading.get_ident(), None)

        try:
            worker = self._parts.pool.spawn("modelcache-closing", give_up)
        except RuntimeError:  # the interpreter ends, or the system has no thread left
            give_up()
        else:
            worker.join()
        if errors:
            raise errors.pop()

    def _give_up(self) -> None:
        with self._end_lock:
            if not self._is_given_up:
                self._parts.close(self._door.shut())
                self._is_given_up = True

    def _warn_leased(self) -> None:
        held = {name: self._driver.sites.holders(e.gate, known=True) for name, e in self._door.entries.copy().items()}
        open_leases = {name: list(holders) for name, holders in held.items() if holders}
        if open_leases:
            _LOG.warning("closed with open leases=%s; return them before closing", open_leases)

    async def aclose(self) -> None:
        """The same without blocking the event loop."""
        from asyncio import to_thread

        await to_thread(self.close)

    def __enter__(self) -> ModelCache:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> ModelCache:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncGet(Awaitable[ModelHandle]):
    """What `aget` returns: awaited, a handle; entered, the raw object under one lease until the block ends."""

    def __init__(self, door: FrontDoor, name: str, timeout_s: float | None) -> None:
        self._door = door
        self._name = name
        self._timeout_s = timeout_s
        self._leases: list[Lease] = []

    def __await__(self) -> Generator[Any, Any, ModelHandle]:
        return self._handle().__await__()

    async def _handle(self) -> ModelHandle:
        (first,) = await self._door.alease((self._name,), self._timeout_s, FirstUseLease)
        self._door.limit_first_use(first)
        return ModelHandle(self._name, self._door, first)

    async def __aenter__(self) -> Any:
        (lease,) = await self._door.alease((self._name,), self._timeout_s, Lease)
        self._leases.append(lease)
        return lease.model

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leases.pop().close()


def _sizes(vram: int | str | None, ram: int | str | None) -> list[tuple[Tier, int]]:
    given = [(tier, read_size(size)) for tier, size in ((Tier.VRAM, vram), (Tier.RAM, ram)) if size is not None]
    if not given:
        raise ValueError('say how much: vram="8GiB" or ram="8GiB"')
    return given
