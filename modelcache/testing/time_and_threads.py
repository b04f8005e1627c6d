"""A clock that is moved by hand, and real threads whose waiting is seen: tests move the clock and never sleep."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import count
from typing import Any

from modelcache.runtime.ports import Clock

#: How long, in real seconds, a test waits for threads to come to rest before it is told which do not.
PATIENCE_S = 10.0
_LOOK_AGAIN = object()


class FakeClock:
    """Time that passes only when told to. Mailboxes made with it wake when their time comes.

    Args:
        start_s: What it shows at first.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._lock = threading.Lock()
        self._mailboxes: weakref.WeakSet[FakeMailbox] = weakref.WeakSet()

    def now_s(self) -> float:
        """Seconds, as of the last `advance`."""
        return self._now_s

    def advance(self, by_s: float) -> None:
        """Let time pass.

        Raises:
            ValueError: Below 0; a monotonic clock never goes back.
        """
        if by_s < 0:
            raise ValueError(f"a clock advances by 0 seconds or more, got {by_s}")
        with self._lock:
            self._now_s += by_s
            mailboxes = list(self._mailboxes)
        for mailbox in mailboxes:
            mailbox.put(_LOOK_AGAIN)

    def tell(self, mailbox: FakeMailbox) -> None:
        """Wake this mailbox whenever time has passed."""
        with self._lock:
            self._mailboxes.add(mailbox)


class FakeLock:
    """A lock, not re-entrant, that knows whether the calling thread holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> bool:
        if self.is_held_here:
            raise AssertionError("a thread takes a lock that it holds already: it would wait for itself")
        self._lock.acquire()
        self._owner = threading.get_ident()
        return True

    def __exit__(self, *exc: object) -> None:
        self._owner = None
        self._lock.release()

    @property
    def is_held_here(self) -> bool:
        """The calling thread is inside."""
        return self._owner == threading.get_ident()


class FakeEvent:
    """A flag whose waiting threads are seen by `FakePool.settle`. A timeout is real seconds, as everywhere."""

    def __init__(self, pool: FakePool) -> None:
        self._pool = pool
        self._flag = threading.Event()

    def set(self) -> None:
        """Raise the flag and wake who waits."""
        self._flag.set()
        self._pool.stir()

    def clear(self) -> None:
        """Lower it."""
        self._flag.clear()

    def is_set(self) -> bool:
        """Whether it is raised."""
        return self._flag.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is raised; False when `timeout` seconds passed first."""
        with self._pool.standing(lambda: not self._flag.is_set()):
            return self._flag.wait(timeout)


class FakeMailbox:
    """A queue on a fake clock. `put` takes no lock of Python's, so finalizers may call it."""

    def __init__(self, clock: FakeClock, pool: FakePool) -> None:
        self._clock = clock
        self._pool = pool
        self._items: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._keys = count()
        # What was put and not yet taken; an entry leaves it only after its reader no longer counts as waiting.
        self._unread: dict[int, None] = {}
        clock.tell(self)

    def put(self, item: Any) -> None:
        """Add an item; never blocks."""
        key = next(self._keys)
        self._unread[key] = None
        self._pool.stir()
        self._items.put((key, item))

    def get(self, until_s: float | None) -> Any | None:
        """The next item, or `None` once the clock reaches `until_s`."""
        while True:
            if until_s is not None and self._clock.now_s() >= until_s:
                try:
                    key, item = self._items.get_nowait()
                except queue.Empty:
                    return None
            else:
                with self._pool.standing(lambda: not self._unread):
                    key, item = self._items.get()
            self._unread.pop(key)
            if item is not _LOOK_AGAIN:
                return item


class Hold:
    """A step that stands still until it is let go; use it instead of a sleep."""

    def __init__(self, pool: FakePool) -> None:
        self._pool = pool
        self._reached, self._go = threading.Event(), threading.Event()

    def stand(self) -> None:
        """Announce, and stand here until `release`."""
        self._reached.set()
        with self._pool.standing(lambda: not self._go.is_set()):
            self._go.wait()

    def wait_reached(self, timeout: float | None = PATIENCE_S) -> bool:
        """Block until somebody stands here; False when `timeout` real seconds passed first."""
        return self._reached.wait(timeout)

    @property
    def is_reached(self) -> bool:
        """Somebody came here."""
        return self._reached.is_set()

    def release(self) -> None:
        """Let whoever stands here, and whoever comes, go on. Idempotent."""
        self._go.set()
        self._pool.stir()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class FakePool:
    """Real threads and primitives that know who waits, so that a test can wait until nothing happens any more."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._workers: dict[threading.Thread, None] = {}
        self._locks: list[FakeLock] = []
        # Thread identity -> whether what that thread waits for has yet to come.
        self._standing: dict[int, Callable[[], bool]] = {}
        # Another one since anybody was last given something to do.
        self._stir = object()

    # --- the port ---

    def lock(self) -> FakeLock:
        """A lock, not re-entrant."""
        lock = FakeLock()
        self._locks.append(lock)
        return lock

    def is_interruptible(self) -> bool:
        """As on real threads: on the main one."""
        return threading.get_ident() == threading.main_thread().ident

    def event(self) -> FakeEvent:
        """A flag."""
        return FakeEvent(self)

    def mailbox(self, clock: Clock) -> FakeMailbox:
        """A queue on `clock`.

        Raises:
            TypeError: Not a `FakeClock`: nothing would wake its readers.
        """
        if not isinstance(clock, FakeClock):
            raise TypeError(f"a FakePool needs a FakeClock, got {type(clock).__name__}; use both fakes or neither")
        return FakeMailbox(clock, self)

    def spawn(self, name: str, run: Callable[[], None]) -> threading.Thread:
        """Start a thread."""

        def work() -> None:
            try:
                run()
            finally:
                with self._changed:
                    del self._workers[thread]
                    self._changed.notify_all()

        thread = threading.Thread(target=work, name=name, daemon=True)
        self._workers[thread] = None
        thread.start()
        return thread

    # --- for tests ---

    def hold(self) -> Hold:
        """A place where a step can stand still, and be seen to."""
        return Hold(self)

    @contextmanager
    def standing(self, still: Callable[[], bool]) -> Generator[None]:
        """Count the calling thread as waiting, for as long as `still()`."""
        me = threading.get_ident()
        self._standing[me] = still
        with self._changed:
            self._changed.notify_all()
        try:
            yield
        finally:
            del self._standing[me]

    def settle(self, *, num_callers: int = 0) -> None:
        """Block until every thread of this pool waits, and at least `num_callers` threads of others wait on its events.

        What waits for the clock, for a `Hold` or for another step stays where it is: only a test can move it.

        Raises:
            TimeoutError: Some thread did not come to rest; it is named.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_settled(num_callers), PATIENCE_S):
                busy = ", ".join(thread.name for thread in self._busy()) or "none"
                raise TimeoutError(
                    f"after {PATIENCE_S} s, busy threads: {busy}; waiting callers: {self.num_callers} of {num_callers}"
                )

    def stir(self) -> None:
        """Somebody who waited may go on. Takes no lock."""
        self._stir = object()

    def _is_settled(self, num_callers: int) -> bool:
        # They are looked at one by one: one that stood still may have been woken by one that stands still by now. A
        # second look sees those that were woken by what is not of this pool, such as a future.
        while True:
            before = self._stir
            if self._busy() or self.num_callers < num_callers or self._busy():
                return False
            if self._stir is before:
                return True

    def _busy(self) -> list[threading.Thread]:
        return [thread for thread in self._workers.copy() if not self._is_standing(thread.ident)]

    def _is_standing(self, ident: int | None) -> bool:
        still = None if ident is None else self._standing.get(ident)
        return still is not None and still()

    @property
    def num_callers(self) -> int:
        """Threads not of this pool that wait on one of its events."""
        own = {thread.ident for thread in self._workers.copy()}
        return sum(ident not in own and self._is_standing(ident) for ident in self._standing.copy())

    @property
    def thread_names(self) -> tuple[str, ...]:
        """The names of its threads that have not ended."""
        return tuple(thread.name for thread in self._workers.copy())

    @property
    def is_locked_here(self) -> bool:
        """The calling thread holds a lock of this pool: no code of a user or of the data plane may see that."""
        return any(lock.is_held_here for lock in self._locks)
