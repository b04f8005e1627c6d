"""What a switch costs beside the copy: promotion, giving up, both, and a first forward, on a simulated link of 8 GB/s.

    python benchmarks/links.py
    python benchmarks/links.py --write links_NAME

`make bench` sets GLIBC_TUNABLES=glibc.cpu.x86_non_temporal_threshold=0x400000. Without it one thread of a processor
with large caches copies a segment of 64 MiB at less than the link's 8 GB/s; hardware that copies by itself does not.

The reference is one flat copy of the same bytes over the same kind of link, taken in turn with ours. The victim of a
switch was looked at for writes beforehand, as it is when it has not been used for a moment. Compute is simulated: it
takes time and no CPU. Memory is mapped below addresses that stay (`memory: mapped`); a row of its own shows what it
costs to allocate it anew instead.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import plots
import torch
from figures import Figure, present, spread

from modelcache import ModelCache
from modelcache.testing import SimulatedDevice

LINK_BYTES_PER_S = 8e9
MB, GB = 1_000_000, 1_000_000_000
ROUNDS = 7
NUM_BLOCKS = 48
UNUSED_S = 0.3  # after which the look has begun


def model(size_bytes: int, num_tensors: int) -> Callable[[], torch.nn.Module]:
    """A model of equal tensors of 32-bit floats."""
    return lambda: torch.nn.ParameterList(
        torch.nn.Parameter(torch.ones(size_bytes // num_tensors // 4), requires_grad=False) for _ in range(num_tensors)
    )


@contextmanager
def flat(size_bytes: int) -> Iterator[Callable[[], float]]:
    """A function that copies as many bytes in one piece, and gives the seconds."""
    device = SimulatedDevice(capacity_bytes=size_bytes + MB, link_bytes_per_s=LINK_BYTES_PER_S, poison=False)
    source = torch.ones(size_bytes, dtype=torch.uint8)
    targets = [device.allocate(size_bytes)]

    def copy() -> float:
        began = time.perf_counter()
        device.copy_in(targets[0], source).wait()
        return time.perf_counter() - began

    copy()
    yield copy
    targets.clear()
    device.close()


@contextmanager
def cache_of(vram: int, ram: int, memory: str = "mapped") -> Iterator[ModelCache]:
    device = SimulatedDevice(capacity_bytes=2 * vram, link_bytes_per_s=LINK_BYTES_PER_S, poison=False, memory=memory)
    with ModelCache(device=device, vram=vram, ram=ram, progress=False) as cache:
        yield cache


def until_looked_at(cache: ModelCache) -> None:
    """Until the cache has looked at what is on the device, as it does on its own after a moment without a lease."""
    pause = threading.Event()
    pause.wait(UNUSED_S)
    while cache._driver.look(lambda machine: machine.checks.due or machine.checks.running is not None):
        pause.wait(0.01)


def figure(what: str, ours: list[float], flats: list[float], limit: float | None, reference: str) -> Figure:
    ratio = statistics.median(a / b for a, b in zip(ours, flats, strict=True))
    return Figure(
        what,
        f"{statistics.median(ours) * 1e3:.1f} ms",
        f"{statistics.median(flats) * 1e3:.1f} ms ({reference})",
        f"{ratio:.3f}",
        "shown" if limit is None else f"<= {limit}",
        limit is None or ratio <= limit,
        f"{spread([each * 1e3 for each in ours])} ms",
        tuple(each * 1e3 for each in ours),
    )


def beside(what: str, busy: list[float], limit: float, size_bytes: int) -> Figure:
    """Processor time outside of the copies; on a link of 55 GB/s it has to fit the margin of its row."""
    margin_s = (limit - 1) * size_bytes / 55e9
    median_s = statistics.median(busy)
    ratio = f"{median_s / margin_s:.2f}"
    ours, margin = f"{median_s * 1e3:.1f} ms", f"{margin_s * 1e3:.2f} ms (margin at 55 GB/s)"
    return Figure(what, ours, margin, ratio, "shown", True, f"{spread([each * 1e3 for each in busy])} ms")


def a_gigabyte(what: str, found: list[float], size_bytes: int) -> Figure:
    each = [seconds / size_bytes * GB for seconds in found]
    return Figure(what, f"{statistics.median(each):.2f} s/GB", "-", "-", "shown", True, f"{spread(each)} s/GB")


def promotions(size_bytes: int, num_tensors: int, limit: float, memory: str = "mapped") -> list[Figure]:
    """From the request to the last segment's landing, beside one flat copy."""
    ours, flats, given, looked, busy = [], [], [], [], []
    vram = int(size_bytes * 1.1)
    with flat(size_bytes) as copy, cache_of(vram, int(size_bytes * 1.2), memory) as cache:
        mover, device = cache._driver._mover, cache._driver._mover._device
        cache.register("model", model(size_bytes, num_tensors))
        cache.prefetch("model").result()
        for _ in range(ROUNDS):
            until_looked_at(cache)
            (part,) = cache._driver.look(lambda machine: list(machine.books.parts))
            began = time.perf_counter()
            assert mover.is_unwritten(part)
            looked.append(time.perf_counter() - began)
            began = time.perf_counter()
            # Not park(), which ends with the allocator giving its memory back, so that the device would have to get it
            # from the system again: here room is needed and used again at once, as in a switch.
            with cache.reserve(vram=vram):
                given.append(time.perf_counter() - began)
            flats.append(copy())
            memcpy_s, cpu_s = device.memcpy_cpu_s, time.process_time()
            began = time.perf_counter()
            cache.prefetch("model").result()
            ours.append(time.perf_counter() - began)
            busy.append(time.process_time() - cpu_s - (device.memcpy_cpu_s - memcpy_s))
    size = f"{size_bytes / GB:g} GB in {num_tensors:,} tensors, {memory}"
    return [
        figure(f"promote {size}", ours, flats, limit, "flat copy"),
        beside(f"processor time beside the copy, promote {size}", busy, limit, size_bytes),
        figure(f"give up the clean copy of {size}, looked at before", given, flats, 0.01, "flat copy"),
        a_gigabyte(f"the look for writes at {size}", looked, size_bytes),
    ]


def switches(size_bytes: int, num_tensors: int) -> list[Figure]:
    """A to B where only one fits."""
    ours, flats, given = [], [], []
    with flat(size_bytes) as copy, cache_of(int(size_bytes * 1.2), int(size_bytes * 2.4)) as cache:
        for name in "ab":
            cache.register(name, model(size_bytes, num_tensors))
            cache.prefetch(name).result()
        for name in "abababab":
            until_looked_at(cache)
            flats.append(copy())
            began = time.perf_counter()
            with cache.lease_many(name):
                ours.append(time.perf_counter() - began)
            given.append(next(e.seconds for e in reversed(cache.events()) if e.kind.value == "trim"))
    size = f"{size_bytes / GB:g} GB in {num_tensors:,} tensors"
    return [
        figure(f"switch to {size}", ours, flats, 1.05, "flat copy"),
        figure(f"of which giving up the other's clean copy of {size}", given, flats, 0.01, "flat copy"),
    ]


class Stack(torch.nn.Module):
    """Blocks of equal weights, each of which computes for `block_s` seconds."""

    block_s = 0.0

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        rows = size_bytes // NUM_BLOCKS // 4
        self.blocks = torch.nn.ModuleList(Block(self, rows) for _ in range(NUM_BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Block(torch.nn.Module):
    def __init__(self, stack: Stack, rows: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(rows), requires_grad=False)
        self.stack = [stack]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.weight[-1:]
        if self.stack[0].block_s:
            threading.Event().wait(self.stack[0].block_s)
        return x


def first_forwards(size_bytes: int) -> list[Figure]:
    """A call of a model that is parked, where another one must give way: copy and compute together."""
    figures = []
    with flat(size_bytes) as copy, cache_of(int(size_bytes * 1.2), int(size_bytes * 2.4)) as cache:
        x, handles = torch.zeros(1), {}
        for name in "ab":
            cache.register(name, lambda: Stack(size_bytes))
            handles[name] = cache.get(name)
        for name in "abab":  # the call that brings a model back is looked at, so that the next one can start early
            handles[name](x)
        copy_s = copy()
        for share in (0.3, 0.6, 1.0):
            ours, floors, flats = [], [], []
            for handle in handles.values():
                handle.__wrapped__.block_s = share * copy_s / NUM_BLOCKS
            for name in "abababab":
                until_looked_at(cache)
                flats.append(copy())
                began = time.perf_counter()
                answer = handles[name](x)
                ours.append(time.perf_counter() - began)
                assert answer.item() == NUM_BLOCKS
                began = time.perf_counter()
                handles[name](x)
                floors.append(max(flats[-1], time.perf_counter() - began))
            what = f"first forward after a switch to {size_bytes / GB:g} GB, computing {share:g} x the copy"
            figures.append(figure(what, ours, floors, 1.05, "the longer of copy and compute"))
    return figures


def measure() -> list[Figure]:
    torch.set_grad_enabled(False)
    return [
        *promotions(200 * MB, 3000, 1.10),
        *promotions(2 * GB, 3000, 1.05),
        *promotions(2 * GB, 3000, 1.05, "allocated"),
        *switches(500 * MB, 300),
        *first_forwards(2 * GB),
    ]


if __name__ == "__main__":
    sys.exit(present("links.py", __doc__, measure, plot=plots.ratios))
