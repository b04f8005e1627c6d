"""``modelcache doctor``: look at this machine and say what would get in the way."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from modelcache import machine_report
from modelcache.cli.checks import (
    Check,
    State,
    ask_torch,
    check_devices,
    check_disk,
    check_distributions,
    check_lockable,
    check_nvml,
    check_python,
    check_ram,
    check_stalls,
    check_torch,
    check_wsl,
)
from modelcache.cli.output import Exit, data_console, note, table, write_json

_MOST_DISK_BYTES = 2 << 30
_PIECE_BYTES = 16 << 20
_STYLES = {State.OK: "green", State.NOTE: "cyan", State.WARNING: "yellow", State.PROBLEM: "bold red"}
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version", "/etc/nv_tegra_release")

EPILOG = """Examples:

modelcache doctor

modelcache doctor --json

modelcache doctor --disk models/qwen/model.safetensors

Ends with 0 when nothing is in the way, 3 when a check found a problem."""


def doctor(
    *,
    disk: Annotated[
        Path | None, typer.Option(help="Also measure how fast this file is read (up to 2 GiB of it).", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the checks as JSON.")] = False,
) -> None:
    """Check this machine: torch, driver, memory limits, packages. Each problem comes with its fix."""
    checks = list(_checks(disk))
    problems = [check for check in checks if check.state is State.PROBLEM]
    if as_json:
        write_json({"checks": [_json(check) for check in checks], "problems": len(problems)})
    else:
        _draw(checks)
        note("no problems found" if not problems else f"problems found: {len(problems)}")
    raise typer.Exit(Exit.PROBLEMS if problems else Exit.OK)


def _checks(disk: Path | None) -> Iterator[Check]:
    machine = machine_report()
    requirements = _requirements()
    yield check_python(sys.version_info[:3])
    yield check_torch(ask_torch(), machine)
    yield check_nvml(machine, any(Path(path).exists() for path in _DRIVER_FILES))
    yield from check_devices(machine, os.getpid())
    yield check_ram(machine.ram)
    yield check_stalls(machine)
    yield check_lockable(_lockable_bytes(), bool(machine.devices))
    yield from check_wsl(_kernel())
    yield from check_distributions(_versions(requirements), requirements)
    if disk is not None:
        yield check_disk(disk, _measure_disk)


def _draw(checks: Iterable[Check]) -> None:
    drawn = table(("Check", "State", "Found"), ())
    for check in checks:
        drawn.add_row(check.name, f"[{_STYLES[check.state]}]{check.state}[/]", _literal(check.found))
        if check.fix:
            drawn.add_row("", "", _literal(f"fix: {check.fix}"))
    data_console().print(drawn)


def _literal(text: str) -> str:
    return text.replace("[", r"\[")


def _json(check: Check) -> dict[str, str]:
    return {"name": check.name, "state": str(check.state), "found": check.found, "fix": check.fix}


def _requirements() -> tuple[str, ...]:
    try:
        return tuple(metadata.requires("modelcache") or ())
    except metadata.PackageNotFoundError:
        # A source tree on the path that nobody installed: its needs are written down nowhere.
        return ()


def _versions(requirements: Iterable[str]) -> dict[str, str | None]:
    names = {requirement.split(">=")[0].strip() for requirement in requirements} | {"pynvml"}
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _lockable_bytes() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return -1 if soft == resource.RLIM_INFINITY else soft


def _kernel() -> str:
    try:
        return Path("/proc/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _measure_disk(path: Path) -> tuple[int, float]:
    """Read the start of a file that the page cache was asked to forget; bytes and seconds."""
    piece = bytearray(_PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started_s, size_bytes = time.perf_counter(), 0
        while size_bytes < _MOST_DISK_BYTES and (read_bytes := file.readinto(piece)):
            size_bytes += read_bytes
        return size_bytes, max(time.perf_counter() - started_s, 1e-9)
