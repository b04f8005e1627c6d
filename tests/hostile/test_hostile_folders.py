"""Hostile model folders, given to the public surface under an audit hook: refused in words or loaded as they are.

Nothing of a folder may be compiled, executed or imported, no program started, no connection made, nothing unpickled and
no file written. The folders are in `folders.py`, the process that loads them all is `canary.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.folders import CASES, LOADED, Case

LONGEST_LINE = 1200


def faults(case: Case, answer: dict) -> list[str]:
    """What is wrong with what came of a folder."""
    found = [f"tried {each}" for each in answer["tried"]]
    if answer["ran"]:
        found.append("its payload ran")
    if case.outcome == LOADED:
        if (answer["outcome"], answer["right"]) != (LOADED, True):
            found.append(f"not loaded right: {answer}")
        return found
    if answer["outcome"] not in {"WeightsError", "LoaderError", "ConfigError"} or case.outcome not in answer["message"]:
        found.append(f"not refused with {case.outcome!r}: {answer}")
    lines = answer["message"].split("\n")
    if not all(line.isprintable() and len(line) <= LONGEST_LINE for line in lines):
        found.append(f"a message nobody can read: {answer}")
    return found


@pytest.mark.timeout(240)
def test_no_hostile_folder_runs_anything_and_each_is_refused_in_words_or_loaded_right(tmp_path, figure):
    for library in ("transformers", "sentence_transformers", "peft"):
        pytest.importorskip(library)
    (tmp_path / "root").mkdir()
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("canary.py"), tmp_path / "root", tmp_path / "good"],
        capture_output=True,
        text=True,
        check=False,
        timeout=220,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    # What no folder may do was done on purpose at the end: a hook that is blind to some of it proves nothing.
    assert [name for name, seen in answers["on purpose"].items() if not seen] == []
    found = {name: faults(case, answers["folders"][name]) for name, case in CASES.items()}
    assert {name: each for name, each in found.items() if each} == {}
    for case in CASES.values():
        figure("hostile directories", case.family, 1)


def test_there_are_enough_of_them_beside_the_attacks_on_headers():
    assert sum(case.family != "headers" for case in CASES.values()) >= 100
