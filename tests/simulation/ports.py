"""The clock, the threads and their primitives of a simulation, as `modelcache.runtime.ports` wants them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from simulation.scheduler import Scheduler, Task


class SimClock:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def now_s(self) -> float:
        return self._scheduler.now_s


class SimLock:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.owner: Task | None = None
        self._is_taken = False

    def __enter__(self) -> bool:
        task = self._scheduler.current
        if task is not None:
            assert self.owner is not task, f"{task.name} takes a lock that it holds: it would wait for itself"
            self._scheduler.switch("lock")
            if self._is_taken:
                self._scheduler.wait(lambda: not self._is_taken, "lock")
        assert not self._is_taken, "a lock is taken between two switches"
        self._is_taken, self.owner = True, task
        return True

    def __exit__(self, *exc: object) -> None:
        self._is_taken, self.owner = False, None


class SimEvent:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_set = False

    def set(self) -> None:
        self._is_set = True
        self._scheduler.switch("event set")

    def clear(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        until_s = None if timeout is None else self._scheduler.now_s + timeout
        return self._scheduler.wait(self.is_set, "event", until_s)


class SimMailbox:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._scheduler.switch("mailbox put")

    def get(self, until_s: float | None) -> Any | None:
        if not self._scheduler.wait(lambda: bool(self._items), "mailbox", until_s):
            return None
        return self._items.popleft()


class SimWorker:
    def __init__(self, scheduler: Scheduler, task: Task) -> None:
        self._scheduler, self._task = scheduler, task
        self.name = task.name

    def join(self, timeout: float | None = None) -> None:
        until_s = None if timeout is None else self._scheduler.now_s + timeout
        self._scheduler.wait(lambda: self._task.is_over, f"join {self.name}", until_s)

    def is_alive(self) -> bool:
        return not self._task.is_over


class SimPool:
    """The pool of a simulation; also what `FakeMover` asks of a `FakePool`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._locks: list[SimLock] = []

    def lock(self) -> SimLock:
        self._locks.append(lock := SimLock(self._scheduler))
        return lock

    def event(self) -> SimEvent:
        return SimEvent(self._scheduler)

    def mailbox(self, clock: object) -> SimMailbox:
        return SimMailbox(self._scheduler)

    def spawn(self, name: str, run: Callable[[], None]) -> SimWorker:
        return SimWorker(self._scheduler, self._scheduler.spawn(name, run))

    @property
    def is_locked_here(self) -> bool:
        task = self._scheduler.current
        return task is not None and any(lock.owner is task for lock in self._locks)
