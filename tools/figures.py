"""What was proved, as one table: `python tools/figures.py` after `make test` and `make proof`.

The suite, the mutants and the fuzzers each write what they found to a file of `.figures/`. Ends with 1 if a group that
was run is below its goal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".figures"
#: What each group must reach, whoever ran it.
GOALS: Mapping[str, float] = {
    "states": 1_000_000,
    "interleavings": 1_000,
    "schedules": 6_800,
    "reach marks": 60,
    "scars": 20,
    "fault rows": 66,
    "header attacks": 82,
    "hostile directories": 60,
    "stalls": 12,
    "mutants killed": 40,
    "fuzz executions": 100_000,
}
Groups = dict[str, dict[str, float]]


def read(folder: Path = FOLDER) -> Groups:
    """Everything in the folder; equal labels of different files add up."""
    groups: Groups = {}
    for path in sorted(folder.glob("*.json")):
        for group, labels in json.loads(path.read_text(encoding="utf-8")).items():
            known = groups.setdefault(group, {})
            for label, number in labels.items():
                known[label] = known.get(label, 0) + number
    return groups


def table(groups: Groups) -> tuple[list[str], list[str]]:
    """A line for each group, and the groups that are below their goal."""
    lines, missed = [], []
    for group, labels in sorted(groups.items()):
        goal, total = GOALS.get(group), sum(labels.values())
        wanted = "" if goal is None else f"at least {goal:,}"
        if goal is not None and total < goal:
            missed.append(group)
            wanted += "  MISSED"
        lines.append(f"{total:>14,.0f}  {group:<22} {wanted}")
    return lines, missed


def main() -> int:
    groups = read()
    if not groups:
        print("nothing was found yet: make test, then make proof", file=sys.stderr)
        return 2
    lines, missed = table(groups)
    print("\n".join(lines))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
