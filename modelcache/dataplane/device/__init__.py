"""Devices that hold copies, behind one protocol; `open_device` picks one by name."""

from __future__ import annotations

from typing import Any

from modelcache.dataplane.device.protocol import Device, DeviceEvent

__all__ = ["CHOICES", "Device", "DeviceEvent", "open_device"]

CHOICES = ("auto", "cuda", "cuda:N", "simulated", "host_only")


def open_device(name: str, *, memory: str = "allocated", **options: Any) -> Device:
    """Open the device that a configuration names.

    Args:
        name: ``"auto"`` is ``"cuda:0"`` where there is one and ``"host_only"`` elsewhere; ``"cuda"`` is ``"cuda:0"``.
        memory: ``"mapped"`` keeps addresses, see `Device.reserve`; without an accelerator it changes nothing.
        options: For ``"simulated"``, the arguments of `SimulatedDevice`, such as ``capacity_bytes``.

    Raises:
        ValueError: No such name or memory; the message lists the choices.
        TypeError: An option that this device does not take.
        RuntimeError: The device is not there, cannot be opened, or has no such memory.
    """
    if memory not in ("allocated", "mapped"):
        raise ValueError(f"unknown memory {memory!r}; choose one of allocated, mapped")
    kind, _, index = name.partition(":")
    if name == "auto":
        import torch

        return open_device("cuda:0" if torch.cuda.is_available() else "host_only", memory=memory, **options)
    if name == "simulated":
        from modelcache.dataplane.device.simulated import SimulatedDevice

        return SimulatedDevice(memory="mapped" if memory == "mapped" else "allocated", **options)
    if name == "host_only":
        from modelcache.dataplane.device.host_only import HostOnlyDevice

        return HostOnlyDevice(**options)
    if name == "cuda" or (kind == "cuda" and index.isdecimal()):
        if memory == "mapped":
            from modelcache.dataplane.device.cuda_mapped import MappedCudaDevice

            return MappedCudaDevice(int(index or 0), **options)
        from modelcache.dataplane.device.cuda import CudaDevice

        return CudaDevice(int(index or 0), **options)
    raise ValueError(f"unknown device {name!r}; choose one of {', '.join(CHOICES)}")
