"""For the length of a schedule: the names under which shipped code asks who runs, or makes what threads wait on.

Whatever could make a thread wait is a place to switch, and a task of the simulation counts as a thread. Nothing else of
the code is touched.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from simulation.ports import SimExecutor, SimPool, SimQueue, SimThread
from simulation.scheduler import Scheduler, Task

import modelcache.cache
import modelcache.door
import modelcache.handle
import modelcache.lease
import modelcache.runtime.driver
from modelcache.futures import MoveFuture
from modelcache.runtime.gate import Gate

Names = Iterable[tuple[Any, dict[str, Any]]]


@contextmanager
def threads_of(scheduler: Scheduler, pool: SimPool) -> Generator[None]:
    """Let a task count as a thread, and every read and write at a gate be a place to switch."""
    outside = SimpleNamespace(name="outside")

    def here() -> Task | SimpleNamespace:
        return scheduler.current or outside

    class SwitchingGate(Gate):
        __slots__ = ("_is_closed",)

        @property
        def closed(self) -> bool:
            scheduler.switch("gate read")
            return self._is_closed

        @closed.setter
        def closed(self, is_closed: bool) -> None:
            self._is_closed = is_closed
            scheduler.switch("gate write")

    def result(future: MoveFuture, timeout: float | None = None) -> None:
        scheduler.wait(future.done, "future")
        Future.result(future, 0)

    asking = SimpleNamespace(get_ident=lambda: id(here()), current_thread=here, Lock=pool.lock)
    with replaced(
        (
            (modelcache.door, {"current_thread": here, "current_holder": here, "threading": asking}),
            (modelcache.handle, {"current_thread": here, "get_ident": asking.get_ident}),
            (modelcache.cache, {"threading": asking}),
            (MoveFuture, {"result": result}),
            (modelcache.runtime.driver, {"get_ident": asking.get_ident, "Gate": SwitchingGate}),
        )
    ):
        yield


@contextmanager
def data_plane_of(scheduler: Scheduler, pool: SimPool) -> Generator[None]:
    """Let the locks, queues, threads and readers of the data plane be those of the simulation."""
    from modelcache.dataplane import arrival, bringing_up, mover, staging
    from modelcache.dataplane.device import simulated_streams
    from modelcache.dataplane.files import reading as file_reading
    from modelcache.dataplane.images import directory as image_directory
    from modelcache.dataplane.images import files as image_files
    from modelcache.dataplane.images import keeping
    from modelcache.dataplane.images import kept as kept_images
    from modelcache.dataplane.images import reading as image_reading
    from modelcache.dataplane.memory import background, blocks, spare_pages

    lock = {"Lock": pool.lock}
    executor = {"ThreadPoolExecutor": partial(SimExecutor, scheduler)}
    with replaced(
        (
            (arrival, lock),
            (background, {**lock, "SimpleQueue": partial(SimQueue, scheduler)}),
            (blocks, {**lock, "Event": pool.event}),
            (file_reading, executor),
            (image_directory, lock),
            (image_files, lock),
            (image_reading, executor),
            (keeping, {**lock, "Event": pool.event, "Thread": partial(SimThread, pool)}),
            (kept_images, {**lock, "Event": pool.event}),
            (simulated_streams, {"threading": SimpleNamespace(Lock=pool.lock)}),
            (spare_pages, lock),
            (staging, executor),
            # How many threads something is divided among must not depend on the machine.
            (os, {"cpu_count": lambda: 4}),
            # To ask the C library for its freed memory takes longer than all the rest of a move of a few bytes.
            (blocks, {"return_freed_heap": lambda: None}),
            (bringing_up, {"return_freed_heap": lambda: None}),
            (mover.blocks, {"return_freed_heap": lambda: None}),
            (staging, {"return_freed_heap": lambda: None}),
        )
    ):
        yield


@contextmanager
def replaced(names: Names) -> Generator[None]:
    with ExitStack() as patches:
        for owner, stand_ins in names:
            for name, stand_in in stand_ins.items():
                patches.enter_context(patch.object(owner, name, stand_in))
        yield
