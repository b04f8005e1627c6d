"""Play one simulated schedule again, by its seed: `python tools/replay.py 4711`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from simulation.world import Schedule


def main() -> int:
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        print("usage: python tools/replay.py SEED", file=sys.stderr)
        return 2
    schedule = Schedule(int(sys.argv[1]))
    try:
        schedule.play()
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    scheduler = schedule.scheduler
    print("\n".join(scheduler.trace))
    print(f"seed {scheduler.seed} ({scheduler.strategy}): {scheduler.num_switches} switches, everything held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
