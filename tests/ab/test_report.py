"""What a person gets: the page, the table, and the commands."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest
from ab.stand import cache_of
from typer.testing import CliRunner

from modelcache.ab import Comparison, compare
from modelcache.ab.journal import Run
from modelcache.cli.app import app

ITEMS = [float(i) for i in range(1, 31)]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    log = tmp_path_factory.mktemp("ab") / "run.jsonl"

    def run(model, item):
        if model.number == 3.0 and item == 7.0:
            raise RuntimeError("<script>alert(1)</script>")
        return model(item)

    with cache_of({"base": 1.0, "other": 2.0, "third": 3.0}, room=2) as cache:
        return compare(cache, ["base", "other", "third"], ITEMS, run=run, score=lambda o, i: o, log=log)


class Lint(HTMLParser):
    """Tags that are opened and not closed, and attributes that lead elsewhere."""

    EMPTY = frozenset({"meta", "br", "img", "use", "path", "rect", "line"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.EMPTY:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_the_page_is_one_file_that_needs_nothing_from_elsewhere(result, tmp_path):
    result.to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert len(text) < 2_000_000
    lint = Lint()
    lint.feed(text)
    assert lint.open == []
    assert all(link.startswith("#") for link in lint.links)
    assert len(lint.ids) == len(set(lint.ids))
    assert {link[1:] for link in lint.links} <= set(lint.ids)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http" not in without_names
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"#0[a1]0[0-9a-f]{3}\b", text), "a colour of the drawing was left in"
    for words in ("Verdicts", "Item by item: score", "Quality against time", "largest disagreements", "own time went"):
        assert words in text


def test_a_blind_page_does_not_tell_which_arm_is_which(result, tmp_path):
    result.to_html(tmp_path / "r.html", blind=True)
    text = (tmp_path / "r.html").read_text()
    assert not re.search(r"\b(base|other|third)\b", re.sub(r"<style>.*?</style>", "", text).replace("baseline", ""))
    for letter in "ABC":
        assert f">{letter} " in text


def test_a_page_of_many_items_stays_small(tmp_path):
    with cache_of({"a": 1.0, "b": 2.0}) as cache:
        result = compare(
            cache, ["a", "b"], [float(i) for i in range(3_000)], run=lambda m, i: m(i), score=lambda o, i: o
        )
    result.to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 2_000_000


def test_the_table_says_everything_a_person_needs(result):
    text = str(result)
    for words in (
        "base vs other vs third: all 30 items",
        "third failed 1 time(s): RuntimeError",
        "other is better than base (score +15.5, 95 % interval",
        "0 disk loads after warm-up",
        "Arms that do not fit together ran in turns",
    ):
        assert words in text


CONFIG = """\
version: 1
device: simulated
budgets: {vram: 64KiB, ram: 1MiB}
segment: 4096B
models:
  one: {loader: "ab_functions:one", reload: true}
  two: {loader: "ab_functions:two", reload: true}
ab:
  compare:
    arms: [one, two]
    items: items.jsonl
    run: ab_functions:run
    scores: {product: {measure: "ab_functions:score", margin: 0.5}}
    log: run.jsonl
  experiments:
    size: {arms: {one: 50%, two: 50%}, overrides: {alice: two}, log: exposures.jsonl}
"""
FUNCTIONS = """\
from ab.stand import Net
def one(): return Net(1.0)
def two(): return Net(2.0)
def run(model, item): return model(item["x"])
def score(output, item): return output
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "m.yaml").write_text(CONFIG)
    (tmp_path / "ab_functions.py").write_text(FUNCTIONS)
    (tmp_path / "items.jsonl").write_text("".join(f'{{"x": {i}}}\n' for i in range(1, 21)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("ab_functions", None)


def call(*words):
    return CliRunner().invoke(app, ["ab", *words])


def test_a_comparison_is_run_from_a_configuration(folder):
    told = call("run", "m.yaml", "--html", "r.html")
    assert told.exit_code == 0, told.output
    assert "two is better than one" in told.stdout
    assert (folder / "r.html").is_file()
    again = call("report", "run.jsonl")
    assert again.exit_code == 0
    assert "two is better than one" in again.stdout
    assert Comparison.from_log(folder / "run.jsonl").num_items == 20
    blind = call("report", "run.jsonl", "--blind")
    assert not re.search(r"\b(one|two)\b", blind.stdout)


def test_what_decides_and_how_surely_is_stated_in_the_configuration(folder):
    (folder / "m.yaml").write_text(
        CONFIG.replace(
            "    log: run.jsonl", "    log: run.jsonl\n    level: 1%\n    primary: [latency]\n    warm_up: 0"
        )
    )
    assert call("run", "m.yaml").exit_code == 0
    found = Comparison.from_log(folder / "run.jsonl")
    assert (found.plan.level, found.plan.primary) == (0.01, ("latency",))
    assert not any(run.is_warm_up for run in found.entries if isinstance(run, Run))
    assert "Intervals are 99 %" in " ".join(str(found).split())


def test_a_blind_run_says_no_name_in_what_it_writes_or_on_the_way(folder):
    for options in ([], ["--json"]):
        told = call("run", "m.yaml", "--blind", "--html", "new/r.html", *options)
        assert told.exit_code == 0, told.output
        assert "product" in told.stdout
        for text in (told.stdout, told.stderr, (folder / "new" / "r.html").read_text()):
            assert not re.search(r"\b(one|two)\b", text.replace("two-sided", ""))


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(folder):
    (folder / "file").write_text("")
    (folder / "there").mkdir()
    for path, words in (("file/r.html", "the report cannot be written there"), ("there", "this is a folder")):
        told = call("run", "m.yaml", "--html", path)
        assert told.exit_code == 2
        assert words in told.stderr
        assert not (folder / "run.jsonl").exists()


def test_the_table_is_there_when_the_report_cannot_be_written_in_the_end(folder, monkeypatch):
    def fail(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(Comparison, "to_html", fail)
    told = call("run", "m.yaml", "--html", "r.html")
    assert told.exit_code == 1
    assert "two is better than one" in told.stdout
    assert "r.html: the report could not be written (no space left on device)" in told.stderr


def test_who_gets_which_arm_is_said(folder):
    told = call("assign", "size", "alice", "bob", "--config", "m.yaml")
    assert told.exit_code == 0
    assert re.search(r"alice +two +override", told.stdout)
    assert re.search(r"bob +(one|two) +assigned", told.stdout)
    told = call("assign", "shape", "bob", "--config", "m.yaml")
    assert told.exit_code == 2
    assert "there is no experiment 'shape'; the configuration has: size" in told.stderr


def test_an_exposure_log_is_read(folder):
    from modelcache import ModelCache
    from modelcache.ab import Experiment

    sys.path.insert(0, str(folder))
    experiment = Experiment.from_config("m.yaml", "size")
    with ModelCache.from_yaml("m.yaml") as cache:
        for unit in range(60):
            with experiment.serve(cache, str(unit)) as serving:
                serving.record(product=serving.model(1.0))
    told = call("analyse", "exposures.jsonl")
    assert told.exit_code == 0
    assert "size: 60 units" in told.stdout
    assert "two is better than one (product" in told.stdout
    assert call("analyse", "exposures.jsonl", "--json").stdout.startswith("[")
    lines = (folder / "exposures.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"arm": "one"' in line] + [line for line in lines if '"arm": "two"' in line][:3]
    (folder / "lost.jsonl").write_text("".join(kept))
    told = call("analyse", "lost.jsonl")
    assert told.exit_code == 3
    assert "not shared out by the weights" in told.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("ab_functions:run", "ab_functions:walk"), "'ab_functions:walk' cannot be had"),
        (("ab_functions:run", "nowhere:run"), "'nowhere:run' cannot be had (No module named 'nowhere')"),
        (("    log: run.jsonl", "    primary: [profit]"), "primary: no metric is called 'profit'; there are 'product'"),
        (("items.jsonl", "absent.jsonl"), "absent.jsonl: there is no such file of items"),
    ],
)
def test_what_cannot_be_run_ends_with_2_and_says_why(folder, change, words):
    (folder / "m.yaml").write_text(CONFIG.replace(*change))
    told = call("run", "m.yaml")
    assert told.exit_code == 2
    assert words in told.stderr


def test_a_configuration_without_a_comparison_says_so(folder):
    (folder / "m.yaml").write_text("version: 1\n")
    told = call("run", "m.yaml")
    assert told.exit_code == 2
    assert "there is no 'ab.compare' to run" in told.stderr
