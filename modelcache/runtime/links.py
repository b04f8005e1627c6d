"""A bounded set of workers per link: loads, copies up, copies down, files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from modelcache.runtime.ports import Clock, Mailbox, Pool, Worker

_LOG = logging.getLogger("modelcache.runtime")
Job = Callable[[], None]


class Link:
    """Runs jobs on at most `num_workers` threads, in the order they came. Threads start when first needed.

    What a job found out it reports itself. One that raises is logged, and the next one is run all the same.
    """

    def __init__(self, name: str, pool: Pool, clock: Clock, num_workers: int) -> None:
        self._name = name
        self._pool = pool
        self._num_workers = num_workers
        self._jobs: Mailbox[Job | None] = pool.mailbox(clock)
        self._workers: list[Worker] = []

    def submit(self, job: Job) -> None:
        """Queue a job. Called by one thread only."""
        if len(self._workers) < self._num_workers:
            number = len(self._workers)
            try:
                self._workers.append(self._pool.spawn(self._worker_name(number), self._work))
            except RuntimeError:
                # The system has no thread left. Those that there are do all of the work, if there are any.
                if not self._workers:
                    raise
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get(None)) is not None:
            survive(job, self._name)
            # A job holds models and errors; the next may be long in coming.
            del job

    def ended(self) -> tuple[str, ...]:
        """The names of the workers that have ended. Until `stop` there should be none. Takes no lock."""
        return tuple(self._worker_name(n) for n, worker in enumerate(self._workers.copy()) if not worker.is_alive())

    def _worker_name(self, number: int) -> str:
        return f"modelcache-{self._name}-{number}"

    def stop(self) -> tuple[Worker, ...]:
        """Let every worker end after the jobs queued so far; returns them to be joined."""
        for _ in self._workers:
            self._jobs.put(None)
        return tuple(self._workers)


def survive(job: Job, link: str) -> None:
    """Run a job on a thread that others depend on: whatever it raises is logged, and goes no further.

    That is so for an exit and an interrupt too. User code that raises one here does not mean this thread.
    """
    try:
        job()
    except BaseException:  # noqa: BLE001  The thread must survive; a log handler may raise as well.
        with suppress(BaseException):
            _LOG.exception("a job failed link=%s", link)
