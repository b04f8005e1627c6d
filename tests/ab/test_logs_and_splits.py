"""The online split where things are uneven: rare arms, drift, changed weights, foreign lines, logs that fail."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from ab.stand import cache_of
from typer.testing import CliRunner

from modelcache.ab import Arm, Assignment, Comparison, Experiment, InputError, Layer, Split, Verdict, analyse, compare
from modelcache.ab.assignment import Why
from modelcache.ab.exposures import _pairs, as_tables
from modelcache.ab.inputs import read_items
from modelcache.cli.app import app

ARMS = {"a": 0.5, "b": 0.5}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "exposures.jsonl"


@pytest.fixture
def cache():
    with cache_of({"a": 1.0, "b": 2.0}) as cache:
        yield cache


def exposure(unit, arm, weights=ARMS, **facts):
    """A line as an experiment writes it."""
    line = {
        "format": "modelcache-ab-exposure",
        "experiment": "size",
        "arm": arm,
        "weights": dict(weights),
        "why": "assigned",
        "unit": unit,
        "tier": "vram",
        "wait_s": 0.1,
        "seconds": 0.2,
        "metrics": {},
        "error": "",
    }
    return {**line, **facts}


def write(log, lines):
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def drifting(log, weights, *, name="size", count=1_000, seed=0, slower=0.0):
    """Units that come one after the other while all times grow by 30 %; the times of `b` are greater by `slower`."""
    split, noise = Experiment(name, weights), random.Random(seed)
    arms = [split.assign(str(unit)).arm for unit in range(count)]
    write(
        log,
        (
            exposure(
                str(unit),
                arm,
                weights,
                seconds=(1 + 0.3 * unit / count) * noise.lognormvariate(0, 0.1) * (1 + slower * (arm == "b")),
            )
            for unit, arm in enumerate(arms)
        ),
    )


# --- who is compared with whom ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [ARMS, {"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.2, "c": 0.2}], ids=str)
def test_identical_arms_are_not_told_apart_under_a_drift_whatever_the_weights(log, weights):
    wrong = 0
    for seed in range(20):
        drifting(log, weights, name=f"e{seed}", seed=seed)
        (found,) = analyse(log)
        wrong += any(one.verdict is not Verdict.CANNOT_TELL for one in found.judgements)
    assert wrong <= 4


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("weights", [ARMS, {"a": 0.9, "b": 0.1}], ids=str)
def test_identical_arms_are_told_apart_in_at_most_18_of_200_drifting_logs_also_when_looked_at_all_the_while(
    log, weights
):
    wrong = 0
    for seed in range(200):
        drifting(log, weights, name=f"e{seed}", seed=seed, count=600)
        lines = log.read_text().splitlines(keepends=True)
        for count in range(40, 601, 40):
            log.write_text("".join(lines[:count]))
            if any(one.verdict is not Verdict.CANNOT_TELL for one in analyse(log)[0].judgements):
                wrong += 1
                break
    assert wrong <= 18


@pytest.mark.parametrize("weights", [ARMS, {"a": 0.9, "b": 0.1}], ids=str)
def test_a_slower_arm_is_found_under_a_drift_whatever_the_weights(log, weights):
    drifting(log, weights, slower=0.1)
    (found,) = analyse(log)
    verdicts = {one.differences.metric.name: one.verdict for one in found.judgements}
    assert verdicts["seconds"] is Verdict.WORSE
    assert [arm.arm for arm in found.arms] == ["a", "b"]


def test_almost_all_units_of_a_rare_arm_find_a_partner(log):
    drifting(log, {"a": 0.9, "b": 0.1})
    (found,) = analyse(log)
    rare = found.arms[1].num_units
    assert rare - 20 <= len(found.judgements[0].differences.values) <= rare


def test_either_partner_of_a_pair_is_as_likely_to_be_in_the_rare_arm():
    draw = random.Random(0)
    count = earlier = 0
    for block in range(2_000):
        arms = {f"{block}-{place}": "b" if draw.random() < 0.1 else "a" for place in range(20)}
        places = list(arms)
        for mine, other in _pairs(arms, "b"):
            assert (arms[mine], arms[other]) == ("b", "a")
            count += 1
            earlier += places.index(mine) < places.index(other)
    assert count >= 3_800
    assert abs(earlier - count / 2) <= 4 * (count / 4) ** 0.5


def test_what_one_look_has_judged_the_next_does_not_change(log):
    drifting(log, ARMS, count=200)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    write(log, lines[:120])
    early = analyse(log)[0].judgements[0].differences.values
    write(log, [*lines, *({**line, "seconds": 9.0} for line in lines)])
    late = analyse(log)[0].judgements[0].differences.values
    assert len(late) > len(early) > 0
    assert late[: len(early)] == early


def test_a_metric_that_a_unit_gives_only_later_counts(log):
    lines = [exposure(str(unit), "ab"[unit % 2]) for unit in range(60)]
    write(log, [*lines, *({**line, "metrics": {"liked": 1.0}} for line in lines)])
    (found,) = analyse(log)
    judged = {one.differences.metric.name: len(one.differences.values) for one in found.judgements}
    assert judged["liked"] == judged["seconds"] == 30


@pytest.mark.parametrize("name", ["x", "layer", "layer:x", "layer/x"])
def test_an_experiment_is_dealt_independently_of_its_layer_whatever_they_are_called(name):
    experiment = Experiment(name, ARMS, layer=Layer("x", 0.0, 0.5))
    given = [experiment.assign(str(unit)) for unit in range(4_000)]
    arms = [one.arm for one in given if one.takes_part]
    assert len(arms) == pytest.approx(2_000, abs=130)
    assert arms.count("b") == pytest.approx(len(arms) / 2, abs=90)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": {"a": "50%", "b": "50%"}}, "the weight of 'a' must lie between 0 and 1, got '50%'"),
        ({"weights": {"a": 0.5, "b": math.nan}}, "the weight of 'b' must lie between 0 and 1, got nan"),
        ({"share": "20%"}, "share must lie between 0 and 1, got '20%'"),
        ({"share": None}, "share must lie between 0 and 1, got None"),
    ],
)
def test_numbers_of_a_split_that_are_none_are_refused_in_words(changes, words):
    with pytest.raises(InputError, match=words):
        Split(**{"name": "size", "weights": ARMS, **changes})


def test_a_slice_that_is_no_numbers_is_refused_in_words():
    with pytest.raises(InputError, match="a slice of layer 'page' lies between 0 and 1, got '0%' to '50%'"):
        Layer("page", "0%", "50%")


def test_places_in_a_layer_are_those_that_the_page_says():
    hashed = hashlib.sha256(b"\0layer\0page\0alice").digest()
    place = int.from_bytes(hashed[:8], "big") / 2**64
    assert Layer("page", place - 1e-9, place + 1e-9).has("alice")
    assert not Layer("page", place + 1e-9, 1.0).has("alice")


# --- weights that change ------------------------------------------------------------------------------------------


def test_an_arm_that_comes_in_later_is_compared_too(log):
    weights = {"a": 0.34, "b": 0.33, "c": 0.33}
    before = [exposure(f"old-{unit}", "ab"[unit % 2]) for unit in range(60)]
    after = [exposure(f"new-{unit}", "abc"[unit % 3], weights) for unit in range(90)]
    write(log, before + after)
    (found,) = analyse(log)
    assert {arm.arm: arm.num_units for arm in found.arms} == {"a": 60, "b": 60, "c": 30}
    assert {one.differences.arm for one in found.judgements} == {"b", "c"}
    assert all(one.differences.values for one in found.judgements)
    assert found.alarm == ""


def test_units_that_move_when_weights_change_are_counted_once_and_set_off_no_alarm(log):
    rare, even = Experiment("size", {"a": 0.9, "b": 0.1}), Experiment("size", ARMS)
    units = [str(unit) for unit in range(1_000)]
    write(
        log,
        (
            exposure(unit, split.assign(unit).arm, split.split.weights, metrics={"quality": quality})
            for split, quality in ((rare, 0.0), (even, 1.0))
            for unit in units
        ),
    )
    (found,) = analyse(log)
    assert sum(arm.num_units for arm in found.arms) == 1_000
    assert found.num_crossing == pytest.approx(400, abs=60)
    assert found.alarm == ""
    # What a unit does after the weights have changed says less about its arm than about who stayed in it.
    assert [arm.means["quality"] for arm in found.arms] == [0.0, 0.0]


# --- what else is in a log ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"metrics": {"liked": "yes"}}, "its 'liked' is 'yes', not a finite number"),
        ({"metrics": {"liked": math.nan}}, "its 'liked' is nan, not a finite number"),
        ({"metrics": {"liked": True}}, "its 'liked' is True, not a finite number"),
        ({"metrics": None}, "its 'metrics' are None, not numbers by name"),
        ({"wait_s": None}, "its 'wait_s' is None, not a finite number"),
        ({"seconds": math.inf}, "its 'seconds' is inf, not a finite number"),
        ({"weights": 3}, "its 'weights' are 3, not numbers by name"),
        ({"weights": {"a": "x", "b": "y"}}, "its 'a' is 'x', not a finite number"),
        ({"weights": {"a": "x"}, "metrics": {"a": 1.0}}, "its 'a' is 'x', not a finite number"),
        ({"weights": {"a": 0.0, "b": 1.0}}, "its weights are {'a': 0.0, 'b': 1.0}, not all positive"),
        ({"seconds": 10**400}, f"its 'seconds' is {10**400}, not a finite number"),
        ({"weights": {"c": 1.0}}, "its arm 'a' is none of its weights"),
        ({"unit": [1]}, "its 'unit' is [1], not text"),
        ({"arm": None}, "its 'arm' is None, not text"),
        ({"error": 1}, "its 'error' is 1, not text"),
        ({"why": "out of share"}, "its why is 'out of share', not 'assigned' or 'override'"),
    ],
    ids=str,
)
def test_a_line_of_the_wrong_kind_is_named_with_what_is_wrong(log, facts, words):
    write(log, [*(exposure(str(unit), "ab"[unit % 2]) for unit in range(20)), exposure("new", "a") | facts])
    with pytest.raises(InputError) as caught:
        analyse(log)
    assert str(caught.value).startswith(f"{log}:21: this is not a line of an exposure log ({words})")


def test_a_last_line_that_a_crash_has_torn_is_left_out(log):
    write(log, [exposure(str(unit), "ab"[unit % 2]) for unit in range(21)])
    log.write_bytes(log.read_bytes()[:-30])
    assert sum(arm.num_units for arm in analyse(log)[0].arms) == 20


def test_a_metric_that_no_line_has_is_named_with_those_that_there_are(log):
    write(log, [exposure(str(unit), "ab"[unit % 2], metrics={"loss": 1.0}) for unit in range(20)])
    with pytest.raises(InputError) as caught:
        analyse(log, lower_is_better=["loss", "lossss"])
    words = "no metric is called 'lossss'; this log has 'failures', 'loss', 'seconds', 'wait_s'"
    assert str(caught.value) == f"{log}: {words}"
    assert analyse(log, lower_is_better=["failures", "seconds"])


@pytest.mark.parametrize("error", ["CancelledError", "GeneratorExit", "KeyboardInterrupt"])
def test_exposures_that_the_caller_did_not_wait_for_are_counted_apart(log, error):
    arms = ["ab"[unit % 2] for unit in range(40)]
    left = [{"error": error, "seconds": 9.0} if arm == "b" else {} for arm in arms]
    write(log, [exposure(str(unit), arm, **facts) for unit, (arm, facts) in enumerate(zip(arms, left, strict=True))])
    (found,) = analyse(log)
    assert [(arm.num_units, arm.num_failed, arm.num_left) for arm in found.arms] == [(20, 0, 0), (20, 0, 20)]
    assert "failures" not in {one.differences.metric.name for one in found.judgements}
    assert found.arms[1].means == {}
    assert found.alarm == ""
    _, arms, *_ = as_tables(found)
    assert "LEFT" in {str(column.header) for column in arms.columns}


# --- what serving does --------------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_is_warned_of_once_and_fails_no_request(cache, tmp_path, caplog):
    (tmp_path / "file").touch()
    log = tmp_path / "file" / "log.jsonl"
    experiment = Experiment("size", ARMS, log=log)
    for unit in ("u", "v"):
        with experiment.serve(cache, unit) as serving:
            assert serving.model(1.0)
    with pytest.raises(KeyError), experiment.serve(cache, "u"):
        raise KeyError("the caller's own")
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "modelcache.ab"]
    assert warning.startswith(f"exposures of experiment=size are lost until log={log} can be written: [Errno ")
    (tmp_path / "file").unlink()
    with experiment.serve(cache, "u"):
        pass
    assert len(log.read_text().splitlines()) == 1


def test_figures_that_json_does_not_know_fail_no_request(cache, log, caplog):
    with Experiment("size", ARMS, log=log).serve(cache, "u") as serving:
        serving.metrics["loss"] = object()
    assert "Object of type object is not JSON serializable" in caplog.text


def test_a_write_that_takes_only_a_part_is_finished(cache, log, monkeypatch):
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole(descriptor, data[:50]))
    with Experiment("size", ARMS, log=log).serve(cache, "u"):
        pass
    assert json.loads(log.read_text())["arm"] in ARMS


@pytest.mark.parametrize("unit", [42, None, b"alice"], ids=str)
def test_a_unit_that_is_not_text_is_refused_in_words(cache, unit):
    words = re.escape(f"experiment 'size': a unit is text, got {unit!r} ({type(unit).__name__}); give the user's name")
    experiment = Experiment("size", ARMS, overrides={"42": "b"})
    with pytest.raises(InputError, match=words):
        experiment.assign(unit)
    with pytest.raises(InputError, match=words), experiment.serve(cache, unit):
        pass
    with pytest.raises(InputError, match=words):
        Experiment("size", ARMS, overrides={unit: "b"})
    assert experiment.assign("42").arm == "b"


def test_a_unit_of_half_a_character_is_served_and_read(cache, log):
    with Experiment("size", ARMS, log=log).serve(cache, "\ud800"):
        pass
    write(
        log, [*map(json.loads, log.read_text().splitlines()), *(exposure(f"\ud800{i}", "ab"[i % 2]) for i in range(20))]
    )
    assert sum(arm.num_units for arm in analyse(log)[0].arms) == 21


@pytest.mark.parametrize("name", ["seconds", "wait_s", "failures"])
def test_a_name_that_every_exposure_has_anyway_is_refused(cache, name):
    with Experiment("size", ARMS).serve(cache, "u") as serving:
        with pytest.raises(InputError, match=f"'{name}' is measured of every exposure; give yours another name"):
            serving.record(quality=1.0, **{name: 7.0})
        assert serving.metrics == {}


@pytest.mark.parametrize("value", [None, "good", 10**400, math.inf], ids=lambda value: str(value)[:8])
def test_a_figure_that_is_no_number_is_refused(cache, value):
    with Experiment("size", ARMS).serve(cache, "u") as serving, pytest.raises(InputError, match="a finite number"):
        serving.record(quality=value)


def test_the_kill_switch_holds_from_the_next_unit_on(cache, log):
    experiment = Experiment("size", ARMS, overrides={"alice": "b"}, log=log)
    units = ["alice", *map(str, range(50))]
    before = [experiment.assign(unit) for unit in units]
    with experiment.serve(cache, "alice") as serving:
        experiment.is_on = False
        assert serving.model.number == 2.0
    assert {experiment.assign(unit) for unit in units} == {Assignment("a", Why.SWITCHED_OFF)}
    with experiment.serve(cache, "alice") as serving:
        assert serving.model.number == 1.0
    assert len(log.read_text().splitlines()) == 1
    experiment.is_on = True
    assert [experiment.assign(unit) for unit in units] == before


def test_a_kill_switch_is_on_or_off_and_nothing_else():
    experiment = Experiment("size", ARMS)
    with pytest.raises(InputError, match="experiment 'size': is_on is True or False, got 'off'"):
        experiment.is_on = "off"
    assert experiment.is_on


def test_a_client_that_goes_away_is_no_failure_of_its_arm(cache, log):
    experiment = Experiment("size", ARMS, log=log)

    async def serve(is_served):
        async with experiment.aserve(cache, "u"):
            is_served.set()
            await asyncio.Event().wait()

    async def main():
        is_served = asyncio.Event()
        task = asyncio.create_task(serve(is_served))
        await is_served.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    (found,) = analyse(log)
    assert sum(arm.num_left for arm in found.arms) == 1
    assert sum(arm.num_failed for arm in found.arms) == 0


# --- a run that is taken up again ---------------------------------------------------------------------------------


class Prompt:
    """An item of one's own."""

    def __init__(self, number, **more):
        self.number = number
        self.more = more


def run(cache, log, items, arms=("a", "b")):
    return compare(cache, arms, items, run=lambda model, item, **settings: 1.0, log=log)


@pytest.mark.parametrize(
    "make",
    [
        Prompt,
        lambda number: Prompt(0, image=torch.full((2, 2), number, dtype=torch.bfloat16)),
        lambda number: torch.tensor(number),
        lambda number: {"labels": {f"label-{number}", "x"}},
        lambda number: {1: number, "a": 0},
        lambda number: np.arange(number),
    ],
    ids=["objects", "tensors in objects", "tensors", "sets", "mixed keys", "arrays"],
)
def test_other_items_are_found_out_when_a_run_is_taken_up(cache, log, make):
    run(cache, log, [make(number) for number in range(5)])
    assert run(cache, log, [make(number) for number in range(5)]).num_items == 5
    with pytest.raises(InputError, match="made with other items"):
        run(cache, log, [make(number) for number in range(1, 6)])


def test_items_have_the_same_identity_in_any_process():
    code = (
        "import numpy, torch; from modelcache.ab.inputs import identity; "
        "print(identity([torch.arange(3), torch.ones(2, dtype=torch.bfloat16), numpy.arange(4), {'b', 'a', 'c'}, 1j]))"
    )
    told = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(told) == 1


def test_items_that_cannot_be_told_apart_are_not_taken_up(cache, log):
    run(cache, log, [lambda: 1, lambda: 2])
    with pytest.raises(InputError, match="made with other items"):
        run(cache, log, [lambda: 1, lambda: 2])


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"cap": math.inf}, {"cap": -math.inf}),
        ({"cap": math.nan}, {"cap": 1.0}),
        ({"prompt": Prompt(1)}, {"prompt": Prompt(2)}),
        ({"bias": torch.zeros(2_000)}, {"bias": torch.arange(2_000) % 1_999 // 1_998}),
        ({"stops": ["a"]}, {"stops": ["b"]}),
    ],
    ids=["infinity", "no number", "objects", "tensors", "lists"],
)
def test_arms_are_known_by_their_settings_of_any_kind(cache, log, settings, others):
    run(cache, log, range(5), ["a", Arm("set", "a", settings)])
    again = run(cache, log, range(5), ["a", Arm("set", "a", copy.deepcopy(settings))])
    assert again.num_items == 5
    assert json.loads(again.to_json())["plan"] == json.loads(log.read_text().splitlines()[0])["plan"]
    with pytest.raises(InputError, match="made with other arms"):
        run(cache, log, range(5), ["a", Arm("set", "a", others)])


@pytest.mark.parametrize(
    ("kind", "facts", "words"),
    [
        ("run", {"arm": "z"}, "'z' is none of the run's 'a', 'b'"),
        ("run", {"start_s": "x"}, "its 'start_s' is 'x'"),
        ("run", {"item": 5}, "there is no item 5, repeat 0"),
        ("run", {"item": 0.5}, "its 'item' is 0.5"),
        ("run", {"seconds": {"run": None}}, "its 'seconds' is {'run': None}"),
        ("run", {"scores": {"x": math.nan}}, "its 'scores' is {'x': nan}"),
        ("run", {"is_warm_up": 0}, "its 'is_warm_up' is 0"),
        ("arrival", {"model": "z"}, "'z' is none of the run's 'a', 'b'"),
        ("arrival", {"vram_bytes": "1GiB"}, "its 'vram_bytes' is '1GiB'"),
    ],
)
def test_a_line_of_another_run_is_named_with_what_is_wrong(cache, log, kind, facts, words):
    run(cache, log, range(5))
    found = [json.loads(line) for line in log.read_text().splitlines()]
    place = next(number for number, line in enumerate(found) if kind in line)
    found[place][kind] |= facts
    write(log, found)
    with pytest.raises(InputError) as caught:
        Comparison.from_log(log)
    assert str(caught.value).startswith(f"{log}:{place + 1}: this is not a line of a run ({words})")


def test_two_do_not_go_on_with_one_run(cache, log):
    def second(model, item):
        with pytest.raises(InputError, match=f"{log}: this run is going on, here or in another process; wait until it"):
            run(cache, log, range(5))
        return 1.0

    result = compare(cache, ["a", "b"], range(5), run=second, log=log)
    assert [arm.num_failed for arm in result.arms] == [0, 0]
    assert run(cache, log, range(5)).num_items == 5


@pytest.mark.parametrize("length", [0, 5, 40, 300])
def test_a_run_whose_first_line_a_crash_has_torn_is_begun_anew(cache, log, length):
    run(cache, log, range(5))
    whole = log.read_bytes()
    log.write_bytes(whole[:length])
    assert run(cache, log, range(5)).num_items == 5
    assert log.read_bytes().splitlines()[0] == whole.splitlines()[0]


@pytest.mark.parametrize("text", ["notes without a line end", '{"format": "modelcache-ab-exposure", "at'])
def test_nothing_is_cut_off_a_file_that_is_of_something_else(cache, log, text):
    log.write_text(text)
    with pytest.raises(InputError, match=f"{log}:1: this is not the first line of a run"):
        run(cache, log, range(5))
    assert log.read_text() == text


def test_nothing_is_cut_off_another_run(cache, log):
    run(cache, log, range(5))
    log.write_bytes(log.read_bytes()[:-10])
    before = log.read_bytes()
    with pytest.raises(InputError, match="made with other items"):
        run(cache, log, range(1, 6))
    assert log.read_bytes() == before


def test_a_log_that_is_a_folder_is_refused_before_anything_is_loaded(cache, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: this is a folder; a run is recorded in a file"):
        run(cache, tmp_path, range(5))
    assert cache.status().counters.disk_hits == 0


def test_a_report_on_what_is_no_file_says_so(tmp_path):
    with pytest.raises(InputError, match=r"x.jsonl: there is no such file; give the file that compare\(log=...\) has"):
        Comparison.from_log(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=f"{tmp_path}: this is a folder; give the file"):
        Comparison.from_log(tmp_path)
    told = CliRunner().invoke(app, ["ab", "report", str(tmp_path / "x.jsonl")])
    assert (told.exit_code, "there is no such file" in told.output) == (2, True)


# --- items of a CSV file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a,b,a\n1,2,3\n", "items.csv:1: two columns are called 'a'; give one of them another name"),
        (b"\n\na,b\n1,2\n1,2,3\n", "items.csv:5: this line has 3 cells, the heading has 2"),
        (b"a,b\n1,2\n1,\xff\n", "items.csv:3: this line is not in UTF-8 (invalid start byte); save the file as UTF-8"),
        (b'a,b\n1,2\n1,"2"3\n', "items.csv:3: this line is not CSV ("),
    ],
    ids=["columns of one name", "blank lines first", "another encoding", "a stray quote"],
)
def test_what_is_wrong_with_a_csv_file_is_named_with_its_line(tmp_path, data, words):
    (tmp_path / "items.csv").write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_items(tmp_path / "items.csv")
    assert words in str(caught.value)


def test_blank_lines_of_a_csv_file_are_no_items(tmp_path):
    (tmp_path / "items.csv").write_text('\ufeff\n\na,b\n1,"2\n3"\n\n4,5\n', encoding="utf-8")
    found = read_items(tmp_path / "items.csv")
    assert found.values == ({"a": "1", "b": "2\n3"}, {"a": "4", "b": "5"})
    assert found.place(1).endswith("items.csv:7")
