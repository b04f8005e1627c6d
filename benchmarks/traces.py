"""The workloads that are served in turn by the cache and its peers: which models, how much room, who is asked for when.

Sizes are those of a small machine with a simulated device, or of a GPU (`full`); one number scales them all. What is
asked for, and in which order, is the same at any size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MB, GB = 1_000_000, 1_000_000_000
TRACE = 120
ZIPF = 0.9
ROUNDING = MB  # room for what alignment adds to many small tensors


@dataclass(frozen=True)
class Shape:
    """A model: how many bytes in how many tensors."""

    size_bytes: int
    num_tensors: int


@dataclass(frozen=True)
class Workload:
    """Models, the room on the device, and the requests of each round.

    Attributes:
        key: Such as ``W1``.
        what: In words.
        models: By name.
        vram_bytes: The budget of every method.
        segment_bytes: The unit of moving, for methods that have one.
        requests: The names asked for in one round, by the number of the round.
    """

    key: str
    what: str
    models: dict[str, Shape]
    vram_bytes: int
    segment_bytes: int
    requests: Callable[[int], tuple[str, ...]]

    @property
    def size_bytes(self) -> int:
        """Of all models together."""
        return sum(shape.size_bytes for shape in self.models.values())


def _equal(num: int, size_bytes: int, num_tensors: int) -> dict[str, Shape]:
    return {f"m{number}": Shape(size_bytes, num_tensors) for number in range(num)}


def _cyclic(models: dict[str, Shape], num_requests: int) -> Callable[[int], tuple[str, ...]]:
    """Each in turn; a round goes on where the one before it ended."""
    names = tuple(models)
    return lambda number: tuple(names[(number * num_requests + each) % len(names)] for each in range(num_requests))


def _zipf(num_models: int, num_requests: int, *, is_shifting: bool) -> Callable[[int], tuple[str, ...]]:
    """Requests by Zipf's law; a shifting one makes other models the favourites in every round."""
    shares = 1 / np.arange(1, num_models + 1) ** ZIPF

    def requests(number: int) -> tuple[str, ...]:
        draw = np.random.default_rng(1000 + number).choice(num_models, num_requests, p=shares / shares.sum())
        order = np.random.default_rng(number if is_shifting else 0).permutation(num_models)
        return tuple(f"m{order[rank]}" for rank in draw)

    return requests


def workloads(*, full: bool, scale: float = 1.0, is_quick: bool = False) -> list[Workload]:
    """All that are served by one thread. `full` has the sizes for a GPU of 80 GB, where each method may use 40 GB."""

    def sized(small: int, large: int) -> int:
        return int((large if full else small) * scale / (4 if is_quick else 1)) // 4096 * 4096

    tiny, many = sized(8 * MB, 50 * MB), sized(100 * MB, 2 * GB)
    llm, third = sized(150 * MB, 16 * GB), sized(96 * MB, 12 * GB)
    encoder, transformer, vae = sized(60 * MB, 10 * GB), sized(120 * MB, 24 * GB), sized(20 * MB, GB)
    zipf, small = sized(4 * MB, 200 * MB), sized(MB, 25 * MB)
    segment = max(4096, sized(8 << 20, 64 << 20))
    num = TRACE // 4 if is_quick else TRACE
    equal = {"W1": _equal(20, tiny, 200), "W2": _equal(4, many, 3000), "W3": _equal(4, llm, 291)}
    pipeline = {"encoder": Shape(encoder, 200), "transformer": Shape(transformer, 700), "vae": Shape(vae, 250)}
    over = _equal(3, third, 128)
    found = [
        Workload(
            "W1",
            "20 tiny models in rotation, room for 5",
            equal["W1"],
            tiny * 21 // 4,
            segment,
            _cyclic(equal["W1"], 20),
        ),
        Workload(
            "W2",
            "4 models of 3,000 tensors in rotation, room for 2",
            equal["W2"],
            many * 17 // 8,
            segment,
            _cyclic(equal["W2"], 2),
        ),
        Workload(
            "W3",
            "4 models like LLMs in rotation, room for 2",
            equal["W3"],
            llm * 17 // 8,
            segment,
            _cyclic(equal["W3"], 6),
        ),
        Workload(
            "W4",
            "text encoder, transformer, VAE in turn, 80 % fit",
            pipeline,
            (encoder + transformer + vae) * 4 // 5,
            segment,
            _cyclic(pipeline, 6),
        ),
        Workload(
            "W5",
            "3 models in turn that are 107 % of the room",
            over,
            int(3 * third / 1.07),
            segment // 4,
            _cyclic(over, 6),
        ),
    ]
    for key, count, size, room in (("W6-40", 40, zipf, 10), ("W6-40s", 40, zipf, 10), ("W6-400", 400, small, 100)):
        is_shifting = key.endswith("s")
        words = ", other favourites in every round" if is_shifting else ""
        what = f"Zipf {ZIPF} over {count} models, room for {room}{words}"
        models = _equal(count, size, 20 if count == 40 else 10)
        requests = _zipf(count, num, is_shifting=is_shifting)
        found.append(Workload(key, what, models, size * room + ROUNDING, segment, requests))
    return found
