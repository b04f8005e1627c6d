"""What every fault must leave behind: books equal to what is held, everybody else served, health as the row says."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benches import Bench, Call

from modelcache.cache import ModelCache
from modelcache.stats import Health
from modelcache.testing import FakeClock, FakePool, Faults, SimulatedDevice
from modelcache.tier import Tier
from modelcache.wiring import Parts, assemble

#: Of the models of a `House`: four segments of one layer each.
LAYERS, LAYER_BYTES = 4, 32 * 32 * 4
MODEL_BYTES = LAYERS * LAYER_BYTES


def net(name: str) -> torch.nn.Module:
    """The model of that name; the same bits every time."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    layers = [torch.nn.Linear(32, 32, bias=False) for _ in range(LAYERS)]
    for layer in layers:
        layer.weight.data.copy_(torch.randn(32, 32, generator=generator))
    return torch.nn.Sequential(*layers).requires_grad_(requires_grad=False)


def bits(model: torch.nn.Module) -> bytes:
    """Its weights, wherever they are."""
    return b"".join(bytes(each.detach().cpu().contiguous().view(torch.uint8).numpy()) for each in model.parameters())


class House:
    """A real cache with real models on the simulated device; time by hand.

    Args:
        tmp_path: For image files.
        vram: Budgets in models, as `ram` and `disk`.
        names: Registered at the start; those in `fixed` have no source to be read again.
        capacity: Of the device, in models; twice the VRAM budget when not given.
        given: Further keywords of `ModelCache`.
    """

    def __init__(
        self,
        tmp_path: Path,
        *,
        vram: int = 2,
        ram: int = 6,
        disk: int = 0,
        names: str = "abc",
        fixed: str = "",
        capacity: float | None = None,
        gauge: Any = None,
        **given: Any,
    ) -> None:
        keys = ("page_locked", "ram_spare", "policy", "memory", "when_full", "idle", "pressure", "max_waiters")
        self.faults = Faults()
        self.device = SimulatedDevice(
            int((capacity or 2 * vram) * MODEL_BYTES), link_bytes_per_s=None, faults=self.faults
        )
        options = {**dict.fromkeys(keys), "lease_sites": None, "progress": False, "segment": LAYER_BYTES}
        options |= {"vram": vram * MODEL_BYTES, "ram": ram * MODEL_BYTES, "device": self.device}
        options |= {"disk": disk * MODEL_BYTES or None, "image_dir": tmp_path / "images" if disk else None, **given}
        self.clock, self.pool = FakeClock(), FakePool()
        parts: Parts = replace(assemble(options), clock=self.clock, pool=self.pool, gauge=gauge)
        self.cache = ModelCache._of(parts)
        self.mover: Any = parts.mover
        self.images = tmp_path / "images"
        #: Memory of other programs: what the tests take of the device themselves.
        self.ballast: list[torch.Tensor] = []
        for name in names:
            self.add(name, reload=name not in fixed)

    def add(self, name: str, **options: Any) -> None:
        """Register the model of that name."""
        self.cache.register(name, lambda: net(name), **{"size": MODEL_BYTES, "reload": True, **options})

    def take_from_device(self, models: float) -> None:
        """Let another program have so much of the device."""
        self.ballast.append(self.device.allocate(int(models * MODEL_BYTES)))

    def call(self, do: Any, name: str = "caller") -> Call:
        return Call(do, name)

    def use(self, *names: str) -> None:
        for name in names:
            with self.cache.get(name) as model:
                model(torch.ones(1, 32, device="sim:0"))
            del model
        self.pool.settle()

    def state(self, name: str) -> str:
        return self.cache.info(name).state

    def states(self) -> dict[str, str]:
        return {name: self.state(name) for name in self.cache.names()}

    def answers_right(self, name: str) -> bool:
        """Lease it, run it, and compare its weights with those of its loader."""
        with self.cache.get(name, timeout=60) as model:
            expected = net(name)
            x = torch.arange(32.0).reshape(1, 32)
            y = model(x.to("sim:0")).cpu()
            right = bits(model) == bits(expected) and torch.allclose(y, expected(x))
            del y
        return right

    def validate(self) -> None:
        """The books balance, and are what the device and the system's memory hold, to the byte."""
        self.pool.settle()
        gc.collect()
        others = sum(each.numel() for each in self.ballast)

        def check(machine: Any) -> None:
            machine.validate()
            books = machine.books
            parts = [self.mover.held_bytes(part) for part in books.parts]
            assert books.vram.resident_bytes == self.device.allocated_bytes() - others == sum(p.vram for p in parts)
            assert books.ram.resident_bytes == self.mover.live_ram_bytes == sum(p.ram for p in parts)
            assert books.disk.resident_bytes == sum(p.image for p in parts)
            for tier in Tier:
                account = books.account(tier)
                assert account.reserved_bytes == account.draining_bytes == account.claimed_bytes == 0, (tier, account)

        self.cache._driver.look(check)

    def close(self) -> None:
        self.ballast.clear()
        self.cache.close()
        assert self.pool.thread_names == ()
        gc.collect()
        assert self.mover.live_ram_bytes == 0
        left = [path for path in self.images.rglob("*") if path.is_file()] if self.images.exists() else []
        assert all("kept" in str(path) or path.suffix not in (".image", ".tmp") for path in left), left


def fake_answers_right(bench: Bench, name: str) -> bool:
    """Lease a model of fakes, use it, and compare its bytes with those of its loader."""
    with bench.cache.get(name, timeout=60) as model:
        return model(lambda: model.weights) == b"".join(b"".join(part.source) for part in model.parts)


def unharmed(
    house: House | Bench, *, but: Iterable[str] = (), healthy: bool = True, served: bool = True, leased: int = 0
) -> Health:
    """The ledger is exact, nobody waits, every other model is served, and health is as it should be.

    Args:
        house: Where the fault was.
        but: Models that the row allows to be out of order.
        healthy: What readiness says.
        served: Whether the others can be had at all; they cannot once the device is lost.
        leased: How many leases the test still holds.
    """
    house.validate()
    status = house.cache.status()
    assert status.num_waiting == status.num_moving == 0
    assert sum(model.num_leases for model in status.models) == leased
    for name in house.cache.names() if served else ():
        if name not in but:
            right = fake_answers_right(house, name) if isinstance(house, Bench) else house.answers_right(name)
            assert right, f"{name} answers wrong"
    house.validate()
    if isinstance(house, Bench):
        house.mover.oracle.require_nothing()
    health = house.cache.health()
    assert health.is_ready is healthy, health
    return health
