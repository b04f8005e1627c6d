"""docs/states.md shows the states and transitions that are."""

from __future__ import annotations

import re
from pathlib import Path

from modelcache.core.records import TRANSITIONS, State

TEXT = (Path(__file__).parents[2] / "docs" / "states.md").read_text(encoding="utf-8")


def test_every_state_is_described() -> None:
    for state in State:
        assert f"| `{state}` |" in TEXT


def test_the_table_of_transitions_is_the_one_that_ships() -> None:
    block = TEXT.partition("<!-- transitions -->")[2].partition("<!-- end -->")[0]
    rows = [tuple(map(str.strip, line.strip("|").split("|"))) for line in block.strip().splitlines()[2:]]
    shown = {(start, move): frozenset(re.split(" or ", ends)) for start, move, ends in rows}
    assert shown == {(str(start), str(move)): frozenset(map(str, ends)) for (start, move), ends in TRANSITIONS.items()}
