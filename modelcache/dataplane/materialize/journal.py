"""Writes to live objects that happen all together or not at all, and can be taken back later.

Covers dictionary entries (a module's parameters, buffers and attributes), class attributes and the memory of a tensor.
Every write is a swap of one pointer; nothing here computes, allocates or copies.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol

import torch


class Absent(Enum):
    """The value of an entry that is not there."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT


class Swap(Protocol):
    """One write with both of its values. Doing or undoing it twice is the same as once."""

    def do(self) -> None:
        """Write the new value."""

    def undo(self) -> None:
        """Write the old value."""


@dataclass(slots=True, frozen=True)
class Entry:
    """One key of one dictionary. `Absent` stands for a key that is not there."""

    table: MutableMapping[str, Any]
    key: str
    before: Any
    after: Any

    def do(self) -> None:
        """Put the new value in, or take the key out."""
        self._put(self.after)

    def undo(self) -> None:
        """Put the old value back, or take the key out."""
        self._put(self.before)

    def _put(self, value: Any) -> None:
        if value is ABSENT:
            self.table.pop(self.key, None)
        else:
            self.table[self.key] = value


@dataclass(slots=True, frozen=True)
class ClassEntry:
    """One attribute of a class, for libraries that patch the class itself."""

    owner: type
    key: str
    before: Any
    after: Any

    def do(self) -> None:
        """Set the new value on the class."""
        setattr(self.owner, self.key, self.after)

    def undo(self) -> None:
        """Set the old value on the class."""
        setattr(self.owner, self.key, self.before)


@dataclass(slots=True, frozen=True)
class Memory:
    """The memory behind one tensor object and its gradient; the object stays the same."""

    tensor: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    before_grad: torch.Tensor | None = None
    after_grad: torch.Tensor | None = None

    def do(self) -> None:
        """Point the tensor at the new memory."""
        self._point_at(self.after, self.after_grad)

    def undo(self) -> None:
        """Point the tensor at the old memory."""
        self._point_at(self.before, self.before_grad)

    def _point_at(self, data: torch.Tensor, grad: torch.Tensor | None) -> None:
        # A gradient on another device than its tensor is refused, so it leaves first and comes back last.
        had_grad = self.before_grad is not None
        if had_grad:
            self.tensor.grad = None
        self.tensor.data = data
        if had_grad:
            self.tensor.grad = grad


def swap_all(swaps: Sequence[Swap], check: Callable[[], None]) -> None:
    """Do every swap, then `check`; when either raises, everything is undone and the error passes on.

    Ctrl-C in the middle is an error like any other, and a second Ctrl-C while undoing only starts the undoing again.
    """
    with torch.inference_mode(False), torch.no_grad():
        try:
            for swap in swaps:
                swap.do()
            check()
        except BaseException:
            undo_all(swaps)
            raise


def undo_all(swaps: Sequence[Swap]) -> None:
    """Undo every swap, last first, to the end whatever interrupts."""
    while True:
        try:
            for swap in reversed(swaps):
                swap.undo()
        except KeyboardInterrupt:
            # Undoing is idempotent and takes microseconds; a model left half swapped would be lost.
            continue
        return
