"""Tells whoever listens: log lines and subscribers, on a thread of its own, so that none can hold anything up."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from modelcache.move import MoveKind
from modelcache.runtime.links import Link
from modelcache.runtime.ports import Clock, Pool
from modelcache.stats import MoveEvent

_LOG = logging.getLogger("modelcache")
#: What may be subscribed to: every move, or the moves of one kind.
TOPICS = ("move", *(kind.value for kind in MoveKind))
_PAST = {
    MoveKind.STAGE: "staged",
    MoveKind.PROMOTE: "promoted",
    MoveKind.TRIM: "trimmed",
    MoveKind.SHED: "shed",
    MoveKind.EVICT: "evicted",
}
Subscriber = Callable[[Any], object]


class Herald:
    """Keeps the last events, logs each once, and calls subscribers in order.

    A subscriber that raises is logged and called again next time; one that blocks delays later log lines and other
    subscribers, nothing else.
    """

    def __init__(self, pool: Pool, clock: Clock, keep: int = 10_000) -> None:
        self._link = Link("herald", pool, clock, 1)
        self._events: deque[MoveEvent] = deque(maxlen=keep)
        self._subscribers: dict[int, tuple[str, Subscriber]] = {}
        self._next_key = 0

    def events(self) -> tuple[MoveEvent, ...]:
        """The last committed moves, oldest first."""
        return tuple(self._events.copy())

    def on(self, topic: str, tell: Subscriber) -> Callable[[], None]:
        """Call `tell` with each event of a topic; returns what ends that.

        Raises:
            ValueError: No such topic.
        """
        if topic not in TOPICS:
            raise ValueError(f"there is no event {topic!r}; choose one of {', '.join(TOPICS)}")
        self._next_key += 1
        key = self._next_key
        self._subscribers[key] = (topic, tell)

        def end() -> None:
            self._subscribers.pop(key, None)

        return end

    def publish(self, event: MoveEvent, evicted: tuple[str, ...]) -> None:
        """Tell of a committed move. Called under the driver's lock: it only queues."""
        self._events.append(event)
        self._link.submit(partial(self._tell, event, evicted))

    def _tell(self, event: MoveEvent, evicted: tuple[str, ...]) -> None:
        # A handler that raises must not keep it from the subscribers.
        with contextlib.suppress(BaseException):
            log_move(event, evicted)
        for topic, tell in tuple(self._subscribers.copy().values()):
            if topic in ("move", event.kind.value):
                try:
                    tell(event)
                except BaseException:  # noqa: BLE001
                    # A subscriber's own, an exit included: it is reported, and the next one is told all the same.
                    _LOG.exception("subscriber failed event=%s", topic)

    def ended(self) -> tuple[str, ...]:
        """The name of its thread, if that has ended."""
        return self._link.ended()

    def stop(self) -> None:
        """Let what was published be told; a subscriber that blocks is left to itself after a second."""
        for worker in self._link.stop():
            worker.join(1.0)


def log_move(event: MoveEvent, evicted: tuple[str, ...]) -> None:
    """One INFO line per committed move."""
    _LOG.info(
        "%s model=%s from=%s to=%s bytes=%d copied_bytes=%d seconds=%.3f reason=%s for=%s evicted=[%s] wait_s=%.3f",
        _PAST[event.kind],
        event.model,
        event.source,
        event.target,
        event.size_bytes,
        event.copied_bytes,
        event.seconds,
        event.reason,
        event.on_behalf_of or "-",
        ", ".join(evicted),
        event.wait_s,
    )
