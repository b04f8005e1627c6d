"""Rooms that are closed whatever came of the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lifecycle.room import Room


@pytest.fixture
def room_of(tmp_path) -> Iterator[Callable[..., Room]]:
    """Make rooms below the test's own folder."""
    rooms: list[Room] = []

    def make(**options: Any) -> Room:
        rooms.append(Room(tmp_path, **options))
        return rooms[-1]

    yield make
    for room in rooms:
        # After a failure something may stand still for good; the next test is not to suffer from it.
        closing = threading.Thread(target=room.cache.close, name="closing", daemon=True)
        closing.start()
        closing.join(5.0)
        room.device.close()
