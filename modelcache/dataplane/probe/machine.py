"""The memory of this machine: one call for budgets, one for people. No torch at import time.

Everything comes as plain numbers or as an `Unavailable` with its reason. The environment is not read here: the values
of ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` are passed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelcache.dataplane.probe.facts import (
    AllocatorFigures,
    DriverFigures,
    Figure,
    Reading,
    Unavailable,
)
from modelcache.dataplane.probe.nvml import ProbeRefusedError, cards, in_words, load_nvml, name_of, slices, uuid_of
from modelcache.dataplane.probe.pressure import Stalls, stalls
from modelcache.dataplane.probe.ram import RamProbe
from modelcache.dataplane.probe.vram import DeviceUser, VramProbe

# What large copies from page-locked memory reach on a lane of each generation, about 0.87 of the raw rate.
_BYTES_PER_S_PER_LANE = {1: 200_000_000, 2: 400_000_000, 3: 770_000_000, 4: 1_600_000_000, 5: 3_450_000_000}

__all__ = [
    "AllocatorFigures",
    "CudaFigures",
    "DeviceReport",
    "DeviceUser",
    "DriverFigures",
    "Figure",
    "MachineReport",
    "MachineTotals",
    "PcieLink",
    "RamProbe",
    "Reading",
    "Stalls",
    "Unavailable",
    "VramProbe",
    "cuda_figures",
    "machine_report",
    "totals",
]


@dataclass(frozen=True, slots=True)
class MachineTotals:
    """What budgets are resolved against.

    Attributes:
        vram: Of the execution device; `None` when there is none to ask about.
        ram: Of the machine or the container.
    """

    vram: Reading | Unavailable | None
    ram: Reading


@dataclass(frozen=True, slots=True)
class CudaFigures:
    """What torch and the CUDA driver say about one device, taken together."""

    uuid: str
    name: str
    integrated: bool
    allocator: AllocatorFigures
    driver: DriverFigures


@dataclass(frozen=True, slots=True)
class PcieLink:
    """The fastest link the card and its slot agree on; `bytes_per_s` is what copies really reach, one way."""

    generation: int
    num_lanes: int
    bytes_per_s: int

    def __str__(self) -> str:
        return f"PCIe {self.generation}.0 x{self.num_lanes}"


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One card (or the slice CUDA would use of it) and who uses it, for people. `uuids` has the slices' too."""

    index: int
    name: str
    uuid: str
    memory: Reading | Unavailable
    users: tuple[DeviceUser, ...] | Unavailable
    link: PcieLink | None
    uuids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MachineReport:
    """What the probes see, for people.

    Attributes:
        nvml: Why NVML cannot be asked; `None` when it can.
        driver_version: Of the NVIDIA driver, such as ``"580.126.09"``; empty without NVML.
        cuda_version: The newest CUDA that driver runs, such as ``"13.0"``; empty without NVML.
        devices: Every NVIDIA card, by PCI address, whatever ``CUDA_VISIBLE_DEVICES`` hides.
        ram: Of the machine or the container.
        stalls: How much processes stand still for want of memory; `None` where the kernel does not say.
    """

    nvml: Unavailable | None
    driver_version: str
    cuda_version: str
    devices: tuple[DeviceReport, ...]
    ram: Reading
    stalls: Stalls | None = None


def totals(
    device_index: int | None,
    *,
    uuid: str | None = None,
    visible: str | None = None,
    order: str | None = None,
    integrated: bool | None = None,
    allocator: AllocatorFigures | None = None,
    driver: DriverFigures | None = None,
    nvml: Any = None,
    psutil: Any = None,
    root: str | Path = "/",
    now_s: Callable[[], float] = time.monotonic,
) -> MachineTotals:
    """Measure the machine once.

    Args:
        device_index: ``cuda:<device_index>``; `None` when the execution device is not a CUDA device.
        uuid: As for `VramProbe`.
        visible: As for `VramProbe`.
        order: As for `VramProbe`.
        integrated: As for `VramProbe`.
        allocator: As for `VramProbe.read`.
        driver: As for `VramProbe.read`.
        nvml: As for `VramProbe`.
        psutil: As for `RamProbe`.
        root: As for `RamProbe`.
        now_s: The clock of the readings.
    """
    host = RamProbe(root, psutil=psutil, now_s=now_s)
    ram = host.read()
    if device_index is None:
        return MachineTotals(None, ram)
    probe = VramProbe(
        device_index,
        uuid=uuid,
        visible=visible,
        order=order,
        integrated=integrated,
        nvml=nvml,
        host=host,
        now_s=now_s,
    )
    vram = probe.read(allocator=allocator, driver=driver)
    probe.close()
    return MachineTotals(vram, ram)


def cuda_figures(device_index: int) -> CudaFigures | None:
    """What torch says about a CUDA device; `None` when this torch has no such device. Imports torch, starts CUDA."""
    import torch

    if not torch.cuda.is_available() or device_index >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(device_index)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device_index)
    return CudaFigures(
        uuid=str(properties.uuid),
        name=properties.name,
        integrated=bool(properties.is_integrated),
        allocator=AllocatorFigures(torch.cuda.memory_allocated(device_index), torch.cuda.memory_reserved(device_index)),
        driver=DriverFigures(free_bytes, total_bytes),
    )


def machine_report(*, nvml: Any = None, psutil: Any = None, root: str | Path = "/") -> MachineReport:
    """Ask every source once, for people. Starts no CUDA and imports no torch."""
    host = RamProbe(root, psutil=psutil)
    ram, stalled = host.read(), stalls(Path(root))
    try:
        nvml = load_nvml() if nvml is None else nvml
        with in_words(nvml):
            nvml.nvmlInit()
            try:
                return replace(_report(nvml, host, ram), stalls=stalled)
            finally:
                nvml.nvmlShutdown()
    except ProbeRefusedError as refused:
        return MachineReport(refused.unavailable, "", "", (), ram, stalled)


def _report(nvml: Any, host: RamProbe, ram: Reading) -> MachineReport:
    version = int(nvml.nvmlSystemGetCudaDriverVersion())
    driver_version = nvml.nvmlSystemGetDriverVersion()
    devices = []
    for index, card in enumerate(cards(nvml)):
        uuid = uuid_of(nvml, card)
        probe = VramProbe(index, uuid=uuid, nvml=nvml, host=host)
        memory = probe.read()
        name = memory.name if isinstance(memory, Reading) else name_of(nvml, card)
        uuids = (uuid, *(uuid_of(nvml, piece) for piece in slices(nvml, card)))
        devices.append(DeviceReport(index, name, uuid, memory, probe.users(), _link(nvml, card), uuids))
        probe.close()
    return MachineReport(
        nvml=None,
        driver_version=driver_version.decode() if isinstance(driver_version, bytes) else driver_version,
        cuda_version=f"{version // 1000}.{version % 1000 // 10}",
        devices=tuple(devices),
        ram=ram,
    )


def _link(nvml: Any, card: Any) -> PcieLink | None:
    try:
        generation = int(nvml.nvmlDeviceGetMaxPcieLinkGeneration(card))
        num_lanes = int(nvml.nvmlDeviceGetMaxPcieLinkWidth(card))
    except nvml.NVMLError:
        # An integrated device has no such link, and a guest may not be told: an unknown speed is no failure.
        return None
    rate = _BYTES_PER_S_PER_LANE.get(generation)
    return None if rate is None else PcieLink(generation, num_lanes, rate * num_lanes)
