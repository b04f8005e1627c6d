"""Simulated schedules of the shipped mover for hours: `python tools/soak.py --hours 8`.

Seeds are played onward from `--seed`; every second one is healed halfway and must then serve everybody. The first one
that breaks a promise ends it, with its report and the command that plays it again.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

#: What a worker plays before it reports.
BLOCK = 50
PROGRESS_EVERY_S = 30.0


@dataclass
class Tally:
    """What was played so far."""

    num_schedules: int = 0
    num_comparisons: int = 0
    marks: Counter[str] = field(default_factory=Counter)
    failure: str = ""

    def add(self, other: Tally) -> None:
        self.num_schedules += other.num_schedules
        self.num_comparisons += other.num_comparisons
        self.marks.update(other.marks)
        self.failure = self.failure or other.failure


def play(first: int) -> Tally:
    """One block of seeds, in a process of its own."""
    from simulation.shipped_world import ShippedSchedule

    logging.getLogger("modelcache").setLevel(logging.CRITICAL + 1)
    tally = Tally()
    for seed in range(first, first + BLOCK):
        schedule = ShippedSchedule(seed, tally.marks, is_live=seed % 2 == 1)
        try:
            schedule.play()
        except AssertionError as error:
            tally.failure = str(error)
            return tally
        tally.num_schedules += 1
        tally.num_comparisons += schedule.num_comparisons
    gc.collect()
    return tally


def soak(seed: int, jobs: int, until_s: float, num_comparisons: int) -> tuple[Tally, float]:
    """Play until a time has passed, or so many comparisons were made, or something failed."""
    tally, began_s, told_s = Tally(), time.monotonic(), time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        running: set[Future[Tally]] = set()
        while True:
            now_s = time.monotonic() - began_s
            is_enough = now_s >= until_s or tally.num_comparisons >= num_comparisons or tally.failure
            while not is_enough and len(running) < jobs:
                running.add(workers.submit(play, seed))
                seed += BLOCK
            if not running:
                return tally, now_s
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                tally.add(future.result())
            if time.monotonic() - told_s >= PROGRESS_EVERY_S:
                told_s = time.monotonic()
                print(f"{now_s:8.0f} s  {figures(tally, now_s)}", flush=True)


def figures(tally: Tally, seconds: float) -> str:
    rate, num_marks = tally.num_schedules / max(seconds, 1e-9), sum(map(bool, tally.marks.values()))
    return (
        f"{tally.num_schedules:,} schedules ({rate:.1f} a second), {tally.num_comparisons:,} hash comparisons, "
        f"{int(bool(tally.failure))} mismatches or other failures, {num_marks} reach marks hit"
    )


def record(path: Path, command: str, tally: Tally, seconds: float, first: int) -> None:
    """Keep the figures as a page."""
    import torch
    from simulation.reach import LIVE, SHIPPED

    missing = [mark for mark in (*SHIPPED, *LIVE) if not tally.marks[mark]]
    rows = "\n".join(f"| {mark} | {count:,} |" for mark, count in sorted(tally.marks.items()) if count)
    path.write_text(
        f"""# Soak: schedules of the shipped mover

| | |
|---|---|
| Date | {datetime.now(UTC):%Y-%m-%d} |
| Command | `{command}` |
| Machine | {os.cpu_count()} cores, {platform.machine()}, {platform.system()}; Python {platform.python_version()}, \
torch {torch.__version__} |
| Seeds | from {first:,}; every second one is healed halfway and must then serve everybody |
| Schedules | {tally.num_schedules:,} in {seconds:,.0f} s, {tally.num_schedules / seconds:.1f} a second |
| Hash comparisons | {tally.num_comparisons:,}: one tensor each, after a use of its model |
| Mismatches | {"0" if not tally.failure else "see below"} |
| Reach marks | {len(SHIPPED) + len(LIVE) - len(missing)} of {len(SHIPPED) + len(LIVE)} |

Each schedule is a real cache over the shipped mover: torch models of 2 to 4 KiB in up to four segments, a simulated
device, RAM and image files with budgets for about half of them, 2 to 4 callers, and in most schedules faults of
loaders, device memory, copies, disk and page-locking. Beside the bytes it is held to budgets, leases, books, progress,
and to leaving nothing behind when it is closed.
{tally.failure}
## How often each mark was reached

| Mark | Times |
|---|---|
{rows}
""",
        encoding="utf-8",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hours", type=float, help="how long; 1 unless --comparisons is given")
    parser.add_argument("--comparisons", type=int, help="until so many tensors were compared")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=10_000_000, help="the first")
    parser.add_argument("--record", type=Path, help="a file for the figures")
    given = parser.parse_args()
    hours = given.hours if given.hours is not None else None if given.comparisons is not None else 1.0
    until_s = float("inf") if hours is None else hours * 3600
    most = sys.maxsize if given.comparisons is None else given.comparisons
    tally, seconds = soak(given.seed, given.jobs, until_s, most)
    print(figures(tally, seconds))
    if given.record is not None:
        record(given.record, f"python tools/soak.py {' '.join(sys.argv[1:])}", tally, seconds, given.seed)
    if tally.failure:
        print(tally.failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
