"""Where the demo's models run: on a CUDA device if there is one, else on a simulated one of just the size needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

#: The link of the simulated device, in bytes per second, each direction.
LINK_BYTES_PER_S = 8e9
# On the simulated device, memory beyond the budget; a cache that exceeds its budget by more meets a real refusal.
_BEYOND_BUDGET_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device while it is open.

    Attributes:
        device: What `ModelCache` is given.
        torch_device: Where tensors go.
        allocated_bytes: What this process holds there now, activations included.
    """

    device: object
    torch_device: torch.device
    allocated_bytes: Callable[[], int]


def label() -> str:
    """The device in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"simulated device, link {LINK_BYTES_PER_S / 1e9:.0f} GB/s"


@contextmanager
def opened(budget_bytes: int) -> Iterator[Accelerator]:
    """A device with room for the budget."""
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        yield Accelerator("cuda:0", device, lambda: torch.cuda.memory_allocated(device))
        return
    from modelcache.testing import SimulatedDevice

    simulated = SimulatedDevice(budget_bytes + _BEYOND_BUDGET_BYTES, link_bytes_per_s=LINK_BYTES_PER_S)
    try:
        yield Accelerator(simulated, simulated.torch_device, simulated.allocated_bytes)
    finally:
        simulated.close()
