"""The online split: who was served by what is logged, and the log says whether an arm does better."""

from __future__ import annotations

import asyncio
import json
import random
from datetime import UTC, datetime
from threading import Thread

import pytest
from ab.stand import Time, cache_of

from modelcache.ab import Experiment, InputError, Layer, Verdict, analyse

ARMS = {"a": 0.5, "b": 0.5}


@pytest.fixture
def cache():
    with cache_of({"a": 1.0, "b": 2.0}) as cache:
        yield cache


@pytest.fixture
def log(tmp_path):
    return tmp_path / "logs" / "exposures.jsonl"


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def unit_of(experiment, arm):
    return next(unit for unit in map(str, range(100)) if experiment.assign(unit).arm == arm)


def test_a_unit_is_served_by_its_arm_and_the_line_says_how(cache, log):
    time = Time()
    experiment = Experiment("size", ARMS, log=log, clock=time, now=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    unit = unit_of(experiment, "b")
    with experiment.serve(cache, unit, request="r1") as serving:
        assert serving.model(3.0) == 6.0
        time.pass_by(0.25)
        serving.record(quality=0.5)
    assert serving.model is None
    (line,) = lines(log)
    assert line == {
        "format": "modelcache-ab-exposure",
        "at": "2026-01-02T03:04:05.000+00:00",
        "experiment": "size",
        "arm": "b",
        "weights": ARMS,
        "share": 1.0,
        "why": "assigned",
        "unit": line["unit"],
        "request": "r1",
        "model": "b",
        "tier": "disk",
        "wait_s": 0.0,
        "seconds": 0.25,
        "metrics": {"quality": 0.5},
        "error": "",
    }
    assert unit != line["unit"]
    with experiment.serve(cache, unit):
        pass
    assert lines(log)[1]["tier"] == "vram"


def test_tasks_are_served_likewise(cache, log):
    experiment = Experiment("size", ARMS, log=log)

    async def main():
        async with experiment.aserve(cache, "u") as serving:
            return serving.model.number, serving.arm

    number, arm = asyncio.run(main())
    assert (number, lines(log)[0]["arm"]) == ({"a": 1.0, "b": 2.0}[arm], arm)


def test_a_block_that_raises_is_logged_and_raises(cache, log):
    experiment = Experiment("size", ARMS, log=log)
    with pytest.raises(ZeroDivisionError), experiment.serve(cache, "u"):
        1 / 0  # noqa: B018
    assert lines(log)[0]["error"] == "ZeroDivisionError"
    assert cache.status().models[0].num_leases == 0


def test_whoever_takes_no_part_gets_the_control_and_no_line(cache, log):
    for experiment in (
        Experiment("size", ARMS, log=log, share=0.0),
        Experiment("size", ARMS, log=log, is_on=False),
        Experiment("size", ARMS, log=log, layer=Layer("page", 0.0, 1e-9)),
    ):
        with experiment.serve(cache, "u") as serving:
            assert serving.arm == "a"
    assert not log.exists()


def test_a_metric_that_is_not_a_number_is_refused(cache, log):
    with (
        pytest.raises(InputError, match="'q' is nan, but a metric is a finite number"),
        Experiment("size", ARMS, log=log).serve(cache, "u") as serving,
    ):
        serving.record(q=float("nan"))


def test_threads_write_whole_lines(cache, log):
    experiment = Experiment("size", ARMS, log=log)

    def work(worker):
        for i in range(25):
            with experiment.serve(cache, f"{worker}-{i}"):
                pass

    threads = [Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(log)) == 200


def filled(log, *, count=400, effect=0.0, loses=0.0, seed=0, arms=ARMS):
    """A log as an experiment writes it, of units that come by lot."""
    draw = random.Random(seed)
    experiment = Experiment("size", arms)
    log.parent.mkdir(exist_ok=True, parents=True)
    with log.open("w") as file:
        for unit in map(str, range(count)):
            arm = experiment.assign(f"{seed}-{unit}").arm
            if arm == "b" and draw.random() < loses:
                continue
            line = {
                "format": "modelcache-ab-exposure",
                "experiment": "size",
                "arm": arm,
                "weights": dict(arms),
                "why": "assigned",
                "unit": unit,
                "tier": "ram" if arm == "b" else "vram",
                "wait_s": 0.1,
                "seconds": draw.lognormvariate(0, 0.3),
                "metrics": {"quality": draw.gauss(effect if arm == "b" else 0.0, 1.0)},
                "error": "",
            }
            file.write(json.dumps(line) + "\n")


def test_an_arm_that_does_better_is_found(log):
    filled(log, effect=0.8)
    (found,) = analyse(log)
    verdicts = {one.differences.metric.name: one.verdict for one in found.judgements}
    assert verdicts == {
        "quality": Verdict.BETTER,
        "seconds": Verdict.CANNOT_TELL,
        "wait_s": Verdict.CANNOT_TELL,
    }
    assert found.alarm == ""
    assert [dict(arm.tiers).keys() for arm in found.arms] == [{"vram"}, {"ram"}]
    (found,) = analyse(log, lower_is_better=["quality"])
    assert found.judgements[0].verdict is Verdict.WORSE


@pytest.mark.timeout(60)
def test_identical_arms_are_told_apart_in_at_most_18_of_200_logs(log):
    wrong = 0
    for seed in range(200):
        filled(log, count=120, seed=seed)
        (found,) = analyse(log)
        wrong += any(one.verdict is not Verdict.CANNOT_TELL for one in found.judgements)
    assert wrong <= 18


def test_an_arm_that_loses_units_sets_off_the_alarm(log):
    filled(log, count=3_000, loses=0.2)
    (found,) = analyse(log)
    assert found.share_p < 0.001
    assert "units are not shared out by the weights" in found.alarm
    filled(log, count=2_000)
    assert analyse(log)[0].alarm == ""


def test_units_that_crossed_over_count_once_and_testers_do_not_count(log):
    filled(log, count=50)
    first = json.loads(log.read_text().splitlines()[0])
    with log.open("a") as file:
        file.write(json.dumps({**first, "arm": "b" if first["arm"] == "a" else "a"}) + "\n")
        file.write(json.dumps({**first, "why": "override", "unit": "tester"}) + "\n")
    (found,) = analyse(log)
    assert (found.num_crossing, found.num_overridden) == (1, 1)
    assert sum(arm.num_units for arm in found.arms) == sum(arm.num_exposures for arm in found.arms) == 50
    pairs = {len(one.differences.values) for one in found.judgements}
    assert max(pairs) <= 25


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hello", "Expecting value"),
        ("[]", "it is not an object"),
        ('{"format": "other"}', "its format is 'other', not 'modelcache-ab-exposure'"),
        ('{"format": "modelcache-ab-exposure"}', "it has no 'experiment'"),
    ],
)
def test_a_foreign_line_is_named_with_the_fix(log, line, words):
    filled(log, count=3)
    with log.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError) as caught:
        analyse(log)
    assert str(caught.value).startswith(f"{log}:4: this is not a line of an exposure log (")
    assert words in str(caught.value)
    assert "take it out, or give another file" in str(caught.value)


def test_a_log_that_is_not_there_or_empty_says_so(tmp_path):
    with pytest.raises(InputError, match="there is no such log"):
        analyse(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(InputError, match="no exposures in this file yet"):
        analyse(tmp_path / "x.jsonl")


def test_experiments_are_made_from_a_configuration(tmp_path):
    (tmp_path / "m.yaml").write_text(
        "version: 1\n"
        "models: {a: {loader: 'm:f'}, b: {loader: 'm:f'}}\n"
        "ab:\n"
        "  experiments:\n"
        "    size:\n"
        "      arms: {a: 50%, b: 50%}\n"
        "      share: 20%\n"
        "      layer: {name: page, end: 50%}\n"
        "      overrides: {alice: b}\n"
        "      log: logs/e.jsonl\n"
    )
    found = Experiment.from_config(tmp_path / "m.yaml", "size")
    by_hand = Experiment("size", ARMS, share=0.2, layer=Layer("page", 0.0, 0.5), overrides={"alice": "b"})
    assert found.split == by_hand.split
    assert found._log == tmp_path / "logs" / "e.jsonl"
    with pytest.raises(InputError) as caught:
        Experiment.from_config(tmp_path / "m.yaml", "page")
    assert str(caught.value).endswith("m.yaml: there is no experiment 'page'; the configuration has: size")
