"""The directory of one process: private, found by nobody else, swept when its process is gone."""

import fcntl
import os
import signal
import stat
import subprocess
import sys

import pytest

from modelcache.dataplane.images.directory import OwnDirectory


def test_it_is_made_once_for_its_user_only_and_removed_when_empty(tmp_path):
    own = OwnDirectory(tmp_path / "images")
    path = own.make()
    assert own.make() == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    own.close()
    own.close()
    assert not (tmp_path / "images").exists()
    assert own.make() != path
    own.close()


def test_two_at_a_time_leave_each_other_alone(tmp_path):
    one, two = OwnDirectory(tmp_path), OwnDirectory(tmp_path)
    first = one.make()
    (first / "a.image").write_text("mine")
    second = two.make()
    assert first != second
    assert (first / "a.image").read_text() == "mine"
    two.close()
    (first / "a.image").unlink()
    one.close()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from modelcache.dataplane.images.directory import OwnDirectory
path = OwnDirectory(Path(sys.argv[1])).make()
(path / "half.tmp").write_text("half")
(path / "whole.image").write_text("whole")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_by_the_next_one(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.image"))) == 1
    own = OwnDirectory(tmp_path)
    assert list(tmp_path.rglob("half.tmp"))
    path = own.make()
    assert list(tmp_path.rglob("*.image")) == list(tmp_path.rglob("*.tmp")) == []
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, f"{path.name}.lock"]
    own.close()


def test_nothing_that_has_another_name_or_purpose_is_swept(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a.image").write_text("mine")
    (tmp_path / "process-1-aa").mkdir()  # without a lock file it is not ours
    (tmp_path / "process-1-aa" / "b.image").write_text("mine")
    (tmp_path / "process-2-bb").mkdir()
    (tmp_path / "process-2-bb" / "notes.txt").write_text("mine")
    (tmp_path / "process-2-bb.lock").touch()
    (tmp_path / "process-3-cc.lock").touch()
    (tmp_path / "process-3-cc").symlink_to(tmp_path / "precious")
    own = OwnDirectory(tmp_path)
    own.make()
    own.close()
    assert (tmp_path / "precious" / "a.image").read_text() == "mine"
    assert (tmp_path / "process-1-aa" / "b.image").read_text() == "mine"
    assert (tmp_path / "process-2-bb" / "notes.txt").read_text() == "mine"


def test_a_lock_that_somebody_holds_is_left(tmp_path):
    (tmp_path / "process-4-dd").mkdir()
    (tmp_path / "process-4-dd" / "a.image").write_text("alive")
    descriptor = os.open(tmp_path / "process-4-dd.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    own = OwnDirectory(tmp_path)
    own.make()
    assert (tmp_path / "process-4-dd" / "a.image").read_text() == "alive"
    own.close()
    os.close(descriptor)


def test_a_parent_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "images").write_text("a file")
    with pytest.raises(OSError):
        OwnDirectory(tmp_path / "images").make()
