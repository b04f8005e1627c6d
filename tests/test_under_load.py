"""Threads and tasks together on real modules and the simulated device: nothing lost, nothing stuck, nothing left."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
import torch

from modelcache import ModelCache, MoveKind
from modelcache.testing import SimulatedDevice

NUM_MODELS, NUM_THREADS, NUM_TASKS, CALLS_EACH = 5, 8, 8, 125
WIDTH = 64


def module(seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) / WIDTH
    return torch.nn.Sequential(*layers).requires_grad_(requires_grad=False)


class Caller:
    """One thread or task: calls models at random and compares every answer."""

    def __init__(self, seed: int, expected: list[torch.Tensor], inputs: torch.Tensor) -> None:
        self.random = random.Random(seed)
        self.expected, self.inputs = expected, inputs
        self.num_calls = 0
        self.problems: list[str] = []

    def which(self) -> int:
        return self.random.randrange(NUM_MODELS)

    def compare(self, index: int, answer: torch.Tensor) -> None:
        self.num_calls += 1
        if answer.device.type != "sim":
            self.problems.append(f"model {index} answered on {answer.device}")
        if not torch.equal(answer.cpu(), self.expected[index]):
            self.problems.append(f"model {index} answered something else")

    def call(self, cache: ModelCache) -> None:
        index = self.which()
        if self.random.random() < 0.5:
            self.compare(index, cache.get(f"m{index}", timeout=60)(self.inputs))
        else:
            with cache.get(f"m{index}", timeout=60) as model:
                self.compare(index, model(self.inputs.to("sim:0")))

    async def acall(self, cache: ModelCache) -> None:
        index = self.which()
        async with cache.aget(f"m{index}", timeout=60) as model:
            self.compare(index, model(self.inputs.to("sim:0")))
        await asyncio.sleep(0)


@pytest.mark.timeout(180)
def test_threads_and_tasks_share_five_models_where_two_fit() -> None:
    modules = [module(seed) for seed in range(NUM_MODELS)]
    inputs = torch.rand(1, WIDTH)
    expected = [each(inputs) for each in modules]
    weights = [{name: t.clone() for name, t in each.state_dict().items()} for each in modules]
    size = sum(t.numel() * 4 for t in modules[0].state_dict().values())
    device = SimulatedDevice(capacity_bytes=64 << 20, link_bytes_per_s=None)
    before = threading.active_count()
    with ModelCache(
        device=device, vram=int(2.4 * size), ram=8 * size, segment="16KiB", progress=False, max_waiters=64
    ) as cache:
        for index in range(NUM_MODELS):
            cache.register(f"m{index}", lambda index=index: module(index))
        callers = [Caller(seed, expected, inputs) for seed in range(NUM_THREADS + NUM_TASKS)]

        def run_thread(caller: Caller) -> None:
            for _ in range(CALLS_EACH):
                caller.call(cache)

        async def run_tasks() -> None:
            async def run_task(caller: Caller) -> None:
                for _ in range(CALLS_EACH):
                    await caller.acall(cache)

            await asyncio.gather(*(run_task(caller) for caller in callers[NUM_THREADS:]))

        threads = [threading.Thread(target=run_thread, args=(caller,)) for caller in callers[:NUM_THREADS]]
        for thread in threads:
            thread.start()
        asyncio.run(run_tasks())
        for thread in threads:
            thread.join()

        assert [problem for caller in callers for problem in caller.problems] == []
        assert sum(caller.num_calls for caller in callers) == (NUM_THREADS + NUM_TASKS) * CALLS_EACH
        assert any(event.kind is MoveKind.TRIM for event in cache.events())
        cache._driver.look(lambda machine: machine.validate())
        assert cache.status().num_waiting == 0
        for index in range(NUM_MODELS):
            cache.park(f"m{index}")
            with cache.get(f"m{index}") as model:
                for name, tensor in model.state_dict().items():
                    assert torch.equal(tensor.cpu(), weights[index][name]), (index, name)
        del model, tensor
    assert device.allocated_bytes() == 0
    assert threading.active_count() <= before
