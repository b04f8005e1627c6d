"""The real clock and the real threads behind the ports."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from modelcache.runtime.ports import Clock

#: The longest single wait, for the system takes no time that is years away; who waits longer looks at the clock again.
_LONGEST_WAIT_S = 86_400.0


class SystemClock:
    """`time.monotonic`."""

    def now_s(self) -> float:
        """Seconds since some fixed instant."""
        return time.monotonic()


class ThreadMailbox:
    """A `queue.SimpleQueue`, the one queue whose `put` is safe in finalizers."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, item: Any) -> None:
        """Add an item; never blocks."""
        self._items.put(item)

    def get(self, until_s: float | None) -> Any | None:
        """The next item, or `None` at `until_s`, or sooner where that is days away."""
        try:
            if until_s is None:
                return self._items.get()
            return self._items.get(timeout=min(max(0.0, until_s - self._clock.now_s()), _LONGEST_WAIT_S))
        except queue.Empty:
            return None


class Flag:
    """A `threading.Event` whose waiting threads hold no lock.

    That one holds one around each wait: a signal handler that runs there keeps whoever sets the event from going on.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: dict[object, threading.Lock] = {}

    def is_set(self) -> bool:
        """It was set, and not cleared since."""
        return self._is_set

    def set(self) -> None:
        """Wake whoever waits, and let nobody wait from now on. Never blocks."""
        self._is_set = True
        # Each is taken out by one thread, so each is released once.
        while self._waiting:
            with contextlib.suppress(KeyError):
                _, latch = self._waiting.popitem()
                latch.release()

    def clear(self) -> None:
        """Let threads wait again."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is set, or so many seconds have passed; whether it is set."""
        latch, me = threading.Lock(), object()
        latch.acquire()
        self._waiting[me] = latch
        try:
            # Looked at after it can be seen that somebody waits: one of the two sees the other.
            if not self._is_set:
                latch.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), _LONGEST_WAIT_S))
        finally:
            self._waiting.pop(me, None)
        return self._is_set


class ThreadPool:
    """Daemon threads: an interpreter that exits without `close()` is not held up by them."""

    def lock(self) -> AbstractContextManager[object]:
        """A lock that a signal handler may take again where it interrupted its holder."""
        return threading.RLock()

    def is_interruptible(self) -> bool:
        """Python runs signal handlers on the main thread, between any two instructions."""
        return threading.get_ident() == threading.main_thread().ident

    def event(self) -> Flag:
        """A flag."""
        return Flag()

    def mailbox(self, clock: Clock) -> ThreadMailbox:
        """A queue of one reader."""
        return ThreadMailbox(clock)

    def spawn(self, name: str, run: Callable[[], None]) -> threading.Thread:
        """Start a thread."""
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread
