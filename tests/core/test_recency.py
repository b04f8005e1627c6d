"""Names by last use: the same order as a sort, with no more looked at than is read."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.core.recency import ByUse


def names_in(order: ByUse, ranks: dict[str, tuple[int, int]]) -> list[str]:
    with closing(order.ranked(ranks.__getitem__)) as ranked:
        return list(ranked)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(0, 9), st.integers(0, 2)),
        st.tuples(st.just("add"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("discard"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("copy"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(steps)
def test_any_history_reads_as_a_sort_would(history) -> None:
    order, inside, ranks, tick = ByUse(), set(), {str(i): (0, 0) for i in range(10)}, 0
    for kind, number, priority in history:
        name = str(number)
        if kind == "use":
            tick += 1
            ranks[name] = (max(priority, ranks[name][0]), tick)
        elif kind == "add":
            order.add(name)
            inside.add(name)
        elif kind == "discard":
            order.discard(name)
            inside.discard(name)
        elif kind == "read":
            with closing(order.ranked(ranks.__getitem__)) as ranked:
                assert list(islice(ranked, number)) == sorted(inside, key=lambda n: (ranks[n], n))[:number]
        else:
            order = order.copy()
    assert set(order) == inside
    assert len(order) == len(inside)
    assert names_in(order, ranks) == sorted(inside, key=lambda n: (ranks[n], n))


def test_the_first_few_of_many_are_read_without_looking_at_the_others() -> None:
    order, looked = ByUse(), []
    ranks = {f"{i:04}": (1, i) for i in range(1000)}
    for name in ranks:
        order.add(name)
    assert names_in(order, ranks) == sorted(ranks)

    def rank_of(name: str) -> tuple[int, int]:
        looked.append(name)
        return ranks[name]

    ranks["0000"] = (1, 5000)
    with closing(order.ranked(rank_of)) as ranked:
        assert list(islice(ranked, 3)) == ["0001", "0002", "0003"]
    assert len(looked) == 4


def test_names_may_be_taken_out_while_they_are_read() -> None:
    order = ByUse()
    for name in "abc":
        order.add(name)
    with closing(order.ranked(lambda _name: (1, 1))) as ranked:
        for name in ranked:
            if name == "b":
                order.discard(name)
    assert names_in(order, dict.fromkeys("ac", (1, 1))) == ["a", "c"]


def test_a_rank_that_shrinks_counts_once_the_name_was_taken_out_and_put_in_again() -> None:
    order, ranks = ByUse(), {"a": (1, 9), "b": (1, 5)}
    for name in ranks:
        order.add(name)
    assert names_in(order, ranks) == ["b", "a"]
    ranks["a"] = (1, 1)
    order.discard("a")
    order.add("a")
    assert names_in(order, ranks) == ["a", "b"]
