"""An accelerator in plain memory, for tests, demos and applications without a GPU.

Simulated:
    A torch device, ``sim:0`` to ``sim:7``, with plain tensors: ``model.to``, ``p.data = view``, forward,
    ``generate()``, accelerate's dispatch; mixing devices is torch's usual error. A capacity, counted to the byte over
    everything on the device, activations included, with the rounding of an allocator; beyond it
    `torch.OutOfMemoryError`. A link with a speed; ordinary ``tensor.to`` takes its time too. Two copy streams, one per
    direction, in order and really asynchronous: fresh memory holds 0xFF bytes (NaN), so a missing wait shows as wrong
    numbers. Page-locking and faults (`Faults`). Address ranges that stay while memory is mapped below them and taken
    away; touching one without memory is CUDA's illegal memory access, and costs the device.

Not simulated:
    The time compute takes. The slowness of memory that is not page-locked: its copies are as asynchronous as others.
    Fragmentation. Contention of ordinary copies with the streams.

The torch part is `simulated_backend.py`, which says what it leaves out.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Literal

import torch

from modelcache.dataplane.device.alias import host_alias, require_flat, storage_over
from modelcache.dataplane.device.faults import Failure, Faults
from modelcache.dataplane.device.protocol import DeviceEvent
from modelcache.dataplane.device.simulated_access import Poison
from modelcache.dataplane.device.simulated_backend import CLAIM
from modelcache.dataplane.device.simulated_memory import Memory, Rounding
from modelcache.dataplane.device.simulated_operators import new_memory
from modelcache.dataplane.device.simulated_ranges import AddressRanges
from modelcache.dataplane.device.simulated_slots import SLOTS, place
from modelcache.dataplane.device.simulated_streams import (
    Copy,
    CopyStream,
    Flag,
    Operator,
    OsThreads,
    Threads,
    closed_error,
)

MemoryKind = Literal["allocated", "mapped"]

_POISON_BYTE = 0xFF
# Below this, waiting costs more than the link would.
_SHORTEST_LINK_WAIT_S = 50e-6


class SimulatedDevice:
    """One simulated accelerator. Up to eight may be open in a process; each gets the lowest index that is free.

    The first one claims torch's PrivateUse1 key for the process.

    Args:
        capacity_bytes: Of its memory.
        link_bytes_per_s: Of the link to it, per direction; `None` copies at the speed of memcpy.
        rounding: How its allocator rounds sizes.
        memory: ``"mapped"`` keeps addresses: see `Device.reserve`. It needs Linux.
        granularity_bytes: Of mapped memory; a multiple of the system's page.
        faults: What is to go wrong; may be extended later.
        poison: Fill fresh memory with 0xFF, so that reading it before a copy lands shows. Benchmarks turn it off.
        threads: Where copy threads and events come from.
        clock: Monotonic seconds.

    Raises:
        ValueError: A size, speed, rounding or granularity that cannot be.
        RuntimeError: Another backend holds the key, all indices are taken, or this system cannot map memory.
    """

    def __init__(
        self,
        capacity_bytes: int = 8 << 30,
        *,
        link_bytes_per_s: float | None = 8e9,
        rounding: Rounding = "exact",
        memory: MemoryKind = "allocated",
        granularity_bytes: int = 2 << 20,
        faults: Faults | None = None,
        poison: bool = True,
        threads: Threads | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if link_bytes_per_s is not None and link_bytes_per_s <= 0:
            raise ValueError(f"link_bytes_per_s must be above 0, got {link_bytes_per_s}; None is an unlimited link")
        self._memory = Memory("sim", capacity_bytes, rounding)
        self._poison = Poison("sim")
        self._ranges = AddressRanges(self._memory, granularity_bytes, self._poison) if memory == "mapped" else None
        self._memory.ranges = self._ranges
        CLAIM.make()
        self._index = SLOTS.reserve()
        self._torch_device = place(self._index)
        self._name = self._memory.device = self._poison.device = str(self._torch_device)
        self._faults = faults if faults is not None else Faults()
        self._link_bytes_per_s, self._clock, self._fills = link_bytes_per_s, clock, poison
        self._threads: Threads = threads if threads is not None else OsThreads()
        self._in = self._stream("in")
        self._out = self._stream("out")
        # Per thread: the events its next operator waits for.
        self._waits = threading.local()
        # Operators that run now, in any thread. Single set operations only.
        self._running: set[Flag] = set()
        self._lock = threading.Lock()
        self._page_locked: dict[int, int] = {}
        self._is_open = True
        SLOTS.attach(self._index, self)

    def _stream(self, direction: str) -> CopyStream:
        name = f"modelcache-{self._name}-{direction}"
        return CopyStream(name, self._poison, self._link_bytes_per_s, self._threads, self._clock)

    @property
    def name(self) -> str:
        """Such as ``"sim:0"``."""
        return self._name

    @property
    def torch_device(self) -> torch.device:
        """Where the tensors of a resident model are."""
        return self._torch_device

    @property
    def holds_copies(self) -> bool:
        """True: it has memory of its own."""
        return True

    @property
    def keeps_addresses(self) -> bool:
        """Whether memory is mapped."""
        return self._ranges is not None

    @property
    def faults(self) -> Faults:
        """What is to go wrong."""
        return self._faults

    @property
    def memory(self) -> Memory:
        """The books of its memory."""
        return self._memory

    @property
    def copied_in_bytes(self) -> int:
        """What `copy_in` has landed so far."""
        return self._in.copied_bytes

    @property
    def copied_out_bytes(self) -> int:
        """What `copy_out` has landed so far."""
        return self._out.copied_bytes

    @property
    def memcpy_cpu_s(self) -> float:
        """CPU seconds of the streams' memcpy: the simulation's cost, which real hardware does not have."""
        return self._in.memcpy_cpu_s + self._out.memcpy_cpu_s

    @property
    def page_locked_bytes(self) -> int:
        """What is page-locked now."""
        return sum(self._page_locked.values())

    # --- memory ---

    def total_bytes(self) -> int:
        """The capacity."""
        return self._memory.capacity_bytes

    def free_bytes(self) -> int:
        """The capacity less everything on the device."""
        return self._memory.capacity_bytes - self._memory.allocated_bytes()

    def allocated_bytes(self) -> int:
        """Everything on the device, rounding included."""
        return self._memory.allocated_bytes()

    def charge_bytes(self, size_bytes: int) -> int:
        """What `allocate` or, where addresses are kept, `map` of that many bytes takes."""
        return (self._memory if self._ranges is None else self._ranges).charge_bytes(size_bytes)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor on the device, full of 0xFF.

        Raises:
            torch.OutOfMemoryError: There is no room, or a fault says so; nothing was allocated.
            torch.AcceleratorError: A transient fault.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed.
        """
        self._require_usable()
        for planned in self._faults.next_call("allocate"):
            self._fail(planned.failure, f"allocating {size_bytes} bytes")
        with torch.inference_mode(False):
            memory = new_memory(self._index, lambda: self._memory.block(size_bytes))
            if self._fills:
                # On the CPU's view: the memory is fresh, so this is no operator that would have to wait for anything.
                host_alias(memory).fill_(_POISON_BYTE)
            return memory

    def reserve(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor over an address range without memory.

        Raises:
            torch.OutOfMemoryError: The process has no addresses left.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed, or keeps no addresses.
        """
        self._require_usable()
        with torch.inference_mode(False):
            return self._mapping().reserve(size_bytes, self._torch_device)

    def map(self, memory: torch.Tensor) -> None:
        """Put memory, full of 0xFF, behind a range. A fault of ``"allocate"`` counts and fails this too.

        Raises:
            ValueError: It is mapped already, or is no such range.
            torch.OutOfMemoryError: There is no room, or a fault says so; nothing was mapped.
            torch.AcceleratorError: A transient fault.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed, or keeps no addresses.
        """
        self._require_usable()
        for planned in self._faults.next_call("allocate"):
            self._fail(planned.failure, f"mapping {memory.numel()} bytes")
        self._mapping().map(memory)
        if self._fills:
            ctypes.memset(memory.data_ptr(), _POISON_BYTE, memory.numel())

    def unmap(self, memory: torch.Tensor) -> None:
        """Take the memory behind a range away; on a device that is closed or lost too.

        Raises:
            ValueError: It is no range that `reserve` answered.
            RuntimeError: The device keeps no addresses.
        """
        self._mapping().unmap(memory)

    def _mapping(self) -> AddressRanges:
        if self._ranges is None:
            raise RuntimeError(f"{self._name} keeps no addresses; open it with memory='mapped'")
        return self._ranges

    def storage(self, memory: torch.Tensor, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor with a storage of its own over a range of `memory`, which it keeps alive.

        Raises:
            ValueError: The range is not inside, or `memory` is not flat uint8.
        """
        return storage_over(memory, offset_bytes, size_bytes)

    def host_view(self, memory: torch.Tensor) -> torch.Tensor:
        """The same bytes as a CPU tensor: the device is plain memory."""
        return host_alias(memory)

    def release_cached(self) -> None:
        """Give the RAM behind freed memory back to the system; the device's own figures count it as free anyway."""
        self._poison.check()
        self._memory.drop_spares()

    # --- copies ---

    def copy_in(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        """Enqueue a copy from RAM to the device.

        Raises:
            ValueError: The tensors are not flat uint8 of one size, in RAM and on this device.
            torch.OutOfMemoryError: A fault says so.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed.
        """
        return self._copy("copy_in", target, source, on_device=target, in_ram=source)

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        """Enqueue a copy from the device to RAM, after the operators that run now.

        Raises:
            ValueError: The tensors are not flat uint8 of one size, on this device and in RAM.
            torch.OutOfMemoryError: A fault says so.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed.
        """
        return self._copy("copy_out", target, source, on_device=source, in_ram=target)

    def _copy(
        self,
        operation: Literal["copy_in", "copy_out"],
        target: torch.Tensor,
        source: torch.Tensor,
        *,
        on_device: torch.Tensor,
        in_ram: torch.Tensor,
    ) -> DeviceEvent:
        self._require_usable()
        require_flat(target, "target")
        require_flat(source, "source")
        if target.numel() != source.numel():
            raise ValueError(f"cannot copy {source.numel()} bytes onto {target.numel()}; pass ranges of one size")
        if on_device.device != self._torch_device or in_ram.device.type != "cpu":
            raise ValueError(
                f"{operation} on {self._name} needs one tensor there and one in RAM, got target {target.device}, "
                f"source {source.device}"
            )
        planned = self._faults.next_call(operation)
        for each in planned:
            if each.failure == "out_of_memory":
                self._fail(each.failure, f"a {operation} of {source.numel()} bytes")
        after = list(self._running) if operation == "copy_out" else []
        copy = Copy(target, source, self._threads.event(), self._threads.event(), after, planned)
        (self._in if operation == "copy_in" else self._out).enqueue(copy)
        return copy

    def let_compute_wait(self, event: DeviceEvent) -> None:
        """Make the next operator of this thread wait for `event`; it raises what the copy failed with."""
        self._poison.check()
        if not hasattr(self._waits, "events"):
            self._waits.events = []
        self._waits.events.append(event)

    def settle(self) -> None:
        """Block until all copies enqueued and all operators running now are done, however they ended.

        Raises:
            DevicePoisonedError: The device failed for good.
        """
        self._poison.check()
        if not self._is_open:
            return
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        flags = list(self._running)
        for stream in (self._in, self._out):
            marker = Copy(nothing, nothing, self._threads.event(), self._threads.event(), (), ())
            stream.enqueue(marker)
            flags.append(marker.landed)
        for flag in flags:
            flag.wait()
        self._poison.check()

    # --- page-locking ---

    def page_lock(self, memory: torch.Tensor) -> bool:
        """Note a RAM block as page-locked; False when a fault refuses it or it is empty or locked already."""
        self._require_usable()
        require_flat(memory, "memory")
        if self._faults.next_page_lock_is_refused() or memory.numel() == 0:
            return False
        with self._lock:
            if memory.data_ptr() in self._page_locked:
                return False
            self._page_locked[memory.data_ptr()] = memory.numel()
        return True

    def page_unlock(self, memory: torch.Tensor) -> None:
        """Undo `page_lock`; memory that is not locked is left alone."""
        with self._lock:
            self._page_locked.pop(memory.data_ptr(), None)

    def close(self) -> None:
        """Stop the copy threads; copies that have not landed fail. Idempotent.

        Tensors still referenced stay what they are: valid, or over a range without memory.
        """
        with self._lock:
            was_open, self._is_open = self._is_open, False
        if was_open:
            self._in.stop()
            self._out.stop()
            self._page_locked.clear()
            self._memory.drop_spares()
            SLOTS.release(self._index)

    def _require_usable(self) -> None:
        self._poison.check()
        if not self._is_open:
            raise closed_error(self._name)

    def _fail(self, failure: Failure | None, what: str) -> None:
        """Raise what a fault says, in the words of a device."""
        if failure == "out_of_memory":
            raise torch.OutOfMemoryError(f"{self._name} is out of memory: injected into {what}")
        if failure == "sticky":
            self._poison.problem = f"injected sticky error in {what}"
            self._poison.check()
        if failure == "transient":
            raise torch.AcceleratorError(f"{self._name}: injected transient error in {what}")

    # --- what the torch backend asks ---

    def begin_compute(self) -> Operator:
        """Wait for what this thread's compute must wait for; returns what `end_compute` takes."""
        operator = Operator(self._threads.event(), self._running)
        try:
            events, self._waits.events = getattr(self._waits, "events", ()), []
            for event in events:
                event.wait()
            self._start_operator()
        except BaseException:
            operator.end()
            raise
        return operator

    def _start_operator(self) -> None:
        for planned in self._faults.next_call("compute"):
            if planned.failure == "sticky":
                self._poison.problem = "injected sticky error in an operator"
            else:
                self._fail(planned.failure, "an operator")
        # Programs meet a lost device as torch's own error; only the device's methods have ours.
        if self._poison.problem is not None:
            raise torch.AcceleratorError(f"{self._name}: {self._poison.problem}")

    def end_compute(self, token: Operator) -> None:
        """The operator is done."""
        token.end()

    def cross_link(self, size_bytes: int, started_s: float) -> None:
        """Let the rest of a blocking copy's time on the link pass."""
        if self._link_bytes_per_s is not None:
            left_s = started_s + size_bytes / self._link_bytes_per_s - self._clock()
            if left_s > _SHORTEST_LINK_WAIT_S:
                self._threads.event().wait(left_s)

    def now_s(self) -> float:
        """The device's clock."""
        return self._clock()
