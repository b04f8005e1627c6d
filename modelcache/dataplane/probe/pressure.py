"""How much processes stand still for want of memory: the kernel's pressure stall information (PSI).

A control group's own file speaks of its processes only, so it wins over the machine's. Kernels without PSI, or started
with ``psi=0``, have no such files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from modelcache.dataplane.probe.cgroup import version_2_groups

_SOME = re.compile(r"^some avg10=(\d+(?:\.\d+)?) ", re.ASCII | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Stalls:
    """Stalls of the last ten seconds.

    Attributes:
        some_percent: How much of the time at least one process stood still.
        source: The path of the file, as seen under ``/``.
    """

    some_percent: float
    source: str


def stalls(root: Path) -> Stalls | None:
    """What the nearest file says: of this process's group, of an ancestor, of the machine; `None` if none can be read.

    Args:
        root: Where ``/proc`` and the control groups are found.
    """
    for path in (*(group / "memory.pressure" for group in version_2_groups(root)), root / "proc/pressure/memory"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            # Absent, not ours to read, or (EOPNOTSUPP) switched off.
            continue
        if (found := _SOME.search(text)) is not None:
            return Stalls(float(found[1]), f"/{path.relative_to(root)}")
    return None
