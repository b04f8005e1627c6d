"""The table of fault rows is whole, and every test that it names is there."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from faults.rows import ROWS, Row, shown

TESTS = Path(__file__).parents[1]


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return frozenset(each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_row_is_there_and_has_tests_or_a_reason() -> None:
    assert list(ROWS) == [f"F{number:02}" for number in range(1, 71)]
    for name, row in ROWS.items():
        assert bool(row.tests) != bool(row.why_not), name
    assert [name for name, row in ROWS.items() if row.why_not] == ["F11", "F67", "F68", "F70"]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.tests])
def test_every_test_of_a_row_is_there(name: str) -> None:
    for test in ROWS[name].tests:
        path, _, function = test.partition("::")
        assert function.partition("[")[0] in functions_of(path), test


def test_a_row_is_shown_when_all_its_tests_passed_and_none_of_their_examples_failed() -> None:
    row = Row("two", ("a.py::one", "a.py::two[x]"))
    both = {"tests/a.py::one", "tests/a.py::two[x]", "tests/a.py::two"}
    assert row.is_shown(both, set())
    assert not row.is_shown(both - {"tests/a.py::two[x]"}, set())
    assert not row.is_shown(both, {"tests/a.py::one"})
    assert not Row("none", why_not="no").is_shown(both, set())


def test_one_failing_example_is_enough_against_a_row() -> None:
    (test,) = ROWS["F19"].tests
    assert len(shown([f"tests/{test}"], [])) == 1
    assert not shown([f"tests/{test}[a]"], [f"tests/{test}[b]"])
