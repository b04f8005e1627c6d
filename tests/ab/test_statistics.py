"""Intervals, tests and verdicts: equal to scipy's, right as often as they say, also when one peeks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from modelcache.ab.metrics import Metric, latency
from modelcache.ab.statistics import (
    evidence,
    holm,
    mean_interval,
    sequence_interval,
    sequence_margin_p,
    sequence_p,
    share_p,
    sign_flip_p,
    smallest_detectable,
)
from modelcache.ab.verdicts import Differences, Verdict, judge

SCORE = Metric("score")


def draw(seed, count, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1.0, count)


def differences(values, metric=SCORE, arm="b"):
    return Differences(metric, arm, "a", "item", tuple(map(float, values)))


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_those_of_scipy_on_the_same_data(seed):
    values = np.random.default_rng(seed).exponential(1.0, 80)
    found = mean_interval(values, seed=seed)
    expected = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=9_999, rng=np.random.default_rng(seed), batch=4_000_000 // 80
    ).confidence_interval
    assert (found.low, found.high) == (expected.low, expected.high)


@pytest.mark.parametrize("seed", range(3))
def test_p_values_are_those_of_scipy_on_the_same_data(seed):
    values = draw(seed, 40, 0.3)
    found = stats.permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9_999,
        rng=np.random.default_rng(seed),
        batch=4_000_000 // 40,
    )
    assert sign_flip_p(values, seed=seed) == found.pvalue


@pytest.mark.timeout(60)
def test_an_interval_of_95_percent_has_the_truth_in_93_to_97_of_100_runs():
    hits = sum(0.3 in mean_interval(draw(seed, 60, 0.3), seed=seed, resamples=999) for seed in range(1_000))
    assert 930 <= hits <= 970


def test_identical_arms_get_a_wrong_verdict_in_at_most_18_of_200_runs():
    wrong = sum(
        judge([differences(draw(seed, 60))], seed=seed)[0].verdict is not Verdict.CANNOT_TELL for seed in range(200)
    )
    assert wrong <= 18


@pytest.mark.parametrize("shape", ["normal", "heavy", "signs", "growing"])
def test_identical_arms_get_a_wrong_verdict_in_at_most_18_of_200_runs_looked_at_after_each_item(shape):
    wrong = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = {
            "normal": lambda rng=rng: rng.normal(size=200),
            "heavy": lambda rng=rng: rng.standard_t(2, size=200),
            "signs": lambda rng=rng: rng.choice([-1.0, 1.0], 200),
            "growing": lambda rng=rng: rng.normal(size=200) * np.geomspace(1, 100, 200),
        }[shape]()
        wrong += any(sequence_p(values[:count]) <= 0.05 for count in range(1, 201))
    assert wrong <= 18


def test_a_naive_test_that_is_looked_at_after_each_item_is_wrong_far_more_often():
    # What the sequence is for, and that the runs above would show it if it did not work.
    wrong = sum(
        any(stats.ttest_1samp(draw(seed, 200)[:count], 0).pvalue <= 0.05 for count in range(10, 201, 10))
        for seed in range(200)
    )
    assert wrong > 30


@pytest.mark.parametrize(("effect", "items"), [(1.0, 40), (0.5, 120)])
def test_a_true_difference_is_found_early(effect, items):
    found = sum(
        any(sequence_p(draw(seed, items, effect)[:count]) <= 0.05 for count in range(1, items + 1))
        for seed in range(100)
    )
    assert found >= 95


def test_a_confidence_sequence_has_the_truth_at_every_look():
    missed = 0
    for seed in range(100):
        values = draw(seed, 100, 0.4)
        missed += any(0.4 not in sequence_interval(values[:count]) for count in range(2, 101, 7))
    assert missed <= 9


def test_a_confidence_sequence_ends_where_the_evidence_does():
    values = draw(1, 100, 0.4)
    found = sequence_interval(values)
    for edge, inward in ((found.low, 1), (found.high, -1)):
        assert evidence(values, edge) == pytest.approx(20, rel=1e-6)
        assert evidence(values, edge + 0.01 * inward) < 20


def test_the_evidence_does_not_depend_on_the_unit():
    values = draw(2, 50, 0.3)
    assert evidence(values) == pytest.approx(evidence(1e9 * values)) == pytest.approx(evidence(1e-9 * values))


def test_holm_is_the_step_down_procedure():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_too_little_says_nothing():
    assert mean_interval([1.0]).low == -math.inf
    assert sign_flip_p([1.0]) == sign_flip_p([0.0] * 9) == sequence_p([]) == sequence_p([0.0] * 9) == 1.0
    assert sequence_interval([]).high == math.inf
    assert smallest_detectable(1) == math.inf
    assert share_p([], []) == 1.0


def test_what_is_always_the_same_is_its_own_interval():
    assert (mean_interval([2.0] * 5).low, mean_interval([2.0] * 5).high) == (2.0, 2.0)
    assert sign_flip_p([2.0] * 10) == pytest.approx(2 / 2**10)


def test_the_smallest_detectable_difference_is_found_four_times_of_five():
    count = 60
    effect = smallest_detectable(count)
    found = sum(sign_flip_p(draw(seed, count, effect), seed=seed, resamples=999) <= 0.05 for seed in range(300))
    assert 0.73 <= found / 300 <= 0.87


@pytest.mark.parametrize(
    ("mean", "margin", "verdict"),
    [
        (0.8, None, Verdict.BETTER),
        (-0.8, None, Verdict.WORSE),
        (0.0, None, Verdict.CANNOT_TELL),
        (0.0, 1.0, Verdict.NO_WORSE),
        (-0.5, 1.0, Verdict.NO_WORSE),
        (-1.5, 1.0, Verdict.WORSE),
        (0.8, 1.0, Verdict.BETTER),
    ],
)
@pytest.mark.parametrize("peeked", [False, True])
@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_verdict_is_one_of_four(mean, margin, verdict, peeked, better):
    sign = 1 if better == "higher" else -1
    values = draw(0, 200)
    values = sign * (values - values.mean() + mean)
    (one,) = judge([differences(values, Metric("m", None, better, margin=margin, bounds=(-4.0, 4.0)))], peeked=peeked)
    assert one.verdict is verdict
    assert str(verdict) in one.sentence or verdict is Verdict.NO_WORSE or verdict is Verdict.CANNOT_TELL
    assert one.interval.low <= one.mean <= one.interval.high


def test_many_comparisons_are_corrected_together():
    # Each by itself would be called at 5 %; of forty, about two are by chance alone.
    many = [differences(draw(seed, 40), arm=f"arm{seed}") for seed in range(40)]
    assert sum(one.p <= 0.05 for one in judge(many)) >= 1
    assert all(one.verdict is Verdict.CANNOT_TELL for one in judge(many))


def test_a_margin_must_be_cleared_by_the_data_and_not_only_by_the_mean():
    values = draw(3, 12, -0.4)
    assert sequence_margin_p(values, 0.5, reach=8.0) > 0.05
    assert sequence_margin_p(draw(3, 400, 0.0), 0.5, reach=8.0) <= 0.05
    assert sequence_margin_p(draw(3, 400, -0.9), 0.5, reach=8.0) == 1.0


def test_times_are_compared_by_ratio_and_shown_as_a_change():
    (one,) = judge([differences(np.log(1.1) + draw(0, 100) * 0.01, latency())])
    assert one.mean == pytest.approx(0.1, abs=0.005)
    assert one.verdict is Verdict.WORSE
    assert "+10" in one.sentence
    assert "%" in one.sentence


def test_a_share_that_is_off_is_noticed():
    assert share_p([5_000, 5_000], [0.5, 0.5]) == pytest.approx(1.0)
    assert share_p([5_300, 4_700], [0.5, 0.5]) < 0.001
