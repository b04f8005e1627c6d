"""For every test: nothing left running, nothing left open, the same examples each time."""

from __future__ import annotations

import gc
import json
import os
import threading
from pathlib import Path

import hypothesis
import pytest
import torch
from faults import rows

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
        # Fonts are kept open by matplotlib for as long as the process lives.
        if (
            target.startswith("/")
            and not target.startswith(("/dev/", "/proc/", "/sys/"))
            and "/mpl-data/" not in target
        ):
            found.add((entry.name, target))
    return found


@pytest.fixture
def figure(record_property):
    """Report a number in the table at the end: `figure("schedules", "shipped mover", 2_000)`; equal labels add up."""

    def report(group: str, label: str, number: float) -> None:
        record_property("figure", (group, label, number))

    return report


def pytest_addoption(parser) -> None:
    parser.addoption("--figures", metavar="FILE", help="also write the table at the end there, as JSON")


def pytest_terminal_summary(terminalreporter, config) -> None:
    """What was proved, as one table: every figure that a passing test reported."""
    groups: dict[str, dict[str, float]] = {}
    took_s: dict[str, float] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "figure":
                group, label, number = value
                labels = groups.setdefault(group, {})
                labels[label] = labels.get(label, 0) + number
                took_s[label] = took_s.get(label, 0.0) + report.duration
    passed, failed = ([report.nodeid for report in terminalreporter.getreports(how)] for how in ("passed", "failed"))
    groups["fault rows"] = dict.fromkeys(rows.shown(passed, failed), 1)
    groups = {group: labels for group, labels in groups.items() if labels}
    if path := config.getoption("--figures"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(json.dumps(groups, indent=1), encoding="utf-8")
    if groups:
        terminalreporter.section("proof")
    for group, labels in sorted(groups.items()):
        for label, number in labels.items():
            rate = f", {number / took_s[label]:,.0f} a second" if group in ("schedules", "states") else ""
            terminalreporter.line(f"{number:>12,}  {group}: {label}{rate}")
        if len(labels) > 1:
            terminalreporter.line(f"{sum(labels.values()):>12,}  {group}, in all")
