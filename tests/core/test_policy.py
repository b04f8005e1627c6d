"""The order of going, as literal lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelcache.core.policy import LRU, POLICIES, Candidate, CostAware


def order(policy, *candidates):
    given = sorted((Candidate(*fields) for fields in candidates), key=lambda c: (c.priority, c.tick, c.part))
    return [c.part for c in policy.rank(given)]


def test_lru_goes_by_last_use():
    assert order(LRU(), ("new", 1, 30, 5), ("old", 1, 10, 5), ("mid", 1, 20, 500)) == ["old", "mid", "new"]


def test_every_low_priority_goes_before_any_higher_one():
    found = order(LRU(), ("a", 2, 1, 1), ("b", 0, 9, 1), ("c", 1, 2, 1), ("d", 0, 3, 1))
    assert found == ["d", "b", "c", "a"]


def test_ties_go_by_name_so_that_runs_repeat():
    assert order(LRU(), ("c", 1, 1, 1), ("a", 1, 1, 9), ("b", 1, 1, 5)) == ["a", "b", "c"]


def test_cost_prefers_what_is_large_among_what_is_about_as_old():
    assert order(CostAware(), ("small", 1, 1, 10), ("large", 1, 2, 1000), ("new", 1, 9, 1000)) == [
        "large",
        "new",
        "small",
    ]


def test_cost_keeps_priorities_and_copes_with_nothing():
    assert order(CostAware(), ("high", 2, 1, 10**9), ("low", 0, 99, 0)) == ["low", "high"]
    assert order(CostAware()) == order(LRU()) == []


candidate = st.builds(
    Candidate, st.text("abc", min_size=1, max_size=3), st.integers(0, 2), st.integers(0, 9), st.integers(0, 99)
)


@given(st.lists(candidate, unique_by=lambda c: c.part))
def test_every_policy_ranks_each_candidate_once_lazily_and_by_priority_first(candidates):
    candidates.sort(key=lambda c: (c.priority, c.tick, c.part))
    for policy in POLICIES.values():
        ranked = list(policy.rank(candidates))
        assert sorted(c.part for c in ranked) == sorted(c.part for c in candidates)
        assert [c.priority for c in ranked] == sorted(c.priority for c in candidates)
        assert next(iter(policy.rank(candidates)), None) == (ranked[0] if ranked else None)


def test_policies_are_found_by_the_name_they_have():
    assert {name: policy.name for name, policy in POLICIES.items()} == {"lru": "lru", "cost": "cost"}
