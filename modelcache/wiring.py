"""From settings to the parts a cache is made of. The only place above the data plane that imports it, when called."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcache.core.ledger import Room
from modelcache.core.machine import Budgets
from modelcache.core.policy import POLICIES, EvictionPolicy
from modelcache.progress import ProgressBars
from modelcache.runtime.driver import Driver
from modelcache.runtime.governor import Gauge
from modelcache.runtime.ports import Clock, Mover, Pool, Progress
from modelcache.runtime.threads import SystemClock, ThreadPool
from modelcache.spec import ModelSpec
from modelcache.tier import Tier

if TYPE_CHECKING:
    from modelcache.config.budgets import Totals
    from modelcache.config.load import Effective
    from modelcache.config.schema import Settings
    from modelcache.dataplane.device.protocol import Device

_LOG = logging.getLogger("modelcache")


#: A copy on the device that nobody used for so long is looked at for writes: well below the pace of people, well above
#: that of a loop of calls, whose model would be looked at in vain.
CHECK_AFTER_S = 0.25


@dataclass(frozen=True)
class Parts:
    """What a cache is made of.

    Attributes:
        budgets: Bytes per tier.
        mover: The data plane.
        clock: Deadlines and idle times.
        pool: Threads.
        device_name: For people.
        execution_device: The `torch.device` that calls run on.
        measure: Free bytes of the device, and RAM held, as the data plane measures them now.
        close: Gives the data plane up; told the models that are still leased.
        policy: Which copies go first.
        progress: Told how far loads and moves are.
        idle_s: For models that do not say.
        lease_sites: Note where leases are taken.
        specs: Models to register at start, and `preload`, their names to bring up.
        gauge: Measures the memory under the budgets while the cache runs; `None` leaves them as they are.
        vram_share: The share of the device, less what others hold, that the VRAM budget was meant as.
    """

    budgets: Budgets
    mover: Mover
    clock: Clock
    pool: Pool
    device_name: str
    execution_device: Callable[[], object]
    measure: Callable[[], Room]
    close: Callable[[Collection[str]], None]
    policy: EvictionPolicy | None = None
    progress: Progress | None = None
    idle_s: float | None = None
    lease_sites: bool = False
    specs: tuple[ModelSpec, ...] = ()
    preload: tuple[str, ...] = ()
    gauge: Gauge | None = None
    vram_share: float = 1.0


#: A keyword of `ModelCache`, and the key of the file that means the same.
_KEYS = {
    "vram": "budgets.vram",
    "ram": "budgets.ram",
    "page_locked": "budgets.page_locked",
    "ram_spare": "budgets.ram_spare",
    "disk": "budgets.disk",
    "device": "device",
    "memory": "memory",
    "policy": "policy.evict",
    "when_full": "policy.when_full",
    "idle": "policy.idle",
    "pressure": "policy.pressure",
    "max_waiters": "max_waiters",
    "image_dir": "image_dir",
    "segment": "segment",
    "progress": "progress",
    "lease_sites": "lease_sites",
}


def assemble(given: Mapping[str, Any]) -> Parts:
    """The parts of a cache as its keywords describe it.

    Raises:
        ConfigError: Values that cannot be used.
    """
    from modelcache.config import settings_of

    device = given["device"]
    is_open = not isinstance(device, str | None)
    call = {_KEYS[key]: value for key, value in given.items() if not (is_open and key == "device")}
    if given["image_dir"] is not None:
        call["image_dir"] = os.fspath(given["image_dir"])
    return _build(settings_of(call), device if is_open else None, {})


def assemble_file(path: str | PathLike[str]) -> Parts:
    """The parts of a cache as a file describes it.

    Raises:
        ConfigError: Every problem of the file.
    """
    from modelcache.config import effective

    found = effective(os.fspath(path))
    return _build(found.settings, None, found.origins, found.specs)


@dataclass(frozen=True, slots=True)
class PlannedBudgets:
    """What a configuration would get on this machine.

    Attributes:
        top: The tier that models would run on.
        device: As far as it can be known without starting it.
        vram_bytes: Budget; 0 on a host-only machine. The others likewise.
        link_bytes_per_s: Of copies from RAM to the device; `None` when nobody knows.
        link: Where that comes from; empty when nobody knows.
        lines: How each came about, for people.
    """

    top: Tier
    device: str
    vram_bytes: int
    ram_bytes: int
    disk_bytes: int
    link_bytes_per_s: int | None
    link: str
    lines: tuple[str, ...]


def planned_budgets(found: Effective) -> PlannedBudgets:
    """Resolve the budgets of a configuration without torch and without starting a device.

    Raises:
        ConfigError: A budget is above the machine, or needs a figure that cannot be had.
    """
    from modelcache.config.budgets import Totals, resolve_budgets
    from modelcache.config.layers import cuda_variables
    from modelcache.dataplane.probe import machine as probe

    settings, device = found.settings, found.settings.device
    index = int(device.removeprefix("cuda:")) if device.startswith("cuda:") else 0 if device == "auto" else None
    visible, order = cuda_variables()
    measured = probe.totals(index, visible=visible, order=order)
    lines: tuple[str, ...] = ()
    if device == "auto":
        vram = measured.vram
        assert vram is not None, "a device was asked about"
        device, why = ("cuda:0", vram.name) if isinstance(vram, probe.Reading) else ("host_only", vram.reason)
        lines = (f"device auto is {device}: {why}",)
    host = Totals(
        measured.ram.total_bytes,
        measured.ram.others_bytes,
        disk_free_bytes=_free_disk_bytes(_image_dir(settings)),
    )
    link_bytes_per_s, link = None, ""
    if device == "simulated":
        host = replace(host, device=device, vram_bytes=settings.simulated.capacity)
        link_bytes_per_s, link = settings.simulated.link, "simulated.link"
    elif device != "host_only":
        host = _with_vram(host, device, measured.vram)
        link_bytes_per_s, link = _link(measured.vram)
    got = resolve_budgets(settings, host, found.origins)
    top = Tier.RAM if device == "host_only" else Tier.VRAM
    return PlannedBudgets(
        top=top,
        device=device,
        vram_bytes=got.vram_bytes,
        ram_bytes=got.ram_bytes,
        disk_bytes=got.disk_bytes,
        link_bytes_per_s=link_bytes_per_s,
        link=link,
        lines=(*lines, *got.lines),
    )


def _link(vram: Any) -> tuple[int | None, str]:
    """The link of the card that was measured, as NVML reports it."""
    from modelcache.dataplane.probe import machine as probe

    if isinstance(vram, probe.Reading):
        for device in probe.machine_report().devices:
            if device.link is not None and vram.uuid in device.uuids:
                return device.link.bytes_per_s, f"{device.link}, as the driver reports it"
    return None, ""


def _with_vram(host: Totals, device: str, vram: Any) -> Totals:
    from modelcache.dataplane.probe import machine as probe

    if isinstance(vram, probe.Reading):
        return replace(
            host,
            device=device,
            device_name=vram.name,
            vram_bytes=vram.total_bytes,
            vram_others_bytes=vram.others_bytes,
            is_unified=vram.unified,
        )
    reason, fix = (vram.reason, vram.fix) if isinstance(vram, probe.Unavailable) else ("", "")
    return replace(host, device=device, vram_problem=reason, vram_fix=fix)


def read_size(size: int | str) -> int:
    """Bytes, given as such or as ``"8GiB"``.

    Raises:
        ValueError: Not above 0, or no size.
    """
    from modelcache.units import parse_bytes

    if isinstance(size, str):
        return parse_bytes(size)
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f'a size is bytes or text such as "8GiB", got {size!r}')
    if size <= 0:
        raise ValueError(f"must be greater than 0, got {size}")
    return size


def _build(
    settings: Settings, device: Device | None, origins: Mapping[Any, Any], specs: tuple[ModelSpec, ...] = ()
) -> Parts:
    from modelcache.config.budgets import resolve_budgets, vram_share
    from modelcache.dataplane.mover import TorchMover

    owned = device is None
    device = device or _open_device(settings)
    image_dir, pool = _image_dir(settings), ThreadPool()
    try:
        bytes_of = resolve_budgets(settings, _totals(device, image_dir), origins)
        for line in bytes_of.lines:
            _LOG.info("%s", line)
        spills = bytes_of.disk_bytes > 0
        mover = TorchMover(
            device,
            segment_bytes=settings.segment,
            image_dir=image_dir if spills else None,
            disk_bytes=bytes_of.disk_bytes,
            page_locked_bytes=bytes_of.page_locked_bytes,
            spare_bytes=bytes_of.ram_spare_bytes,
            spawn=pool.spawn,
        )
    except BaseException:
        if owned:
            device.close()
        raise
    clock = SystemClock()
    bars = ProgressBars(clock.now_s) if settings.progress else None
    top = Tier.VRAM if device.holds_copies else Tier.RAM

    def close(in_use: Collection[str]) -> None:
        mover.close(in_use)
        if bars is not None:
            bars.close()

    return Parts(
        Budgets(
            bytes_of.ram_bytes - bytes_of.ram_spare_bytes,
            bytes_of.vram_bytes,
            bytes_of.disk_bytes,
            top,
            settings.max_waiters,
            settings.policy.when_full == "wait",
            CHECK_AFTER_S,
        ),
        mover,
        clock,
        pool,
        device.name,
        lambda: device.torch_device,
        lambda: Room(device.free_bytes() if device.holds_copies else 0, mover.live_ram_bytes),
        close,
        POLICIES[settings.policy.evict],
        bars,
        settings.policy.idle,
        settings.lease_sites,
        specs,
        settings.preload,
        _gauge(device, clock) if settings.policy.pressure == "watch" else None,
        vram_share(settings),
    )


def _gauge(device: Device, clock: Clock) -> Gauge:
    from modelcache.config.layers import cuda_variables
    from modelcache.dataplane.probe.gauge import gauge_of

    visible, order = cuda_variables()
    return gauge_of(device, clock.now_s, visible=visible, order=order)


def _open_device(settings: Settings) -> Device:
    from modelcache.dataplane.device import open_device

    if settings.device != "simulated":
        return open_device(settings.device, memory=settings.memory)
    simulated = settings.simulated
    return open_device(
        "simulated",
        memory=settings.memory,
        capacity_bytes=simulated.capacity,
        link_bytes_per_s=float(simulated.link),
        rounding=simulated.rounding,
    )


def _image_dir(settings: Settings) -> Path:
    if settings.image_dir is not None:
        return Path(settings.image_dir)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("modelcache", appauthor=False)) / "images"


def _totals(device: Device, image_dir: Path) -> Totals:
    """What the machine has, measured once."""
    from modelcache.config.budgets import Totals
    from modelcache.config.layers import cuda_variables
    from modelcache.dataplane.probe import machine as probe

    visible, order = cuda_variables()
    kind, _, index = device.name.partition(":")
    figures = probe.cuda_figures(int(index or 0)) if kind == "cuda" else None
    measured = probe.totals(
        int(index or 0) if kind == "cuda" else None,
        uuid=figures.uuid if figures else None,
        integrated=figures.integrated if figures else None,
        allocator=figures.allocator if figures else None,
        driver=figures.driver if figures else None,
        visible=visible,
        order=order,
    )
    host = Totals(measured.ram.total_bytes, measured.ram.others_bytes, disk_free_bytes=_free_disk_bytes(image_dir))
    if not device.holds_copies:
        return host
    if kind == "cuda":
        return _with_vram(host, device.name, measured.vram)
    return replace(host, device=device.name, device_name="simulated", vram_bytes=device.total_bytes())


def _free_disk_bytes(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


_DRIVERS: weakref.WeakSet[Driver] = weakref.WeakSet()


def forked_away(driver: Driver) -> None:
    """See to it that a forked child cannot use this driver, whose threads stay with the parent."""
    _watch_forks()
    _DRIVERS.add(driver)


def _disown_all() -> None:
    for driver in list(_DRIVERS):
        driver.disown()


@cache
def _watch_forks() -> None:
    """Once a process: what is registered there cannot be taken back."""
    os.register_at_fork(after_in_child=_disown_all)
