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

SCENES = [
    "killed_in_a_spill",
    "terminated_in_a_spill",
    "killed_around_the_rename",
    "killed_in_a_kept_image",
    "killed_with_eight_loads_in_flight",
    "two_processes_share_a_folder",
]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    """What the child said of each scene."""
    folder = tmp_path_factory.mktemp("ends")
    return verdicts(run("processes.end_scenes", "main", str(folder)))


@pytest.mark.parametrize("scene", SCENES)
def test_a_process_that_is_ended_leaves_nothing_that_the_next_one_believes(told, scene):
    assert told[scene] == "fine", told[scene]


def test_every_scene_is_played():
    assert [scene.__name__ for scene in end_scenes.SCENES] == SCENES


@pytest.mark.parametrize("scene", ["leave_open", "leave_in_a_load"])
def test_an_interpreter_that_ends_closes_its_cache(tmp_path, scene):
    ended = run("processes.end_scenes", scene, str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "left" in ended.stdout.splitlines()
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.rglob("*"))
    if scene == "leave_open":
        assert "closed with open leases={'b': ['MainThread']" in ended.stderr


def test_ctrl_c_ends_a_script_that_waits_for_a_model(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from processes.end_scenes import struck_in_a_load as go; "
    command = [sys.executable, "-c", f"{code}go({str(tmp_path)!r})"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What was started in the background ignores Ctrl-C, and so does what it starts.
    with subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        assert process.stdout.readline() == "left\n"
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGINT
    assert "never" not in out
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert err.count("Traceback") == 1, err
    assert not list(tmp_path.rglob("*"))


def test_workers_that_are_started_anew_have_caches_of_their_own(tmp_path):
    ended = run("processes.end_scenes", "workers_started_anew", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (0, "left\n"), ended.stderr
    assert not list(tmp_path.rglob("*"))
