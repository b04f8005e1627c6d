"""The order of the calls: fair to each arm, with as few promotions as can be."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from modelcache.ab.schedule import group_models, least_promotions, make_schedule


def plan(groups, arms="abc", items=60, **changes):
    options = {"num_used": items, "repeats": 1, "seed": 0, "num_pairs": None, "promotions": lambda visits: len(visits)}
    return make_schedule(items, arms, groups, **{**options, **changes})


@pytest.mark.parametrize("groups", [(("a", "b", "c"),), (("a", "b"), ("c",)), (("a",), ("b",), ("c",))])
@pytest.mark.parametrize("repeats", [1, 3])
def test_every_arm_gets_every_item_as_often_as_asked(groups, repeats):
    calls = Counter(
        (call.arm, call.item, call.repeat) for block in plan(groups, repeats=repeats).blocks for call in block.calls
    )
    assert calls == {(arm, item, repeat): 1 for arm in range(3) for item in range(60) for repeat in range(repeats)}


def test_arms_that_fit_together_take_turns_in_the_order_abba():
    (block,) = plan((("a", "b", "c"),)).blocks
    turns = [[call.arm for call in block.calls[i : i + 3]] for i in range(0, len(block.calls), 3)]
    for first, second in zip(turns[::2], turns[1::2], strict=True):
        assert first == second[::-1]
    assert len({tuple(turn) for turn in turns}) > 2


def test_over_a_pair_of_blocks_a_steady_drift_cancels():
    schedule = plan((("a",), ("b",)), arms="ab", items=80)
    at, when = 0, {0: Counter(), 1: Counter()}
    for block in schedule.blocks:
        for call in block.calls:
            when[call.arm][block.pair] += at
            at += 1
    assert when[0] == when[1]


def test_where_two_blocks_of_a_group_meet_nothing_moves():
    visits = [block.models for block in plan((("a",), ("b",)), arms="ab", items=80).blocks]
    assert sum(one != other for one, other in pairwise(visits)) == len(visits) // 2


def test_the_same_seed_gives_the_same_order_and_another_one_another():
    assert plan((("a", "b", "c"),), seed=1) == plan((("a", "b", "c"),), seed=1) != plan((("a", "b", "c"),), seed=2)


def test_a_part_of_the_items_is_drawn_by_lot():
    used = [
        {call.item for block in plan((("a", "b", "c"),), num_used=10, seed=s).blocks for call in block.calls}
        for s in (0, 1)
    ]
    assert [len(each) for each in used] == [10, 10]
    assert used[0] != used[1]


def test_models_are_put_into_as_few_groups_as_can_be():
    sizes = {"a": 5, "b": 4, "c": 3, "d": 2}

    def fits(names):
        return sum(sizes[name] for name in names) <= 7

    groups = group_models("abcd", fits)
    assert len(groups) == 2
    assert sorted("".join(name for group in groups for name in group)) == list("abcd")
    assert all(map(fits, groups))
    assert group_models("abcd", lambda names: True) == (("a", "b", "c", "d"),)
    assert len(group_models("abcdefghij", lambda names: len(names) < 3)) == 5


def brute_force(visits, sizes, room, held=frozenset()):
    """Try everything that may be kept."""
    if not visits:
        return 0
    needed = frozenset(visits[0])
    best = 10**9
    others = sorted(held - needed)
    for mask in range(1 << len(others)):
        kept = needed | {other for i, other in enumerate(others) if mask >> i & 1}
        if kept == needed or sum(sizes[m] for m in kept) <= room:
            best = min(best, len(needed - held) + brute_force(visits[1:], sizes, room, kept))
    return best


@pytest.mark.parametrize(
    ("visits", "room", "least"),
    [
        ([("a", "b"), ("c",), ("a", "b"), ("c",)], 2, 5),
        ([("a",), ("b",), ("a",), ("b",)], 1, 4),
        ([("a",), ("b",), ("a",), ("b",)], 2, 2),
        ([("a", "b"), ("c",), ("c",), ("b", "a")], 2, 4),
    ],
)
def test_the_fewest_promotions_are_those_of_trying_everything(visits, room, least):
    sizes = dict.fromkeys("abc", 1)
    assert least_promotions(visits, sizes, room, frozenset()) == brute_force(visits, sizes, room) == least
