"""The real clock and the real threads behind the ports."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from modelcache.runtime.ports import Clock


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
        """The next item, or `None` at `until_s`."""
        try:
            if until_s is None:
                return self._items.get()
            return self._items.get(timeout=max(0.0, until_s - self._clock.now_s()))
        except queue.Empty:
            return None


class ThreadPool:
    """Daemon threads: an interpreter that exits without `close()` is not held up by them."""

    def lock(self) -> threading.Lock:
        """A lock, not re-entrant."""
        return threading.Lock()

    def event(self) -> threading.Event:
        """A flag."""
        return threading.Event()

    def mailbox(self, clock: Clock) -> ThreadMailbox:
        """A queue of one reader."""
        return ThreadMailbox(clock)

    def spawn(self, name: str, run: Callable[[], None]) -> threading.Thread:
        """Start a thread."""
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread
