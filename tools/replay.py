"""Play one simulated schedule again, by its seed: `python tools/replay.py [--shipped] [--live] 4711`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))


def world_of(*, is_shipped: bool) -> Any:
    """What a schedule is of; torch takes longer to import than a schedule takes, and is not always needed."""
    if is_shipped:
        from simulation.shipped_world import ShippedSchedule

        return ShippedSchedule
    from simulation.fake_world import FakeSchedule

    return FakeSchedule


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--shipped", action="store_true", help="of the shipped mover, with real torch models")
    parser.add_argument("--live", action="store_true", help="healed halfway")
    given = parser.parse_args()
    schedule = world_of(is_shipped=given.shipped)(given.seed, is_live=given.live)
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
