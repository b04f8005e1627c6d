"""The soak and the replay: what they print, and that a schedule that breaks a promise ends them with 1."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from modelcache.dataplane import giving_up

TOOLS = Path(__file__).parents[2] / "tools"

pytestmark = pytest.mark.skipif(not TOOLS.is_dir(), reason="the tools are only in a checkout")


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import soak

    monkeypatch.setattr(soak, "BLOCK", 25)
    log = logging.getLogger("modelcache")
    level = log.level
    yield soak
    log.setLevel(level)
    del sys.modules["soak"]


@pytest.mark.timeout(60)
def test_a_block_counts_its_schedules_and_comparisons(soak):
    tally = soak.play(0)
    assert tally.failure == ""
    assert tally.num_schedules == 25
    assert tally.num_comparisons > 200
    assert tally.marks["everybody served after healing"] == 12
    assert "25 schedules (12.5 a second), " in soak.figures(tally, 2.0)
    assert " hash comparisons, 0 mismatches or other failures, " in soak.figures(tally, 2.0)


@pytest.mark.timeout(60)
def test_the_first_schedule_that_loses_bytes_ends_it_with_its_report(soak, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(giving_up, "changed", lambda part, prints: set())
    monkeypatch.setattr(soak, "soak", lambda seed, jobs, until_s, comparisons: (soak.play(seed), 1.0))
    page = tmp_path / "soak.md"
    monkeypatch.setattr(sys, "argv", ["soak.py", "--seed", "2000", "--comparisons", "9", "--record", str(page)])
    assert soak.main() == 1
    report = capsys.readouterr().err
    assert "again with: python tools/replay.py --shipped " in report
    assert " changed: " in report
    assert "the last events:\n" in report
    assert report.strip() in page.read_text()


@pytest.mark.parametrize(
    ("options", "tail"), [((), "switches, everything held"), (("--live",), "switches, everything held")]
)
def test_a_seed_is_played_again_by_one_command(options, tail):
    done = subprocess.run(
        [sys.executable, str(TOOLS / "replay.py"), *options, "7"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(tail)
    assert "seed 7 (" in done.stdout
