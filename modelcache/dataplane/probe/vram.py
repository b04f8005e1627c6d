"""How much memory a CUDA device has, how much is free, and how much of it others hold.

NVML sees every process; the CUDA driver and torch's allocator see ours. One reading reconciles whoever answered at that
moment and takes the safe figure. NVML may be absent, refuse, or vanish while a container runs: then the driver's
figures are used if there are any, else the last ones, marked stale.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from modelcache.dataplane.probe.facts import AllocatorFigures, DriverFigures, Figure, Reading, Unavailable, reconcile
from modelcache.dataplane.probe.nvml import (
    Address,
    ProbeRefusedError,
    find_device,
    in_words,
    load_nvml,
    name_of,
    uuid_of,
)
from modelcache.dataplane.probe.ram import RamProbe

# Devices that use the machine's own memory. NVML answers NOT_SUPPORTED for them, or nonsense; the same answer from
# any other device means something is wrong with it, so only these names count.
_INTEGRATED = re.compile(r"\b(GB10|Tegra|Jetson|Orin|Xavier|Thor)\b")


@dataclass(frozen=True, slots=True)
class DeviceUser:
    """A process that computes on a device; `used_bytes` is `None` when the driver does not say."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Opened:
    handle: Any
    name: str
    uuid: str
    is_shared: bool


class VramProbe:
    """Reads one CUDA device, by UUID where one is known.

    Any thread may read: the only state is the handle, the last figures and the time of the last failure, each replaced
    whole; two threads at the same moment cost one more question.
    """

    def __init__(
        self,
        device_index: int = 0,
        *,
        uuid: str | None = None,
        visible: str | None = None,
        order: str | None = None,
        integrated: bool | None = None,
        nvml: Any = None,
        host: RamProbe | None = None,
        now_s: Callable[[], float] = time.monotonic,
        retry_s: float = 30.0,
    ) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            device_index: As torch counts: ``cuda:<device_index>``.
            uuid: The device's UUID where it is known (torch knows it); wins over the index.
            visible: The value of ``CUDA_VISIBLE_DEVICES``, `None` when not set.
            order: The value of ``CUDA_DEVICE_ORDER``, `None` when not set.
            integrated: Whether the device shares the machine's memory, as CUDA says; `None` goes by its name.
            nvml: A module like `pynvml`; the real one when left out.
            host: Who measures the pool of a device that shares the machine's memory.
            now_s: The clock of the readings.
            retry_s: How long NVML is left alone after it failed, in seconds.
        """
        self._address = Address(device_index, uuid, visible, order)
        self._integrated = integrated
        self._nvml = nvml
        self._host = host
        self._now_s = now_s
        self._retry_s = retry_s
        self._opened: _Opened | None = None
        self._failure: tuple[float, Unavailable] | None = None
        self._last: Reading | None = None
        self._name = f"cuda:{device_index}"
        self._was_shared = bool(integrated)

    def read(
        self, *, allocator: AllocatorFigures | None = None, driver: DriverFigures | None = None
    ) -> Reading | Unavailable:
        """Measure now, as one snapshot.

        Args:
            allocator: What this process holds through torch, taken at the same moment.
            driver: What `mem_get_info` answers, taken at the same moment.

        Returns:
            The safe figures; the last ones with `stale` set when nobody answers any more; or why there are none.
        """
        at_s = self._now_s()
        answer = self._nvml_figures(at_s)
        ours_bytes = 0 if allocator is None else allocator.reserved_bytes
        if self._is_shared():
            return self._pool(ours_bytes)
        problem = answer if isinstance(answer, Unavailable) else None
        figures = () if isinstance(answer, Unavailable) else answer
        figures += _driver_figures(driver, at_s)
        if not figures:
            return self._last_figures(at_s, problem)
        reading = replace(
            reconcile(figures + _allocator_figures(allocator, at_s), ours_bytes, at_s),
            name=self._name,
            uuid=self._opened.uuid if self._opened else "",
            problem=problem,
        )
        self._last = reading
        return reading

    def users(self) -> tuple[DeviceUser, ...] | Unavailable:
        """The processes that compute or draw on the device, this one included if it does."""
        try:
            opened = self._open(self._now_s())
            with in_words(self._nvml):
                found = [
                    *self._nvml.nvmlDeviceGetComputeRunningProcesses(opened.handle),
                    *self._nvml.nvmlDeviceGetGraphicsRunningProcesses(opened.handle),
                ]
        except ProbeRefusedError as refused:
            return refused.unavailable
        used = {int(process.pid): process.usedGpuMemory for process in found}
        return tuple(DeviceUser(pid, None if size is None else int(size)) for pid, size in sorted(used.items()))

    def close(self) -> None:
        """Let go of NVML. Idempotent; a later reading opens it again."""
        if self._opened is not None:
            self._opened = None
            self._shut_down()

    def _nvml_figures(self, at_s: float) -> tuple[Figure, ...] | Unavailable:
        """What NVML says now. After a refusal everything is opened anew, but not before the retry time."""
        try:
            opened = self._open(at_s)
            if opened.is_shared:
                return ()
            with in_words(self._nvml):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(opened.handle)
        except ProbeRefusedError as refused:
            # Told the old refusal again because it is too early to ask: the time of the next try stays.
            if self._failure is None or self._failure[1] is not refused.unavailable:
                self._failure = (at_s, refused.unavailable)
            self.close()
            return refused.unavailable
        self._failure = None
        return (
            Figure("total", int(memory.total), "nvml", at_s),
            Figure("free", int(memory.free), "nvml", at_s),
        )

    def _open(self, at_s: float) -> _Opened:
        if self._opened is not None:
            return self._opened
        if self._failure is not None and at_s - self._failure[0] < self._retry_s:
            raise ProbeRefusedError(self._failure[1])
        if self._nvml is None:
            self._nvml = load_nvml()
        with in_words(self._nvml):
            self._nvml.nvmlInit()
        try:
            self._opened = self._find()
        except ProbeRefusedError:
            self._shut_down()
            raise
        self._name = self._opened.name
        return self._opened

    def _find(self) -> _Opened:
        with in_words(self._nvml):
            handle = find_device(self._nvml, self._address)
            name, uuid = name_of(self._nvml, handle), uuid_of(self._nvml, handle)
        is_shared = bool(_INTEGRATED.search(name)) if self._integrated is None else self._integrated
        return _Opened(handle, name, uuid, is_shared)

    def _shut_down(self) -> None:
        # NVML may be gone by now, and then there is nothing left to close.
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _is_shared(self) -> bool:
        if self._opened is not None:
            self._was_shared = self._opened.is_shared
        return self._was_shared

    def _pool(self, ours_bytes: int) -> Reading:
        """The machine's memory: what the device holds for us is no part of the resident set, but still ours."""
        pool = (self._host or RamProbe(now_s=self._now_s)).read()
        others_bytes = max(0, pool.others_bytes - ours_bytes)
        uuid = self._opened.uuid if self._opened else ""
        return replace(pool, others_bytes=others_bytes, name=self._name, uuid=uuid, unified=True)

    def _last_figures(self, at_s: float, problem: Unavailable | None) -> Reading | Unavailable:
        if self._last is not None:
            return replace(self._last, stale=True, age_s=at_s - self._last.at_s, problem=problem)
        assert problem is not None, "without figures there is a refusal"
        return problem


def _driver_figures(driver: DriverFigures | None, at_s: float) -> tuple[Figure, ...]:
    if driver is None:
        return ()
    return (Figure("total", driver.total_bytes, "driver", at_s), Figure("free", driver.free_bytes, "driver", at_s))


def _allocator_figures(allocator: AllocatorFigures | None, at_s: float) -> tuple[Figure, ...]:
    if allocator is None:
        return ()
    return (
        Figure("allocated", allocator.allocated_bytes, "allocator", at_s),
        Figure("reserved", allocator.reserved_bytes, "allocator", at_s),
    )
