"""Work that nobody waits for, on a few threads of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock
from typing import Protocol

log = logging.getLogger("modelcache.dataplane")

_JOIN_S = 5.0  # after which a thread that hangs in the driver is left to itself

Job = Callable[[], None]


class Worker(Protocol):
    """A thread that was started."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or so many seconds."""


class Spawn(Protocol):
    """Starts a thread."""

    def __call__(self, name: str, run: Callable[[], None]) -> Worker:
        """Have a thread of this name run something."""


class Background:
    """Runs jobs in the order given. Thread-safe.

    Its lock guards the list of threads and is held while they are started.

    Args:
        spawn: Starts a thread; `None` for no threads: then nothing may be submitted.
        name: Of the threads.
        num_workers: How many there are once the first job may come.
    """

    def __init__(self, spawn: Spawn | None, name: str, num_workers: int) -> None:
        self._spawn, self._name, self._num_workers = spawn, name, num_workers
        self._lock = Lock()
        self._workers: list[Worker] = []
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.is_closed = False

    def start(self) -> bool:
        """Whether jobs will be run: there are threads, or they were started now."""
        with self._lock:
            if self.is_closed:
                return False
            while self._spawn is not None and len(self._workers) < self._num_workers:
                try:
                    self._workers.append(self._spawn(self._name, self._work))
                except RuntimeError as error:
                    log.warning("no thread for %s: %s; its work is done when it is asked for", self._name, error)
                    self._spawn = None
            return bool(self._workers)

    def submit(self, job: Job) -> None:
        """Have a job run, once `start` said that it will be. Never blocks; finalizers may call it."""
        if not self.is_closed:
            self._jobs.put(job)

    def close(self) -> None:
        """End the threads after the jobs that they are at; the others are dropped. Idempotent.

        A long job looks at `is_closed` now and then.
        """
        with self._lock:
            self.is_closed = True
            workers, self._workers = self._workers, []
        for _ in workers:
            self._jobs.put(None)
        for worker in workers:
            worker.join(_JOIN_S)
        while not self._jobs.empty():
            self._jobs.get()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self.is_closed:
            try:
                job()
            except Exception:  # whatever one job met, the next ones are run
                log.exception("a job of %s failed", self._name)
            del job  # or the memory that it is about would stay until the next one comes
