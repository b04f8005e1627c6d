"""What a task of a simulation runs on: something that stops where it hands over, and goes on where it is resumed.

A greenlet is quick to switch. Code that keeps things per thread in C, as torch does with its modes, needs a thread of
its own; one runs at a time, so that the seed still decides everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Lock, Thread, get_ident
from typing import Protocol

from greenlet import getcurrent, greenlet


class Strand(Protocol):
    """Something with a body that can be stopped and resumed."""

    @property
    def is_over(self) -> bool:
        """The body returned."""

    @property
    def is_here(self) -> bool:
        """The caller runs on it."""

    def resume(self) -> None:
        """Let it run until it hands over, or is over."""

    def hand_over(self) -> None:
        """Called on it: stop, until it is resumed."""


class GreenletStrand:
    def __init__(self, body: Callable[[], None]) -> None:
        self._hub: greenlet | None = None
        self._greenlet = greenlet(body)

    @property
    def is_over(self) -> bool:
        return self._greenlet.dead

    @property
    def is_here(self) -> bool:
        return getcurrent() is self._greenlet

    def resume(self) -> None:
        if self._hub is None:
            # Its end comes back there, whoever made it.
            self._hub = self._greenlet.parent = getcurrent()
        self._greenlet.switch()

    def hand_over(self) -> None:
        assert self._hub is not None
        self._hub.switch()


class ThreadStrand:
    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body
        self._mine, self._hub = Lock(), Lock()
        self._mine.acquire()
        self._hub.acquire()
        self._ident = 0
        self._thread: Thread | None = None
        self.is_over = False

    @property
    def is_here(self) -> bool:
        return get_ident() == self._ident

    def resume(self) -> None:
        if self._thread is None:
            # A daemon: a schedule that failed leaves strands behind that nobody will resume.
            self._thread = Thread(target=self._run, name="strand", daemon=True)
            self._thread.start()
        else:
            self._mine.release()
        self._hub.acquire()
        if self.is_over:
            self._thread.join()

    def hand_over(self) -> None:
        self._hub.release()
        self._mine.acquire()

    def _run(self) -> None:
        self._ident = get_ident()
        try:
            self._body()
        finally:
            self.is_over = True
            self._ident = 0
            self._hub.release()


@contextmanager
def on_one_processor() -> Generator[None]:
    """Threads of which one runs at a time hand over ten times as fast when they need not wake another processor."""
    before = os.sched_getaffinity(0)
    allowed = sorted(before)
    os.sched_setaffinity(0, {allowed[os.getpid() % len(allowed)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
