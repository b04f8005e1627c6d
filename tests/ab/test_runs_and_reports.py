"""Runs that are to end well whatever names, scores and items are given, and reports that say what was found."""

from __future__ import annotations

import pytest
from ab.stand import cache_of

from modelcache.ab import InputError, Metric, compare

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


@pytest.mark.parametrize("name", ["", " read", 1])
def test_a_stage_has_a_name(name):
    with pytest.raises(InputError, match="a stage has a name without spaces around it, got"):
        compared(run={name: multiply, "answer": multiply})
