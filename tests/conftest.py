"""For every test: nothing left running, nothing left open, the same examples each time."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("stable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("stable")

#: How long a thread that was told to end may take, in real seconds.
PATIENCE_S = 5.0


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """Threads of ours that a test starts end with it."""
    before = set(threading.enumerate())
    yield
    ours = [t for t in threading.enumerate() if t not in before and t.name.startswith("modelcache")]
    for thread in ours:
        thread.join(PATIENCE_S)
    left = [thread.name for thread in ours if thread.is_alive()]
    assert not left, f"threads are left behind: {left}"


@pytest.fixture(autouse=True)
def no_file_is_left_open():
    """Files that a test opens are closed with it."""
    before = _open_files()
    yield
    if left := _open_files() - before:
        gc.collect()
        left = _open_files() - before
    assert not left, f"files are left open: {sorted(left)}"


def _open_files() -> set[tuple[str, str]]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("/") and not target.startswith(("/dev/", "/proc/", "/sys/")):
            found.add((entry.name, target))
    return found


def pytest_terminal_summary(terminalreporter) -> None:
    """How many states of each world were visited."""
    visited = [
        (report.nodeid.partition("[")[2].rstrip("]"), dict(report.user_properties)["states"])
        for report in terminalreporter.getreports("passed")
        if "states" in dict(report.user_properties)
    ]
    if visited:
        terminalreporter.section("explored states")
        for world, num_states in visited:
            terminalreporter.line(f"{num_states:>9,}  {world}")
        terminalreporter.line(f"{sum(number for _, number in visited):>9,}  in all")
