"""Memory limits of this process's control groups, versions 1 and 2, from the leaf up to the root.

psutil reports the host, and a container or a parent slice may allow far less. Everything is read below an injectable
root, so that tests can lay out the files of any machine. A file that is missing or cannot be read sets no limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Version 1 writes "unlimited" as the largest multiple of the page size: 9223372036854771712 with pages of 4 KiB,
# a little less with larger pages.
_UNLIMITED_BYTES = 2**63 - 2**21
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """One limit that applies to this process.

    Attributes:
        source: The path of the file it was read from, as seen under ``/``.
        limit_bytes: The limit.
        available_bytes: What may still be used below it, file cache that can be dropped counted as free; `None` when
            the group's use cannot be read.
    """

    source: str
    limit_bytes: int
    available_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Mount:
    version: int
    root: str
    point: str


@dataclass(frozen=True, slots=True)
class _Names:
    """What a version calls its files."""

    limits: tuple[str, ...]
    current: str
    file_cache: tuple[str, str]  # not used again lately, and used again


_V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Names(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def cgroup_limits(root: Path, *, all_file_cache: bool = False) -> tuple[CgroupLimit, ...]:
    """Every memory limit over this process, leaf first; empty when nothing limits it.

    Args:
        root: Where ``/proc`` and the control groups are found.
        all_file_cache: Count as available also the file cache that was used again lately.
    """
    memberships = _memberships(_text(root / "proc/self/cgroup"))
    found: list[CgroupLimit] = []
    for mount in _mounts(_text(root / "proc/self/mountinfo")):
        path = memberships.get(mount.version)
        if path is None:
            continue
        top = root / mount.point.lstrip("/")
        names = _V2 if mount.version == 2 else _V1
        for group in _ancestry(top, _below(mount.root, path)):
            found.extend(_limits_of(group, names, root, all_file_cache=all_file_cache))
            if mount.version == 1 and group != top and _number(group.parent / "memory.use_hierarchy") == 0:
                break
    return tuple(found)


def version_2_groups(root: Path) -> tuple[Path, ...]:
    """The folders of this process's group in version 2 and of its ancestors, leaf first; empty where it is not used."""
    path = _memberships(_text(root / "proc/self/cgroup")).get(2)
    if path is None:
        return ()
    return tuple(
        group
        for mount in _mounts(_text(root / "proc/self/mountinfo"))
        if mount.version == 2
        for group in _ancestry(root / mount.point.lstrip("/"), _below(mount.root, path))
    )


def _memberships(text: str) -> dict[int, str]:
    """Version -> this process's path in the hierarchy that controls memory."""
    paths: dict[int, str] = {}
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    return paths


def _mounts(text: str) -> Iterator[_Mount]:
    """Where the memory hierarchies are mounted."""
    for line in text.splitlines():
        fields, _, tail = line.partition(" - ")
        left, right = fields.split(), tail.split()
        if len(left) < 5 or len(right) < 3:
            continue
        root, point = _unescape(left[3]), _unescape(left[4])
        if right[0] == "cgroup2":
            yield _Mount(2, root, point)
        elif right[0] == "cgroup" and "memory" in right[2].split(","):
            yield _Mount(1, root, point)


def _unescape(field: str) -> str:
    """The kernel writes blanks and backslashes in paths as octal."""
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), field)


def _below(mount_root: str, path: str) -> tuple[str, ...]:
    """The steps from the mount point down to this process's group.

    A container may see only its own group, mounted as if it were the root, while the membership still names the full
    path; and from inside a namespace the path may start above it (``/../x``). Then the mount point is the group.
    """
    group, top = _steps(path), _steps(mount_root)
    if ".." in group:
        return ()
    return group[len(top) :] if group[: len(top)] == top else ()


def _steps(path: str) -> tuple[str, ...]:
    return tuple(step for step in path.split("/") if step)


def _ancestry(top: Path, steps: tuple[str, ...]) -> Iterator[Path]:
    """The group and its ancestors, leaf first, ending at the mount point."""
    for depth in range(len(steps), -1, -1):
        yield top.joinpath(*steps[:depth])


def _limits_of(group: Path, names: _Names, root: Path, *, all_file_cache: bool) -> Iterator[CgroupLimit]:
    """The limits one group sets, and in version 1 the one its invisible ancestors set."""
    statistics = _statistics(group / "memory.stat")
    current_bytes = _number(group / names.current)
    for name in names.limits:
        limit_bytes = _number(group / name)
        if limit_bytes is None or limit_bytes >= _UNLIMITED_BYTES:
            continue
        available_bytes = None
        if current_bytes is not None:
            cache_bytes = sum(statistics.get(name, 0) for name in names.file_cache[: 2 if all_file_cache else 1])
            held_bytes = max(0, current_bytes - cache_bytes)
            available_bytes = max(0, limit_bytes - held_bytes)
        yield CgroupLimit(_shown(group / name, root), limit_bytes, available_bytes)
    hierarchical_bytes = statistics.get("hierarchical_memory_limit")
    if hierarchical_bytes is not None and hierarchical_bytes < _UNLIMITED_BYTES:
        source = f"{_shown(group / 'memory.stat', root)} hierarchical_memory_limit"
        yield CgroupLimit(source, hierarchical_bytes, None)


def _shown(path: Path, root: Path) -> str:
    return f"/{path.relative_to(root)}"


def _statistics(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _number(path: Path) -> int | None:
    """The number in a file; `None` when there is none, which is also how version 2 says ``max``."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Absent, not ours to read, or gone since it was listed: it sets no limit that we could know of.
        return ""
