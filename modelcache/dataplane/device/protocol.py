"""What the mover asks of a device. One file per kind of device implements it; one contract suite tests them all.

Memory on a device and blocks in RAM are flat ``torch.uint8`` tensors here; shapes and dtypes belong to `image.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch


class DeviceEvent(Protocol):
    """A point in a copy stream: everything enqueued before it has landed once it is done."""

    def is_done(self) -> bool:
        """Whether it has been reached; never blocks."""

    def wait(self) -> None:
        """Block the calling thread until it is reached; raises what a copy before it failed with."""


class Device(Protocol):
    """One device that holds copies.

    All methods may be called from any thread. Copies run on streams of the device's own, in order per direction.
    A method that raises `torch.OutOfMemoryError` has allocated nothing. After a sticky error every call raises
    `DevicePoisonedError`.
    """

    @property
    def name(self) -> str:
        """Such as ``"cuda:0"``, ``"sim:0"``, ``"cpu"``."""

    @property
    def torch_device(self) -> torch.device:
        """Where the tensors of a resident model are."""

    @property
    def holds_copies(self) -> bool:
        """False for `host_only`: RAM is the top tier, and none of the memory methods may be called."""

    @property
    def keeps_addresses(self) -> bool:
        """Whether memory is mapped below address ranges that stay, by `reserve`, `map` and `unmap`.

        Where it is False these three must not be called: each `allocate` may answer with another address.
        """

    def total_bytes(self) -> int:
        """The size of the device's memory."""

    def free_bytes(self) -> int:
        """What can be allocated now, as the driver and the allocator measure it."""

    def allocated_bytes(self) -> int:
        """What this process holds of it through the allocator, rounding included."""

    def charge_bytes(self, size_bytes: int) -> int:
        """What `allocate(size_bytes)` really takes, with the allocator's rounding; 0 for 0.

        Where addresses are kept it is what `map` of a range of that size takes.
        """

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor, shape ``(size_bytes,)``, uninitialized. Freed when its last reference dies.

        Raises:
            torch.OutOfMemoryError: There is no room; cached memory was released and the call tried once more.
        """

    def reserve(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor over an address range without memory, which charges nothing.

        Its bytes may be read and written only while memory is mapped: any other access is illegal and costs the device.
        The range, and memory still mapped below it, is given back when the last tensor over it dies.
        """

    def map(self, memory: torch.Tensor) -> None:
        """Put memory behind a whole range that `reserve` answered; what it holds is undefined.

        Raises:
            ValueError: It is mapped already, or is no such range.
            torch.OutOfMemoryError: There is no room; cached memory was released and the call tried once more.
        """

    def unmap(self, memory: torch.Tensor) -> None:
        """Take the memory behind a range away. Nothing may use it any more: see `settle`. Unmapped already is fine.

        Raises:
            ValueError: It is no range that `reserve` answered.
        """

    def storage(self, memory: torch.Tensor, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor over a range of `memory` (on the device or in RAM) with an `UntypedStorage` of its own.

        `memory` may be a reserved range, mapped or not: its bytes are not touched. The result keeps `memory`
        alive. Its storage starts at the range, so that offsets of views count from there.
        """

    def host_view(self, memory: torch.Tensor) -> torch.Tensor | None:
        """The same bytes as a CPU tensor, where the processor can read the device's memory; `None` elsewhere."""

    def copy_in(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        """Enqueue a copy of uint8 bytes from RAM to the device. `source` must live until the event is done."""

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        """Enqueue a copy of uint8 bytes from the device to RAM, after all compute enqueued so far on the device."""

    def let_compute_wait(self, event: DeviceEvent) -> None:
        """Make compute enqueued by this thread from now on wait for `event`, without blocking the caller.

        What a failed copy leads to differs: a simulated operator raises it, CUDA goes on. Ask the event.
        """

    def settle(self) -> None:
        """Block until everything enqueued on the device so far is done, compute included: memory may be reused.

        To be called before the last reference to memory is dropped that compute may still be using. A copy that failed
        is done too; what it failed with is its event's to say.
        """

    def release_cached(self) -> None:
        """Give the allocator's cached memory back to the driver."""

    def page_lock(self, memory: torch.Tensor) -> bool:
        """Make a RAM block page-locked, so that copies are asynchronous; False when refused (error cleared)."""

    def page_unlock(self, memory: torch.Tensor) -> None:
        """Undo `page_lock`."""

    def close(self) -> None:
        """Stop its threads. Memory still referenced stays valid. Idempotent.

        Copies in flight land or fail, but their events are always reached.
        """
