"""Fixtures of the fault rows: houses that are closed and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from benches import Bench
from faults.standing import House


@pytest.fixture
def house_of(tmp_path) -> Iterator[Callable[..., House]]:
    """Make real caches over the simulated device; each is closed at the end, and must leave nothing."""
    houses: list[House] = []

    def make(**options: Any) -> House:
        houses.append(House(tmp_path / str(len(houses)), **options))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


@pytest.fixture
def bench_of() -> Iterator[Callable[..., Bench]]:
    """The same over fakes."""
    benches: list[Bench] = []

    def make(**options: Any) -> Bench:
        benches.append(Bench(**options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()
