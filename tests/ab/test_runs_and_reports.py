"""Runs that are to end well whatever names, scores and items are given, and reports that say what was found."""

from __future__ import annotations

import json
import re

import pytest
from ab.stand import Time, cache_of

from modelcache.ab import Arm, InputError, Metric, compare, smallest_detectable

ITEMS = [float(i) for i in range(1, 13)]


def multiply(model, item):
    return model(item)


def output(result, item):
    return result


def compared(arms=("a", "b"), items=ITEMS, *, room=10, **options):
    with cache_of({"a": 1.0, "b": 2.0, "c": 1.0}, room=room) as cache:
        return compare(cache, arms, items, **{"run": multiply, "score": output, **options})


# --- names --------------------------------------------------------------------------------------------------------


def test_a_score_may_be_called_a_latency(tmp_path):
    result = compared(
        score=[Metric("first token latency", output, "lower")], run={"read": lambda m, i: i, "go": multiply}
    )
    assert result.arms[1].means["first token latency"] == pytest.approx(13.0)
    assert [metric.name for metric in result.plan.scores] == ["first token latency"]
    assert [metric.name for metric in result.plan.times] == ["latency", "read latency", "go latency"]
    result.to_html(tmp_path / "r.html")
    assert "Item by item: first token latency" in (tmp_path / "r.html").read_text()


def test_names_that_look_like_markup_stand_in_the_table_as_they_are():
    table = str(compared(arms=[Arm("a", "a"), Arm("b [/x]", "b")], score=[Metric("acc[/y]", output, unit="[/z]")]))
    assert "ACC[/Y]" in table
    assert "b [/x] is better than a (acc[/y] +6.5 [/z]" in table


@pytest.mark.parametrize("name", ["", " read", 1])
def test_a_stage_has_a_name(name):
    with pytest.raises(InputError, match="a stage has a name without spaces around it, got"):
        compared(run={name: multiply, "answer": multiply})


# --- scores and times ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [None, "0.5", [1.0, 2.0], 1j, float("inf")])
def test_a_score_that_is_no_number_ends_the_run_and_does_not_count_against_the_arms(score):
    with pytest.raises(InputError, match=r"item \d+: 'quality' of arm '[ab]' is .*, but a score is a finite number"):
        compared(score=[Metric("quality", lambda o, i: score)])


@pytest.mark.parametrize("score", [True, 1, "numpy"])
def test_whatever_is_a_number_is_a_score(score):
    import numpy as np

    found = np.float32(1.0) if score == "numpy" else score
    assert compared(score=[Metric("quality", lambda o, i: found)]).arms[0].means["quality"] == 1.0


def test_a_score_of_nought_that_is_compared_by_ratio_is_named_with_the_fix():
    words = r"item \d+: 'cost' of arm '[ab]' is 0, but what is compared by ratio is above nought; .* scale='difference'"
    with pytest.raises(InputError, match=words):
        compared(score=[Metric("cost", lambda o, i: 0.0, scale="ratio")])


def test_a_clock_that_does_not_move_tells_no_arms_apart():
    result = compared(clock=lambda: 1.0)
    (latency,) = (one for one in result.judgements if one.differences.metric.name == "latency")
    assert set(latency.differences.values) == {0.0}


@pytest.mark.parametrize("scale", ["ratio", "difference"])
def test_where_every_call_failed_there_is_no_score_to_compare(scale, tmp_path):
    def run(model, item):
        raise RuntimeError("no answer")

    result = compared(run=run, score=[Metric("cost", output, scale=scale)])
    assert "b and a have no item in common by which to compare cost" in str(result)
    assert "failed" in page_of(result, tmp_path)


def test_an_input_error_of_the_users_own_code_is_a_failure_of_the_arm():
    def run(model, item):
        if model.number == 2.0:
            raise InputError("this prompt is too long")
        return model(item)

    assert [arm.num_failed for arm in compared(run=run).arms] == [0, 12]


class Wordless:
    def __repr__(self):
        raise OSError("no words")


@pytest.mark.parametrize(
    ("answer", "shown"), [({"text": "x"}, "x"), (5.0, "5.0"), (Wordless(), "<Wordless>")], ids=["shown", "repr", "type"]
)
def test_what_cannot_be_shown_is_no_failure_and_ends_no_run(answer, shown):
    result = compared(run=lambda m, i: answer, score=lambda o, i: 1.0, show=lambda o: o["text"])
    assert [arm.num_failed for arm in result.arms] == [0, 0]
    assert {run.output for run in result.runs} == {shown}
    assert result.items[0] == "1.0"


def test_half_a_character_in_an_output_ends_no_report(tmp_path):
    compared(run=lambda m, i: "\ud83d", score=lambda o, i: 1.0, show=str).to_html(tmp_path / "r.html")
    assert "<pre>?</pre>" in (tmp_path / "r.html").read_text(encoding="utf-8")


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "seed is a whole number from 0, got -1"),
        ({"seed": "x"}, "seed is a whole number from 0, got 'x'"),
        ({"seed": 1.5}, "seed is a whole number from 0, got 1.5"),
        ({"warm_up": 1.5}, "warm_up is a whole number from 0, got 1.5"),
        ({"warm_up": -1}, "warm_up is a whole number from 0, got -1"),
        ({"level": "x"}, "level is between 0 and 1, such as 0.05, got 'x'"),
        ({"level": 5}, "level is between 0 and 1, such as 0.05, got 5"),
        ({"max_seconds": "10m"}, "max_seconds is a number of seconds above 0, got '10m'"),
        ({"max_seconds": -1}, "max_seconds is a number of seconds above 0, got -1"),
        ({"max_seconds": float("nan")}, "max_seconds is a number of seconds above 0, got nan"),
        ({"items": None}, "items is a list, or the path of a .jsonl or .csv file, got None"),
        ({"arms": None}, "arms is a list of names, or of Arm, got None"),
        ({"arms": ["a", 2]}, "an arm is the name of a registered model, or an Arm, got 2"),
        ({"score": None}, "score is a callable, or a list of Metric(name, callable), got None"),
        ({"score": [Metric("m", 3)]}, "score is a callable, or a list of Metric(name, callable), got Metric("),
        ({"score": [Metric("", output)]}, "score: a metric has a name, got ''"),
        ({"score": [Metric(3, output)]}, "score: a metric has a name, got 3"),
        ({"primary": "output"}, "primary is a list of names, got the string 'output'; write ['output']"),
        ({"latency_margin": "5%"}, "a margin is a positive number, got '5%'"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_an_argument_of_another_kind_is_refused_in_words_before_anything_is_loaded(changes, words):
    with cache_of({"a": 1.0, "b": 2.0}) as cache:
        options = {"arms": ["a", "b"], "items": ITEMS, "run": multiply, "score": output, **changes}
        with pytest.raises(InputError) as caught:
            compare(cache, options.pop("arms"), options.pop("items"), **options)
        assert words in str(caught.value)
        assert cache.status().counters.disk_hits == 0


@pytest.mark.parametrize(("name", "model", "settings"), [("", "a", {}), (1, "a", {}), ("a", 1, {}), ("a", "a", [1])])
def test_an_arm_has_names_and_settings_by_name(name, model, settings):
    with pytest.raises(
        InputError, match=r"an arm and its model have names, got|settings are keyword arguments by name"
    ):
        Arm(name, model, settings)


@pytest.mark.parametrize("item", [{1: 1, "a": 2}, {(1, 2): 3}])
def test_items_may_have_keys_of_any_kind(item):
    assert compared(items=[item] * 5, run=lambda m, i: 1.0).num_items == 5


# --- taking a run up again ----------------------------------------------------------------------------------------


def cut(log, count):
    """Leave so many lines of a log, as if the run had been killed there."""
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:count]))


@pytest.mark.parametrize("room", [1, 10])
def test_other_arms_are_named_before_anything_is_loaded(tmp_path, room):
    log = tmp_path / "run.jsonl"
    compared(log=log, room=room)
    cut(log, 10)
    with cache_of({"a": 1.0, "b": 2.0, "c": 1.0}, room=room) as cache:
        with pytest.raises(InputError, match=r"run\.jsonl:1: this run was made with other arms"):
            compare(cache, ["a", "c"], ITEMS, run=multiply, score=output, log=log)
        assert cache.status().counters.disk_hits == 0


def test_models_that_do_not_fit_together_any_more_are_named_and_no_arm_is_blamed(tmp_path):
    log = tmp_path / "run.jsonl"
    compared(log=log, room=10)
    cut(log, 10)
    with pytest.raises(InputError, match=r"run\.jsonl:1: in this run a, b were in place together, and now they do not"):
        compared(log=log, room=1)
    assert log.read_bytes().count(b"\n") == 10
    assert [arm.num_failed for arm in compared(log=log, room=2).arms] == [0, 0]


# --- the page -----------------------------------------------------------------------------------------------------


def page_of(result, tmp_path, **options):
    result.to_html(tmp_path / "r.html", **options)
    return (tmp_path / "r.html").read_text(encoding="utf-8")


def test_no_name_gets_into_the_page_as_markup(tmp_path):
    hostile = 'm"><script>alert(1)</script>'
    page = page_of(compared(arms=["a", Arm(hostile, "b")], score=[Metric(hostile, output)]), tmp_path)
    assert "<script" not in page
    assert 'aria-label="m&quot;&gt;&lt;script&gt;' in page


def test_metrics_whose_names_differ_in_a_sign_have_ids_of_their_own(tmp_path):
    page = page_of(compared(score=[Metric("a b", output), Metric("a-b", output), Metric("A b", output)]), tmp_path)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 100
    assert {link[1:] for link in re.findall(r'href="(#[^"]+)"', page)} <= set(ids)


@pytest.mark.parametrize("name", ["b $x^{$", "$b$", "5 % of $ \\frac"])
def test_dollars_in_a_name_are_drawn_as_they_are(tmp_path, name):
    page = page_of(compared(arms=[Arm("a", "a"), Arm(name, "b")], score=[Metric(name, output)]), tmp_path)
    assert f"{name}: latency</text>" in page
    assert "mathdefault" not in page


def test_more_arms_than_colours_have_each_a_colour_that_is_defined(tmp_path):
    page = page_of(compared(arms=["a", *(Arm(f"b{i}", "b") for i in range(9))], items=ITEMS[:4]), tmp_path)
    defined = set(re.findall(r"(--m\d+):", page))
    assert set(re.findall(r"var\((--m\d+)\)", page)) == defined


def test_errors_that_all_differ_are_shown_up_to_twenty(tmp_path):
    def run(model, item):
        if model.number == 1.0:
            raise RuntimeError(f"cannot answer {item}: " + "y" * 300)
        return model(item)

    result = compared(items=[float(i) for i in range(400)], run=run, score=())
    assert len(result.error_lines) == 21
    assert result.error_lines[-1] == "... and 380 other errors; the JSON has them all"
    assert page_of(result, tmp_path).count("cannot answer") == 20


# --- what is said of a run ----------------------------------------------------------------------------------------


def test_a_run_that_waits_for_no_decision_does_not_say_that_one_ended_it():
    time = Time()

    def run(model, item):
        time.pass_by(1.0)
        return model(item)

    options = {"items": ITEMS * 5, "run": run, "max_seconds": 40, "clock": time}
    result = compared(**options)
    assert result.num_items < 60
    assert result.ends.endswith("it ended when its time was up, or it was stopped")
    assert compared(**options, stop_early=True).ends.endswith("it ended when the primary metrics were decided")


def test_a_model_that_was_in_ram_before_the_run_had_no_first_load():
    with cache_of({"a": 1.0, "b": 2.0}, room=1) as cache:
        with cache.get("a"):
            pass
        with cache.get("b"):
            pass
        cache.park("b")
        result = compare(cache, ["a", "b"], ITEMS, run=multiply)
    assert [arrival.found for arrival in result.arrivals if arrival.block < 0] == ["ram", "ram"]
    assert [arm.cold_s for arm in result.arms] == [None, None]


# --- blind --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secret():
    """Of four arms one answers with its name, one fails in words that name it, and one does not come up."""

    def broken():
        raise OSError("/models/secret-d has no weights")

    def run(model, item):
        if model.number == 3.0:
            raise RuntimeError("CUDA error in SecretNet")
        return {"from": "secret-b", "number": model(item)}

    with cache_of({"secret-a": 1.0, "secret-b": 2.0, "secret-c": 3.0}, room=2) as cache:
        cache.register("secret-d", broken)
        arms = ["secret-a", Arm("secret arm", "secret-b", {}), "secret-c", "secret-d"]
        return compare(cache, arms, ITEMS, run=run, score=[Metric("number", lambda o, i: o["number"])])


def test_nothing_blind_holds_a_name(secret, tmp_path):
    blind = secret.blinded()
    for text in (str(blind), blind.to_json(), page_of(secret, tmp_path, blind=True)):
        assert not re.search("secret", text, re.IGNORECASE)
        assert "weights" not in text
    assert "{'from': '[name]', 'number'" in blind.to_json()
    assert "failed 12 time(s): did not come up" in str(blind)
    assert "failed 12 time(s): RuntimeError\n" in str(blind)


def test_a_blind_comparison_is_with_whichever_arm_is_called_a(secret):
    blind = secret.blinded()
    assert [arm.name for arm in blind.plan.arms] == ["A", "B", "C", "D"]
    assert {one.differences.base for one in blind.judgements} == {"A"}
    assert str(secret.blinded()) == str(blind)
    assert blind.ends == secret.ends
    assert blind.num_switches == secret.num_switches


def test_the_place_of_the_baseline_is_drawn_by_lot_for_each_run():
    firsts = set()
    for seed in range(12):
        result = compared(seed=seed, clock=lambda: 1.0)
        (found,) = (one for one in result.blinded().judgements if one.differences.metric.name == "output")
        firsts.add(str(found.verdict))
    assert firsts == {"better", "worse"}


def test_more_arms_than_letters_have_names_of_their_own():
    names = [
        arm.name
        for arm in compared(arms=["a", *(Arm(f"b{i}", "b") for i in range(29))], items=ITEMS[:2]).blinded().plan.arms
    ]
    assert len(set(names)) == 30
    assert names[25:28] == ["Z", "A1", "B1"]


def test_what_a_run_can_show_is_said_before_it_and_stands_in_the_table_and_in_the_json():
    said = []
    result = compared(items=ITEMS * 10, max_items=64, level=0.01, on_progress=said.append)
    deviations = smallest_detectable(64, level=0.01)
    assert 0.4 < deviations < 0.5
    words = f"Four times of five, 64 items show a difference of {deviations:.2g} standard deviations"
    assert words in said[0]
    assert words in " ".join(str(result).split())
    assert json.loads(result.to_json())["detectable_deviations"] == deviations
    assert json.loads(compared(max_items=1).to_json())["detectable_deviations"] is None
