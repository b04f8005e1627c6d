"""What it costs to choose who must leave the device, among many models that may.

    python benchmarks/choosing.py
    python benchmarks/choosing.py --write choosing_NAME

One choice is one call of the cache's planner, asked for room that one of the idle models has: nothing moves, so that
the same state is asked many times. The peer is the strategy of diffusers' `ComponentsManager`, asked the same: it
looks at every combination of the models on the device, so it is asked with few, and its row is another one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import plots
from figures import Figure, present, spread

from modelcache import ModelCache
from modelcache.core.ledger import Room
from modelcache.core.planner import Plan
from modelcache.testing import FakeClock, FakeModel, FakeMover, FakePool, cache_of

ROUNDS, CALLS = 9, 50
FEW, MANY = 10, 1000
SIZE_BYTES = 64
LIMIT_US = 20.0
PEER_MODELS = (8, 12, 16, 18)


@contextmanager
def full_of(num_models: int) -> Iterator[ModelCache]:
    """A cache of idle models, all of them on the device, with no room for another."""
    pool = FakePool()
    size = num_models * SIZE_BYTES
    with cache_of(FakeMover(pool, vram_bytes=size, ram_bytes=size), FakeClock(), pool) as cache:
        for number in range(num_models):
            cache.register(f"m{number}", lambda: FakeModel(SIZE_BYTES))
            with cache.lease_many(f"m{number}"):
                pass
        yield cache


def chooser(cache: ModelCache) -> Callable[[], object]:
    """One choice among what is there now."""
    machine = cache._driver.look(lambda machine: machine)
    needs = Room(vram=SIZE_BYTES)
    everybody = lambda _name: True  # noqa: E731
    assert isinstance(machine.planner.plan(needs, everybody), Plan)
    return lambda: machine.planner.plan(needs, everybody)


def microseconds(function: Callable[[], object], calls: int = CALLS) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls * 1e6


def ours() -> list[Figure]:
    with full_of(FEW) as few, full_of(MANY) as many:
        among_few, among_many = chooser(few), chooser(many)
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            found[0].append(microseconds(among_few))
            found[1].append(microseconds(among_many))
    a, b = map(statistics.median, found)
    return [
        Figure(
            f"choose who leaves, among {MANY:,} idle models",
            f"{b:.1f} us",
            f"{a:.1f} us (among {FEW})",
            f"{b / a:.1f}",
            f"<= {LIMIT_US:.0f} us",
            b <= LIMIT_US,
            f"{spread(found[1])} us",
            tuple(found[1]),
        )
    ]


class _Sized:
    """What the strategy asks of a model."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    def get_memory_footprint(self) -> int:
        return self._size_bytes


class _Hook:
    def __init__(self, model_id: str, size_bytes: int) -> None:
        self.model_id, self.model = model_id, _Sized(size_bytes)


def theirs() -> list[Figure]:
    """The strategy of diffusers, on a simulated device that is as full as it can be."""
    try:
        from diffusers.modular_pipelines.components_manager import AutoOffloadStrategy
    except ImportError as error:
        why = f"diffusers' strategy: not installed ({error.name})"
        return [Figure(why, "-", "-", "-", "shown", holds=True, spread="-")]
    from modelcache.testing import SimulatedDevice

    figures = []
    device = SimulatedDevice(capacity_bytes=1 << 20, poison=False)
    strategy = AutoOffloadStrategy("0GB")
    try:
        held = device.allocate((1 << 20) - 1)
        for num in PEER_MODELS:
            hooks = [_Hook(f"m{number}", SIZE_BYTES + number) for number in range(num)]
            model = _Sized(num * SIZE_BYTES // 2)
            call = lambda hooks=hooks, model=model: strategy(hooks, "new", model, device.torch_device)  # noqa: E731
            times = [microseconds(call, 1) for _ in range(3)]
            figures.append(
                Figure(
                    f"diffusers' strategy, among {num} models",
                    f"{statistics.median(times) / 1e3:.2f} ms",
                    f"2^{num} combinations",
                    "-",
                    "shown",
                    True,
                    f"{min(times) / 1e3:.2f} to {max(times) / 1e3:.2f} ms",
                )
            )
        del held
    finally:
        device.close()
    return figures


def measure() -> list[Figure]:
    return ours() + theirs()


if __name__ == "__main__":
    sys.exit(present("choosing.py", __doc__, measure, plot=plots.ratios))
