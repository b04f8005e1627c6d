"""Hits from many threads, alone and while another model is on its way to the device.

    python benchmarks/concurrency.py
    python benchmarks/concurrency.py --device cuda:0
    python benchmarks/concurrency.py --write concurrency_NAME

W7: 1 to 32 threads, 95 of 100 requests on models that are on the device, the others on one of two that do not fit
together. The hits of n threads together are divided by those of one thread in the same round. The reference of the
hits during a promotion is the same hit, just before it. Each hit is `lease_many` of one name, entered and left.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import plots
import torch
from figures import Figure, Setup, present, spread
from peers import Cache
from stage import opened, write_models
from traces import MB, Shape, Workload

from modelcache import ModelCache

THREADS = (1, 2, 4, 8, 16, 32)
ROUND_S, NUM_ROUNDS = 0.25, 9
LIMIT = 0.95


def together(num_threads: int, work: Callable[[int, Callable[[], bool]], int], seconds: float = ROUND_S) -> float:
    """What `work` counts in all threads, a second; it is called with a number and with what says it is over."""
    begin, end = threading.Barrier(num_threads + 1), threading.Event()
    counts = [0] * num_threads

    def run(number: int) -> None:
        begin.wait()
        counts[number] = work(number, end.is_set)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    begin.wait()
    began = time.perf_counter()
    end.wait(seconds)
    end.set()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def hitting(cache: ModelCache, names: tuple[str, ...]) -> Callable[[int, Callable[[], bool]], int]:
    """Nothing but hits; each thread on one of the models."""

    def work(number: int, is_over: Callable[[], bool]) -> int:
        name, count = names[number % len(names)], 0
        while not is_over():
            for _ in range(100):
                with cache.lease_many(name):
                    pass
            count += 100
        return count

    return work


def mixing(cache: ModelCache, hot: tuple[str, ...], cold: tuple[str, ...]) -> Callable[[int, Callable[[], bool]], int]:
    """95 hits, then five requests for models that may not be there."""

    def work(number: int, is_over: Callable[[], bool]) -> int:
        count = 0
        while not is_over():
            for each in range(100):
                name = cold[(number + count // 100) % len(cold)] if each >= 95 else hot[number % len(hot)]
                with cache.lease_many(name):
                    pass
            count += 100
        return count

    return work


def scaling(what: str, by_threads: dict[int, list[float]], limit_at: int | None) -> list[Figure]:
    figures = []
    for num, rates in by_threads.items():
        if num == 1:
            continue
        ratios = [a / b for a, b in zip(rates, by_threads[1], strict=True)]
        ratio = statistics.median(ratios)
        has_limit = num == limit_at
        figures.append(
            Figure(
                f"{what}, {num} threads",
                f"{statistics.median(rates) / 1e3:.1f} thousand a second",
                f"{statistics.median(by_threads[1]) / 1e3:.1f} thousand a second (one thread)",
                f"{ratio:.3f}",
                f">= {LIMIT}" if has_limit else "shown",
                not has_limit or ratio >= LIMIT,
                spread(ratios),
                tuple(ratios),
            )
        )
    return figures


def in_rounds(work: Callable[[int, Callable[[], bool]], int], num_rounds: int) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {num: [] for num in THREADS}
    for number in range(num_rounds):
        turn = number % len(THREADS)
        for num in THREADS[turn:] + THREADS[:turn]:
            found[num].append(together(num, work))
    return found


def hits_during_promotions(cache: ModelCache, hot: str, cold: str, num_rounds: int) -> list[Figure]:
    """Each hit's time while a model is on its way, by one thread that does nothing else."""

    def hits_until(is_over: Callable[[], bool], most: int) -> list[float]:
        found = []
        while not is_over() and len(found) < most:
            began = time.perf_counter_ns()
            with cache.lease_many(hot):
                pass
            found.append(time.perf_counter_ns() - began)
        return found

    quiet, busy = [], []
    for _ in range(num_rounds):
        cache.park(cold)
        with cache.lease_many(hot):
            pass
        quiet.append(sorted(hits_until(lambda: False, 5_000)))
        promotion = cache.prefetch(cold)
        busy.append(sorted(hits_until(promotion.done, 10**9)))
        promotion.result()
    figures = []
    for share, words in ((0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")):
        ours = [times[int(len(times) * share)] / 1e3 for times in busy if times]
        reference = [times[int(len(times) * share)] / 1e3 for times in quiet]
        ratios = [a / b for a, b in zip(ours, reference, strict=True)]
        figures.append(
            Figure(
                f"a hit during another model's promotion, {words} of about {len(busy[-1]):,}",
                f"{statistics.median(ours):.2f} us",
                f"{statistics.median(reference):.2f} us (before it)",
                f"{statistics.median(ratios):.2f}",
                "shown",
                True,
                f"{spread(ours)} us",
                tuple(ours),
            )
        )
    return figures


def measure(setup: Setup | None = None) -> list[Figure]:
    setup = setup or Setup()
    torch.set_grad_enabled(False)
    size = 200 * MB if not setup.is_quick else 20 * MB
    models = {f"hot{number}": Shape(MB, 20) for number in range(4)} | {
        "cold0": Shape(size, 300),
        "cold1": Shape(size, 300),
    }
    room = 4 * MB + size + size // 2
    workload = Workload("W7", "threads", models, room, 8 << 20, lambda _round: tuple(models))
    hot, cold = tuple(models)[:4], tuple(models)[4:]
    num_rounds = 2 if setup.is_quick else NUM_ROUNDS
    with ExitStack() as stack:
        files = write_models(workload, Path(stack.enter_context(TemporaryDirectory())))
        books = stack.enter_context(opened(setup.device, room))
        method = Cache(workload, files, books)
        stack.callback(method.close)
        x = torch.arange(4, dtype=torch.float32, device=books.torch_device)
        for name in (*cold, *hot):
            method.serve(name, x)
        for name in hot:
            method.cache.pin(name)
        hits = scaling("hits", in_rounds(hitting(method.cache, hot), num_rounds), 8)
        during = hits_during_promotions(method.cache, hot[0], cold[0], num_rounds)
        mixed = scaling(
            "W7: 95 % hits, 5 % on two that do not fit", in_rounds(mixing(method.cache, hot, cold), 3), None
        )
        peak = books.peak_bytes()
        over = 0.0 if peak is None else peak / room
        counters = method.cache.status().counters
    lost = counters.refusals + counters.timeouts
    return [
        *hits,
        *during,
        *mixed,
        Figure("W7: requests that failed", str(lost), "-", "-", "0", lost == 0, "one run"),
        Figure("W7: peak on the device", f"{over:.4f} x budget", "-", "-", "<= 1.0", over <= 1, "one run"),
    ]


if __name__ == "__main__":
    sys.exit(
        present(
            "concurrency.py", __doc__, measure, notes=__doc__.split("\n\n", 2)[2].strip(), setup=True, plot=plots.ratios
        )
    )
