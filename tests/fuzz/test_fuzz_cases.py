"""Every input that a fuzzer ever failed on, and every seed, once more; and the fuzzers themselves for a moment."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from fuzz import targets
from fuzz.targets import TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("fuzz_tool", ROOT / "tools" / "fuzz.py")
fuzz_tool = importlib.util.module_from_spec(_SPEC)
sys.modules["fuzz_tool"] = fuzz_tool
_SPEC.loader.exec_module(fuzz_tool)

KEPT = [(name, path) for name in TARGETS for path in sorted((fuzz_tool.CASES / name).glob("*"))]
NUM_MUTATIONS = 300


@pytest.mark.parametrize(("name", "path"), KEPT, ids=[f"{name}-{path.name}" for name, path in KEPT])
def test_what_failed_once_holds_now(name, path, figure):
    TARGETS[name].run(path.read_bytes())
    figure("fuzz executions", "inputs that once failed", 1)


def test_what_is_kept_belongs_to_a_target():
    folders = {path.name for path in fuzz_tool.CASES.iterdir()} if fuzz_tool.CASES.is_dir() else set()
    assert folders <= TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_mutations_of_them_hold(name, figure):
    import random

    target, rng = TARGETS[name], random.Random(7)
    pool = fuzz_tool.seeds_of(name, target)
    for data in [b"", b"\0", b"\1", *pool, *(fuzz_tool.mutated(rng, pool, target.words) for _ in range(NUM_MUTATIONS))]:
        target.run(data)
    figure("fuzz executions", name, NUM_MUTATIONS + len(pool) + 3)


def test_an_input_that_fails_is_kept_and_named(tmp_path, monkeypatch, capsys):
    """The plain engine over a target with a bug, in this process."""

    def broken(data: bytes) -> None:
        assert b"bug" not in data

    monkeypatch.setitem(TARGETS, "broken", Target(broken, (b"seed",), (b"bug",)))
    monkeypatch.setattr(fuzz_tool, "_targets", lambda: TARGETS)
    with pytest.raises(SystemExit) as ended:
        fuzz_tool.without_coverage("broken", 15, tmp_path, seed=1)
    assert ended.value.code == 1
    (failed,) = tmp_path.glob("failed-*")
    assert b"bug" in failed.read_bytes()
    assert "Done" in capsys.readouterr().out
    monkeypatch.setattr(fuzz_tool, "CASES", tmp_path / "cases")
    kept = fuzz_tool._kept("broken", failed)
    assert kept.parent == tmp_path / "cases" / "broken"
    assert kept.read_bytes() in fuzz_tool.seeds_of("broken", TARGETS["broken"])


@pytest.mark.timeout(120)
def test_the_tool_runs_a_target_in_a_process_of_its_own_and_counts(capsys):
    assert fuzz_tool.report(["names"], "plain", 0.5, 1, 1) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("names"))
    assert int(line.split()[2].replace(",", "")) > 0
    assert line.endswith("none")


def test_a_target_that_is_broken_fails_for_a_header_that_safetensors_reads_otherwise(monkeypatch):
    """The difference is looked for: with a reader that sees one tensor more, the property does not hold."""
    import safetensors

    found = safetensors.deserialize
    monkeypatch.setattr(safetensors, "deserialize", lambda content: [*found(content), ("more", {})])
    with pytest.raises(AssertionError):
        targets.header(b"\1{}")
