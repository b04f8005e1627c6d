"""A real cache of real models on a simulated device, whose clock and threads a test moves by hand."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from benches import Call

from modelcache import ModelCache
from modelcache.testing import FakeClock, FakePool, Faults, SimulatedDevice
from modelcache.wiring import assemble

#: Of one layer, which is a segment; each model has three.
LAYER_BYTES, LAYERS = 4096, 3
MODEL_BYTES = LAYERS * LAYER_BYTES


def net(seed: int) -> torch.nn.Sequential:
    """A model whose bits are known by its seed."""
    draw = torch.Generator().manual_seed(seed)
    layers = [torch.nn.Linear(32, 32, bias=False) for _ in range(LAYERS)]
    for layer in layers:
        layer.weight.data.copy_(torch.randn(32, 32, generator=draw))
    return torch.nn.Sequential(*layers).requires_grad_(requires_grad=False)


def bits(model: torch.nn.Module) -> bytes:
    """Its weights, wherever they are."""
    return b"".join(each.detach().cpu().numpy().tobytes() for each in model.parameters())


class OnDevice:
    """A cache with room for `vram` models on the device and `ram` in RAM."""

    def __init__(self, *, vram: int = 2, ram: int = 4) -> None:
        self.faults, self.clock, self.pool = Faults(), FakeClock(), FakePool()
        # Its streams are threads of the pool too, so that the pool knows whether anything still happens.
        self.device = SimulatedDevice(
            2 * vram * MODEL_BYTES,
            link_bytes_per_s=None,
            faults=self.faults,
            threads=self.pool,  # type: ignore[arg-type]
            clock=self.clock.now_s,
        )
        names = ("page_locked", "ram_spare", "policy", "memory", "when_full", "idle", "pressure", "max_waiters")
        options: dict[str, Any] = {name: None for name in (*names, "lease_sites", "disk", "image_dir")}
        options |= {"vram": vram * MODEL_BYTES, "ram": ram * MODEL_BYTES, "device": self.device}
        parts = assemble({**options, "progress": False, "segment": LAYER_BYTES})
        self.mover: Any = parts.mover
        self.cache = ModelCache._of(replace(parts, clock=self.clock, pool=self.pool))

    def call(self, do: Any) -> Call:
        return Call(do)

    def held(self) -> tuple[int, int]:
        """Bytes on the device and in RAM, as these say; the cache's books must say the same."""
        self.pool.settle()
        held = self.device.allocated_bytes(), self.mover.live_ram_bytes
        stats = self.cache.status()
        books = {tier.tier.value: tier.resident_bytes + tier.reserved_bytes for tier in stats.tiers}
        assert held == (books["vram"], books["ram"])
        return held

    def close(self) -> None:
        self.cache.close()
        self.device.close()


@contextmanager
def on_device(**options: int) -> Generator[OnDevice]:
    """One that is closed at the end, and leaves nothing."""
    house = OnDevice(**options)
    try:
        yield house
    except BaseException:
        house.close()
        raise
    house.close()
    gc.collect()
    assert house.pool.thread_names == ()
    assert (house.device.allocated_bytes(), house.mover.live_ram_bytes) == (0, 0)
