"""One CUDA device: copies on two streams of their own, ordered against compute by events only.

Memory: one allocation per request from torch's caching allocator, made on the copy-in stream. The allocator keeps free
blocks per stream, so a block that is handed out again was ours before, and the copy that fills it comes behind all
earlier copies on the same stream. A block of a user's activations, perhaps still read by a kernel in flight, cannot be
handed to a copy. What remains is compute on a model's own memory: `settle` before the last reference to it is dropped.

Addresses that stay the same across evictions are `cuda_mapped.py`'s. Not covered: more than one process per device;
devices of other makers.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from modelcache.dataplane.device.alias import require_flat, storage_over
from modelcache.dataplane.device.cuda_errors import CudaPoison, is_sticky
from modelcache.dataplane.device.protocol import DeviceEvent
from modelcache.errors import DevicePoisonedError

_MIB = 1 << 20
_cuda: Any = torch.cuda  # parts of it have no annotations


def segment_bytes(size_bytes: int) -> int:
    """What the driver may lose to one allocation of torch's caching allocator, at its default settings.

    The allocator asks the driver for segments: 2 MiB, shared, for allocations up to 1 MiB; 20 MiB, shared, below
    10 MiB; from there one of its own, rounded up to 2 MiB. A segment stays while one allocation in it lives, so the
    charge is the whole segment even where several share it. Only a small allocation that was given part of a larger
    freed segment keeps more than its charge; `release_cached` between evicting and allocating avoids that. (Inside a
    segment sizes are rounded to 512 bytes, which is what `allocated_bytes` counts.)
    """
    if size_bytes <= 0:
        return 0
    if size_bytes <= _MIB:
        return 2 * _MIB
    if size_bytes < 10 * _MIB:
        return 20 * _MIB
    return -(-size_bytes // (2 * _MIB)) * 2 * _MIB


class _Copy:
    """One copy in a stream, and the event behind it."""

    def __init__(self, poison: CudaPoison, tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._poison = poison
        # Neither end may be freed or reused before the event: the hardware still reads and writes them.
        self._tensors: tuple[torch.Tensor, ...] = tensors
        # Blocking: a thread that waits sleeps instead of spinning.
        self.event = _cuda.Event(blocking=True)

    def is_done(self) -> bool:
        """Whether it was reached."""
        with self._poison.watch():
            done = bool(self.event.query())
        if done:
            self._tensors = ()
        return done

    def wait(self) -> None:
        """Block until it is reached."""
        with self._poison.watch():
            self.event.synchronize()
        self._tensors = ()


class CudaDevice:
    """One CUDA device.

    Raises:
        RuntimeError: This process does not see it.
    """

    def __init__(self, index: int = 0) -> None:
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= visible:
            raise RuntimeError(
                f"cuda:{index} is not there: this process sees {visible} CUDA devices; "
                "check nvidia-smi, CUDA_VISIBLE_DEVICES and that torch is a CUDA build, or use device='host_only'"
            )
        _cuda.init()
        self._index = index
        self._device = torch.device("cuda", index)
        self._name = f"cuda:{index}"
        self._poison = CudaPoison(self._name)
        with self._poison.watch():
            self._in, self._out = _cuda.Stream(self._device), _cuda.Stream(self._device)
        # Guards the three containers below; no CUDA call is made under it.
        self._lock = threading.Lock()
        self._pending: deque[_Copy] = deque()
        self._compute_streams: dict[int, torch.cuda.Stream] = {}
        self._page_locked: dict[int, int] = {}
        self._is_open = True

    @property
    def name(self) -> str:
        """Such as ``"cuda:0"``."""
        return self._name

    @property
    def torch_device(self) -> torch.device:
        """Where the tensors of a resident model are."""
        return self._device

    @property
    def holds_copies(self) -> bool:
        """True: it has memory of its own."""
        return True

    @property
    def keeps_addresses(self) -> bool:
        """False: memory is allocated anew each time; see `cuda_mapped.py`."""
        return False

    # --- memory ---

    def total_bytes(self) -> int:
        """What the driver says the device has."""
        with self._poison.watch():
            return int(torch.cuda.mem_get_info(self._device)[1])

    def free_bytes(self) -> int:
        """What the driver has free, and what the allocator keeps without using it."""
        with self._poison.watch():
            cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            return int(torch.cuda.mem_get_info(self._device)[0]) + cached

    def allocated_bytes(self) -> int:
        """What this process holds in live blocks of the allocator, each rounded up to 512 bytes."""
        with self._poison.watch():
            return torch.cuda.memory_allocated(self._device)

    def charge_bytes(self, size_bytes: int) -> int:
        """See `segment_bytes`."""
        return segment_bytes(size_bytes)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor on the device, uninitialized.

        Raises:
            torch.OutOfMemoryError: There is no room, even after the allocator's cache was given back.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed.
        """
        with self._entered():
            try:
                return self._empty(size_bytes)
            except torch.OutOfMemoryError:
                # Retry outside of the handler: the error's traceback would hold frames, and with them memory.
                pass
            self._let_go_of_landed()
            torch.cuda.empty_cache()
            return self._empty(size_bytes)

    def _empty(self, size_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False), torch.cuda.stream(self._in):
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def reserve(self, size_bytes: int) -> torch.Tensor:
        """Refused, with a `RuntimeError`; and so are `map` and `unmap`."""
        _refuse_addresses(self._name)

    def map(self, memory: torch.Tensor) -> None:
        """Refused."""
        _refuse_addresses(self._name)

    def unmap(self, memory: torch.Tensor) -> None:
        """Refused."""
        _refuse_addresses(self._name)

    def storage(self, memory: torch.Tensor, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor with a storage of its own over a range of `memory`, which it keeps alive.

        Raises:
            ValueError: The range is not inside, or `memory` is not flat uint8.
        """
        return storage_over(memory, offset_bytes, size_bytes)

    def host_view(self, memory: torch.Tensor) -> torch.Tensor | None:
        """`None`: the processor does not read this memory."""
        return None

    def release_cached(self) -> None:
        """One `empty_cache`."""
        self._let_go_of_landed()
        with self._poison.watch(), torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    # --- copies ---

    def copy_in(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        """Enqueue a copy from RAM to the device; from memory that is not page-locked, the call returns when it is read.

        Raises:
            ValueError: The tensors are not flat uint8 of one size, in RAM and on this device.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed.
        """
        self._require_pair("copy_in", target, source, on_device=target, in_ram=source)
        with self._entered():
            return self._copy(self._in, target, source)

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        """Enqueue a copy from the device to RAM, behind the compute enqueued so far.

        That is what the default stream, the caller's stream and every stream seen by `let_compute_wait` hold now.
        Compute on other streams must be joined to one of these first, as CUDA programs do before they use its results.

        Raises:
            ValueError: The tensors are not flat uint8 of one size, on this device and in RAM.
            DevicePoisonedError: The device failed for good.
            RuntimeError: The device is closed.
        """
        self._require_pair("copy_out", target, source, on_device=source, in_ram=target)
        with self._entered():
            with self._lock:
                streams = dict(self._compute_streams)
            for stream in (torch.cuda.default_stream(self._device), torch.cuda.current_stream(self._device)):
                streams[stream.cuda_stream] = stream
            for stream in streams.values():
                self._out.wait_stream(stream)
            return self._copy(self._out, target, source)

    def _copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        self._let_go_of_landed()
        copy = _Copy(self._poison, (target, source))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            copy.event.record(stream)
        # Only now: an event that was never recorded counts as reached, and another thread would let go of the tensors.
        with self._lock:
            self._pending.append(copy)
        return copy

    def _let_go_of_landed(self) -> None:
        """Forget copies that landed although nobody asked them."""
        with self._lock:
            pending = list(self._pending)
        landed = {id(copy) for copy in pending if copy.is_done()}
        with self._lock:
            self._pending = deque(copy for copy in self._pending if id(copy) not in landed)

    def _require_pair(
        self,
        operation: str,
        target: torch.Tensor,
        source: torch.Tensor,
        *,
        on_device: torch.Tensor,
        in_ram: torch.Tensor,
    ) -> None:
        require_flat(target, "target")
        require_flat(source, "source")
        if target.numel() != source.numel():
            raise ValueError(f"cannot copy {source.numel()} bytes onto {target.numel()}; pass ranges of one size")
        if on_device.device != self._device or in_ram.device.type != "cpu":
            raise ValueError(
                f"{operation} on {self._name} needs one tensor there and one in RAM, got target {target.device}, "
                f"source {source.device}"
            )

    def let_compute_wait(self, event: DeviceEvent) -> None:
        """Make this thread's current stream wait; the caller goes on at once.

        Raises:
            TypeError: The event is not this kind of device's.
        """
        if not isinstance(event, _Copy):
            raise TypeError(f"{self._name} can only wait for its own events, got {type(event).__name__}")
        with self._poison.watch():
            stream = torch.cuda.current_stream(self._device)
            with self._lock:
                self._compute_streams[stream.cuda_stream] = stream
            stream.wait_event(event.event)

    def settle(self) -> None:
        """Block until the device has nothing left to do."""
        with self._poison.watch():
            torch.cuda.synchronize(self._device)
        self._let_go_of_landed()

    # --- page-locking ---

    def page_lock(self, memory: torch.Tensor) -> bool:
        """Register exactly the bytes of a RAM block with the driver.

        torch's own page-locked memory is not used: it rounds each block up to a power of two.
        """
        require_flat(memory, "memory")
        if memory.numel() == 0:
            return False
        with self._entered():
            portable = 1
            status = _cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), portable)
            if int(status) != 0:
                # The driver keeps a refusal pending, and the next innocent call would report it as its own.
                _clear_pending_error(self._device)
                return False
            with self._lock:
                self._page_locked[memory.data_ptr()] = memory.numel()
            return True

    def page_unlock(self, memory: torch.Tensor) -> None:
        """Undo `page_lock`; memory that is not locked is left alone."""
        with self._lock:
            if self._page_locked.pop(memory.data_ptr(), None) is None:
                return
        with self._poison.watch(), torch.cuda.device(self._device):
            if int(_cuda.cudart().cudaHostUnregister(memory.data_ptr())) != 0:
                _clear_pending_error(self._device)

    def close(self) -> None:
        """Wait for the copies in flight; tensors still referenced stay valid. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            with self._poison.watch():
                self._in.synchronize()
                self._out.synchronize()
        except DevicePoisonedError:
            # There is nothing in flight on a device that is lost, and closing must not fail for it.
            pass
        with self._lock:
            self._pending.clear()
            self._compute_streams.clear()

    def _require_open(self) -> None:
        if not self._is_open:
            raise RuntimeError(f"{self._name} is closed; open a new device")

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """This device is the thread's current one, usable, and watched for sticky errors."""
        self._require_open()
        with self._poison.watch(), torch.cuda.device(self._device):
            yield


def _refuse_addresses(name: str) -> NoReturn:
    raise RuntimeError(f"{name} keeps no addresses; open it with memory='mapped'")


def _clear_pending_error(device: torch.device) -> None:
    """Take the calling thread's pending CUDA error away."""
    runtime = _runtime_library()
    if runtime is not None:
        runtime.cudaGetLastError()
        return
    try:
        # torch checks for a pending error behind every kernel launch, and raises and clears it there.
        torch.empty(1, device=device).fill_(1.0)
    except RuntimeError as error:
        if is_sticky(error):
            raise


def _runtime_library() -> Any:
    """The CUDA runtime that torch has loaded, by its soname; `None` where it is linked statically."""
    major = (torch.version.cuda or "0").partition(".")[0]
    try:
        return ctypes.CDLL(f"libcudart.so.{major}")
    except OSError:
        return None
