"""Links run jobs in order, on a bounded number of threads, and end after what was queued."""

from __future__ import annotations

import gc
import threading
import weakref

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
