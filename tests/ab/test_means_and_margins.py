"""What is said of means and margins: honest where losses are rare, where one peeks, and where arms fail."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from ab.stand import Time, cache_of
from scipy import stats

from modelcache import ConfigError, load_config
from modelcache.ab import Comparison, InputError, Metric, Verdict, compare, verdicts
from modelcache.ab.statistics import (
    mean_evidence,
    mean_interval,
    mean_margin_p,
    sequence_interval,
    sequence_margin_p,
    share_p,
)
from modelcache.ab.verdicts import Differences, judge

ITEMS = [float(i) for i in range(1, 13)]
ACCURACY = Metric("accuracy", margin=0.05, bounds=(0.0, 1.0))


def losses(seed, count, share):
    """What a candidate that fails `share` of the items that the baseline gets right shows."""
    return -1.0 * (np.random.default_rng(seed).random(count) < share)


def verdict_of(values, metric, *, peeked=False, seed=0):
    (one,) = judge([Differences(metric, "b", "a", "item", tuple(map(float, values)))], peeked=peeked, seed=seed)
    return one


LOSSES = {
    "rare": lambda draw, count: -1.0 * (draw.random(count) < 0.05),
    "in both directions": lambda draw, count: draw.choice([-1.0, 0.0, 1.0], count, p=[0.15, 0.75, 0.10]),
    "beside noise": lambda draw, count: draw.uniform(-0.02, 0.02, count) - (draw.random(count) < 0.05),
    "of any size": lambda draw, count: -draw.beta(0.1, 1.9, count),
    "even": lambda draw, count: draw.normal(-0.05, 0.2, count).clip(-1.05, 0.95),
}


# --- which way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_evidence_that_points_one_way_gives_no_verdict_the_other_way(better, sign):
    one = verdict_of(sign * np.array([0.01] * 60 + [-10.0]), Metric("m", better=better), peeked=True)
    assert one.adjusted_p <= 0.05
    assert one.verdict is Verdict.CANNOT_TELL
    assert "most differences go one way and their mean goes the other" in one.sentence
    assert (one.interval.low, one.interval.high) == (-math.inf, math.inf)


def test_an_interval_of_differences_that_are_not_symmetric_about_their_mean_is_not_made_up():
    values = np.append(np.random.default_rng(0).uniform(0.01, 0.02, 60), -10.0)
    assert sequence_interval(values).low == -math.inf
    found = sequence_interval(values, reach=20.0)
    assert found.low <= values.mean() <= found.high


# --- margins ------------------------------------------------------------------------------------------------------


def test_an_arm_that_loses_twice_the_margin_is_seldom_called_no_worse_when_looked_at_after_each_item():
    wrong = 0
    for seed in range(200):
        values = losses(seed, 100, 0.10)
        wrong += any(sequence_margin_p(values[:count], 0.05, reach=1.0) <= 0.05 for count in range(2, 101))
    assert wrong <= 18


@pytest.mark.parametrize("count", [20, 60, 100])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_arm_that_loses_the_margin_is_called_no_worse_in_at_most_18_of_200_runs(count, loss):
    wrong = sum(
        mean_margin_p(LOSSES[loss](np.random.default_rng(seed), count), 0.05, reach=1.05, seed=seed, resamples=499)
        <= 0.05
        for seed in range(200)
    )
    assert wrong <= 18


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", LOSSES)
def test_margins_and_intervals_are_as_seldom_wrong_as_they_say_in_2000_runs(loss):
    # 5 % of 2,000 are 100; more than 125 come about by chance once in two hundred times.
    wrong = {"fixed": 0, "looked at": 0, "sequence": 0}
    for seed in range(2_000):
        values = LOSSES[loss](np.random.default_rng(seed), 200)
        looks = range(5, 201, 5)
        wrong["fixed"] += mean_margin_p(values, 0.05, reach=1.05, seed=seed, resamples=999) <= 0.05
        wrong["looked at"] += any(sequence_margin_p(values[:n], 0.05, reach=1.05) <= 0.05 for n in looks)
        wrong["sequence"] += any(-0.05 not in sequence_interval(values[:n], reach=1.05) for n in looks[::8])
    assert max(wrong.values()) <= 125, wrong


@pytest.mark.parametrize(("num_lost", "count"), [(0, 59), (1, 80), (3, 100)])
def test_the_margin_of_right_and_wrong_is_tested_as_by_the_binomial_distribution(num_lost, count):
    values = np.zeros(count)
    values[:num_lost] = -1.0
    exact = stats.binomtest(num_lost, count, 0.05, alternative="less").pvalue
    assert mean_margin_p(values, 0.05, reach=1.0) == pytest.approx(exact, rel=0.2)


def test_so_many_items_without_a_loss_show_that_an_arm_is_no_worse():
    for count, fixed, peeked in ((40, "cannot", "cannot"), (70, "no worse", "cannot"), (110, "no worse", "no worse")):
        assert str(verdict_of(np.zeros(count), ACCURACY).verdict).startswith(fixed)
        assert str(verdict_of(np.zeros(count), ACCURACY, peeked=True).verdict).startswith(peeked)


@pytest.mark.parametrize("count", [10, 30])
def test_without_a_range_a_skewed_loss_of_the_margin_is_seldom_called_no_worse(count):
    wrong = 0
    for seed in range(200):
        values = -np.random.default_rng(seed).exponential(1.0, count)
        wrong += mean_margin_p(values, 1.0, seed=seed, resamples=499) <= 0.05
    assert wrong <= 18


def test_without_a_range_no_worse_is_not_said_of_a_run_that_is_looked_at_and_the_fix_is_named():
    values = np.random.default_rng(0).normal(0.0, 0.01, 200)
    one = verdict_of(values, Metric("m", margin=1.0), peeked=True)
    assert one.verdict is Verdict.CANNOT_TELL
    assert "state Metric(bounds=...), or finish a run of a fixed number of items" in one.sentence
    assert verdict_of(values, Metric("m", margin=1.0)).verdict is Verdict.NO_WORSE


def test_without_a_range_no_worse_is_not_said_where_few_items_differ():
    one = verdict_of([0.0] * 100 + [-0.1] * 3, Metric("m", margin=1.0))
    assert one.verdict is Verdict.CANNOT_TELL
    assert "so few units differ" in one.sentence
    assert one.as_json()["reason"] == one.reason != ""


def test_a_margin_wider_than_the_range_is_never_lost():
    assert sequence_margin_p([-0.5, 0.5], 1.0, reach=1.0) == 0.0
    assert mean_margin_p([-0.5, 0.5], 1.5, reach=1.0) < 0.001


def test_the_costly_test_is_made_once_for_each_comparison(monkeypatch):
    counted = []
    monkeypatch.setattr(verdicts, "sign_flip_p", lambda values, **options: counted.append(values) or 0.5)
    (one,) = judge([Differences(Metric("m"), "b", "a", "item", (1.0, 2.0, 3.0))])
    assert len(counted) == 1
    assert one.p == one.adjusted_p == 0.5


# --- intervals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2])
def test_a_confidence_sequence_within_a_range_has_the_mean_of_rare_losses_at_every_look(share):
    missed = 0
    for seed in range(60):
        values = losses(seed, 80, share)
        missed += any(-share not in sequence_interval(values[:count], reach=1.0) for count in range(2, 81, 13))
    assert missed <= 8


@pytest.mark.parametrize(("share", "count"), [(0.05, 30), (0.02, 60), (0.05, 100)])
def test_an_interval_has_the_mean_of_rare_losses_as_often_as_it_says(share, count):
    missed = sum(
        -share not in mean_interval(losses(seed, count, share), reach=1.0, seed=seed, resamples=499)
        for seed in range(200)
    )
    assert missed <= 18


def test_a_confidence_sequence_within_a_range_ends_where_the_evidence_does():
    values = np.random.default_rng(1).uniform(-0.2, 0.6, 80)
    found = sequence_interval(values, reach=1.0)
    assert mean_evidence(values, found.low, 1.0) == pytest.approx(40, rel=1e-6)
    assert mean_evidence(-values, -found.high, 1.0) == pytest.approx(40, rel=1e-6)
    assert found.low <= values.mean() <= found.high


def test_items_without_a_difference_leave_a_rare_one_open():
    assert mean_interval([0.0] * 6).high == sequence_interval([0.0] * 12).high == math.inf
    for found in (mean_interval([0.0] * 60, reach=1.0), sequence_interval([0.0] * 60, reach=1.0)):
        assert found.high == pytest.approx(-found.low)
        assert 0.04 < found.high < 0.2
    # Within a range what is always at its end may be anywhere near it.
    assert mean_interval([-1.0] * 20, reach=1.0).low == pytest.approx(-1.0)
    assert mean_interval([-1.0] * 20, reach=1.0).high > -0.9


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0, 1.0 + 2**-52], [5.0, 5.0 + 2**-50], [0.0, 0.0, 1.0], [0.0, 1.0]])
def test_nearly_equal_differences_and_few_of_them_have_an_interval(values):
    found = mean_interval(values)
    assert found.low <= np.mean(values) <= found.high


def test_an_unbounded_interval_is_shown_as_such(tmp_path):
    for stop_early in (False, True):
        with cache_of({"a": 1.0}) as cache:
            result = compare(
                cache,
                ["a", "a"],
                ITEMS,
                run=lambda model, item: model(item),
                score=lambda output, item: output,
                stop_early=stop_early,
            )
        result.to_html(tmp_path / "x.html")
        assert "95 % interval unbounded to unbounded" in (tmp_path / "x.html").read_text()
        assert result.judgements[0].as_json()["interval"] == [None, None]


# --- bounds -------------------------------------------------------------------------------------------------------


def run_ab(score, *, run=lambda model, item: model(item), items=ITEMS, **options):
    with cache_of({"a": 1.0, "b": 2.0}) as cache:
        return compare(cache, ["a", "b"], items, run=run, score=score, **options)


@pytest.mark.parametrize("bounds", [(0.0,), (1.0, 0.0), (0.0, math.inf), (0.0, "1")])
def test_bounds_are_two_numbers(bounds):
    with pytest.raises(InputError, match=r"metric 'm': bounds are the least and the most that it can be, got"):
        Metric("m", bounds=bounds)


def test_bounds_of_a_ratio_are_above_nought_and_bound_its_logarithm():
    with pytest.raises(InputError, match="that it can be above nought"):
        Metric("m", scale="ratio", bounds=(0.0, 1.0))
    assert Metric("m", scale="ratio", bounds=(1.0, 10.0)).reach == pytest.approx(math.log(10.0))
    assert Metric("m", bounds=(-1.0, 2.0)).reach == 3.0
    assert Metric("failures").reach == 1.0
    assert Metric("m").reach == math.inf
    assert Metric.from_json(Metric("m", bounds=(0.0, 2.0)).as_json()) == Metric("m", bounds=(0.0, 2.0))


def test_a_score_outside_of_its_bounds_is_an_error_that_names_the_item_and_the_fix():
    with pytest.raises(InputError, match=r"item \d+: 'm' of arm 'b' is 1.5, outside of its bounds \(0.0, 1.0\); state"):
        run_ab([Metric("m", lambda output, item: 1.5 if output != item else 0.5, bounds=(0.0, 1.0))])


def test_scores_of_right_and_wrong_are_known_by_their_values():
    right = Metric("right", lambda output, item: float(item > 3), margin=0.2)
    (one, *_) = run_ab([right], items=ITEMS * 6, stop_early=True).judgements
    assert one.differences.metric.bounds == (0.0, 1.0)
    assert one.verdict is Verdict.NO_WORSE


def test_bounds_of_a_score_are_read_from_a_configuration(tmp_path):
    def config(bounds):
        (tmp_path / "c.yaml").write_text(
            "version: 1\nmodels: {m: {loader: 'x:y'}}\nab: {compare: {arms: [m, m], items: i.jsonl, run: 'x:y', "
            f"scores: {{s: {{measure: 'x:y', bounds: {bounds}}}}}}}}}\n"
        )
        return load_config(str(tmp_path / "c.yaml")).settings.ab.compare.scores["s"].bounds

    assert config("[-2, 0.5]") == (-2.0, 0.5)
    for bounds, words in (("[a, 1]", "a number"), ("[.inf, 1]", "a number"), ("[1]", "bounds")):
        with pytest.raises(ConfigError, match=words):
            config(bounds)


# --- unfinished runs ----------------------------------------------------------------------------------------------


def test_figures_of_an_unfinished_run_hold_although_one_looks_again_when_it_goes_on(tmp_path):
    log = tmp_path / "run.jsonl"
    whole = run_ab(lambda output, item: output, log=log, items=ITEMS * 3)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[: len(lines) // 2]))
    part = Comparison.from_log(log)
    assert [one.peeked for one in (*part.judgements, *whole.judgements)] == [True, True, False, False]
    words = " ".join(str(part).split())
    assert "hold however often the run was looked at" in words
    assert "the run is unfinished" in words
    assert "unfinished" not in str(whole)


def test_identical_arms_that_are_looked_at_ten_times_by_more_and_more_time_are_seldom_told_apart(tmp_path):
    wrong = 0
    for seed in range(12):
        time, noise = Time(), random.Random(seed)

        def run(model, item, time=time, noise=noise):
            time.pass_by(1.0)
            return noise.gauss(0, 1)

        looks = (
            run_ab(
                lambda output, item: output,
                run=run,
                seed=seed,
                items=ITEMS * 2,
                log=tmp_path / f"{seed}.jsonl",
                clock=time,
                max_seconds=5.0 * look,
                warm_up=0,
            )
            for look in range(1, 11)
        )
        wrong += any(look.judgements[0].verdict is not Verdict.CANNOT_TELL for look in looks)
    assert wrong <= 3


# --- failures -----------------------------------------------------------------------------------------------------


def failing(*failed):
    def run(model, item):
        if model.number == 2.0 and item in failed:
            raise RuntimeError("out of memory")
        return model(item)

    return run


@pytest.mark.parametrize("stop_early", [False, True])
def test_an_arm_that_fails_on_every_item_is_worse_by_a_score_of_right_and_wrong(stop_early):
    score = [Metric("accuracy", lambda output, item: 1.0, margin=0.05)]
    result = run_ab(score, run=failing(*ITEMS), items=ITEMS * 5, stop_early=stop_early)
    assert result.judgements[0].verdict is Verdict.WORSE
    assert result.judgements[0].mean == -1.0


def test_a_failed_item_has_the_worst_score_within_the_bounds():
    for better, worst in (("higher", -5.0), ("lower", 100.0)):
        score = Metric("m", lambda output, item: output, better, bounds=(-5.0, 100.0))
        result = run_ab([score], run=failing(3.0))
        (metric, *_) = result.plan.metrics
        assert result.value(metric, "b", ITEMS.index(3.0)) == worst
        assert result.judgements[0].differences.num_guessed == 0


def test_an_arm_that_failed_is_neither_better_nor_no_worse_by_a_score_that_is_a_guess():
    score = Metric("m", lambda output, item: output, margin=50.0)
    one = run_ab([score], run=failing(3.0)).judgements[0]
    assert one.adjusted_p <= 0.05
    assert one.verdict is Verdict.CANNOT_TELL
    assert "b failed on 1 that a did not fail on" in one.sentence
    assert "state Metric(bounds=...)" in one.sentence
    assert one.as_json()["num_guessed"] == 1
    assert run_ab([score]).judgements[0].verdict is Verdict.BETTER


def test_items_that_a_time_leaves_out_are_counted_where_it_is_told():
    result = run_ab((), run=failing(3.0, 4.0))
    (times, *_) = (one for one in result.judgements if one.differences.metric.name == "latency")
    assert times.differences.num_left_out == 2
    assert "without 2 that one of them failed on" in times.sentence
    assert "without" not in run_ab(()).judgements[0].sentence


# --- shares -------------------------------------------------------------------------------------------------------


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
