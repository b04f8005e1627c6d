"""The copy streams of the simulated device: one first-in-first-out thread per direction.

A copy takes its bytes over the link's rate in seconds and lands as one memcpy near the end of that time, so that
compute which does not wait for it reads what was there before. The thread waits on an event meanwhile and costs no CPU
beside the memcpy.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from modelcache.dataplane.device.faults import Hold, Planned
from modelcache.dataplane.device.simulated_access import UNMAPPED, Poison


class Flag(Protocol):
    """An event that one thread sets and others wait for."""

    def set(self) -> None:
        """Raise it."""

    def clear(self) -> None:
        """Lower it."""

    def is_set(self) -> bool:
        """Whether it is raised."""

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is raised or `timeout` seconds passed; whether it is raised."""


class Running(Protocol):
    """A thread that was started."""

    def join(self, timeout: float | None = None) -> None:
        """Block until it has ended."""


class Operator:
    """An operator that runs, among all that do; ended at the latest when nobody refers to it any more.

    A Ctrl-C may come between its start and the block that is to end it; whoever waits for it must not do so for ever.
    """

    __slots__ = ("_flag", "_running")

    def __init__(self, flag: Flag, running: set[Flag]) -> None:
        self._flag, self._running = flag, running
        running.add(flag)

    def end(self) -> None:
        """It is done. Idempotent."""
        self._running.discard(self._flag)
        self._flag.set()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it never began
            self.end()


class Threads(Protocol):
    """Where the streams get their threads and events from, so that a schedule can be replayed."""

    def event(self) -> Flag:
        """A new flag, lowered."""

    def spawn(self, name: str, run: Callable[[], None]) -> Running:
        """Start `run` in a thread of this name."""


class OsThreads:
    """The operating system's threads, as daemons: a forgotten device does not keep the process alive."""

    def event(self) -> Flag:
        """A `threading.Event`."""
        return threading.Event()

    def spawn(self, name: str, run: Callable[[], None]) -> Running:
        """Start `run` in a thread of its own."""
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread


def fresh(error: BaseException) -> BaseException:
    """An equal exception for one more caller, with the original as its cause and a traceback of its own."""
    copy = type(error)(*error.args)
    copy.__cause__ = error
    return copy


class Copy:
    """One copy in a stream, and the event of its landing.

    Attributes:
        tensors: Target and source; let go as soon as the copy is over, or a kept event would keep memory.
        size_bytes: To copy.
        after: What the copy waits for before it begins.
        planned: Faults.
        ready_s: When it could have begun, on the device's clock.
        landed: Set when it is over.
        begun: Set when its turn has come.
    """

    def __init__(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        flag: Flag,
        begun: Flag,
        after: Iterable[Flag],
        planned: tuple[Planned, ...],
    ) -> None:
        self.tensors: tuple[torch.Tensor, torch.Tensor] | None = (target, source)
        self.size_bytes = source.numel()
        self.ready_s = 0.0
        self.after = tuple(after)
        self.planned = planned
        self.landed, self.begun = flag, begun
        self._error: BaseException | None = None

    def is_done(self) -> bool:
        """Whether it landed or failed."""
        return self.landed.is_set()

    def wait(self) -> None:
        """Block until it landed; raises what it failed with, a fresh exception each time."""
        self.landed.wait()
        if self._error is not None:
            raise fresh(self._error)

    def end(self, error: BaseException | None) -> None:
        """Called by the stream, once."""
        self.tensors, self.after, self.planned = None, (), ()
        self._error = error.with_traceback(None) if error is not None else None
        self.landed.set()


class CopyStream:
    """Runs copies one after another in a thread that starts with the first of them.

    Args:
        name: Of the thread.
        poison: Shared with the device; a sticky fault fills it.
        bytes_per_s: Of the link; `None` is as fast as memcpy.
        threads: Where the thread comes from.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        poison: Poison,
        bytes_per_s: float | None,
        threads: Threads,
        clock: Callable[[], float],
    ) -> None:
        self._name, self._poison, self._bytes_per_s = name, poison, bytes_per_s
        self._threads, self._clock = threads, clock
        self._queue: deque[Copy] = deque()
        # Guards starting, stopping and the order of the queue; nothing is called under it that could block.
        self._lock = threading.Lock()
        self._work, self._stop = threads.event(), threads.event()
        self._thread: Running | None = None
        self._is_busy = False
        self._holding: Hold | None = None
        self._link_free_s = 0.0
        self._memcpy_bytes_per_s = 8e9
        self.copied_bytes = 0
        self.memcpy_cpu_s = 0.0

    def enqueue(self, copy: Copy) -> None:
        """Put a copy behind all others.

        Raises:
            RuntimeError: The device was closed.
        """
        with self._lock:
            if self._stop.is_set():
                raise closed_error(self._poison.device)
            if self._thread is None:
                self._thread = self._threads.spawn(self._name, self._run)
            copy.ready_s = self._clock()
            is_idle = not self._queue and not self._is_busy
            self._queue.append(copy)
        self._work.set()
        if is_idle:
            # Hardware begins at once. A thread needs the interpreter for that, and would wait until the caller lets go.
            copy.begun.wait()

    def stop(self) -> None:
        """End the thread; copies that have not landed fail."""
        with self._lock:
            self._stop.set()
            holding, thread = self._holding, self._thread
        if holding is not None:
            holding.release()
        self._work.set()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._work.wait()
            self._work.clear()
            while self._queue:
                self._is_busy = True
                self._finish(self._queue.popleft())
            self._is_busy = False

    def _finish(self, copy: Copy) -> None:
        copy.begun.set()
        try:
            self._carry_out(copy)
        except Exception as error:  # noqa: BLE001 - the stream must go on; the error belongs to whoever waits for the event
            copy.end(error)
        else:
            copy.end(None)

    def _carry_out(self, copy: Copy) -> None:
        for flag in copy.after:
            flag.wait()
        for each in copy.planned:
            self._stand(each.hold)
        if copy.after or copy.planned:
            copy.ready_s = self._clock()
        self._refuse(copy)
        if copy.tensors is None or copy.size_bytes == 0:
            return
        target, source = copy.tensors
        landing_s = self._wait_for_link(copy)
        self._refuse_if_over()
        for tensor in copy.tensors:
            if UNMAPPED.is_missing(tensor):
                self._poison.lose("an illegal memory access was encountered in a copy: nothing is mapped there")
        self._poison.check()
        started_s, cpu_s = self._clock(), time.thread_time()
        # Through ctypes, so that the interpreter's lock is free and no thread of torch's own takes part.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), copy.size_bytes)
        for each in copy.planned:
            _corrupt(target, each.corrupt_byte)
        self.memcpy_cpu_s += time.thread_time() - cpu_s
        self.copied_bytes += copy.size_bytes
        took_s = self._clock() - started_s
        if took_s > 0 and copy.size_bytes >= 1 << 20:
            self._memcpy_bytes_per_s = copy.size_bytes / took_s
        if landing_s is not None:
            self._stop.wait(max(0.0, landing_s - self._clock()))

    def _wait_for_link(self, copy: Copy) -> float | None:
        """Wait until just the memcpy is left of the copy's time on the link; returns when it should have landed."""
        if self._bytes_per_s is None:
            return None
        # Queued copies follow each other without a gap, however late this thread was woken.
        landing_s = max(copy.ready_s, self._link_free_s) + copy.size_bytes / self._bytes_per_s
        self._link_free_s = landing_s
        self._stop.wait(max(0.0, landing_s - self._clock() - copy.size_bytes / self._memcpy_bytes_per_s))
        return landing_s

    def _stand(self, hold: Hold | None) -> None:
        if hold is None:
            return
        with self._lock:
            self._holding = None if self._stop.is_set() else hold
        if self._holding is not None:
            hold.stand()
            self._holding = None

    def _refuse(self, copy: Copy) -> None:
        self._refuse_if_over()
        for each in copy.planned:
            if each.failure == "sticky":
                self._poison.problem = f"injected sticky error in a copy of {copy.size_bytes} bytes"
                self._poison.check()
            if each.failure == "transient":
                raise torch.AcceleratorError(f"{self._poison.device}: injected transient error in a copy")

    def _refuse_if_over(self) -> None:
        self._poison.check()
        if self._stop.is_set():
            raise closed_error(self._poison.device)


def _corrupt(target: torch.Tensor, byte: int | None) -> None:
    if byte is not None:
        cell = ctypes.c_uint8.from_address(target.data_ptr() + byte)
        cell.value ^= 0xFF


def closed_error(device: str) -> RuntimeError:
    """What a closed device answers."""
    return RuntimeError(f"{device} is closed; open a new device")
