"""The figures this project promises, each next to a reference measured in the same run.

    python benchmarks/run.py                    # a table; exit code 1 when a figure is missed
    python benchmarks/run.py --quick            # the workloads small and few, to see that it works
    python benchmarks/run.py --device cuda:0    # the workloads on a GPU
    python benchmarks/run.py --write NAME       # also benchmarks/results/NAME.md

Each part is a script of its own and says there what it divides by what. Those that fork come first: a process with
threads had better not.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import bytes_moved
import choosing
import concurrency
import hits
import host_only_memory
import links
import loaders
import materialize
import reading
import second_start
import workloads
from figures import Figure, Setup, present, spread


def imports() -> list[Figure]:
    def run(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return (time.perf_counter() - began) * 1e3

    figures = []
    for statement, limit_ms in (("import modelcache", 150), ("from modelcache import ModelCache", None)):
        check = f"{statement}; import sys; assert 'torch' not in sys.modules"
        empty, whole = [], []
        for _ in range(7):
            empty.append(run("pass"))
            whole.append(run(check))
        reference = statistics.median(empty)
        found = [each - reference for each in whole]
        ours = statistics.median(found)
        figures.append(
            Figure(
                f"{statement}, no torch",
                f"{ours:.0f} ms",
                f"{reference:.0f} ms (empty interpreter)",
                "-",
                "shown" if limit_ms is None else f"< {limit_ms} ms",
                limit_ms is None or ours < limit_ms,
                f"{spread(found)} ms",
                tuple(found),
            )
        )
    return figures


def measure(setup: Setup) -> list[Figure]:
    forking = (materialize.measure, host_only_memory.measure, reading.measure, second_start.measure, loaders.measure)
    in_process = (imports, hits.measure, choosing.measure, bytes_moved.measure, links.measure)
    figures = [figure for part in (*forking, *in_process) for figure in told(part.__module__, part)]
    for part in (concurrency.measure, workloads.measure):
        figures += told(part.__module__, lambda part=part: part(setup))
    return figures


def told(name: str, part: object) -> list[Figure]:
    """The figures of a part, and on the terminal how long they took."""
    began = time.perf_counter()
    figures: list[Figure] = part()
    print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return figures


if __name__ == "__main__":
    sys.exit(present("run.py", __doc__, measure, setup=True))
