"""Which simulated device answers to which index of the torch device name ``sim``."""

from __future__ import annotations

import threading
from typing import Protocol

import torch

from modelcache.dataplane.device.simulated_memory import Memory
from modelcache.dataplane.device.simulated_streams import Operator

NAME = "sim"
NUM_INDICES = 8


class Accelerator(Protocol):
    """What the backend asks of the device behind an index."""

    @property
    def memory(self) -> Memory:
        """Its books."""

    def begin_compute(self) -> Operator:
        """An operator is about to run in this thread: waits for what it must wait for; returns a token."""

    def end_compute(self, token: Operator) -> None:
        """The operator is done."""

    def cross_link(self, size_bytes: int, started_s: float) -> None:
        """Let the rest of a blocking copy's time on the link pass in this thread."""

    def now_s(self) -> float:
        """The device's clock."""

    def close(self) -> None:
        """Stop its threads."""


class _Slots:
    """Which device answers to which index.

    A closed device keeps answering for tensors that outlive it, until another one opens under its index.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: list[Accelerator | None] = [None] * NUM_INDICES
        self._open = [False] * NUM_INDICES
        # Per thread: `index`, what ``sim`` means there.
        self.chosen = threading.local()

    def reserve(self) -> int:
        """The lowest index that no open device has.

        Raises:
            RuntimeError: Every index is taken.
        """
        with self._lock:
            for index, is_open in enumerate(self._open):
                if not is_open:
                    self._open[index] = True
                    return index
        raise RuntimeError(f"all {NUM_INDICES} simulated devices of this process are open; close one of them first")

    def attach(self, index: int, device: Accelerator) -> None:
        """Let `device` answer for a reserved index."""
        self._devices[index] = device

    def release(self, index: int) -> None:
        """The index may be reserved again."""
        with self._lock:
            self._open[index] = False

    def close_all(self) -> None:
        """Close every device that is still open."""
        for device, is_open in zip(list(self._devices), list(self._open), strict=True):
            if is_open and device is not None:
                device.close()

    def at(self, index: int) -> Accelerator:
        """The device behind an index.

        Raises:
            RuntimeError: There never was one.
        """
        device = self._devices[index] if 0 <= index < NUM_INDICES else None
        if device is None:
            raise RuntimeError(f"no simulated device was opened as {NAME}:{index}; open one with SimulatedDevice(...)")
        return device

    def current(self) -> int:
        """What ``sim`` without an index means: the thread's choice, else the lowest open device."""
        chosen: int | None = getattr(self.chosen, "index", None)
        return next((index for index, is_open in enumerate(self._open) if is_open), 0) if chosen is None else chosen

    def count(self) -> int:
        """Up to the highest open device; at least 1."""
        return max((index + 1 for index, is_open in enumerate(self._open) if is_open), default=1)


SLOTS = _Slots()


def place(index: int) -> torch.device:
    """The torch device of an index."""
    return torch.device(NAME, index)


def index_of(device: object) -> int:
    """The index that a device argument means; torch's or a plain number."""
    index = device.index if isinstance(device, torch.device) else device if isinstance(device, int) else None
    return SLOTS.current() if index is None else index
