"""A CUDA device that keeps addresses: physical chunks mapped into ranges that are reserved for life.

What is compiled or captured over a range holds after its memory was taken away and came back, and nothing fragments.
Torch's allocator is not asked for such memory; what programs allocate themselves is still its own.

One chunk per range, as large as the range. Chunks that were unmapped are kept for ranges of their size. Before one is
created, kept ones of as many bytes are given up, so that what is mapped and kept together never exceeds the most that
was mapped at once.

Not covered: sharing chunks between processes; chunks in parts.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from modelcache.dataplane.device.alias import alias, require_flat
from modelcache.dataplane.device.cuda import CudaDevice
from modelcache.errors import DevicePoisonedError

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


def bindings() -> Any:
    """The driver's functions.

    Raises:
        RuntimeError: They are not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise RuntimeError(
            "memory 'mapped' calls the CUDA driver through the package cuda-bindings, which is not installed; "
            "pip install cuda-bindings, or set memory: allocated"
        ) from error


@dataclass(slots=True, eq=False)
class _Range:
    """One address range, and the chunk behind it; `None` is none."""

    address: int
    size_bytes: int
    length_bytes: int
    chunk: Any = None


class _Owner:
    """What the tensors over a range keep alive."""

    __slots__ = ("_owned", "_ranges")

    def __init__(self, ranges: CudaRanges, owned: _Range) -> None:
        self._ranges, self._owned = ranges, owned

    def __del__(self) -> None:
        self._ranges.abandon(self._owned)


class CudaRanges:
    """The ranges and the chunks of one device.

    Every call into the driver is made inside `entered`, which makes the device the thread's own, refuses when it is
    lost and notes when it is lost here.

    Args:
        driver: The module `cuda.bindings.driver`, or what behaves like it.
        device: Where the tensors are.
        ordinal: The driver's number of the device.
        entered: See above.
        settle: Blocks until the device has nothing left to do.
        make_room: Gives cached memory of others back to the driver.

    Raises:
        RuntimeError: The device cannot map memory, or another problem of the driver.
        DevicePoisonedError: The device failed for good.
    """

    def __init__(
        self,
        driver: Any,
        device: torch.device,
        ordinal: int,
        entered: Callable[[], AbstractContextManager[None]],
        settle: Callable[[], None],
        make_room: Callable[[], None],
    ) -> None:
        self._driver, self._device, self._entered = driver, device, entered
        self._settle, self._make_room = settle, make_room
        self._lock = threading.Lock()
        self._ranges: dict[int, _Range] = {}
        # Length and handle of chunks behind no range, the oldest first.
        self._kept: list[tuple[int, Any]] = []
        self._mapped_bytes = self._kept_bytes = 0
        # Ranges whose last tensor died. A finalizer calls no driver: it may run anywhere, and kernels may be under way.
        self._abandoned: deque[_Range] = deque()
        self._is_open = True
        with entered():
            # The primary context, which torch made for this thread; other threads may have none.
            self._context = self._call("cuCtxGetCurrent")
            self._require_support(ordinal)
            self._properties, self._access = self._describe(ordinal)
            flags = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self._granularity_bytes = int(self._call("cuMemGetAllocationGranularity", self._properties, flags))

    def _require_support(self, ordinal: int) -> None:
        what = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        handle = self._call("cuDeviceGet", ordinal)
        if not int(self._call("cuDeviceGetAttribute", what, handle)):
            raise RuntimeError(f"{self._device} cannot map memory into address ranges; set memory: allocated")

    def _describe(self, ordinal: int) -> tuple[Any, Any]:
        """What chunks are made of, and who may read and write them."""
        driver = self._driver
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = ordinal
        access = driver.CUmemAccessDesc()
        access.location = properties.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return properties, access

    def _call(self, name: str, *arguments: Any) -> Any:
        """One function of the driver; returns what it answers beside its status.

        Raises:
            torch.OutOfMemoryError: The driver says so.
            torch.AcceleratorError: Any other problem, with the driver's code.
        """
        status, *answer = getattr(self._driver, name)(*arguments)
        code = int(status)
        if code == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"{self._device} is out of memory ({name})")
        if code:
            error = torch.AcceleratorError(f"CUDA error: {name} failed with {getattr(status, 'name', code)}")
            error.error_code = code  # type: ignore[attr-defined]
            raise error
        return answer[0] if answer else None

    def _adopt_thread(self) -> None:
        """Give a thread that never used the device its context; functions of the driver need one, and torch waits."""
        if not int(self._call("cuCtxGetCurrent")):
            self._call("cuCtxSetCurrent", self._context)

    # --- figures ---

    def charge_bytes(self, size_bytes: int) -> int:
        """The size, rounded up to what the driver maps."""
        return -(-size_bytes // self._granularity_bytes) * self._granularity_bytes

    @property
    def mapped_bytes(self) -> int:
        """What is behind ranges."""
        self._let_go_of_abandoned()
        return self._mapped_bytes

    @property
    def kept_bytes(self) -> int:
        """What is behind none, and kept."""
        return self._kept_bytes

    # --- ranges ---

    def reserve(self, size_bytes: int) -> torch.Tensor:
        """A tensor over a new range.

        Raises:
            torch.OutOfMemoryError: The driver has no addresses left.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed, or another problem of the driver.
        """
        self._let_go_of_abandoned()
        if size_bytes == 0:
            return alias(0, (0,), (1,), torch.uint8, device=self._device, keep=None)
        length = self.charge_bytes(size_bytes)
        with self._entered():
            self._adopt_thread()
            address = int(self._call("cuMemAddressReserve", length, 0, 0, 0))
        reserved = _Range(address, size_bytes, length)
        owner = _Owner(self, reserved)
        with self._lock:
            self._ranges[address] = reserved
        with torch.inference_mode(False):
            return alias(address, (size_bytes,), (1,), torch.uint8, device=self._device, keep=owner)

    def map(self, memory: torch.Tensor) -> None:
        """Put a chunk behind the range of a tensor.

        Raises:
            ValueError: It is mapped already, or is no such range.
            torch.OutOfMemoryError: There is no room; nothing was mapped.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed, or another problem of the driver.
        """
        self._let_go_of_abandoned()
        found = self._find(memory)
        if found is None:
            return
        try:
            self._map(found)
        except torch.OutOfMemoryError:
            # Retry outside of the handler: the error's traceback would hold frames, and with them memory.
            pass
        else:
            return
        self.release_cached()
        self._make_room()
        self._map(found)

    def _map(self, found: _Range) -> None:
        with self._entered(), self._lock:
            if found.chunk is not None:
                raise ValueError(f"the range at {found.address:#x} is mapped already; unmap it first")
            self._adopt_thread()
            chunk = self._take_chunk(found.length_bytes)
            try:
                self._put_behind(found, chunk)
            except BaseException:
                self._keep(found.length_bytes, chunk)
                raise
            found.chunk = chunk
            self._mapped_bytes += found.length_bytes

    def _put_behind(self, found: _Range, chunk: Any) -> None:
        self._call("cuMemMap", found.address, found.length_bytes, 0, chunk, 0)
        try:
            self._call("cuMemSetAccess", found.address, found.length_bytes, [self._access], 1)
        except BaseException:
            self._call("cuMemUnmap", found.address, found.length_bytes)
            raise

    def unmap(self, memory: torch.Tensor) -> None:
        """Take the chunk behind the range of a tensor away, if there is one; on a lost or closed device too.

        Raises:
            ValueError: It is no such range.
            RuntimeError: A problem of the driver that does not cost the device.
        """
        found = self._find(memory)
        if found is not None:
            with self._lock:
                self._unmap(found)
        self._let_go_of_abandoned()

    def _unmap(self, found: _Range) -> None:
        if found.chunk is None:
            return
        chunk = found.chunk
        if self._driven(lambda: self._call("cuMemUnmap", found.address, found.length_bytes)):
            self._keep(found.length_bytes, chunk)
        found.chunk = None
        self._mapped_bytes -= found.length_bytes
        if not self._is_open:
            self._release_kept(self._kept_bytes)

    def _driven(self, call: Callable[[], None]) -> bool:
        """Make a call that gives something back; False on a lost device, which has lost that too."""
        try:
            with self._entered():
                self._adopt_thread()
                call()
        except DevicePoisonedError:
            return False
        return True

    def _find(self, memory: torch.Tensor) -> _Range | None:
        """The range that a tensor is the whole of; `None` for one of no bytes."""
        require_flat(memory, "memory")
        if memory.numel() == 0:
            return None
        with self._lock:
            found = self._ranges.get(memory.data_ptr())
        if found is None or found.size_bytes != memory.numel():
            raise ValueError(
                f"the {memory.numel()} bytes at {memory.data_ptr():#x} are not a whole range of {self._device}; "
                "pass what reserve() answered"
            )
        return found

    def abandon(self, abandoned: _Range) -> None:
        """The last tensor over a range died; the next call gives it back."""
        self._abandoned.append(abandoned)
        if not self._is_open and not sys.is_finalizing():
            self._let_go_of_abandoned()

    def _let_go_of_abandoned(self) -> None:
        """Give back the ranges that nobody refers to, unless another thread, or this one further up, is at it."""
        while self._abandoned and self._lock.acquire(blocking=False):
            try:
                while self._abandoned:
                    self._give_back(self._abandoned.popleft())
            finally:
                self._lock.release()

    def _give_back(self, each: _Range) -> None:
        if each.chunk is not None:
            # Who dropped it may have kernels under way, as is fine with memory of the allocator.
            self._driven(self._settle)
            self._unmap(each)
        self._driven(lambda: self._call("cuMemAddressFree", each.address, each.length_bytes))
        del self._ranges[each.address]

    # --- chunks ---

    def _take_chunk(self, length_bytes: int) -> Any:
        """A kept chunk of that size, or a new one."""
        for place in range(len(self._kept) - 1, -1, -1):
            if self._kept[place][0] == length_bytes:
                self._kept_bytes -= length_bytes
                return self._kept.pop(place)[1]
        self._release_kept(length_bytes)
        return self._call("cuMemCreate", length_bytes, self._properties, 0)

    def _keep(self, length_bytes: int, chunk: Any) -> None:
        self._kept.append((length_bytes, chunk))
        self._kept_bytes += length_bytes

    def _release_kept(self, at_least_bytes: int) -> None:
        """Give kept chunks back to the driver, the oldest first, until so many bytes or none are left."""
        released = 0
        while self._kept and released < at_least_bytes:
            length, chunk = self._kept.pop(0)
            self._kept_bytes -= length
            released += length
            self._driven(lambda chunk=chunk: self._call("cuMemRelease", chunk))  # type: ignore[misc]

    def release_cached(self) -> None:
        """Give all kept chunks back to the driver."""
        self._let_go_of_abandoned()
        with self._lock:
            self._release_kept(self._kept_bytes)

    def close(self) -> None:
        """Keep no chunks from now on. Ranges still referenced stay what they are."""
        self._is_open = False
        self.release_cached()


class MappedCudaDevice(CudaDevice):
    """One CUDA device with memory that is mapped; see `CudaDevice` for everything else.

    Raises:
        RuntimeError: This process does not see it, cuda-bindings is not installed, or the device cannot map memory.
    """

    def __init__(self, index: int = 0) -> None:
        driver = bindings()
        super().__init__(index)
        with self._entered():
            # The first operator makes the context current in this thread.
            torch.empty(1, device=self._device).fill_(0)
        make_room = super().release_cached
        self._ranges = CudaRanges(driver, self._device, index, self._watched, self.settle, make_room)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """As `_entered`, and on a closed device too."""
        with self._poison.watch(), torch.cuda.device(self._device):
            yield

    @property
    def keeps_addresses(self) -> bool:
        """True."""
        return True

    def charge_bytes(self, size_bytes: int) -> int:
        """What `map` of a range of that size takes."""
        return self._ranges.charge_bytes(size_bytes)

    def free_bytes(self) -> int:
        """What the driver has free, and what the allocator and this device keep without using it."""
        return super().free_bytes() + self._ranges.kept_bytes

    def allocated_bytes(self) -> int:
        """What is mapped, and what this process holds in live blocks of the allocator."""
        return super().allocated_bytes() + self._ranges.mapped_bytes

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor from torch's allocator, uninitialized.

        Raises:
            torch.OutOfMemoryError: There is no room, even after cached memory was given back.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed.
        """
        try:
            return super().allocate(size_bytes)
        except torch.OutOfMemoryError:
            # Retry outside of the handler: the error's traceback would hold frames, and with them memory.
            pass
        self._ranges.release_cached()
        return super().allocate(size_bytes)

    def reserve(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor over an address range without memory; see `CudaRanges.reserve`."""
        self._require_open()
        return self._ranges.reserve(size_bytes)

    def map(self, memory: torch.Tensor) -> None:
        """Put memory behind a range; see `CudaRanges.map`."""
        self._require_open()
        self._ranges.map(memory)

    def unmap(self, memory: torch.Tensor) -> None:
        """Take the memory behind a range away; see `CudaRanges.unmap`."""
        self._ranges.unmap(memory)

    def release_cached(self) -> None:
        """One `empty_cache`, and all chunks that are behind no range."""
        super().release_cached()
        self._ranges.release_cached()

    def close(self) -> None:
        """Wait for the copies in flight and give up the chunks kept. Tensors still referenced stay what they are."""
        super().close()
        self._ranges.close()
