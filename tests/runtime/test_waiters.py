"""An answer arrives once, and a caller who leaves and an answer that comes are never both lost."""

from __future__ import annotations

import itertools
import threading

import pytest

from modelcache.runtime.waiters import LEFT, Waiter, blocking


def test_the_first_answer_counts_and_wakes_once():
    woken = []
    waiter = Waiter(1, 0.0, lambda: woken.append(1))
    assert waiter.offer("first")
    assert not waiter.offer("second")
    assert (waiter.result(), woken) == ("first", [1])


def test_whoever_has_left_gets_nothing_and_is_not_woken():
    woken = []
    waiter = Waiter(1, 0.0, lambda: woken.append(1))
    assert waiter.leave() is LEFT
    assert not waiter.offer("late")
    assert woken == []


def test_whoever_leaves_too_late_gets_the_answer_to_deal_with():
    waiter = Waiter(1, 0.0, lambda: None)
    assert waiter.offer(("lease",))
    assert waiter.leave() == ("lease",)


def test_an_error_is_raised():
    waiter = Waiter(1, 0.0, lambda: None)
    waiter.offer(KeyError("x"))
    with pytest.raises(KeyError):
        waiter.result()


def test_a_blocking_waiter_sets_its_event():
    event = threading.Event()
    assert blocking(1, 0.0, event).offer(None)
    assert event.is_set()


def test_two_equal_answers_are_two_answers():
    waiter = Waiter(1, 0.0, lambda: None)
    assert waiter.offer([1])
    assert not waiter.offer([1])


def test_of_an_offer_and_a_leave_at_once_exactly_one_comes_first():
    outcomes = set()
    for _ in range(300):
        waiter, both = Waiter(1, 0.0, lambda: None), threading.Barrier(2)
        found = {}

        def offer(waiter=waiter, both=both, found=found):
            both.wait()
            found["offered"] = waiter.offer("answer")

        thread = threading.Thread(target=offer)
        thread.start()
        both.wait()
        left = waiter.leave()
        thread.join()
        assert found["offered"] == (left == "answer")
        outcomes.add(found["offered"])
    assert outcomes <= set(itertools.chain((True, False)))
