"""What is said of means and margins: honest where losses are rare, where one peeks, and where arms fail."""

from __future__ import annotations

import numpy as np
import pytest

from modelcache.ab.statistics import share_p


@pytest.mark.parametrize("weights", [[0.99, 0.01], [0.5, 0.5], [0.2, 0.3, 0.5]])
def test_a_share_that_is_as_planned_seldom_sets_off_the_alarm_however_often_it_is_looked_at(weights):
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        counts = np.cumsum(draw.multinomial(1, weights, size=300), axis=0)
        wrong += any(share_p(seen.tolist(), weights) <= 0.05 for seen in counts[::3])
    assert wrong <= 18


def test_the_share_of_few_units_is_as_seldom_called_a_fault_as_it_says():
    draw = np.random.default_rng(0)
    alarms = sum(share_p(draw.multinomial(5, [0.99, 0.01]).tolist(), [0.99, 0.01]) < 0.001 for _ in range(5_000))
    assert alarms <= 15


def test_an_arm_that_gets_no_units_is_noticed_after_twenty():
    assert share_p([0, 20], [0.5, 0.5]) < 0.001
    assert share_p([3, 1], [1.0, 0.0]) == 0.0
    assert share_p([3, 0], [1.0, 0.0]) == 1.0


def test_shares_that_were_changed_on_the_way_set_off_no_alarm():
    draw, wrong = np.random.default_rng(1), 0
    weights = np.repeat([0.9, 0.5], 150)
    for _ in range(200):
        ours = np.cumsum(draw.random(300) < weights)
        wrong += any(
            share_p(
                [int(ours[n - 1]), n - int(ours[n - 1])], [float(weights[:n].sum()), float((1 - weights[:n]).sum())]
            )
            <= 0.05
            for n in range(1, 301, 5)
        )
    assert wrong <= 18
