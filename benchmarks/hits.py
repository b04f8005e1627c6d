"""What a hit costs: a lease on a model that is on the device already.

    python benchmarks/hits.py
    python benchmarks/hits.py --write hits_NAME

The reference is a `functools.lru_cache` hit, which keeps nothing in place and counts nobody. Times are medians over
rounds in which ours and the reference take turns; an empty call is subtracted from all. The ratio and the time of a hit
each have a limit. Next to them stands what Python takes for an object of four fields that is made, entered, left and
dropped, and does nothing: a lease written in Python costs that and what it does. What a hit costs at 300 and at 30,000
tensors, and at ten and at 100,000 models, is compared.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable

import plots
import torch
from figures import Figure, present, spread

from modelcache import ModelCache

ROUNDS, CALLS = 9, 5_000
NUM_MANY = 100_000
FEW_TENSORS, MANY_TENSORS, WITHIN = 300, 30_000, 0.05


class Identity(torch.nn.Module):
    """A model whose forward costs nothing, so that what is left is ours."""

    def __init__(self, num_tensors: int = 1) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.ones(4), requires_grad=False) for _ in range(num_tensors)
        )

    def forward(self, x: object) -> object:
        return x


class Nothing:
    """The least that a lease could be: four fields and a ``with`` block. It counts nobody and returns nothing."""

    __slots__ = ("model", "name", "number", "place")

    def __init__(self, name: str, place: object, number: int, model: object) -> None:
        self.name = name
        self.place = place
        self.number = number
        self.model = model

    def __enter__(self) -> object:
        return self.model

    def __exit__(self, exc_type: object, exc: object, traceback: object) -> None:
        pass


def doing_nothing() -> None:
    with Nothing("model", None, 1, None):
        pass


@functools.lru_cache
def lookup(name: str) -> str:
    return name


def timed(*functions: Callable[[], object]) -> list[list[float]]:
    """Microseconds a call of each, per round; rounds interleaved, an empty call subtracted."""
    times: list[list[float]] = [[] for _ in functions]

    def once(function: Callable[[], object]) -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            function()
        return (time.perf_counter() - began) / CALLS * 1e6

    for function in functions:
        once(function)
    for number in range(ROUNDS):
        empty = once(lambda: None)
        turn = number % len(functions)
        order = list(range(len(functions)))
        for each in order[turn:] + order[:turn]:
            times[each].append(max(0.001, once(functions[each]) - empty))
    return times


def entering(cache: ModelCache, name: str) -> Callable[[], None]:
    def entered() -> None:
        with cache.get(name):
            pass

    return entered


def leasing(cache: ModelCache, name: str) -> Callable[[], None]:
    def leased() -> None:
        with cache.lease_many(name):
            pass

    return leased


def hits(cache: ModelCache) -> list[Figure]:
    """Next to `lru_cache`: the ratio and the time each have a limit."""
    handle = cache.get("model")
    handle(1)
    functions = (
        lambda: lookup("model"),
        doing_nothing,
        leasing(cache, "model"),
        entering(cache, "model"),
        lambda: handle(1),
    )
    lru, nothing, lease, block, call = timed(*functions)
    figures = []
    for what, found, most, most_us in (
        ("floor: an object and its with block, no lease", nothing, None, 5.0),
        ("hit: bare lease (lease_many of one)", lease, 8, 5.0),
        ("hit: with cache.get(name)", block, 16, 25.0),
        ("hit: call through a handle", call, None, 25.0),
    ):
        ratios = [a / b for a, b in zip(found, lru, strict=True)]
        ours, ratio = statistics.median(found), statistics.median(ratios)
        figures += [
            Figure(
                f"{what}, ratio",
                f"{ours:.2f} us",
                f"{statistics.median(lru):.3f} us (lru_cache hit)",
                f"{ratio:.0f}",
                "shown" if most is None else f"<= {most}",
                most is None or ratio <= most,
                spread(ratios),
                tuple(ratios),
            ),
            Figure(
                f"{what}, time",
                f"{ours:.2f} us",
                "-",
                "-",
                f"<= {most_us:.0f} us",
                ours <= most_us,
                f"{spread(found)} us",
                tuple(found),
            ),
        ]
    return figures


def at_any_size(cache: ModelCache) -> list[Figure]:
    """A hit does not look at the tensors."""
    sizes = {"few": FEW_TENSORS, "lots": MANY_TENSORS}
    for name, num_tensors in sizes.items():
        cache.register(name, functools.partial(Identity, num_tensors))
        with cache.get(name):
            pass
    figures = []
    for what, maker in (("bare lease", leasing), ("with cache.get(name)", entering)):
        few, lots = timed(maker(cache, "few"), maker(cache, "lots"))
        ratios = [a / b for a, b in zip(lots, few, strict=True)]
        ratio = statistics.median(ratios)
        figures.append(
            Figure(
                f"hit: {what}, {MANY_TENSORS:,} tensors",
                f"{statistics.median(lots):.2f} us",
                f"{statistics.median(few):.2f} us ({FEW_TENSORS} tensors)",
                f"{ratio:.3f}",
                f"within {WITHIN:.0%}",
                abs(ratio - 1) <= WITHIN,
                spread(ratios),
                tuple(ratios),
            )
        )
    return figures


def many(cache: ModelCache) -> list[Figure]:
    """A cache of ten models next to one of 100,000, their rounds interleaved."""
    for number in range(10 - len(cache)):
        cache.register(f"m{number}", Identity)
    with ModelCache(ram="64MiB", device="host_only", progress=False) as full:
        full.register("model", Identity)
        began = time.perf_counter()
        for number in range(NUM_MANY):
            full.register(f"m{number}", Identity)
        each_us = (time.perf_counter() - began) / NUM_MANY * 1e6
        full.get("model")  # Answered after every registration before it was taken note of.
        figures = [
            Figure("register, each of 100,000", f"{each_us:.1f} us", "-", "-", "<= 50 us", each_us <= 50, "one run")
        ]
        for what, maker in (("bare lease", leasing), ("with cache.get(name)", entering)):
            few, lots = timed(maker(cache, "model"), maker(full, "model"))
            ratios = [a / b for a, b in zip(lots, few, strict=True)]
            ratio = statistics.median(ratios)
            figures.append(
                Figure(
                    f"hit at 100,000 models: {what}",
                    f"{statistics.median(lots):.2f} us",
                    f"{statistics.median(few):.2f} us (hit at ten models)",
                    f"{ratio:.2f}",
                    "<= 3",
                    ratio <= 3,
                    spread(ratios),
                    tuple(ratios),
                )
            )
    return figures


def measure() -> list[Figure]:
    torch.set_grad_enabled(False)
    with ModelCache(ram="128MiB", device="host_only", progress=False) as cache:
        cache.register("model", Identity)
        return hits(cache) + at_any_size(cache) + many(cache)


if __name__ == "__main__":
    sys.exit(present("hits.py", __doc__, measure, notes=__doc__.split("\n\n", 2)[2].strip(), plot=plots.ratios))
