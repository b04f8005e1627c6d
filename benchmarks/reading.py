"""How fast files of weights become a model in RAM, beside reading the same files and doing nothing with them.

    python benchmarks/reading.py                 # a table; exit code 1 when a figure is missed
    python benchmarks/reading.py --write NAME    # also benchmarks/results/NAME.md

The model is loaded through the cache, without an accelerator, from four safetensors files; it is the load that follows
an eviction, so that memory was made ready before. Warm means that the system has the files in memory, cold that it was
made to forget them. The reference reads the same files in pieces of 8 MiB into one block of memory that has its pages:
warm with 2 threads through the page cache, cold with 8 threads past it. Ours and the reference take turns, in one
process, and what was loaded is compared with what was saved before anything is timed. A cold figure is judged only if
the disk gave the reference itself about the same speed every time. Other loaders have a process of their own for each
round, touch every page, and hold the result in memory of their own, except where said.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import plots
import torch
from figures import Figure, present, spread
from host_only_memory import drop_cached
from materialize import in_child
from safetensors.torch import load_file, save_file

from modelcache import ModelCache

ROUNDS, PEER_ROUNDS = 9, 7
NUM_SHARDS, LAYERS_PER_SHARD, WIDTH = 4, 20, 1536
PIECE_BYTES = 8 << 20
WARM_THREADS, COLD_THREADS = 2, 8
WARM, COLD = 1.15, 1.05
STEADY = 0.2  # of the reference's median: how far apart its quartiles may be for a cold figure to mean anything


class Net(torch.nn.Module):
    """Equal layers of 9 MiB each, and their biases; 0.76 GB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(NUM_SHARDS * LAYERS_PER_SHARD))


def save(folder: Path) -> None:
    torch.manual_seed(0)
    state = Net().state_dict()
    names, index = list(state), {}
    step = len(names) // NUM_SHARDS
    for shard in range(NUM_SHARDS):
        file = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        mine = names[shard * step : (shard + 1) * step]
        save_file({name: state[name] for name in mine}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(mine, file)
    content = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    for path in shards(folder):
        drop_cached(path)


def remember(folder: Path) -> None:
    for path in shards(folder):
        with path.open("rb", buffering=0) as file:
            block = bytearray(PIECE_BYTES)
            while file.readinto(block):
                pass


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def raw(folder: Path, block: mmap.mmap, num_threads: int, flags: int) -> float:
    """Seconds to read all files into memory that has its pages."""
    memory, work, start = memoryview(block), [], 0
    descriptors = [os.open(path, os.O_RDONLY | flags) for path in shards(folder)]
    for descriptor in descriptors:
        size = os.fstat(descriptor).st_size
        work += [(descriptor, offset, start + offset) for offset in range(0, size, PIECE_BYTES)]
        start += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE

    def read(piece: tuple[int, int, int]) -> None:
        descriptor, offset, place = piece
        os.preadv(descriptor, [memory[place : place + PIECE_BYTES]], offset)

    with ThreadPoolExecutor(num_threads) as threads:
        seconds = timed(lambda: list(threads.map(read, work)))
    for descriptor in descriptors:
        os.close(descriptor)
    return seconds


def block_for(folder: Path) -> mmap.mmap:
    size = sum(path.stat().st_size + PIECE_BYTES for path in shards(folder))
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(block)), 1, size)
    return block


def bring(cache: ModelCache) -> None:
    with cache.get("m"):
        pass


def settle(cache: ModelCache) -> None:
    """Until the memory of what was evicted is ready again, as it is a moment later."""
    blocks, pause = cache._parts.mover._tiers.blocks, threading.Event()
    while not blocks.is_settled:
        pause.wait(0.005)


def check(model: torch.nn.Module, folder: Path) -> None:
    found = model.state_dict()
    for path in shards(folder):
        for name, value in load_file(path).items():
            assert torch.equal(found[name], value), name


def rounds_of(folder: Path) -> dict[str, list[float]]:
    """Seconds of every round; to be called in a child."""
    torch.set_num_threads(1)
    block = block_for(folder)
    found: dict[str, list[float]] = {}
    with ModelCache(device="host_only", ram="3GiB", ram_spare="960MiB", progress=False) as cache:
        cache.register("m", model=Net, weights=str(folder))
        with cache.get("m") as model:
            check(model, folder)
            del model

        def ours(prepare: Callable[[Path], None]) -> float:
            cache.evict("m")
            settle(cache)
            prepare(folder)
            return timed(lambda: bring(cache))

        def reference(prepare: Callable[[Path], None]) -> float:
            settle(cache)  # nothing else may be going on
            prepare(folder)
            return raw(folder, block, *((WARM_THREADS, 0) if prepare is remember else (COLD_THREADS, os.O_DIRECT)))

        for number in range(ROUNDS):
            for state, prepare in (("warm", remember), ("cold", forget)):
                turns = [(state, ours), (f"{state} raw", reference)]
                for what, measure_one in turns if number % 2 else reversed(turns):
                    found.setdefault(what, []).append(measure_one(prepare))
    return found


def cloned(folder: Path) -> list[torch.Tensor]:
    return [value.clone() for path in shards(folder) for value in load_file(path).values()]


def from_pretrained(folder: Path) -> list[torch.Tensor]:
    from transformers import LlamaForCausalLM

    tensors = list(LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict().values())
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()
    return tensors


def save_llama(folder: Path) -> None:
    from host_only_memory import llama

    torch.manual_seed(0)
    llama(18).save_pretrained(folder, max_shard_size="150MB")


def peer_round(folder: Path, load: Callable[[Path], list[torch.Tensor]]) -> dict[str, float]:
    """One round of another loader, everything in memory before; to be called in a child."""
    torch.set_num_threads(1)
    block = block_for(folder)
    remember(folder)
    kept: list[list[torch.Tensor]] = []
    return {"raw": raw(folder, block, WARM_THREADS, 0), "peer": timed(lambda: kept.append(load(folder)))}


def figure(what: str, ours: list[float], reference: list[float], limit: float | None, name: str) -> Figure:
    ratios = [one / other for one, other in zip(ours, reference, strict=True)]
    ratio = statistics.median(ratios)
    return Figure(
        what,
        f"{statistics.median(ours) * 1e3:.0f} ms",
        f"{statistics.median(reference) * 1e3:.0f} ms ({name})",
        f"{ratio:.3f}",
        "shown, not judged" if limit is None else f"<= {limit}",
        limit is None or ratio <= limit,
        f"{spread(ratios)} x",
        tuple(ratios),
    )


def is_steady(found: list[float]) -> bool:
    low, middle, high = statistics.quantiles(found, n=4)
    return high - low <= STEADY * middle


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as root:
        folder = Path(root, "net")
        folder.mkdir()
        in_child(lambda: save(folder))
        megabytes = sum(path.stat().st_size for path in shards(folder)) / 1e6
        of = in_child(lambda: rounds_of(folder))
        limit = COLD if is_steady(of["cold raw"]) else None
        figures = [
            figure(f"warm load to RAM, {megabytes:.0f} MB", of["warm"], of["warm raw"], WARM, "page cache"),
            figure(f"cold load to RAM, {megabytes:.0f} MB", of["cold"], of["cold raw"], limit, "past the page cache"),
        ]
        peers = [("safetensors load_file and clone, warm", folder, cloned)]
        if importlib.util.find_spec("transformers") is not None:
            other = Path(root, "llama")
            in_child(lambda: save_llama(other))
            peers.append(("transformers from_pretrained of another model, mapped, warm", other, from_pretrained))
        for what, its_folder, load in peers:
            rounds = [in_child(lambda f=its_folder, run=load: peer_round(f, run)) for _ in range(PEER_ROUNDS)]
            figures.append(figure(what, [r["peer"] for r in rounds], [r["raw"] for r in rounds], None, "page cache"))
    return figures


if __name__ == "__main__":
    sys.exit(present("reading.py", __doc__, measure, notes=__doc__.split("\n\n", 2)[2].strip(), plot=plots.ratios))
