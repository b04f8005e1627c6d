"""Runs scenes in processes of their own, several in one; each says how it went in a line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

TESTS = Path(__file__).parent.parent
#: For the start of Python and torch, and all scenes of a child, in real seconds.
PATIENCE_S = 60


def run(module: str, function: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call a function of a module below `tests` in a new process, and wait for its end."""
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from {module} import {function}; "
    code += f"{function}(*{list(arguments)!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def play(scenes: Iterable[Callable[[Path], None]], folder: str) -> None:
    """In the child: play scenes one after the other, and say of each how it went."""
    for scene in scenes:
        own = Path(folder) / scene.__name__
        own.mkdir()
        try:
            scene(own)
            verdict = "fine"
        except BaseException:  # it is reported, and the next scene is played
            verdict = traceback.format_exc()
        os.write(2, (json.dumps([scene.__name__, verdict]) + "\n").encode())


def verdicts(ended: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """In the parent: what a child said of its scenes."""
    assert ended.returncode == 0, f"ended with {ended.returncode}:\n{ended.stderr}"
    lines = [line for line in ended.stderr.splitlines() if line.startswith('["')]
    return dict(json.loads(line) for line in lines)


def forked(do: Callable[[], None]) -> int:
    """In a child without threads: do something in a grandchild; its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        code = 99
        try:
            do()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def end(how: str) -> None:
    """End this process here and now."""
    os.kill(os.getpid(), getattr(signal, how))
    signal.pause()
