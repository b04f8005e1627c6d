"""The fault rows: what each demands, and the tests that show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One fault: what must come of it, and the tests, as ``path::function``; the first one counts it."""

    demands: str
    tests: tuple[str, ...]


ROWS: dict[str, Row] = {}


def first_shown_by(test: str) -> list[str]:
    """The rows that this test is the first to show."""
    return [name for name, row in ROWS.items() if row.tests and row.tests[0] == test]
