"""What a probe answers with: figures that carry where they come from and how old they are, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why a figure cannot be had, as a value: the caller decides whether that is an error.

    Attributes:
        reason: A clause without a full stop, such as ``"NVML is not available (driver/library version mismatch)"``.
        fix: An imperative clause, such as ``"fix the driver (reboot after update)"``.
        code: The name of the return code behind it, such as ``"LIB_RM_VERSION_MISMATCH"``; empty without one.
    """

    reason: str
    fix: str
    code: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.fix}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number as one source gave it.

    Attributes:
        what: ``total``, ``free``, ``limit``, ``allocated`` or ``reserved``.
        size_bytes: The number.
        source: Who said so: ``nvml``, ``driver``, ``allocator``, ``psutil``, or the path of a cgroup file.
        at_s: When, on the probe's clock.
    """

    what: str
    size_bytes: int
    source: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Reading:
    """The memory of one device or of the machine, at one moment. All sizes are bytes.

    Attributes:
        total_bytes: The smallest total anybody reported.
        free_bytes: The smallest free figure anybody reported, never more than the total.
        used_bytes: ``total - free``: what cannot be had now, whoever holds it.
        others_bytes: What is used by anything but this process's own allocations. On a device that includes the
            context of this process, which no model can use either.
        source: Where `total_bytes` comes from.
        free_source: Where `free_bytes` comes from.
        at_s: When it was measured, on the probe's clock.
        age_s: How old it was when it was handed out: 0 unless `stale`.
        stale: The source no longer answers and these are its last figures.
        name: Of the device, for people.
        uuid: Of the device or of its slice; empty for RAM.
        unified: The device has no memory of its own: this is the machine's one pool.
        figures: Every number that was reconciled.
        problem: Why a source is missing from `figures` or why the reading is stale.
    """

    total_bytes: int
    free_bytes: int
    used_bytes: int
    others_bytes: int
    source: str
    free_source: str
    at_s: float
    age_s: float = 0.0
    stale: bool = False
    name: str = ""
    uuid: str = ""
    unified: bool = False
    figures: tuple[Figure, ...] = ()
    problem: Unavailable | None = None


@dataclass(frozen=True, slots=True)
class AllocatorFigures:
    """What this process holds of a device through torch's allocator, in bytes."""

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, slots=True)
class DriverFigures:
    """What the CUDA driver answers for a device (`mem_get_info`), in bytes."""

    free_bytes: int
    total_bytes: int


def reconcile(figures: tuple[Figure, ...], ours_bytes: int, at_s: float) -> Reading:
    """Pick the safe answer out of several: the smallest total and the smallest free.

    Args:
        figures: At least one figure of ``total`` or ``limit`` and one of ``free``.
        ours_bytes: What this process holds itself; the rest of what is used belongs to others.
        at_s: The moment of the snapshot.
    """
    total = min((figure for figure in figures if figure.what in {"total", "limit"}), key=_size)
    free = min((figure for figure in figures if figure.what == "free"), key=_size)
    free_bytes = max(0, min(free.size_bytes, total.size_bytes))
    used_bytes = total.size_bytes - free_bytes
    return Reading(
        total_bytes=total.size_bytes,
        free_bytes=free_bytes,
        used_bytes=used_bytes,
        others_bytes=max(0, used_bytes - ours_bytes),
        source=total.source,
        free_source=free.source if free.size_bytes <= total.size_bytes else total.source,
        at_s=at_s,
        figures=figures,
    )


def _size(figure: Figure) -> int:
    return figure.size_bytes
