"""Bytes moved where three models in turn are 107 % of the room on the device, beside an LRU of whole models.

    python benchmarks/bytes_moved.py
    python benchmarks/bytes_moved.py --write bytes_moved_NAME

The cache's bytes are counted by the simulated device. The LRU of whole models is replayed on the same requests, and
done for real by the `.to()` shuffle, both ways of whose copies are counted, one way shown. The first cycle, in which
everything has to come, is left out of both.
"""

from __future__ import annotations

import sys
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import plots
import torch
from figures import Figure, present
from peers import Cache, Shuffle
from stage import opened, write_models
from traces import MB, Shape, Workload

NUM_CYCLES, NUM_SEGMENTS = 12, 128
SIZE_BYTES = 24 * MB // (NUM_SEGMENTS * 512) * NUM_SEGMENTS * 512
LIMIT = 0.21


def workload() -> Workload:
    models = {name: Shape(SIZE_BYTES, NUM_SEGMENTS) for name in "abc"}
    vram = int(3 * SIZE_BYTES / 1.07)
    return Workload("P8", "107 %", models, vram, SIZE_BYTES // NUM_SEGMENTS, lambda _round: tuple("abc"))


def replayed(requests: Sequence[str], models: dict[str, Shape], vram_bytes: int) -> list[int]:
    """What an LRU of whole models brings to the device at each request."""
    held: OrderedDict[str, int] = OrderedDict()
    moved = []
    for name in requests:
        size = models[name].size_bytes
        moved.append(0 if name in held else size)
        while name not in held and sum(held.values()) + size > vram_bytes:
            held.popitem(last=False)
        held[name] = size
        held.move_to_end(name)
    return moved


def measure() -> list[Figure]:
    torch.set_grad_enabled(False)
    load = workload()
    requests = load.requests(0) * NUM_CYCLES
    x = torch.arange(4, dtype=torch.float32)
    with ExitStack() as stack:
        files = write_models(load, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        ours, theirs = [], []
        for kind, found in ((Cache, ours), (Shuffle, theirs)):
            with opened("simulated", load.vram_bytes) as books:
                method = kind(load, files, books)
                on_device = x.to(books.torch_device)
                for name in requests:
                    before = books.crossed_bytes()
                    method.serve(name, on_device)
                    found.append(books.crossed_bytes() - before)
                peak = books.peak_bytes() / load.vram_bytes
                method.close()
                if kind is Cache:
                    ours_peak = peak
    first = len(load.models)
    lru = sum(replayed(requests, load.models, load.vram_bytes)[first:])
    moved, shuffled, num = sum(ours[first:]), sum(theirs[first:]), len(requests) - first
    per_cycle = [sum(ours[i : i + first]) / (first * SIZE_BYTES) for i in range(first, len(requests), first)]
    rest = f"{min(per_cycle):.3f} to {max(per_cycle):.3f} a cycle"
    what = f"3 models of {NUM_SEGMENTS} segments, 107 % of the room, in turn"
    return [
        Figure(
            f"bytes to the device, {what}",
            f"{moved / num / MB:.2f} MB a request",
            f"{lru / num / MB:.2f} MB (LRU of whole models, same requests)",
            f"{moved / lru:.3f}",
            f"<= {LIMIT}",
            moved / lru <= LIMIT,
            rest,
            tuple(per_cycle),
        ),
        Figure(
            f"bytes both ways, {what}",
            f"{moved / num / MB:.2f} MB a request",
            f"{shuffled / num / MB:.2f} MB (`.to()` shuffle, measured)",
            f"{moved / shuffled:.3f}",
            "shown",
            holds=True,
            spread=rest,
        ),
        Figure(
            f"peak on the device, {what}",
            f"{ours_peak:.4f} x budget",
            "-",
            "-",
            "<= 1.0",
            ours_peak <= 1,
            "one run",
        ),
    ]


if __name__ == "__main__":
    sys.exit(present("bytes_moved.py", __doc__, measure, plot=plots.ratios))
