"""Fixtures of the fault rows: houses that are closed and checked, and the row that a passing test shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from benches import Bench
from faults.rows import first_shown_by
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


@pytest.fixture(autouse=True)
def row_is_counted(request, figure) -> None:
    """Once per row: the first example of the first test that is listed for it."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and any(callspec.indices.values()):
        return
    name = f"{request.path.parent.name}/{request.path.name}::{request.node.originalname}"
    for row in first_shown_by(f"tests/{name}"):
        figure("fault rows", row, 1)
