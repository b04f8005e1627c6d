"""How long a second process takes to have a model in RAM that the first one had to convert from its files.

    python benchmarks/second_start.py                 # a table; exit code 1 when a figure is missed
    python benchmarks/second_start.py --write NAME    # also benchmarks/results/NAME.md

The model is a mixture of experts whose weights lie in its files one by one and in memory stacked, so that its folder
cannot be read into place. A first process loads it with transformers and keeps its image. Every round has processes of
their own, forked from one that has only imported, each of which first loads a tiny model of the same kind: one loads
the model and is timed from the request until its bytes, checked, are in RAM; two read the bytes of the image file with
four threads into fresh memory, through the page cache and around it (`O_DIRECT`); one loads the model from its folder,
as the first process did. The system was made to forget the files before each of them, and a round in which it had not
is not counted. The rounds of the four take turns.
"""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import plots
import torch
import transformers
from figures import Figure, present, spread
from host_only_memory import cached_bytes, drop_cached
from materialize import in_child
from transformers import MixtralConfig, MixtralForCausalLM

from modelcache import ModelCache
from modelcache.dataplane.files.reading import bytes_of

ROUNDS, LIMIT = 7, 1.2
PIECE_BYTES, NUM_THREADS = 8 << 20, 4
COLD = 0.01  # of a file may still be in memory


def mixtral(num_layers: int, width: int) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=8_000,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        max_position_embeddings=256,
    )
    return MixtralForCausalLM(config).to(torch.bfloat16)


def save(root: Path) -> None:
    torch.manual_seed(0)
    for name, num_layers, width in (("tiny", 1, 256), ("model", 4, 1024)):
        mixtral(num_layers, width).save_pretrained(root / name)


def opened(root: Path, images: Path) -> ModelCache:
    cache = ModelCache(device="host_only", ram="4GiB", disk="8GiB", image_dir=images, progress=False)
    for name in ("tiny", "model"):
        cache.register(name, loader="transformers", path=str(root / name))
    return cache


def image_of(images: Path, at_least: int) -> Path | None:
    found = [path for path in images.glob("kept/*.image") if path.stat().st_size >= at_least]
    return found[0] if found else None


def keep(root: Path) -> None:
    """What the first process does."""
    for name, images in (("tiny", root / "tiny-images"), ("model", root / "images")):
        with opened(root, images) as cache, cache.get(name):
            for _ in range(1200):
                if image_of(images, 0):
                    break
                Event().wait(0.1)


def load(root: Path, images: Path, name: str) -> float:
    with opened(root, images) as cache:
        began = time.perf_counter()
        with cache.get(name) as model:
            seconds = time.perf_counter() - began
            first = next(iter(model.parameters()))
            assert first.device.type == "cpu"
            assert first.numel()
        return seconds


def ours(root: Path) -> dict[str, float]:
    load(root, root / "tiny-images", "tiny")
    image = image_of(root / "images", 0)
    assert image is not None
    is_cold = forget([image])
    return {"seconds": load(root, root / "images", "model"), "cold": is_cold}


def ordinary(root: Path) -> dict[str, float]:
    load(root, root / "no-images", "tiny")
    is_cold = forget(list((root / "model").glob("*.safetensors")))
    return {"seconds": load(root, root / "no-images", "model"), "cold": is_cold}


def reference(root: Path, flags: int = 0) -> dict[str, float]:
    load(root, root / "tiny-images", "tiny")
    image = image_of(root / "images", 0)
    assert image is not None
    is_cold = forget([image])
    began = time.perf_counter()
    size = image.stat().st_size
    memory = mmap.mmap(-1, size)
    view = memoryview(memory)
    file = os.open(image, os.O_RDONLY | flags)
    with ThreadPoolExecutor(NUM_THREADS) as pool:

        def read(start: int) -> None:
            done, stop = start, min(start + PIECE_BYTES, size)
            while done < stop:
                done += os.preadv(file, [view[done:stop]], done)

        list(pool.map(read, range(0, size, PIECE_BYTES)))
    return {"seconds": time.perf_counter() - began, "cold": is_cold}


def around(root: Path) -> dict[str, float]:
    return reference(root, os.O_DIRECT)


def forget(paths: list[Path]) -> bool:
    for path in paths:
        drop_cached(path)
    return all(cached_bytes(path) <= COLD * path.stat().st_size for path in paths)


def is_same(root: Path) -> bool:
    """Whether the model built around its image is the one that transformers loads, bit for bit."""
    expected = MixtralForCausalLM.from_pretrained(root / "model", local_files_only=True).state_dict()
    with opened(root, root / "images") as cache, cache.get("model") as model:
        found = model.state_dict()
        return found.keys() == expected.keys() and all(
            bytes_of(found[name].contiguous()) == bytes_of(expected[name].contiguous()) for name in found
        )


def measure() -> list[Figure]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        in_child(lambda: save(root))
        in_child(lambda: keep(root))
        image = image_of(root / "images", 0)
        assert image is not None, "the first process kept no image"
        assert in_child(lambda: is_same(root)), "the image gives another model"
        size = image.stat().st_size
        works: dict[str, Callable[[Path], dict[str, float]]] = {
            "ours": ours,
            "reference": reference,
            "around": around,
            "ordinary": ordinary,
        }
        found: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(ROUNDS):
            for name, work in works.items():
                answer = in_child(lambda work=work: work(root))
                if answer["cold"]:
                    found[name].append(answer["seconds"])
        assert all(len(each) >= 5 for each in found.values()), "the system does not forget its files"
    return figures_of(found, size)


def figures_of(found: dict[str, list[float]], size: int) -> list[Figure]:
    ours_words = "second start: the image found, built around, read and checked"
    figures = []
    for name, words, to, limit in (
        ("ours", ours_words, "reference", LIMIT),
        ("ours", f"{ours_words}; read around the page cache", "around", None),
        ("ordinary", "the same model loaded from its folder by transformers", "reference", None),
    ):
        seconds, raw = statistics.median(found[name]), statistics.median(found[to])
        figures.append(
            Figure(
                f"{words}, {size / 1e6:.0f} MB",
                f"{seconds:.3f} s",
                f"{raw:.3f} s (cold read of the image's bytes, {size / raw / 1e9:.2f} GB/s)",
                f"{seconds / raw:.2f}",
                "shown" if limit is None else f"<= {limit} x",
                limit is None or seconds <= limit * raw,
                f"{spread(found[name])} s; reference {spread(found[to])} s",
                tuple(found[name]),
            )
        )
    return figures


if __name__ == "__main__":
    sys.exit(present("second_start.py", __doc__, measure, notes=__doc__.split("\n\n", 2)[2].strip(), plot=plots.ratios))
