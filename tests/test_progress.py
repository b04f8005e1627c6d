"""Bars for what lasts, and nothing for what does not or where nobody looks."""

from __future__ import annotations

import io
import sys

import pytest

from modelcache.progress import QUIET_S, ProgressBars, has_audience
from modelcache.testing import FakeClock


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def show(monkeypatch):
    """Puts a terminal in the place of standard error; called by the test, because fixtures see another capture."""

    def put(stream=None):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("sys.stderr", stream or Screen())
        return sys.stderr

    return put


def bars_of(clock, *, watched=True):
    return ProgressBars(clock.now_s, lambda: watched)


def test_what_is_short_shows_nothing(show):
    screen = show()
    clock = FakeClock()
    bars = bars_of(clock)
    for done in range(0, 101, 10):
        bars("a", done, 100)
        clock.advance(QUIET_S / 11)
    bars.close()
    assert screen.getvalue() == ""


def test_what_lasts_shows_a_bar_that_goes_away_with_the_last_byte(show):
    screen = show()
    clock = FakeClock()
    bars = bars_of(clock)
    bars("a", 0, 100)
    clock.advance(QUIET_S + 0.1)
    bars("a", 50, 100)
    assert bars._bars is not None
    bars("a", 100, 100)
    assert bars._bars is None
    assert "a" in screen.getvalue()


def test_nobody_is_shown_anything_who_does_not_look(show):
    screen = show()
    clock = FakeClock()
    bars = bars_of(clock, watched=False)
    bars("a", 0, 100)
    clock.advance(60)
    bars("a", 50, 100)
    assert bars._bars is None
    assert screen.getvalue() == ""


def test_several_bars_share_a_screen_and_closing_takes_all_away(show):
    show()
    clock = FakeClock()
    bars = bars_of(clock)
    for name in "ab":
        bars(name, 0, 100)
    clock.advance(QUIET_S + 1)
    for name in "ab":
        bars(name, 50, 100)
    assert len(bars._tasks) == 2
    bars("a", 100, 100)
    assert len(bars._tasks) == 1
    bars.close()
    bars.close()
    assert bars._bars is None


def test_a_second_move_of_the_same_model_starts_its_time_again(show):
    show()
    clock = FakeClock()
    bars = bars_of(clock)
    bars("a", 100, 100)
    clock.advance(60)
    bars("a", 0, 100)
    bars("a", 50, 100)
    assert bars._bars is None
    bars.close()


def test_a_terminal_is_an_audience_and_a_pipe_is_none(show):
    show()
    assert has_audience()
    show(io.StringIO())
    assert not has_audience()
