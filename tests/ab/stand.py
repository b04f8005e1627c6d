"""What comparisons are tested on: tiny models in a real cache, and time by hand."""

from __future__ import annotations

import torch

from modelcache import ModelCache

LAYER_BYTES = 32 * 32 * 4


class Net(torch.nn.Module):
    """Multiplies by its number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number
        self.weight = torch.nn.Parameter(torch.full((32, 32), float(number)), requires_grad=False)

    def forward(self, x: float) -> float:
        return x * float(self.weight[0, 0])


def cache_of(numbers, *, room: float = 10, ram: float = 20, sized: bool = True) -> ModelCache:
    """A cache over the simulated device, with room for so many models."""
    cache = ModelCache(
        vram=int(room * LAYER_BYTES), ram=int(ram * LAYER_BYTES), device="simulated", segment=4096, progress=False
    )
    for name, number in numbers.items():
        options = {"size": LAYER_BYTES} if sized else {}
        cache.register(name, lambda number=number: Net(number), reload=True, **options)
    return cache


class Time:
    """A clock that work moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds
