"""How much RAM a model takes where there is no accelerator: while it is loaded, while it is held, after it was evicted.

    python benchmarks/host_only_memory.py                 # a table; exit code 1 when a figure is missed
    python benchmarks/host_only_memory.py --write NAME    # also benchmarks/results/NAME.md

Every round has a process of its own, forked from one that has only imported: it loads a tiny model in the same way,
so that nothing is left to import, gives free heap memory back, and then loads the model, looks at it, and evicts it to
disk. Memory is resident memory above what the process had before, the peak is its high-water mark, and the figures are
in multiples of the model's bytes. What the system keeps of a file that was read is not the process's: it was made to
forget the file before, and what it has of it afterwards is shown.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import plots
import torch
import transformers
from figures import Figure, present
from materialize import in_child, memory_of_process
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modelcache import ModelCache

ROUNDS = 5
WIDTH, NUM_LAYERS = 1024, 48
PEAK, HELD, FALL = 1.05, 1.03, 0.95
MEASURES = ("peak", "held", "fall", "file")


class Net(torch.nn.Module):
    """Equal layers; 201 MB with 48 of them."""

    def __init__(self, num_layers: int = NUM_LAYERS) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))


def tiny() -> torch.nn.Module:
    return Net(1)


def large() -> torch.nn.Module:
    return Net(10 * NUM_LAYERS)


@dataclass(frozen=True)
class Case:
    """A way to register a model, and the same way with a tiny one; the folder of its files, if it is read from any."""

    what: str
    options: Mapping[str, object]
    warm_up: Mapping[str, object]
    files: Path
    rounds: int = ROUNDS


def llama(num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def cases(root: Path) -> list[Case]:
    def save() -> None:
        torch.manual_seed(0)
        for name, make in (("net", Net), ("tiny", tiny), ("large", large)):
            (root / name).mkdir()
            save_file(make().state_dict(), root / name / "model.safetensors")
        for name, num_layers in (("llama", 6), ("tiny-llama", 1)):
            llama(num_layers).save_pretrained(root / name)

    in_child(save)
    names = ("net", "tiny", "large")
    net, small, big = ({"weights": str(root / name / "model.safetensors")} for name in names)
    folder = {"loader": "transformers", "dtype": "bfloat16"}
    return [
        Case("model= and weights=", {"model": Net} | net, {"model": tiny} | small, root / "net"),
        Case("model= and weights=", {"model": large} | big, {"model": tiny} | small, root / "large", rounds=3),
        Case(
            "a transformers folder",
            folder | {"path": str(root / "llama")},
            folder | {"path": str(root / "tiny-llama")},
            root / "llama",
        ),
        Case("a callable, spilled to an image file", {"loader": Net}, {"loader": tiny}, root / "none"),
    ]


def measured(case: Case, images: Path) -> dict[str, float]:
    """The figures of one round; to be called in a child."""
    torch.set_num_threads(1)
    for path in case.files.glob("*.safetensors"):
        drop_cached(path)
    limits = {"ram": "3GiB", "disk": "1GiB", "ram_spare": "none", "image_dir": images, "progress": False}
    with ModelCache(device="host_only", **limits) as cache:
        cache.register("tiny", **case.warm_up)
        cache.register("m", **case.options)
        with cache.get("tiny"):
            pass
        cache.evict("tiny")
        start = level()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        with cache.get("m") as model:
            peak = memory_of_process("VmHWM") - start
            pages = sum(cached_bytes(path) for path in case.files.glob("*.safetensors"))
            check(model, case)
            del model
        held = level() - start
        size_bytes = cache.info("m").size_bytes
        cache.evict("m")
        assert cache.info("m").ram_bytes == 0
        fall = held - (level() - start)
    return dict(zip(MEASURES, (each / size_bytes for each in (peak, held, fall, pages)), strict=True)) | {
        "bytes": size_bytes
    }


def level() -> int:
    """Resident memory, without what is free in the heap or garbage of this script's own."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory_of_process("VmRSS")


def check(model: torch.nn.Module, case: Case) -> None:
    """The loaded bytes are those of the files."""
    found = model.state_dict()
    for path in case.files.glob("*.safetensors"):
        for name, value in load_file(path).items():
            assert torch.equal(found[name], value), name


def drop_cached(path: Path) -> None:
    """Let the system forget what it has of a file in memory, if it will."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(path: Path) -> int:
    """How much of a file the system has in memory."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapping:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        held = (ctypes.c_char * size).from_buffer(mapping)
        failed = libc.mincore(ctypes.addressof(held), size, pages)
        del held
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def figures_of(case: Case, images: Path) -> list[Figure]:
    found = [in_child(lambda: measured(case, images)) for _ in range(case.rounds)]
    what = f"{case.what}, {found[0]['bytes'] / 1e6:.0f} MB"

    def figure(key: str, words: str, limit: float | None, worst: Callable[..., float], sign: str) -> Figure:
        values = [each[key] for each in found]
        shown = worst(values)
        holds = limit is None or (shown <= limit if sign == "<=" else shown >= limit)
        return Figure(
            f"{words}, {what}",
            f"{shown:.3f} x bytes",
            "1 x bytes (the model's bytes)",
            f"{shown:.3f}",
            "shown" if limit is None else f"{sign} {limit}",
            holds,
            f"{min(values):.3f} to {max(values):.3f}",
            tuple(values),
        )

    return [
        figure("peak", "peak of RSS while loading", PEAK, max, "<="),
        figure("held", "RSS while held", HELD, max, "<="),
        figure("fall", "fall of RSS after eviction to disk", FALL, min, ">="),
        figure("file", "its files in the system's page cache", None, statistics.median, "<="),
    ]


def measure() -> list[Figure]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        return [figure for case in cases(root) for figure in figures_of(case, root / "images")]


if __name__ == "__main__":
    sys.exit(
        present("host_only_memory.py", __doc__, measure, notes=__doc__.split("\n\n", 2)[2].strip(), plot=plots.ratios)
    )
