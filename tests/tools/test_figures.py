"""The table of everything that was proved."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

FIGURES = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "figures.py"))


def test_figures_of_several_runs_add_up(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps({"scars": {"S01": 1}, "fuzz executions": {"header": 5}}))
    (tmp_path / "fuzz.json").write_text(json.dumps({"fuzz executions": {"header": 7, "names": 1}}))
    assert FIGURES["read"](tmp_path) == {"scars": {"S01": 1}, "fuzz executions": {"header": 12, "names": 1}}


def test_a_group_below_its_goal_is_named_and_one_without_a_goal_is_shown() -> None:
    lines, missed = FIGURES["table"]({"scars": {"S01": 1}, "stalls": {"all": 15}, "closes": {"fifty": 50}})
    assert missed == ["scars"]
    assert [line.split()[0] for line in lines] == ["50", "1", "15"]
    assert "at least 20  MISSED" in lines[1]
    assert "MISSED" not in lines[2]
