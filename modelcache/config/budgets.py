"""From what was asked for to bytes: budgets resolved once, against what the machine has. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelcache.config.layers import Origin
from modelcache.config.schema import Settings
from modelcache.config.values import Absolute, Auto, Share, Size
from modelcache.errors import ConfigError, Finding
from modelcache.units import format_bytes

VRAM_SHARE = 0.8
RAM_SHARE = 0.5
PAGE_LOCKED_SHARE_OF_BUDGET = 0.5
DISK_SHARE = 0.5
LARGEST_SPARE_SHARE_OF_BUDGET = 1 / 32  # a budget below 32 segments needs its last one


@dataclass(frozen=True, slots=True)
class Totals:
    """What was measured of the machine before anything was loaded. All sizes are bytes.

    Attributes:
        ram_bytes: Of the machine, or of the container if that is less.
        ram_others_bytes: Of it, what others hold.
        device: The execution device, such as ``"cuda:0"``; ``"host_only"`` when RAM is the top tier.
        device_name: For people, such as ``"NVIDIA RTX 4090"``.
        vram_bytes: Of the device; `None` when it could not be measured.
        vram_others_bytes: Of it, what others hold.
        vram_problem: Why it could not be measured: a clause.
        vram_fix: What to do about that: an imperative clause.
        disk_free_bytes: Free where image files go; `None` when not measured.
        is_unified: The device has no memory of its own: VRAM and RAM are the same pool, of `ram_bytes`.
    """

    ram_bytes: int
    ram_others_bytes: int = 0
    device: str = "host_only"
    device_name: str = ""
    vram_bytes: int | None = None
    vram_others_bytes: int = 0
    vram_problem: str = ""
    vram_fix: str = ""
    disk_free_bytes: int | None = None
    is_unified: bool = False


@dataclass(frozen=True, slots=True)
class TierBudgets:
    """Bytes per tier. 0 of `disk_bytes` means that nothing is spilled.

    `page_locked_bytes` and `ram_spare_bytes` are parts of `ram_bytes`.

    Attributes:
        vram_bytes: 0 on a host-only machine.
        ram_bytes: The RAM tier.
        page_locked_bytes: How much of the RAM tier may be page-locked.
        disk_bytes: Image files.
        ram_spare_bytes: How much of the RAM tier is kept ready ahead of demand, and is not for models.
        lines: One line for people per budget: how it came about, and what is not used.
    """

    vram_bytes: int
    ram_bytes: int
    page_locked_bytes: int
    disk_bytes: int
    lines: tuple[str, ...] = ()
    ram_spare_bytes: int = 0


def resolve_budgets(
    settings: Settings, totals: Totals, origins: Mapping[tuple[str | int, ...], Origin] | None = None
) -> TierBudgets:
    """Turn sizes, shares and ``auto`` into bytes.

    A share is of the total less what others hold. ``auto`` is 80 % of VRAM, 50 % of RAM, half of the RAM budget
    page-locked, and half of the free disk. Where VRAM and RAM are one pool, ``auto`` RAM is half of what VRAM leaves.

    Args:
        settings: What was asked for.
        totals: What there is.
        origins: Where each key was set, so that errors name the place.

    Raises:
        ConfigError: A budget is above what there is, or a share is of something that could not be measured.
    """
    sums = _Sums(settings, totals, origins or {})
    vram = sums.vram()
    ram = sums.ram(vram)
    page_locked = sums.page_locked(ram)
    ram_spare = sums.ram_spare(ram)
    disk = sums.disk()
    if sums.findings:
        raise ConfigError(tuple(sums.findings))
    return TierBudgets(vram, ram, page_locked, disk, tuple(sums.lines), ram_spare)


def vram_share(settings: Settings) -> float:
    """The share of the device, less what others hold, that the VRAM budget was given as; 1 for a size."""
    asked = settings.budgets.vram
    return asked.fraction if isinstance(asked, Share) else VRAM_SHARE if isinstance(asked, Auto) else 1.0


@dataclass(slots=True)
class _Sums:
    settings: Settings
    totals: Totals
    origins: Mapping[tuple[str | int, ...], Origin]
    findings: list[Finding] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def vram(self) -> int:
        totals, asked = self.totals, self.settings.budgets.vram
        if totals.device == "host_only":
            if not isinstance(asked, Auto):
                self.lines.append(f"budgets.vram {asked}: not used, RAM is the top tier on this machine")
            if self.settings.memory != "allocated":
                self.lines.append(f"memory {self.settings.memory}: not used, there is no device memory")
            return 0
        if totals.is_unified:
            return self._of(
                "vram", asked, totals.ram_bytes, totals.ram_others_bytes, VRAM_SHARE, f"the memory of {self._device()}"
            )
        if totals.vram_bytes is None:
            return self._unmeasured_vram(asked)
        return self._of("vram", asked, totals.vram_bytes, totals.vram_others_bytes, VRAM_SHARE, self._device())

    def ram(self, vram_bytes: int) -> int:
        totals, asked = self.totals, self.settings.budgets.ram
        others_bytes, what = totals.ram_others_bytes, "this machine's RAM"
        if totals.is_unified and totals.device != "host_only":
            what = "what VRAM leaves of the one memory"
            if isinstance(asked, Auto):
                others_bytes = min(totals.ram_bytes, others_bytes + vram_bytes)
        ram_bytes = self._of("ram", asked, totals.ram_bytes, others_bytes, RAM_SHARE, what)
        if totals.is_unified and vram_bytes + ram_bytes > totals.ram_bytes:
            self._report(
                "ram",
                f"{format_bytes(ram_bytes)}, with {format_bytes(vram_bytes)} of budgets.vram, exceeds the "
                f"{format_bytes(totals.ram_bytes)} that both share on {self._device()}; lower one of them",
            )
        return ram_bytes

    def page_locked(self, ram_bytes: int) -> int:
        totals, asked = self.totals, self.settings.budgets.page_locked
        if totals.device == "host_only":
            if not isinstance(asked, Auto):
                self.lines.append(f"budgets.page_locked {asked}: not used, there is no device to copy to")
            return 0
        if isinstance(asked, Auto):
            page_locked_bytes = int(ram_bytes * PAGE_LOCKED_SHARE_OF_BUDGET)
            self.lines.append(f"budgets.page_locked {format_bytes(page_locked_bytes)}: half of the RAM budget")
            return page_locked_bytes
        if isinstance(asked, Absolute) and asked.size_bytes == 0:
            self.lines.append("budgets.page_locked none: copies are not asynchronous")
            return 0
        page_locked_bytes = self._of("page_locked", asked, totals.ram_bytes, totals.ram_others_bytes, 0.0, "RAM")
        if page_locked_bytes > ram_bytes > 0:
            self._report(
                "page_locked",
                f"{format_bytes(page_locked_bytes)} exceeds budgets.ram, {format_bytes(ram_bytes)}, of which it is a "
                "part; lower it or raise budgets.ram",
            )
        return page_locked_bytes

    def ram_spare(self, ram_bytes: int) -> int:
        asked, segment_bytes = self.settings.budgets.ram_spare, self.settings.segment
        if isinstance(asked, Auto):
            spare_bytes = segment_bytes if segment_bytes <= ram_bytes * LARGEST_SPARE_SHARE_OF_BUDGET else 0
            if spare_bytes:
                self.lines.append(f"budgets.ram_spare {format_bytes(spare_bytes)}: one segment of the RAM budget")
            return spare_bytes
        if isinstance(asked, Absolute) and asked.size_bytes == 0:
            return 0
        spare_bytes = self._of("ram_spare", asked, self.totals.ram_bytes, self.totals.ram_others_bytes, 0.0, "RAM")
        if spare_bytes >= ram_bytes > 0:
            self._report(
                "ram_spare",
                f"{format_bytes(spare_bytes)} leaves nothing of budgets.ram, {format_bytes(ram_bytes)}, of which it "
                "is a part; lower it or raise budgets.ram",
            )
        return spare_bytes

    def disk(self) -> int:
        asked, free_bytes = self.settings.budgets.disk, self.totals.disk_free_bytes
        if isinstance(asked, Absolute) and asked.size_bytes == 0:
            self.lines.append("budgets.disk none: models that cannot be read again keep their RAM copy")
            return 0
        if isinstance(asked, Absolute) and (free_bytes is None or asked.size_bytes > free_bytes):
            # Image files of an earlier start count against this budget and not as free, so this is no error.
            seen = "" if free_bytes is None else f", of which {format_bytes(free_bytes)} are free now"
            self.lines.append(f"budgets.disk {format_bytes(asked.size_bytes)}{seen}")
            return asked.size_bytes
        if free_bytes is None:
            self._report("disk", f'"{asked}" needs the free disk space, which was not measured; give a size, "100GiB"')
            return 0
        return self._of("disk", asked, free_bytes, 0, DISK_SHARE, "free disk")

    def _of(self, key: str, asked: Size, total_bytes: int, others_bytes: int, auto: float, what: str) -> int:
        """Bytes of one budget; the line that says how it came about."""
        name = f"budgets.{key}"
        if isinstance(asked, Absolute):
            if asked.size_bytes > total_bytes:
                self._report(
                    key,
                    f"{format_bytes(asked.size_bytes)} exceeds the {format_bytes(total_bytes)} of {what}; lower it"
                    f"{' or choose another device' if key == 'vram' else ''}",
                )
            now = f", of which others hold {format_bytes(others_bytes)} now" if others_bytes else ""
            self.lines.append(
                f"{name} {format_bytes(asked.size_bytes)}: of the {format_bytes(total_bytes)} of {what}{now}"
            )
            return asked.size_bytes
        fraction = asked.fraction if isinstance(asked, Share) else auto
        size_bytes = int(max(0, total_bytes - others_bytes) * fraction)
        if size_bytes == 0:
            self._report(
                key,
                f'"{asked}" is nothing: others hold {format_bytes(others_bytes)} of the {format_bytes(total_bytes)} of '
                f"{what}; free some of it",
            )
        less = f" less {format_bytes(others_bytes)} held by others" if others_bytes else ""
        self.lines.append(
            f"{name} {format_bytes(size_bytes)}: {fraction:.4g} of the {format_bytes(total_bytes)} of {what}{less}"
        )
        return size_bytes

    def _unmeasured_vram(self, asked: Size) -> int:
        if isinstance(asked, Absolute):
            self.lines.append(f"budgets.vram {format_bytes(asked.size_bytes)}: the size of {self._device()} is unknown")
            return asked.size_bytes
        why = self.totals.vram_problem or "it could not be measured"
        fix = f", or {self.totals.vram_fix}" if self.totals.vram_fix else ""
        self._report(
            "vram",
            f'"{asked}" needs the size of {self._device()}, but {why}; give an absolute size such as "20GiB"{fix}',
        )
        return 0

    def _device(self) -> str:
        return f"{self.totals.device} ({self.totals.device_name})" if self.totals.device_name else self.totals.device

    def _report(self, key: str, message: str) -> None:
        origin = self.origins.get(("budgets", key), Origin.DEFAULT)
        self.findings.append(Finding(origin.path, origin.line, origin.column, f"budgets.{key}", message))
