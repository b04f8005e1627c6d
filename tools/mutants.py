"""Plant each seeded bug of tests/mutants/ in a copy of the package, and see that the tests named in it catch it.

A mutant is a unified diff of a few lines against the repository root. The comment lines above it say what it breaks,
and which tests must fail because of it:

    # breaks: bytes that are being given up count as free before they are
    # killed by: tests/core/test_ledger.py::test_bytes_on_their_way_out_are_not_free

Torch and pytest are imported once; every mutant is a fork of that process, with the changed copy first on its path. The
same tests are run once on the unchanged package, where all must pass: else a kill says nothing.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = ROOT / "tests" / "mutants"
#: A mutant that makes its tests run longer than this is killed too: it hangs.
PATIENCE_S = 60.0
#: What forks need and no mutant changes: torch, pytest with its plugins, and the libraries of tests and package.
NEEDED = ("torch", "pytest", "_pytest.pastebin", "_pytest.junitxml", "pytest_timeout", "anyio.pytest_plugin")
NEEDED += (
    "hypothesis.stateful",
    "_hypothesis_pytestplugin",
    "safetensors.torch",
    "yaml",
    "psutil",
    "pydantic",
    "wrapt",
)
#: What pytest exits with when a test failed; anything else is no verdict.
FAILED = 1


@dataclass(frozen=True)
class Mutant:
    """One seeded bug."""

    path: Path
    breaks: str
    tests: tuple[str, ...]
    room: str

    @property
    def name(self) -> str:
        return self.path.stem

    @classmethod
    def read(cls, path: Path) -> Mutant:
        """Parse one patch; `ValueError` says what is missing."""
        text = path.read_text()
        breaks = re.findall(r"^# breaks: (.+)$", text, re.MULTILINE)
        tests = re.findall(r"^# killed by: (.+)$", text, re.MULTILINE)
        changed = re.findall(r"^\+\+\+ b/modelcache/([\w./]+)", text, re.MULTILINE)
        if len(breaks) != 1 or not tests or not changed:
            raise ValueError(f"{path}: needs one '# breaks:', at least one '# killed by:', and a diff of modelcache/")
        rooms = dict.fromkeys(("core", "runtime"), "core and runtime")
        rooms |= {"dataplane": "data plane", "ab": "comparisons"}
        first = changed[0].split("/")[0]
        return cls(path, breaks[0], tuple(tests), rooms.get(first, "front door"))

    def plant(self, into: Path) -> str:
        """Copy the package and change the copy; what is wrong with the patch, or nothing."""
        # With what was compiled: only the changed files are newer than that.
        shutil.copytree(ROOT / "modelcache", into / "modelcache")
        command = ["git", "apply", "--recount", "-C1", str(self.path)]
        done = subprocess.run(command, cwd=into, capture_output=True, text=True, check=False)
        return done.stderr.strip()


@dataclass
class Run:
    """Tests running in a fork."""

    name: str
    home: Path
    mutant: Mutant | None
    started_s: float = field(default_factory=time.monotonic)
    pid: int = 0

    @property
    def log(self) -> Path:
        return self.home / "log.txt"

    def start(self, tests: tuple[str, ...], options: tuple[str, ...]) -> None:
        """Fork, and run the tests in the child with the copy in front of the repository."""
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            os.setpgid(0, 0)
            sink = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.path.insert(0, str(self.home))
            os.environ["PYTHONPATH"] = str(self.home)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True
            import pytest

            own = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", f"--basetemp={self.home}/tmp")
            # Plugins are imported already, and have no assertions to explain.
            own += ("-W", "ignore::pytest.PytestAssertRewriteWarning")
            code = int(pytest.main([*own, *options, *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def failed_tests(self) -> list[str]:
        return re.findall(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\])?)(?: - .*)?$", self.log.read_text(), re.MULTILINE)


def ended(running: dict[int, Run], patience_s: float) -> Iterator[tuple[Run, int]]:
    """Those that have ended, with their exit codes; one that is out of patience is ended, with `FAILED`."""
    for pid, run in list(running.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del running[pid]
            yield run, os.waitstatus_to_exitcode(status)
        elif run.mutant is not None and time.monotonic() - run.started_s > patience_s:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            del running[pid]
            yield run, FAILED


def run_all(
    mutants: list[Mutant], jobs: int, tests: tuple[str, ...], patience_s: float, work: Path
) -> tuple[list[str], dict[str, float]]:
    """Run the clean copy, then every mutant; the problems found, and the seconds of each room."""
    problems: list[str] = []
    spent: dict[str, float] = {}
    todo: list[Mutant | None] = [None, *mutants]
    running: dict[int, Run] = {}
    while todo or running:
        # One more than asked for: some mutants compute nothing, and wait until a deadline.
        while todo and len(running) <= jobs:
            mutant = todo.pop(0)
            name = mutant.name if mutant else "unchanged"
            home = work / name
            home.mkdir()
            if mutant is None:
                shutil.copytree(ROOT / "modelcache", home / "modelcache")
                named = tests or tuple(dict.fromkeys(test for each in mutants for test in each.tests))
            elif wrong := mutant.plant(home):
                problems.append(f"{name}: the patch does not apply: {wrong}")
                continue
            else:
                named = tests or mutant.tests
            run = Run(name, home, mutant)
            run.start(named, ("-x",) if mutant else ())
            running[run.pid] = run
        for run, code in ended(running, patience_s):
            seconds = time.monotonic() - run.started_s
            spent[run.mutant.room if run.mutant else "unchanged"] = (
                spent.get(run.mutant.room if run.mutant else "unchanged", 0.0) + seconds
            )
            problems += verdict(run, code, seconds)
            shutil.rmtree(run.home)
        signal.sigtimedwait({signal.SIGCHLD}, 0.05)
    return problems, spent


def verdict(run: Run, code: int, seconds: float) -> list[str]:
    """Print one line; the problem, if there is one."""
    tail = "\n".join(run.log.read_text().splitlines()[-25:])
    if run.mutant is None:
        print(f"{'passed' if code == 0 else 'FAILED':9} {seconds:5.1f} s  the unchanged package", flush=True)
        return [] if code == 0 else [f"the named tests fail on the unchanged package:\n{tail}"]
    by = run.failed_tests()
    word = "killed" if code == FAILED else "SURVIVED" if code == 0 else "NO VERDICT"
    print(f"{word:9} {seconds:5.1f} s  {run.name}: {run.mutant.breaks}" + (f"  [{by[0]}]" if by else ""), flush=True)
    if code == FAILED:
        return []
    return [f"{run.name} survived its tests: {run.mutant.breaks}" if code == 0 else f"{run.name}: {code}\n{tail}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants to run, by the start of their names; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tests", nargs="+", default=(), help="run these instead of the tests named in the patches")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="write how many were killed there, as JSON")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="seconds after which a mutant hangs")
    given = parser.parse_args()
    mutants = [Mutant.read(path) for path in sorted(MUTANTS.glob("*.patch"))]
    if given.names:
        mutants = [mutant for mutant in mutants if mutant.name.startswith(tuple(given.names))]
    if not mutants:
        print("no mutant has such a name", file=sys.stderr)
        return 2
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    os.chdir(ROOT)
    started_s = time.monotonic()
    compileall.compile_dir(ROOT / "modelcache", quiet=1)
    for name in NEEDED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        problems, spent = run_all(mutants, given.jobs, tuple(given.tests), given.patience, Path(work))
    print(f"\n{len(mutants) - len(problems)} of {len(mutants)} mutants killed in {time.monotonic() - started_s:.0f} s")
    for room, seconds in spent.items():
        number = sum(mutant.room == room for mutant in mutants)
        print(f"{number:>5}  {room}, {seconds / given.jobs:.0f} s of {given.jobs} cores")
    for problem in problems:
        print(f"\n{problem}", file=sys.stderr)
    if given.figures:
        given.figures.parent.mkdir(exist_ok=True)
        killed = {"mutants killed": {"of " + str(len(mutants)): len(mutants) - len(problems)}}
        given.figures.write_text(json.dumps(killed), encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
