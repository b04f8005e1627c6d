"""Many threads and tasks, real modules on the simulated device, room for two models of five."""

from __future__ import annotations

import asyncio
import gc
import random
import threading

import pytest
import torch

from modelcache.cache import ModelCache
from modelcache.core.ledger import Room
from modelcache.core.machine import Budgets
from modelcache.dataplane.mover import TorchMover
from modelcache.runtime.threads import SystemClock, ThreadPool
from modelcache.testing import SimulatedDevice
from modelcache.tier import Tier
from modelcache.wiring import Parts

NAMES = ("a", "b", "c", "d", "e")
SEGMENT = 8192
WIDTH = 64


class Net(torch.nn.Module):
    """Four layers, a tied head and a buffer; about 64 KiB."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.head = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.layers[0].weight
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x) + self.shift)


class OneMover(TorchMover):
    """Refuses, and remembers, any move of a model that somebody is inside of."""

    inside: dict[str, dict[object, None]]
    broken: list[str]

    def move(self, move, progress=None, arriving=None):
        for name, tokens in self.inside.items():
            if move.part.startswith(name) and tokens:
                self.broken.append(f"{move.kind} of {move.part} while {name} is used")
        return super().move(move, progress, arriving)


class Stress:
    def __init__(self, tmp_path) -> None:
        self.device = SimulatedDevice(1 << 20, link_bytes_per_s=None, rounding="512")
        self.mover = OneMover(self.device, segment_bytes=SEGMENT, image_dir=tmp_path)
        self.mover.inside = self.inside = {name: {} for name in NAMES}
        self.mover.broken = self.broken = []
        self.expected, self.outputs = {}, {}
        self.x = torch.linspace(-1, 1, WIDTH).reshape(1, WIDTH)
        size = 0
        for seed, name in enumerate(NAMES):
            net = Net(seed)
            with torch.no_grad():
                self.outputs[name] = net(self.x)
            self.expected[name] = {key: value.clone() for key, value in net.state_dict().items()}
            size = sum(p.numel() * 4 for p in net.parameters()) + WIDTH * 4
        self.vram = 2 * size + 2 * SEGMENT
        self.cache = ModelCache._of(
            Parts(
                budgets=Budgets(ram=1 << 22, vram=self.vram, disk=1 << 22),
                mover=self.mover,
                clock=SystemClock(),
                pool=ThreadPool(),
                device_name=self.device.name,
                execution_device=lambda: self.device.torch_device,
                measure=lambda: Room(self.device.free_bytes(), self.mover.live_ram_bytes),
                close=self.mover.close,
            )
        )
        for seed, name in enumerate(NAMES):
            self.cache.register(name, lambda seed=seed: Net(seed))

    def check(self, name: str, model) -> None:
        token = object()
        self.inside[name][token] = None
        try:
            with torch.no_grad():
                y = model(self.x.to(self.device.torch_device)).cpu()
        finally:
            del self.inside[name][token]
        torch.testing.assert_close(y, self.outputs[name], rtol=1e-5, atol=1e-6)

    def by_handle(self, rng: random.Random) -> None:
        name = rng.choice(NAMES)
        with torch.no_grad():
            y = self.cache.get(name)(self.x).cpu()
        torch.testing.assert_close(y, self.outputs[name], rtol=1e-5, atol=1e-6)

    def by_block(self, rng: random.Random) -> None:
        name = rng.choice(NAMES)
        with self.cache.get(name) as model:
            self.check(name, model)

    def by_two(self, rng: random.Random) -> None:
        names = rng.sample(NAMES, 2)
        with self.cache.lease_many(*names) as models:
            for name, model in zip(names, models, strict=True):
                self.check(name, model)

    def by_hand(self, rng: random.Random) -> None:
        name = rng.choice(NAMES)
        rng.choice((self.cache.park, self.cache.evict, self.cache.prefetch, self.cache.explain))(name)

    def thread(self, seed: int, num_calls: int, failed: list[BaseException]) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(num_calls):
                rng.choices((self.by_handle, self.by_block, self.by_two, self.by_hand), (4, 4, 1, 1))[0](rng)
        except BaseException as error:
            failed.append(error)

    async def task(self, seed: int, num_calls: int) -> None:
        rng = random.Random(seed)
        for _ in range(num_calls):
            name = rng.choice(NAMES)
            async with self.cache.aget(name) as model:
                self.check(name, model)
                await asyncio.sleep(0)

    async def tasks(self, num_calls: int) -> None:
        await asyncio.gather(*(self.task(100 + i, num_calls) for i in range(8)))


@pytest.mark.timeout(120)
def test_eight_threads_and_eight_tasks_share_room_for_two_models_of_five(tmp_path):
    stress = Stress(tmp_path)
    failed: list[BaseException] = []
    threads = [threading.Thread(target=stress.thread, args=(i, 125, failed)) for i in range(8)]
    for thread in threads:
        thread.start()
    asyncio.run(stress.tasks(125))
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert not stress.broken

    def books(machine):
        machine.validate()
        assert machine.flights.is_idle or machine.waiting == {}
        return machine.books.vram.resident_bytes

    gc.collect()
    stress.cache.free(vram=stress.vram)
    assert stress.cache._driver.look(books) == 0
    assert stress.device.allocated_bytes() == 0
    status = stress.cache.status()
    assert status.num_waiting == 0
    assert sum(model.num_leases for model in status.models) == 0
    assert status.tier(Tier.VRAM).resident_bytes == 0
    for name in NAMES:
        with stress.cache.get(name) as model:
            found = {key: value.cpu() for key, value in model.state_dict().items()}
            assert model.head.weight is model.layers[0].weight
        assert found.keys() == stress.expected[name].keys()
        assert all(torch.equal(found[key], stress.expected[name][key]) for key in found), name
    assert len(stress.cache.events()) > 500
    stress.cache.close()
    del model, found
    gc.collect()
    assert stress.device.allocated_bytes() == 0
    assert stress.mover.live_ram_bytes == 0
    assert not list(tmp_path.rglob("*.image*"))
