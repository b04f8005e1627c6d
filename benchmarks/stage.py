"""What the workloads are served on: a device with its books, models of random bytes, and their files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from traces import Shape, Workload

from modelcache.testing import SimulatedDevice

LINK_BYTES_PER_S = 8e9
#: Room on a simulated device beside the budget, for inputs and results; whoever needs more runs out of memory.
ACTIVATIONS_BYTES = 1 << 20


class Net(torch.nn.Module):
    """Vectors, and a forward that reads the first and the last of them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        length = max(4, shape.size_bytes // shape.num_tensors // 4)
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.empty(length), requires_grad=False) for _ in range(shape.num_tensors)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights[0][:4] + self.weights[-1][-4:]

    # Names that libraries for transformers and diffusers ask for.

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    def get_memory_footprint(self) -> int:
        return size_of(self)


def size_of(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def empty_net(shape: Shape) -> Net:
    """One without memory."""
    with torch.device("meta"):
        return Net(shape)


def write_models(workload: Workload, folder: Path) -> dict[str, Path]:
    """A file of random weights for each model; no two are alike."""
    files = {}
    for number, (name, shape) in enumerate(workload.models.items()):
        random = np.random.default_rng(number)
        weights = {
            key: torch.from_numpy(random.random(weight.numel(), dtype=np.float32))
            for key, weight in empty_net(shape).state_dict().items()
        }
        files[name] = folder / f"{name}.safetensors"
        save_file(weights, files[name])
    return files


class Books:
    """A device, what has crossed its link, and the most that was on it."""

    def __init__(self, device: Any, torch_device: torch.device, budget_bytes: int) -> None:
        self.device, self.torch_device, self.budget_bytes = device, torch_device, budget_bytes

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def crossed_bytes(self) -> int | None:
        """Both ways; `None` where nobody counts."""
        return None

    def peak_bytes(self) -> int | None:
        """Inputs and results included; `None` where nobody knows whose it was."""
        return None

    def forget_peak(self) -> None: ...

    def close(self) -> None: ...


class _Metered(SimulatedDevice):
    """A simulated device that counts what torch's own copies put on its link, and knows its high-water mark."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, link_bytes_per_s=LINK_BYTES_PER_S, poison=False)
        self.crossed_bytes = self.peak_bytes = 0
        take = self.memory.take_charge

        def noted(charge: int, **options: int) -> int:
            taken = take(charge, **options)
            self.peak_bytes = max(self.peak_bytes, self.memory.allocated_bytes())
            return taken

        self.memory.take_charge = noted

    def cross_link(self, size_bytes: int, started_s: float) -> None:
        self.crossed_bytes += size_bytes
        super().cross_link(size_bytes, started_s)


class _Simulated(Books):
    def __init__(self, budget_bytes: int) -> None:
        device = _Metered(budget_bytes + ACTIVATIONS_BYTES)
        super().__init__(device, device.torch_device, budget_bytes)

    def synchronize(self) -> None: ...

    def crossed_bytes(self) -> int:
        return self.device.crossed_bytes + self.device.copied_in_bytes + self.device.copied_out_bytes

    def peak_bytes(self) -> int:
        return self.device.peak_bytes

    def forget_peak(self) -> None:
        self.device.peak_bytes = self.device.allocated_bytes()

    def close(self) -> None:
        self.device.close()


@contextmanager
def opened(name: str, budget_bytes: int) -> Iterator[Books]:
    """A device for one method; on CUDA all share the one there is, each with a budget of its own."""
    if name == "simulated":
        books: Books = _Simulated(budget_bytes)
    else:
        books = Books(name, torch.device(name), budget_bytes)
    try:
        yield books
    finally:
        books.close()


@contextmanager
def flat(name: str, most_bytes: int) -> Iterator[Callable[[int], float]]:
    """A function that copies so many bytes to the device in one piece, from page-locked RAM, and gives the seconds."""
    if name == "simulated":
        device = SimulatedDevice(most_bytes + 4096, link_bytes_per_s=LINK_BYTES_PER_S, poison=False)
        source = torch.ones(most_bytes, dtype=torch.uint8)
        targets = [device.allocate(most_bytes)]

        def copy(size_bytes: int) -> float:
            began = time.perf_counter()
            device.copy_in(targets[0][:size_bytes], source[:size_bytes]).wait()
            return time.perf_counter() - began

        copy(most_bytes)
        try:
            yield copy
        finally:
            targets.clear()
            device.close()
        return
    source = torch.ones(most_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(most_bytes, dtype=torch.uint8, device=name)

    def copy_to_cuda(size_bytes: int) -> float:
        torch.cuda.synchronize(name)
        began = time.perf_counter()
        target[:size_bytes].copy_(source[:size_bytes], non_blocking=True)
        torch.cuda.synchronize(name)
        return time.perf_counter() - began

    copy_to_cuda(most_bytes)
    yield copy_to_cuda
