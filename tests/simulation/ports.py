"""The clock, the threads and their primitives of a simulation, as `modelcache.runtime.ports` wants them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
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

    def is_interruptible(self) -> bool:
        return False

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


class SimQueue:
    """A `queue.SimpleQueue`. Finalizers put into it, so that is no place to switch."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)

    def get(self) -> Any:
        if not self._items:
            self._scheduler.wait(self._items.__len__, "queue")
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items


class SimThread:
    """A `threading.Thread`, as far as the data plane uses it."""

    def __init__(self, pool: SimPool, *, target: Callable[[], None], name: str, daemon: bool) -> None:
        self._pool, self._target, self._name = pool, target, name
        self._worker: SimWorker | None = None

    def start(self) -> None:
        self._worker = self._pool.spawn(self._name, self._target)

    def join(self, timeout: float | None = None) -> None:
        assert self._worker is not None, f"{self._name} was never started"
        self._worker.join(timeout)


class SimExecutor:
    """A `ThreadPoolExecutor`, as far as the data plane uses it: each job is a task, so many at a time."""

    def __init__(self, scheduler: Scheduler, max_workers: int, thread_name_prefix: str = "") -> None:
        self._scheduler, self._max_workers, self._name = scheduler, max_workers, thread_name_prefix
        self._running: dict[Task, None] = {}
        self._jobs: list[tuple[Task, Future[Any]]] = []

    def submit(self, run: Callable[..., Any], *args: Any) -> SimFuture:
        future = SimFuture(self._scheduler)

        def work() -> None:
            task = self._scheduler.current
            assert task is not None
            self._scheduler.wait(lambda: len(self._running) < self._max_workers or future.cancelled(), "a free worker")
            if not future.set_running_or_notify_cancel():
                return
            self._running[task] = None
            try:
                future.set_result(run(*args))
            except BaseException as error:
                future.set_exception(error)
            finally:
                del self._running[task]

        self._jobs.append((self._scheduler.spawn(self._name, work), future))
        return future

    def map(self, run: Callable[[Any], Any], *items: Iterable[Any]) -> Iterator[Any]:
        futures = [self.submit(run, *each) for each in zip(*items, strict=True)]
        return (future.result() for future in futures)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for _, future in self._jobs if cancel_futures else ():
            future.cancel()
        if wait:
            self._scheduler.wait(lambda: all(task.is_over for task, _ in self._jobs), f"shutdown of {self._name}")

    def __enter__(self) -> SimExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()


class SimFuture(Future[Any]):
    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler

    def result(self, timeout: float | None = None) -> Any:
        self._scheduler.wait(self.done, "a future")
        return super().result(0)
