"""Faults to inject into a simulated device: what fails, what waits, what arrives damaged."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

Operation = Literal["allocate", "copy_in", "copy_out", "compute"]
Failure = Literal["out_of_memory", "transient", "sticky"]

OPERATIONS: tuple[Operation, ...] = ("allocate", "copy_in", "copy_out", "compute")
FAILURES: tuple[Failure, ...] = ("out_of_memory", "transient", "sticky")


class Hold:
    """A copy that stands still until it is let go; a test's gate, instead of a sleep."""

    def __init__(self) -> None:
        self._reached, self._go = threading.Event(), threading.Event()

    def wait_reached(self, timeout: float | None = None) -> bool:
        """Block until the copy stands at the gate; False when `timeout` seconds passed first."""
        return self._reached.wait(timeout)

    @property
    def is_reached(self) -> bool:
        """Whether the copy has come to the gate."""
        return self._reached.is_set()

    def release(self) -> None:
        """Let the copy go on. Idempotent."""
        self._go.set()

    def stand(self) -> None:
        """Called by the device: announce and wait."""
        self._reached.set()
        self._go.wait()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class Planned:
    """What happens to one call.

    Attributes:
        call: Which call of the operation, from 1.
        failure: What it fails with.
        hold: Where it stands until released.
        corrupt_byte: The offset whose bits arrive inverted.
    """

    call: int
    failure: Failure | None = None
    hold: Hold | None = None
    corrupt_byte: int | None = None


class Faults:
    """A plan of faults for one device; may be extended at any time, from any thread.

    ``nth`` always counts from the moment the fault is planned: 1 is the next call. Calls are counted in the order in
    which they are made. ``"allocate"`` is `Device.allocate` or `Device.map`, ``"compute"`` any operator torch runs on
    the device.

    A copy that is to fail with ``"out_of_memory"`` fails when it is called; with the others when it runs, so its event
    raises. ``"sticky"`` poisons the device.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[Operation, int] = dict.fromkeys(OPERATIONS, 0)
        self._planned: dict[Operation, list[Planned]] = {operation: [] for operation in OPERATIONS}
        self._page_lock_refusals: int | None = 0

    def fail(self, operation: Operation, *, nth: int = 1, failure: Failure = "transient") -> None:
        """Fail the `nth` call of `operation` from now.

        Raises:
            ValueError: No such operation or failure, or `nth` is below 1.
        """
        if failure not in FAILURES:
            raise ValueError(f"unknown failure {failure!r}; choose one of {', '.join(FAILURES)}")
        self._plan(operation, nth, failure=failure)

    def hold(self, operation: Literal["copy_in", "copy_out"], *, nth: int = 1) -> Hold:
        """Make the `nth` copy from now stand still before any of its bytes land, and everything behind it in order.

        Raises:
            ValueError: Not a copy, or `nth` is below 1.
        """
        _require_copy(operation, "held")
        hold = Hold()
        self._plan(operation, nth, hold=hold)
        return hold

    def corrupt(self, operation: Literal["copy_in", "copy_out"], *, nth: int = 1, byte: int = 0) -> None:
        """Invert the bits of the byte at offset `byte` of the `nth` copy from now, after it lands.

        Raises:
            ValueError: Not a copy, or `nth` is below 1.
        """
        _require_copy(operation, "corrupted")
        self._plan(operation, nth, corrupt_byte=byte)

    def refuse_page_lock(self, count: int | None = None) -> None:
        """Refuse the next `count` requests for page-locked memory; all of them with `None`."""
        with self._lock:
            self._page_lock_refusals = count

    def _plan(
        self,
        operation: Operation,
        nth: int,
        *,
        failure: Failure | None = None,
        hold: Hold | None = None,
        corrupt_byte: int | None = None,
    ) -> None:
        if operation not in OPERATIONS:
            raise ValueError(f"unknown operation {operation!r}; choose one of {', '.join(OPERATIONS)}")
        if nth < 1:
            raise ValueError(f"nth counts from 1, the next call, got {nth}")
        with self._lock:
            self._planned[operation].append(Planned(self._calls[operation] + nth, failure, hold, corrupt_byte))

    def next_call(self, operation: Operation) -> tuple[Planned, ...]:
        """Called by the device: count one call and take what is planned for it."""
        with self._lock:
            self._calls[operation] = call = self._calls[operation] + 1
            planned = self._planned[operation]
            if not planned:
                return ()
            due = tuple(each for each in planned if each.call == call)
            self._planned[operation] = [each for each in planned if each.call != call]
            return due

    def next_page_lock_is_refused(self) -> bool:
        """Called by the device: count one request."""
        with self._lock:
            if self._page_lock_refusals is None:
                return True
            refused = self._page_lock_refusals > 0
            self._page_lock_refusals -= refused
            return refused


def _require_copy(operation: str, what: str) -> None:
    if operation not in ("copy_in", "copy_out"):
        raise ValueError(f"only a copy can be {what}, not {operation!r}; choose copy_in or copy_out")
