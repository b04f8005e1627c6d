"""A bounded set of workers per link: loads, copies up, copies down, files."""

from __future__ import annotations

from collections.abc import Callable

from modelcache.runtime.ports import Clock, Mailbox, Pool, Worker

Job = Callable[[], None]


class Link:
    """Runs jobs on at most `num_workers` threads, in the order they came. Threads start when first needed.

    A job must not raise: what it found out it reports itself.
    """

    def __init__(self, name: str, pool: Pool, clock: Clock, num_workers: int) -> None:
        self._name = name
        self._pool = pool
        self._num_workers = num_workers
        self._jobs: Mailbox[Job | None] = pool.mailbox(clock)
        self._workers: list[Worker] = []
        self._num_queued = 0

    def submit(self, job: Job) -> None:
        """Queue a job. Called by one thread only."""
        if len(self._workers) < self._num_workers:
            number = len(self._workers)
            try:
                self._workers.append(self._pool.spawn(f"modelcache-{self._name}-{number}", self._work))
            except RuntimeError:
                # The system has no thread left. Those that there are do all of the work, if there are any.
                if not self._workers:
                    raise
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get(None)) is not None:
            job()
            # A job holds models and errors; the next may be long in coming.
            del job

    def stop(self) -> tuple[Worker, ...]:
        """Let every worker end after the jobs queued so far; returns them to be joined."""
        for _ in self._workers:
            self._jobs.put(None)
        return tuple(self._workers)
