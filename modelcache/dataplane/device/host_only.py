"""No accelerator: RAM is the top tier, models run where they are, and nothing is ever copied to a device."""

from __future__ import annotations

from typing import NoReturn

import torch

from modelcache.dataplane.device.alias import storage_over
from modelcache.dataplane.device.protocol import DeviceEvent


class HostOnlyDevice:
    """The `Device` of a machine without an accelerator, or of one whose accelerator is not to be used.

    Its figures are 0 and everything that would touch device memory raises `RuntimeError`.
    """

    @property
    def name(self) -> str:
        """``"cpu"``."""
        return "cpu"

    @property
    def torch_device(self) -> torch.device:
        """Where the tensors of every model are."""
        return torch.device("cpu")

    @property
    def holds_copies(self) -> bool:
        """False: there is no memory beside RAM."""
        return False

    @property
    def keeps_addresses(self) -> bool:
        """False: there is no device memory."""
        return False

    def total_bytes(self) -> int:
        """0."""
        return 0

    def free_bytes(self) -> int:
        """0."""
        return 0

    def allocated_bytes(self) -> int:
        """0."""
        return 0

    def charge_bytes(self, size_bytes: int) -> int:
        """Nothing is ever charged.

        Raises:
            RuntimeError: Always.
        """
        _refuse(f"charge {size_bytes} bytes")

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """There is no memory to take.

        Raises:
            RuntimeError: Always.
        """
        _refuse(f"allocate {size_bytes} bytes")

    def reserve(self, size_bytes: int) -> torch.Tensor:
        """There are no addresses to reserve.

        Raises:
            RuntimeError: Always.
        """
        _refuse(f"reserve {size_bytes} bytes")

    def map(self, memory: torch.Tensor) -> None:
        """There is no memory to map.

        Raises:
            RuntimeError: Always.
        """
        _refuse(f"map {memory.numel()} bytes")

    def unmap(self, memory: torch.Tensor) -> None:
        """Nothing was mapped.

        Raises:
            RuntimeError: Always.
        """
        _refuse(f"unmap {memory.numel()} bytes")

    def storage(self, memory: torch.Tensor, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor with a storage of its own over a range of a RAM block, which it keeps alive.

        RAM is the tier models run on here, so this one works.

        Raises:
            ValueError: The range is not inside, or `memory` is not flat uint8.
        """
        return storage_over(memory, offset_bytes, size_bytes)

    def host_view(self, memory: torch.Tensor) -> torch.Tensor:
        """The block itself."""
        return memory

    def copy_in(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        """There is nowhere to copy to.

        Raises:
            RuntimeError: Always.
        """
        _refuse(f"copy {source.numel()} bytes in")

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        """There is nothing to copy from.

        Raises:
            RuntimeError: Always.
        """
        _refuse(f"copy {source.numel()} bytes out")

    def let_compute_wait(self, event: DeviceEvent) -> None:
        """No event can come from here.

        Raises:
            RuntimeError: Always.
        """
        _refuse("wait for a copy")

    def settle(self) -> None:
        """Nothing is ever enqueued: compute on the CPU is done when it returns."""

    def release_cached(self) -> None:
        """Nothing is cached."""

    def page_lock(self, memory: torch.Tensor) -> bool:
        """False: without copies there is nothing to gain."""
        return False

    def page_unlock(self, memory: torch.Tensor) -> None:
        """Nothing was locked."""

    def close(self) -> None:
        """Nothing to stop."""


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(f"cannot {what}: this cache has no accelerator (device: host_only), RAM is its top tier")
