"""Who is at what, and since when it gave no sign of life: for those who look, without any lock."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from itertools import count

from modelcache.runtime.ports import Clock, Progress
from modelcache.units import format_seconds


class Work:
    """One thing that a thread is at; called with progress, which is a sign of life.

    Args:
        what: In words.
        watch: Where it is known.
        is_waited_for: Callers may be waiting for it to end.
        progress: Told the same.
    """

    __slots__ = ("_progress", "_watch", "at_s", "is_waited_for", "what")

    def __init__(self, what: str, watch: Watch, progress: Progress | None, *, is_waited_for: bool) -> None:
        self.what = what
        self.is_waited_for = is_waited_for
        self._watch = watch
        self._progress = progress
        self.at_s = watch.now_s()

    def __call__(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Note progress."""
        self.at_s = self._watch.sign()
        if self._progress is not None:
            self._progress(name, done_bytes, total_bytes)

    def silent_for(self, seconds: float) -> str:
        """That it gave no sign for so long, in words."""
        return f"{self.what}: no sign for {format_seconds(seconds)}"


class Watch:
    """What is being worked on now. A stuck thread holds nobody up here: no call waits for another."""

    def __init__(self, clock: Clock) -> None:
        self.now_s = clock.now_s
        self.signed_s = clock.now_s()
        self._works: dict[int, Work] = {}
        self._keys = count()

    def sign(self) -> float:
        """Something that callers wait for has come further; returns the time."""
        self.signed_s = now_s = self.now_s()
        return now_s

    @contextmanager
    def over(self, what: str, progress: Progress | None = None, *, is_waited_for: bool = True) -> Generator[Work]:
        """Around a piece of work; what is yielded takes its progress."""
        key = next(self._keys)
        self._works[key] = work = Work(what, self, progress, is_waited_for=is_waited_for)
        if is_waited_for:
            self.sign()
        try:
            yield work
        finally:
            del self._works[key]
            if is_waited_for:
                self.sign()

    def silent(self, for_s: float) -> tuple[Work, ...]:
        """What gave no sign for so long, the longest first."""
        since_s = self.now_s() - for_s
        return tuple(sorted((w for w in self._works.copy().values() if w.at_s <= since_s), key=lambda w: w.at_s))
