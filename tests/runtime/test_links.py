"""Links run jobs in order, on a bounded number of threads, and end after what was queued."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import pytest

from modelcache.runtime.links import Link
from modelcache.testing import FakeClock, FakePool


def test_one_worker_runs_jobs_in_the_order_they_came():
    pool, done = FakePool(), []
    link = Link("up", pool, FakeClock(), 1)
    assert pool.thread_names == ()
    for n in range(20):
        link.submit(lambda n=n: done.append(n))
    assert pool.thread_names == ("modelcache-up-0",)
    for worker in link.stop():
        worker.join(10)
    assert done == list(range(20))


def test_never_more_jobs_run_than_there_are_workers():
    pool, running, most = FakePool(), set(), []
    link = Link("up", pool, FakeClock(), 3)
    hold = pool.hold()

    def job():
        running.add(threading.get_ident())
        most.append(len(running))
        hold.stand()
        running.discard(threading.get_ident())

    for _ in range(10):
        link.submit(job)
    pool.settle()
    assert len(running) == 3
    hold.release()
    for worker in link.stop():
        worker.join(10)
    assert max(most) == 3
    assert len(most) == 10


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_job_that_raises_is_logged_and_the_next_one_is_run(error, caplog):
    pool, done = FakePool(), []

    def fail():
        raise error("of a job")

    link = Link("up", pool, FakeClock(), 1)
    link.submit(fail)
    link.submit(lambda: done.append(1))
    pool.settle()
    assert done == [1]
    assert "a job failed link=up" in caplog.text
    assert "of a job" in caplog.text
    for worker in link.stop():
        worker.join(10)


def test_a_log_handler_that_ends_the_thread_does_not():
    class Handler(logging.Handler):
        def emit(self, record):
            raise SystemExit

    pool, done = FakePool(), []
    link, handler = Link("up", pool, FakeClock(), 1), Handler()
    logging.getLogger("modelcache.runtime").addHandler(handler)
    try:
        link.submit(lambda: 1 / 0)
        link.submit(lambda: done.append(1))
        pool.settle()
    finally:
        logging.getLogger("modelcache.runtime").removeHandler(handler)
    assert done == [1]
    for worker in link.stop():
        worker.join(10)


def test_a_worker_that_has_ended_is_named():
    pool = FakePool()
    link = Link("up", pool, FakeClock(), 1)
    link.submit(lambda: None)
    pool.settle()
    assert link.ended() == ()
    link._jobs.put(None)
    pool.settle()
    assert link.ended() == ("modelcache-up-0",)


def test_stopping_what_never_ran_joins_nobody():
    assert Link("up", FakePool(), FakeClock(), 2).stop() == ()


def test_a_job_that_is_done_is_let_go():
    class Job:
        def __call__(self):
            pass

    pool = FakePool()
    link, job = Link("up", pool, FakeClock(), 1), Job()
    seen = weakref.ref(job)
    link.submit(job)
    del job
    pool.settle()
    gc.collect()
    assert seen() is None
    for worker in link.stop():
        worker.join(10)
