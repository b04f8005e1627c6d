"""Who gets which arm: by the weights, the same everywhere, and nobody moves when the share is raised."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from modelcache.ab import InputError, Layer, Split
from modelcache.ab.assignment import Why, mask, place_of

VECTORS = Path(__file__).with_name("assignment_vectors.json")
WEIGHTS = {"control": 0.5, "b": 0.3, "c": 0.2}
NAMES = [f"experiment-{i}" for i in range(20)]


def is_within_four_errors(counts, count):
    return all(
        abs(counts[arm] - count * weight) <= 4 * (count * weight * (1 - weight)) ** 0.5
        for arm, weight in WEIGHTS.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_units_are_shared_out_by_the_weights(name):
    split = Split(name, WEIGHTS)
    counts = Counter(split.assign(str(unit)).arm for unit in range(20_000))
    assert is_within_four_errors(counts, 20_000)


@pytest.mark.proof
@pytest.mark.timeout(300)
def test_a_million_units_are_shared_out_by_the_weights_in_each_of_20_experiments():
    for name in NAMES:
        split = Split(name, WEIGHTS)
        counts = Counter(split.assign(str(unit)).arm for unit in range(1_000_000))
        assert is_within_four_errors(counts, 1_000_000)


def test_raising_the_share_moves_nobody_who_takes_part():
    before, after = Split("ramp", WEIGHTS, share=0.1), Split("ramp", WEIGHTS, share=0.5)
    joined = 0
    for unit in map(str, range(20_000)):
        was, now = before.assign(unit), after.assign(unit)
        if was.takes_part:
            assert now == was
        joined += now.takes_part
    assert joined == pytest.approx(10_000, abs=300)


def test_raising_the_weight_of_the_last_of_two_arms_moves_nobody_out_of_it():
    before, after = Split("ramp", {"old": 0.9, "new": 0.1}), Split("ramp", {"old": 0.5, "new": 0.5})
    new = [unit for unit in map(str, range(20_000)) if before.assign(unit).arm == "new"]
    assert new
    assert all(after.assign(unit).arm == "new" for unit in new)


def test_places_are_those_of_the_committed_vectors_in_any_process():
    vectors = json.loads(VECTORS.read_text())
    assert len(vectors) >= 20
    for one in vectors:
        assert place_of(one["experiment"], one["unit"]) == one["place"]
        assert Split(one["experiment"], WEIGHTS).assign(one["unit"]).arm == one["arm"]
    code = (
        "import json, sys; from modelcache.ab.assignment import place_of; "
        "print(json.dumps([place_of(v['experiment'], v['unit']) for v in json.load(sys.stdin)]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], input=VECTORS.read_text(), capture_output=True, text=True, check=True
    )
    assert json.loads(told.stdout) == [one["place"] for one in vectors]


def test_experiments_of_one_layer_never_share_a_unit_and_others_are_independent():
    one = Split("one", WEIGHTS, layer=Layer("page", 0.0, 0.4))
    other = Split("other", WEIGHTS, layer=Layer("page", 0.4, 1.0))
    both = Counter((one.assign(unit).takes_part, other.assign(unit).takes_part) for unit in map(str, range(20_000)))
    assert both[True, True] == both[False, False] == 0
    assert both[True, False] == pytest.approx(8_000, abs=300)
    assert one.assign("x").why in (Why.ASSIGNED, Why.OTHER_SLICE)


def test_arms_of_two_experiments_are_independent_of_each_other():
    split, other = Split("one", WEIGHTS), Split("two", WEIGHTS)
    joint = Counter((split.assign(unit).arm, other.assign(unit).arm) for unit in map(str, range(20_000)))
    for arm, weight in WEIGHTS.items():
        for its, its_weight in WEIGHTS.items():
            share = weight * its_weight
            assert joint[arm, its] == pytest.approx(20_000 * share, abs=4 * (20_000 * share) ** 0.5)


def test_a_tester_gets_the_arm_that_is_written_down_and_does_not_count():
    split = Split("e", WEIGHTS, overrides={"alice": "c"})
    assert (split.assign("alice").arm, split.assign("alice").why) == ("c", Why.OVERRIDE)
    assert not split.assign("alice").takes_part


def test_the_kill_switch_sends_everybody_to_the_control():
    split = Split("e", WEIGHTS, overrides={"alice": "c"}, is_on=False)
    assert {split.assign(unit).arm for unit in ("alice", *map(str, range(100)))} == {"control"}
    assert split.assign("7").why is Why.SWITCHED_OFF


def test_a_mask_does_not_tell_the_unit_and_differs_between_experiments():
    assert mask("e", "alice") == mask("e", "alice") != mask("f", "alice")
    assert len(mask("e", "alice")) == 16
    assert "alice" not in mask("e", "alice")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": {"a": 0.5, "b": 0.4}}, "weights must add up to 1, got 0.5 + 0.4 = 0.9; use 'share' to ramp up"),
        ({"weights": {"a": 1.0}}, "needs two arms or more"),
        ({"weights": {"a": 1.5, "b": -0.5}}, "the weight of 'a' must lie between 0 and 1, got 1.5"),
        ({"share": 10.0}, "share must lie between 0 and 1, got 10.0"),
        ({"overrides": {"bob": "z"}}, "the override of 'bob' names the arm 'z'"),
        ({"name": ""}, "needs a name"),
    ],
)
def test_a_split_that_cannot_be_is_refused_in_words(changes, words):
    with pytest.raises(InputError) as caught:
        Split(**{"name": "e", "weights": WEIGHTS, **changes})
    assert words in str(caught.value)


def test_a_slice_that_cannot_be_is_refused_in_words():
    with pytest.raises(InputError, match="lies between 0 and 1, got 0.5 to 0.4"):
        Layer("page", 0.5, 0.4)


def test_the_places_of_the_documentation_are_those_of_the_vectors():
    page = (Path(__file__).parents[2] / "docs" / "ab.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (0\.\d+) \|$", page, re.MULTILINE)
    assert len(shown) >= 3
    for experiment, unit, place in shown:
        assert place_of(experiment, unit) == float(place)
