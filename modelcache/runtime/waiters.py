"""One ticket per caller: an answer that arrives exactly once, and a caller who may leave before it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from modelcache.runtime.ports import Event

#: What a caller who leaves puts in the place of an answer.
LEFT = object()


class Waiter:
    """Where one caller waits for one answer.

    The answer is whatever is put in first: by the driver, or `LEFT` by a caller who goes. `dict.setdefault` is the one
    atomic step that decides, so an answer is never lost and never given twice.

    Args:
        wake: Called once, on the driver's thread, when the answer is there.
        asked_s: When, on the driver's clock.
    """

    __slots__ = ("_box", "_wake", "asked_s", "ticket")

    def __init__(self, ticket: int, asked_s: float, wake: Callable[[], None]) -> None:
        self.ticket = ticket
        self.asked_s = asked_s
        self._wake = wake
        self._box: dict[str, Any] = {}

    def deadline_s(self, timeout_s: object) -> float | None:
        """When its time is up, on the driver's clock; `None` if never.

        Raises:
            TypeError: The timeout is no number.
            ValueError: It is NaN.
        """
        if timeout_s is None or timeout_s == math.inf:
            return None
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, Real):
            raise TypeError(f"timeout must be seconds, or None to wait, got {timeout_s!r}")
        if math.isnan(timeout_s):
            raise ValueError("timeout must be seconds, or None to wait, got nan")
        return self.asked_s + float(timeout_s)

    def offer(self, answer: object) -> bool:
        """Give the answer; False if the caller has left or has one already."""
        if self._box.setdefault("answer", answer) is not answer:
            return False
        self._wake()
        return True

    def leave(self) -> Any:
        """Stop waiting: `LEFT`, or the answer that came first and is the caller's to deal with."""
        return self._box.setdefault("answer", LEFT)

    @property
    def is_answered(self) -> bool:
        """Nobody waits here any more."""
        return "answer" in self._box

    def result(self) -> Any:
        """The answer, raised if it is an error. Call it once, after the wake-up."""
        # An error refers to the frames of its caller, and what they hold. Were it still referred to from here, or by a
        # frame, all of that would stay until the garbage collector came by.
        answer, self._box["answer"] = self._box["answer"], None
        try:
            if isinstance(answer, BaseException):
                raise answer
            return answer
        finally:
            del answer


def blocking(ticket: int, asked_s: float, event: Event) -> Waiter:
    """A waiter for a thread that waits on `event`."""
    return Waiter(ticket, asked_s, event.set)
