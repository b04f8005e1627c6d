"""How a cache shows itself, as text and as HTML; what has no business in either is escaped."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import pytest
from benches import Bench

from modelcache.display import as_html, as_text, one_line
from modelcache.stats import CacheStats, Counters, ModelStats, TierStats
from modelcache.tier import Tier

GIB = 1 << 30


def model(name="flux", state="ready", **given):
    facts = {
        "type_name": "Net",
        "size_bytes": 2 * GIB,
        "vram_bytes": 0,
        "ram_bytes": 0,
        "disk_bytes": 0,
        "workspace_bytes": 0,
        "num_leases": 0,
        "holders": (),
        "pin": None,
        "priority": "normal",
        "last_use": 0,
        **given,
    }
    return ModelStats(name=name, state=state, **facts)


STATS = CacheStats(
    "sim:0",
    (TierStats(Tier.VRAM, 8 * GIB, 0, 2 * GIB, 1 * GIB, 0), TierStats(Tier.RAM, 16 * GIB, 1 * GIB, 4 * GIB, 0, 0)),
    (
        model(vram_bytes=2 * GIB, ram_bytes=2 * GIB, num_leases=3, pin=Tier.VRAM),
        model("qwen", "parked", ram_bytes=2 * GIB),
        model("cold", "cold", size_bytes=None),
    ),
    2,
    1,
    Counters(),
)


def test_the_table_lists_models_and_tiers():
    assert as_text(STATS).splitlines() == [
        "ModelCache on sim:0",
        "MODEL  STATE   SIZE     VRAM     RAM      DISK  LEASES  PIN",
        "flux   ready   2.0 GiB  2.0 GiB  2.0 GiB  -     3       vram",
        "qwen   parked  2.0 GiB  -        2.0 GiB  -     -       -",
        "cold   cold    ?        -        -        -     -       -",
        "VRAM 2.0 GiB / 8.0 GiB (1.0 GiB moving or held)   RAM 4.0 GiB / 16.0 GiB "
        "(1.0 GiB over, waiting for leases)   waiting 2",
    ]


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (model(vram_bytes=2 * GIB), "vram 2.0 GiB"),
        (model(ram_bytes=2 * GIB), "ram 2.0 GiB"),
        (model(state="parked", ram_bytes=GIB), "parked 1.0 GiB"),
        (model(state="cold"), "cold"),
        (model(state="failed"), "failed"),
    ],
)
def test_one_line_says_where_the_best_copy_is(shown, words):
    assert one_line(shown) == words


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_html_is_well_formed_escaped_and_loads_nothing():
    hostile = dataclasses.replace(STATS, device="<script>alert(1)</script>")
    page = Balanced()
    page.feed(as_html(hostile))
    assert page.open == []
    assert {tag for tag, _ in page.tags} == {"div", "b", "table", "thead", "tbody", "tr", "th", "td", "span"}
    assert "<script>alert(1)</script>" in page.text
    assert "qwen" in page.text
    assert not any(key in ("src", "href", "onclick") for _, attrs in page.tags for key in attrs)


def test_bars_are_as_wide_as_their_share():
    assert 'title="flux 2.0 GiB" style="width:25.00%' in as_html(STATS)


def test_a_cache_shows_itself_and_a_handle_its_model():
    bench = Bench()
    bench.add("a")
    handle = bench.cache.get("a")
    assert repr(handle) == "<modelcache: a FakeModel vram 20 B>"
    assert "a      ready  20 B  20 B  20 B  -     1       -" in repr(bench.cache)
    assert "ModelCache on fake:0" in bench.cache._repr_html_()
    del handle
    bench.close()
    assert repr(bench.cache) == "<ModelCache, closed>"
