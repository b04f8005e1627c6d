"""From a file in the page cache to private RAM: the cache and four loaders, all bytes of the model in the end.

    python benchmarks/loaders.py
    python benchmarks/loaders.py --write loaders_NAME

Each load runs in a process of its own, so that every heap starts the same; loaders take turns, and who begins rotates.
The reference is reading the same file into memory that has been touched before, once, by `preadv`: what the page cache
gives. `cold` and `warm` would differ by the disk alone: only warm is measured here. Every load is compared with what
was written, after the clock has stopped. Loaders whose tensors are views of a file's mapping or of a buffer that is
used again copy them: the end is the same for all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from figures import Figure, absent, present, spread
from safetensors.torch import load_file, save_file

SIZE_BYTES, NUM_TENSORS = 256_000_000, 291
ROUNDS = 7
Weights = dict[str, torch.Tensor]


def by_the_cache(folder: Path) -> Callable[[], Weights]:
    from modelcache import ModelCache

    file = folder / "model.safetensors"

    def of(sizes: dict[str, list[int]]) -> torch.nn.Module:
        with torch.device("meta"):
            return torch.nn.ParameterDict({name: torch.empty(shape) for name, shape in sizes.items()})

    cache = ModelCache(device="host_only", ram=2 * SIZE_BYTES, progress=False)
    cache.register("model", model=lambda: of(shapes(folder)), weights=str(file))
    # A tiny one first, so that nothing is left to import, as with the other loaders.
    save_file({"w": torch.ones(4)}, folder / "tiny.safetensors")
    cache.register("tiny", model=lambda: of({"w": [4]}), weights=str(folder / "tiny.safetensors"))
    with cache.get("tiny"):
        pass

    def load() -> Weights:
        with cache.get("model") as model:
            return dict(model.state_dict())

    return load


def by_safetensors(folder: Path) -> Callable[[], Weights]:
    file = folder / "model.safetensors"
    return lambda: {name: weight.clone() for name, weight in load_file(file).items()}


def by_runai(folder: Path) -> Callable[[], Weights]:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Weights:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(folder / "model.safetensors"))
            return {name: weight.clone() for name, weight in streamer.get_tensors()}

    return load


def by_fastsafetensors(folder: Path) -> Callable[[], Weights]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load() -> Weights:
        loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
        loader.add_filenames({0: [str(folder / "model.safetensors")]})
        buffer = loader.copy_files_to_device()
        found = {name: buffer.get_tensor(name).clone() for name in buffer.key_to_rank_lidx}
        buffer.close()
        loader.close()
        return found

    return load


def by_tensorizer(folder: Path) -> Callable[[], Weights]:
    from tensorizer import TensorDeserializer

    def load() -> Weights:
        with TensorDeserializer(str(folder / "model.tensors"), device="cpu", lazy_load=False) as found:
            return {name: weight.detach() for name, weight in found.items()}

    return load


def by_read(folder: Path) -> Callable[[], Weights]:
    """The reference: bytes into memory that is there already, and no tensors."""
    file = folder / "model.safetensors"
    target = bytearray(file.stat().st_size)
    target[:: os.sysconf("SC_PAGESIZE")] = b"1" * len(target[:: os.sysconf("SC_PAGESIZE")])

    def load() -> Weights:
        with file.open("rb", buffering=0) as opened:
            view, done = memoryview(target), 0
            while done < len(target):
                done += os.preadv(opened.fileno(), [view[done : done + (8 << 20)]], done)
        return {}

    return load


WAYS: dict[str, tuple[str, Callable[[Path], Callable[[], Weights]]]] = {
    "read": ("", by_read),
    "modelcache, model= and weights=": ("modelcache", by_the_cache),
    "safetensors load_file, cloned": ("safetensors", by_safetensors),
    "Run:ai streamer, cloned": ("runai-model-streamer", by_runai),
    "fastsafetensors without GDS, cloned": ("fastsafetensors", by_fastsafetensors),
    "tensorizer, its own format": ("tensorizer", by_tensorizer),
}


def shapes(folder: Path) -> dict[str, list[int]]:
    return json.loads((folder / "shapes.json").read_text(encoding="utf-8"))


def write(folder: Path) -> None:
    random = np.random.default_rng(0)
    weights = {
        f"w{number}": torch.from_numpy(random.random(SIZE_BYTES // NUM_TENSORS // 4, dtype=np.float32))
        for number in range(NUM_TENSORS)
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "shapes.json").write_text(json.dumps({name: list(w.shape) for name, w in weights.items()}))
    try:
        from tensorizer import TensorSerializer
    except ImportError:
        return
    serializer = TensorSerializer(str(folder / "model.tensors"))
    serializer.write_state_dict(weights)
    serializer.close()


def load_once(way: str, folder: Path) -> None:
    """In a process of its own: one load, its seconds on the last line of what is printed."""
    torch.set_num_threads(1)
    load = WAYS[way][1](folder)
    began = time.perf_counter()
    found = load()
    took = time.perf_counter() - began
    if way != "read":
        expected = load_file(folder / "model.safetensors")
        assert found.keys() == expected.keys(), way
        assert all(torch.equal(found[name], expected[name]) for name in expected), way
    print(f"\n{took}", flush=True)
    os._exit(0)  # What a loader leaves running is not ours to wait for.


def seconds(way: str, folder: Path) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--load", way, str(folder)], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:160] if done.stderr.strip() else "no word")
    return float(done.stdout.strip().splitlines()[-1])


def measure() -> list[Figure]:
    found: dict[str, list[float]] = {}
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        for way, (distribution, _) in WAYS.items():
            try:
                if distribution and distribution != "modelcache":
                    version(distribution)
                seconds(way, folder)
                found[way] = []
            except PackageNotFoundError:
                figures.append(absent(f"load to RAM: {way}", "not installed"))
            except RuntimeError as error:
                figures.append(absent(f"load to RAM: {way}", f"failed: {error}"))
        for number in range(ROUNDS):
            ways = list(found)
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                found[way].append(seconds(way, folder))
    reads = found.pop("read")
    size = f"{SIZE_BYTES / 1e6:.0f} MB in {NUM_TENSORS} tensors"
    rows = []
    for way, times in found.items():
        ratios = [a / b for a, b in zip(times, reads, strict=True)]
        distribution = WAYS[way][0]
        label = way if distribution == "modelcache" else f"{way} ({distribution} {version(distribution)})"
        rows.append(
            Figure(
                f"load to RAM, {size}: {label}",
                f"{statistics.median(times) * 1e3:.0f} ms",
                f"{statistics.median(reads) * 1e3:.0f} ms (read into touched memory)",
                f"{statistics.median(ratios):.2f}",
                "shown",
                True,
                spread(ratios),
                tuple(ratios),
            )
        )
    return rows + figures


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load_once(sys.argv[2], Path(sys.argv[3]))
    import plots

    sys.exit(present("loaders.py", __doc__, measure, notes=__doc__.split("\n\n", 2)[2].strip(), plot=plots.ratios))
