"""The figures this project promises, each next to a reference measured in the same run.

    python benchmarks/run.py                 # a table; exit code 1 when a figure is missed
    python benchmarks/run.py --write NAME    # also benchmarks/results/NAME.md

Times are medians over rounds in which ours and the reference take turns; the empty loop is subtracted from both.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import host_only_memory
import links
import materialize
import torch
from figures import Figure, present, spread

from modelcache import ModelCache

ROUNDS, CALLS = 9, 5_000
NUM_MANY = 100_000


class Identity(torch.nn.Module):
    """A model whose forward costs nothing, so that what is left is ours."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: object) -> object:
        return x


@functools.lru_cache
def lookup(name: str) -> str:
    return name


def timed(*functions: Callable[[], object]) -> list[list[float]]:
    """Microseconds a call of each, per round; rounds interleaved, an empty call subtracted."""
    times: list[list[float]] = [[] for _ in functions]

    def once(function: Callable[[], object]) -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            function()
        return (time.perf_counter() - began) / CALLS * 1e6

    for function in functions:
        once(function)
    for _ in range(ROUNDS):
        empty = once(lambda: None)
        for function, found in zip(functions, times, strict=True):
            found.append(max(0.001, once(function) - empty))
    return times


def hits(cache: ModelCache) -> list[Figure]:
    handle = cache.get("model")
    handle(1)

    def bare() -> None:
        with cache.lease_many("model"):
            pass

    def entered() -> None:
        with cache.get("model"):
            pass

    def called() -> None:
        handle(1)

    lru, lease, block, call = timed(lambda: lookup("model"), bare, entered, called)
    reference = statistics.median(lru)
    figures = []
    for what, found, limit in (
        ("hit: bare lease (lease_many of one)", lease, 5.0),
        ("hit: with cache.get(name)", block, 25.0),
        ("hit: call through a handle", call, 25.0),
    ):
        ours = statistics.median(found)
        figures.append(
            Figure(
                what,
                f"{ours:.2f} us",
                f"{reference:.3f} us (lru_cache hit)",
                f"{ours / reference:.0f}",
                f"<= {limit:.0f} us",
                ours <= limit,
                f"{spread(found)} us",
                tuple(found),
            )
        )
    return figures


def many(cache: ModelCache) -> list[Figure]:
    """A cache of ten models next to one of 100,000, their rounds interleaved."""
    for number in range(9):
        cache.register(f"m{number}", Identity)
    with ModelCache(ram="64MiB", device="host_only", progress=False) as full:
        full.register("model", Identity)
        began = time.perf_counter()
        for number in range(NUM_MANY):
            full.register(f"m{number}", Identity)
        each_us = (time.perf_counter() - began) / NUM_MANY * 1e6
        full.get("model")  # Answered after every registration before it was taken note of.

        def among_ten() -> None:
            with cache.lease_many("model"):
                pass

        def among_many() -> None:
            with full.lease_many("model"):
                pass

        few, lots = timed(among_ten, among_many)
    ours, theirs = statistics.median(lots), statistics.median(few)
    return [
        Figure("register, each of 100,000", f"{each_us:.1f} us", "-", "-", "<= 50 us", each_us <= 50, "one run"),
        Figure(
            "hit at 100,000 models",
            f"{ours:.2f} us",
            f"{theirs:.2f} us (hit at ten models)",
            f"{ours / theirs:.2f}",
            "<= 3 x",
            ours <= 3 * theirs,
            f"{spread(lots)} us",
            tuple(lots),
        ),
    ]


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


def measure() -> list[Figure]:
    # First, because they fork, which a process with threads had better not.
    figures = materialize.measure() + host_only_memory.measure()
    torch.set_grad_enabled(False)
    with ModelCache(ram="64MiB", device="host_only", progress=False) as cache:
        cache.register("model", Identity)
        figures += hits(cache) + many(cache)
    return figures + imports() + links.measure()


if __name__ == "__main__":
    sys.exit(present("run.py", __doc__, measure))
