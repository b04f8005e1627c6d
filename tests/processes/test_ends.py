"""However a process ends, it ends, and what it leaves on the disk is cleared up and never believed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from processes import end_scenes
from processes.children import PATIENCE_S, TESTS, run, verdicts

pytestmark = pytest.mark.timeout(90)

ROWS = [
    ("killed_in_a_spill", "F24"),
    ("terminated_in_a_spill", "F24 by SIGTERM"),
    ("killed_around_the_rename", "F24 around the rename"),
    ("killed_in_a_kept_image", "F24 in a kept image"),
    ("killed_with_eight_loads_in_flight", "F23, F53"),
    ("two_processes_share_a_folder", "F32"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    """What the child said of each scene."""
    folder = tmp_path_factory.mktemp("ends")
    return verdicts(run("processes.end_scenes", "main", str(folder)))


@pytest.mark.parametrize(("scene", "row"), ROWS, ids=[scene for scene, _ in ROWS])
def test_a_process_that_is_ended_leaves_nothing_that_the_next_one_believes(told, figure, scene, row):
    assert told[scene] == "fine", told[scene]
    figure("fault rows", row, 1)


def test_every_scene_is_a_row():
    assert [scene.__name__ for scene in end_scenes.SCENES] == [scene for scene, _ in ROWS]


@pytest.mark.parametrize("scene", ["leave_open", "leave_in_a_load"])
def test_an_interpreter_that_ends_closes_its_cache(tmp_path, figure, scene):
    ended = run("processes.end_scenes", scene, str(tmp_path))
    assert (ended.returncode, ended.stdout.splitlines()[-1:]) == (0, ["left"]), ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.rglob("*"))
    if scene == "leave_open":
        assert "closed with open leases={'b': ['MainThread']" in ended.stderr
    figure("fault rows", f"F63 at exit: {scene}", 1)


def test_ctrl_c_ends_a_script_that_waits_for_a_model(tmp_path, figure):
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from processes.end_scenes import struck_in_a_load as go; "
    command = [sys.executable, "-c", f"{code}go({str(tmp_path)!r})"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "left\n"
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGINT
    assert "never" not in out
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert err.count("Traceback") == 1, err
    assert not list(tmp_path.rglob("*"))
    figure("fault rows", "F52 in a script", 1)


def test_workers_that_are_started_anew_have_caches_of_their_own(tmp_path, figure):
    ended = run("processes.end_scenes", "workers_started_anew", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (0, "left\n"), ended.stderr
    assert not list(tmp_path.rglob("*"))
    figure("fault rows", "F51 in workers started anew", 1)
