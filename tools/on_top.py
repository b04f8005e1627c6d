"""Another version of a library on top of the installed ones, in a folder that goes away."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def install_on_top(folder: Path, *requirements: str) -> None:
    """Install just these into `folder`. What stands on the path before the installed libraries wins over them."""
    _pip("install", "--no-deps", "--target", str(folder), *requirements)


def download_source(folder: Path, requirement: str) -> Path:
    """The source distribution of a library, as its index has it."""
    _pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), requirement)
    [found] = folder.glob("*.tar.gz")
    return found


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pip {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def version_in(folder: Path, name: str) -> str:
    """The version of the library that was installed into `folder`."""
    [found] = metadata.distributions(name=name, path=[str(folder)])
    return found.version


def environment(*folders: Path) -> dict[str, str]:
    """The variables for a Python that looks into these folders before anything else, on one core, without a hub."""
    return {
        **os.environ,  # noqa: TID251 - handed on to a child
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def where_and_when() -> str:
    """The machine, the versions and the day, in one line of a report."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "modelcache"))
    day = dt.datetime.now(tz=dt.UTC).date()
    return f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, {versions}, {day}"


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def write_report(path: Path, report: str) -> None:
    """Write a report under its name, with the command that made it."""
    script, *arguments = sys.argv
    given = " ".join(path.name if argument == str(path) else argument for argument in arguments)
    path.write_text(f"# {path.stem}\n\n`python tools/{Path(script).name} {given}`\n\n{report}\n", encoding="utf-8")
