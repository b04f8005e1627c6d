"""Which CUDA errors cost the device, and the memory of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modelcache.errors import DevicePoisonedError

# After these the CUDA context cannot be used again; NVIDIA documents that the process must be restarted.
_STICKY_CODES = frozenset({
    214,  # cudaErrorECCUncorrectable
    220,  # cudaErrorNvlinkUncorrectable
    700,  # cudaErrorIllegalAddress
    702,  # cudaErrorLaunchTimeout
    709,  # cudaErrorContextIsDestroyed
    710,  # cudaErrorAssert
    714,  # cudaErrorHardwareStackError
    715,  # cudaErrorIllegalInstruction
    716,  # cudaErrorMisalignedAddress
    717,  # cudaErrorInvalidAddressSpace
    718,  # cudaErrorInvalidPc
    719,  # cudaErrorLaunchFailure
    721,  # cudaErrorContained
})  # fmt: skip
_STICKY_WORDS = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "misaligned address",
    "illegal instruction",
    "hardware stack error",
    "invalid program counter",
    "not supported on this address space",
    "uncorrectable ecc",
    "uncorrectable nvlink",
    "context is destroyed",
)


def is_sticky(error: BaseException) -> bool:
    """Whether a torch error means that the device is lost to this process."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    if getattr(error, "error_code", None) in _STICKY_CODES:
        return True
    words = str(error).lower()
    return any(sticky in words for sticky in _STICKY_WORDS)


class CudaPoison:
    """Why the device cannot be used any more; empty while it can."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._problem: str | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Refuse to start when poisoned, and become poisoned by a sticky error inside.

        Raises:
            DevicePoisonedError: Either of the two.
        """
        if self._problem is not None:
            raise DevicePoisonedError(self._device, self._problem)
        try:
            yield
        except RuntimeError as error:
            if not is_sticky(error):
                raise
            self._problem = str(error).partition("\n")[0]
            raise DevicePoisonedError(self._device, self._problem) from error
