"""A comparison from end to end on a real cache: residency, failures, resuming, and what identical arms are told."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
from ab.stand import Time, cache_of

from modelcache.ab import Arm, Comparison, InputError, Metric, Verdict, compare
from modelcache.ab.journal import Arrival, Run

ITEMS = [float(i) for i in range(1, 25)]


def multiply(model, item):
    return model(item)


def output(result, item):
    return result


def verdicts(result):
    return {(one.differences.arm, one.differences.metric.name): one.verdict for one in result.judgements}


@pytest.fixture
def three():
    with cache_of({"a": 1.0, "b": 2.0, "c": 1.0}) as cache:
        yield cache


def test_arms_are_scored_on_every_item_and_told_apart(three):
    result = compare(three, ["a", "b", "c"], ITEMS, run=multiply, score=output, seed=1)
    assert (result.num_items, len(result.runs)) == (24, 72)
    assert verdicts(result)["b", "output"] is Verdict.BETTER
    assert verdicts(result)["c", "output"] is Verdict.CANNOT_TELL
    (one, *_) = result.judgements
    assert one.mean == pytest.approx(sum(ITEMS) / len(ITEMS))
    assert sorted(one.differences.values) == ITEMS
    assert "b is better than a" in str(result)
    assert "0 disk loads after warm-up; 0 switches" in str(result)


@pytest.mark.parametrize(("room", "ram", "groups"), [(2, 20, 2), (1, 20, 3), (3, 20, 1), (2, 3, 2)])
def test_models_that_do_not_fit_together_move_as_seldom_as_can_be_and_are_never_loaded_again(room, ram, groups):
    with cache_of({"a": 1.0, "b": 2.0, "c": 3.0}, room=room, ram=ram) as cache:
        before = cache.status().counters.disk_hits
        result = compare(cache, ["a", "b", "c"], ITEMS, run=multiply, score=output)
        assert len(result.plan.groups) == groups
        assert result.num_switches == result.plan.least_switches
        assert result.num_disk_loads == 0
        assert cache.status().counters.disk_hits - before == 3
        assert result.num_items == 24


def test_arms_that_took_turns_in_blocks_are_compared_by_pairs_of_blocks():
    with cache_of({"a": 1.0, "b": 2.0, "c": 3.0}, room=2) as cache:
        result = compare(cache, ["a", "b", "c"], ITEMS, run=multiply, score=output)
    units = {(d.arm, d.metric.name): (d.unit, len(d.values)) for d in result.differences()}
    assert units["b", "latency"] == ("item", 24)
    assert units["c", "latency"] == ("block pair", 6)
    assert units["c", "output"] == ("item", 24)


def test_calls_after_an_arrival_are_not_counted_and_arrivals_are_told_apart():
    with cache_of({"a": 1.0, "b": 2.0}, room=1) as cache:
        result = compare(cache, ["a", "b"], ITEMS, run=multiply, warm_up=2)
    warm = [entry for entry in result.entries if isinstance(entry, Run) and entry.is_warm_up]
    assert len(warm) == 2 * result.num_switches > 20
    first = [a for a in result.arrivals if a.block < 0]
    assert [(a.model, a.found) for a in first] == [("a", "disk"), ("b", "disk")]
    assert {a.found for a in result.arrivals if a.block >= 0} <= {"ram", "vram"}
    assert all(arm.cold_s is not None for arm in result.arms)


def test_ram_that_does_not_hold_the_arms_is_refused_unless_loads_are_accepted():
    with cache_of({"a": 1.0, "b": 2.0, "c": 3.0}, room=1, ram=1) as cache:
        with pytest.raises(
            InputError, match=r"RAM .* does not hold all arms: .*; raise budgets.ram, .* allow_disk=True"
        ):
            compare(cache, ["a", "b", "c"], ITEMS, run=multiply)
        result = compare(cache, ["a", "b", "c"], ITEMS, run=multiply, allow_disk=True, num_pairs=2)
        assert result.num_disk_loads > 0


def test_one_model_with_other_settings_is_an_arm():
    with cache_of({"a": 2.0}) as cache:
        arms = [Arm("plain", "a"), Arm("doubled", "a", {"times": 2})]
        result = compare(cache, arms, ITEMS, run=lambda model, item, times=1: model(item) * times, score=output)
    assert verdicts(result)["doubled", "output"] is Verdict.BETTER


def test_stages_are_timed_one_by_one(three):
    time = Time()

    def first(model, item):
        time.pass_by(1.0)
        return item

    def second(model, item):
        time.pass_by(2.0 * model.number)
        return model(item)

    result = compare(three, ["a", "b"], ITEMS, run={"read": first, "answer": second}, clock=time)
    means = {arm.arm.name: arm.means for arm in result.arms}
    assert means["a"] == pytest.approx({"latency": 3.0, "read latency": 1.0, "answer latency": 2.0, "failures": 0.0})
    assert means["b"]["answer latency"] == pytest.approx(4.0)
    assert verdicts(result)["b", "answer latency"] is Verdict.WORSE
    assert verdicts(result)["b", "read latency"] is Verdict.CANNOT_TELL


def test_a_margin_lets_an_arm_be_no_slower(three):
    time = Time()
    noise = random.Random(0)

    def run(model, item):
        time.pass_by(1.0 + 0.02 * noise.random())
        return item

    result = compare(three, ["a", "c"], ITEMS, run=run, latency_margin=0.05, clock=time)
    assert verdicts(result)["c", "latency"] is Verdict.NO_WORSE


@pytest.mark.parametrize("peeking", [False, True])
@pytest.mark.timeout(200)
def test_identical_arms_under_a_drift_of_30_percent_get_a_wrong_verdict_in_at_most_18_of_200_runs(peeking):
    wrong = 0
    with cache_of({"a": 1.0, "b": 1.0}) as cache:
        for seed in range(200):
            time, noise = Time(), random.Random(seed)
            called = iter(range(10_000))

            def run(model, item, time=time, noise=noise, called=called):
                drift = 1 + 0.3 * next(called) / 80
                time.pass_by(drift * noise.lognormvariate(0, 0.1))
                return noise.gauss(0, 1)

            result = compare(
                cache, ["a", "b"], ITEMS[:20] * 2, run=run, score=output, seed=seed, stop_early=peeking, clock=time
            )
            wrong += any(one.verdict is not Verdict.CANNOT_TELL for one in result.judgements)
    assert wrong <= 18


def test_identical_arms_in_blocks_under_a_drift_are_not_told_apart():
    wrong = 0
    with cache_of({"a": 1.0, "b": 1.0}, room=1) as cache:
        for seed in range(20):
            time, noise = Time(), random.Random(seed)

            def run(model, item, time=time, noise=noise):
                time.pass_by((1 + 0.3 * time.now_s / 100) * noise.lognormvariate(0, 0.05))

            result = compare(cache, ["a", "b"], ITEMS * 2, run=run, seed=seed, clock=time)
            wrong += result.judgements[0].verdict is not Verdict.CANNOT_TELL
    assert wrong <= 4


def test_a_run_that_may_stop_early_does_once_everything_primary_is_decided(three):
    result = compare(three, ["a", "b"], ITEMS * 10, run=multiply, score=output, stop_early=True)
    assert 5 < result.num_items < 100
    assert verdicts(result)["b", "output"] is Verdict.BETTER
    assert "it ended when the primary metrics were decided" in str(result)
    assert all(one.peeked for one in result.judgements)


def test_a_run_ends_when_its_time_is_up(three):
    time = Time()
    result = compare(three, ["a", "c"], ITEMS, run=lambda m, i: time.pass_by(1.0), max_seconds=20, clock=time)
    assert 6 <= result.num_items <= 11
    assert "its time was up" in result.ends


def test_so_many_items_are_drawn_by_lot(three):
    result = compare(three, ["a", "c"], ITEMS, run=multiply, max_items=5)
    assert result.num_items == 5
    assert result.ends == "all 5 items"


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_failing_item_is_recorded_and_counts_against_its_arm(three):
    def run(model, item):
        if model.number == 2.0 and item % 2:
            raise RuntimeError("no answer")
        return model(item)

    result = compare(three, ["a", "b"], ITEMS, run=run, score=output)
    assert result.num_items == 24
    assert result.arms[1].num_failed == 12
    assert verdicts(result)["b", "failures"] is Verdict.WORSE
    assert "b failed 12 time(s): RuntimeError: no answer" in str(result)
    # A failed item has the worst score that was seen.
    score = next(m for m in result.plan.metrics if m.name == "output")
    assert result.value(score, "b", ITEMS.index(1.0)) == 1.0
    latency = next(m for m in result.plan.metrics if m.name == "latency")
    assert result.value(latency, "b", ITEMS.index(1.0)) is None


def test_an_arm_that_does_not_come_up_is_recorded_and_the_others_are_compared(three):
    def broken():
        raise OSError("no such weights")

    three.register("d", broken)
    result = compare(three, ["a", "b", "d"], ITEMS, run=multiply, score=output)
    assert result.arms[2].num_failed == 24
    assert verdicts(result)["d", "failures"] is Verdict.WORSE
    assert verdicts(result)["b", "output"] is Verdict.BETTER
    assert "no such weights" in str(result)
    assert set(result.arms[2].means) == {"failures"}
    assert "d and a have no item in common by which to compare latency." in str(result)


def test_a_score_that_is_not_a_number_is_an_error_that_names_the_item_and_the_fix(three, tmp_path):
    (tmp_path / "items.jsonl").write_text("\n1.0\n2.0\n3.0\n")
    with pytest.raises(InputError) as caught:
        compare(
            three,
            ["a", "b"],
            tmp_path / "items.jsonl",
            run=multiply,
            score=[Metric("margin", lambda o, i: float("nan") if i == 2.0 else o)],
        )
    assert f"{tmp_path / 'items.jsonl'}:3: 'margin' of arm" in str(caught.value)
    assert "is nan, but a score is a finite number; raise an error" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"items": []}, "no items: a comparison needs two at the least"),
        ({"items": [1]}, "one item"),
        ({"arms": ["a"]}, "needs two arms or more, got ['a']; name one model twice"),
        ({"arms": "ab"}, "arms is a list of names, got the string 'ab'"),
        ({"arms": ["a", "x"]}, "not registered: 'x'; the cache knows 'a', 'b', 'c'"),
        ({"arms": ["a", Arm("a")]}, "two arms are called 'a'"),
        ({"primary": ["margin"]}, "no metric is called 'margin'; there are 'output', 'latency', 'failures'"),
        ({"score": [Metric("m", output), Metric("m", output)]}, "two metrics are called 'm'"),
        ({"score": [Metric("m")]}, "Metric(name, callable)"),
        ({"repeats": 0}, "repeats is a whole number from 1, got 0"),
        ({"level": 2}, "level is between 0 and 1"),
        ({"run": {}}, "run is a callable, or a mapping"),
        ({"items": "x.txt"}, "x.txt: items are read from .jsonl or .csv files"),
        ({"items": "x.jsonl"}, "x.jsonl: there is no such file of items"),
    ],
)
def test_bad_input_is_refused_in_words_before_anything_is_loaded(three, changes, words):
    options = {"arms": ["a", "b"], "items": ITEMS, "run": multiply, "score": output, **changes}
    with pytest.raises(InputError) as caught:
        compare(three, options.pop("arms"), options.pop("items"), **options)
    assert words in str(caught.value)
    assert three.status().counters.disk_hits == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("i.jsonl", '{"a": 1}\n{"a": \n', "i.jsonl:2: this line is not JSON"),
        (
            "i.csv",
            "a,b\n1,2\n1,2,3\n",
            "i.csv:3: this line has 3 cells, the heading has 2; quote cells that hold commas",
        ),
        ("i.csv", "a,b\n1,2\n1\n", "i.csv:3: this line has 1 cells, the heading has 2"),
        ("i.jsonl", "\n\n", "i.jsonl: no items"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(three, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        compare(three, ["a", "b"], tmp_path / name, run=multiply)
    assert words in str(caught.value)


def test_items_of_a_csv_file_are_dictionaries(three, tmp_path):
    (tmp_path / "i.csv").write_text('text,number\n"a, b",1\nc,2\nd,3\n')
    result = compare(three, ["a", "b"], tmp_path / "i.csv", run=lambda m, item: m(float(item["number"])), score=output)
    assert sorted(result.judgements[0].differences.values) == [1.0, 2.0, 3.0]


# --- resuming -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a signal would end it."""


@pytest.mark.parametrize("room", [10, 2])
@pytest.mark.parametrize("at", [0, 1, 17, 40, 71])
def test_a_run_that_was_killed_goes_on_and_finds_what_an_unbroken_one_finds(tmp_path, room, at):
    numbers = {"a": 1.0, "b": 2.0, "c": 3.0}
    options = {"score": output, "seed": 5, "repeats": 1}
    with cache_of(numbers, room=room) as cache:
        unbroken = compare(cache, list("abc"), ITEMS, run=multiply, **options)
    log, left = tmp_path / "run.jsonl", iter(range(at))

    def run(model, item):
        if next(left, None) is None:
            raise Killed
        return model(item)

    with cache_of(numbers, room=room) as cache, pytest.raises(Killed):
        compare(cache, list("abc"), ITEMS, run=run, log=log, warm_up=0, **options)
    # The last line may be torn.
    with log.open("ab") as file:
        file.write(b'{"run": {"arm": "a", "it')
    with cache_of(numbers, room=room) as cache:
        again = compare(cache, list("abc"), ITEMS, run=multiply, log=log, warm_up=0, **options)
    order = [(run.arm, run.item, run.block) for run in unbroken.runs]
    assert [(run.arm, run.item, run.block) for run in again.runs] == order
    assert len(set(order)) == 72
    assert [run.scores for run in again.runs] == [run.scores for run in unbroken.runs]
    scores = [
        [one.as_json() for one in r.judgements if one.differences.metric.name == "output"] for r in (again, unbroken)
    ]
    assert scores[0] == scores[1]
    assert str(Comparison.from_log(log)).splitlines()[:2] == str(again).splitlines()[:2]
    assert all(one.start_s <= other.start_s for one, other in pairwise(again.runs))


def test_a_finished_run_is_not_run_again(three, tmp_path):
    log = tmp_path / "run.jsonl"
    compare(three, ["a", "b"], ITEMS, run=multiply, log=log)
    result = compare(three, ["a", "b"], ITEMS, run=lambda m, i: pytest.fail("called again"), log=log)
    assert result.num_items == 24


def test_another_run_is_not_mixed_into_a_log(three, tmp_path):
    log = tmp_path / "run.jsonl"
    compare(three, ["a", "b"], ITEMS, run=multiply, log=log)
    with pytest.raises(InputError, match=r"run.jsonl:1: this run was made with other seed \(0, now 1\)"):
        compare(three, ["a", "b"], ITEMS, run=multiply, log=log, seed=1)
    with pytest.raises(InputError, match="made with other items"):
        compare(three, ["a", "b"], [*ITEMS[:-1], 99.0], run=multiply, log=log)


@pytest.mark.parametrize(
    ("line", "words"), [("nonsense", "is not a line of a run"), ('{"walk": {}}', "is not a line of a run")]
)
def test_a_foreign_line_in_a_log_is_named(three, tmp_path, line, words):
    log = tmp_path / "run.jsonl"
    compare(three, ["a", "b"], ITEMS, run=multiply, log=log)
    lines = log.read_text().splitlines()
    lines.insert(3, line)
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as caught:
        Comparison.from_log(log)
    assert f"{log}:4: this {words}" in str(caught.value)
    with pytest.raises(InputError, match=r"other\.jsonl:1: this is not the first line of a run"):
        (tmp_path / "other.jsonl").write_text("{}\n")
        Comparison.from_log(tmp_path / "other.jsonl")


# --- what is written ----------------------------------------------------------------------------------------------


def test_the_json_has_all_that_is_needed_to_compute_it_again(three, tmp_path):
    result = compare(three, ["a", "b"], ITEMS, run=multiply, score=output, log=tmp_path / "run.jsonl")
    found = json.loads(result.to_json(tmp_path / "r.json"))
    assert found == json.loads((tmp_path / "r.json").read_text())
    by_name = {"run": Run, "arrival": Arrival}
    entries = [by_name[kind](**facts) for entry in found["entries"] for kind, facts in entry.items()]
    again = Comparison(result.plan.from_json(found["plan"]), entries)
    assert [one.as_json() for one in again.judgements] == found["judgements"]
