"""Several models, too little room, one thread: the cache and its peers on the same requests.

    python benchmarks/workloads.py                    # the simulated device
    python benchmarks/workloads.py --device cuda:0    # a GPU, as large as it has room for
    python benchmarks/workloads.py --quick            # to see that it works
    python benchmarks/workloads.py --write workloads_NAME

Every method first shows that each model's weights and one forward are bit for bit those of its file. Then rounds, in
which each serves the same requests in turn; who begins rotates. A switch is a request whose model was not on the device
as a whole, from the request until the result of one forward. It is divided by one flat copy of the model's bytes from
page-locked RAM, taken in the same round: 1.0 is the speed of the link, and less is possible for who kept a part.
Afterwards every result is compared again. What a method does while it is idle is not timed: the cache looks at unused
copies for writes, also in the others' turns. p99 is of all switches of all rounds; of fewer than 100 it is the longest.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import plots
import psutil
import torch
from figures import Figure, Setup, absent, present, spread
from peers import METHODS, Cache, CannotRunError, Method, as_words
from safetensors.torch import load_file
from stage import empty_net, flat, opened, write_models
from traces import Workload, workloads

MOST_CHECKED = 8  # models of each method, weight by weight; all of them by their forward


@dataclass
class Served:
    """What became of one method: seconds by round, of switches and of all requests, and what else it did."""

    method: Method
    switches: list[list[tuple[str, float]]] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    num_requests: int = 0
    crossed_bytes: int = 0
    failures: list[str] = field(default_factory=list)


def expectations(files: dict[str, Path], x: torch.Tensor, workload: Workload) -> dict[str, torch.Tensor]:
    """What each model answers, by its file."""
    found = {}
    for name, path in files.items():
        model = empty_net(workload.models[name])
        model.load_state_dict(load_file(path), assign=True)
        found[name] = model(x).clone()
    return found


def check(served: Served, x: torch.Tensor, expected: dict[str, torch.Tensor]) -> None:
    """Every model answers right; of some, every weight on the device is that of the file."""
    method = served.method
    for number, name in enumerate(expected):
        if not torch.equal(method.serve(name, x).cpu(), expected[name]):
            raise AssertionError(f"{method.label}: {name} answers wrong")
        method.after()
        if number < MOST_CHECKED:
            there = load_file(method.files[name])
            for key, weight in method.weights(name).items():
                if weight.device != method.place or not torch.equal(weight.cpu(), there[key]):
                    raise AssertionError(f"{method.label}: {key} of {name} is wrong or elsewhere")
                del weight  # or it would keep its memory on the device
    method.rest()
    method.books.forget_peak()


def serve_round(served: Served, names: Sequence[str], x: torch.Tensor, expected: dict[str, torch.Tensor]) -> None:
    method, books = served.method, served.method.books
    switches, answers, total = [], [], 0.0
    before = books.crossed_bytes(), method.moved_bytes
    for name in names:
        was_ready = method.is_ready(name)
        began = time.perf_counter()
        try:
            answer = method.serve(name, x)
            books.synchronize()
        except Exception as error:  # noqa: BLE001 (a failed request is counted and named)
            served.failures.append(as_words(error))
            continue
        took = time.perf_counter() - began
        method.after()
        total += took
        answers.append((name, answer))
        if not was_ready:
            switches.append((name, took))
    method.rest()
    served.switches.append(switches)
    served.total_s.append(total)
    served.num_requests += len(names)
    now = books.crossed_bytes()
    served.crossed_bytes += method.moved_bytes - before[1] if now is None or before[0] is None else now - before[0]
    for name, answer in answers:
        if not torch.equal(answer.cpu(), expected[name]):
            raise AssertionError(f"{method.label}: {name} answers wrong")


def run(workload: Workload, setup: Setup) -> list[Figure]:
    """All methods through one workload."""
    chosen = [m for m in METHODS if not setup.methods or any(word in m.label for word in setup.methods)]
    figures: list[Figure] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = write_models(workload, folder)
        x = torch.arange(4, dtype=torch.float32)
        expected = expectations(files, x, workload)
        sizes = sorted({shape.size_bytes for shape in workload.models.values()})
        copy = stack.enter_context(flat(setup.device, sizes[-1]))
        everybody: list[Served] = []
        for kind in chosen:
            try:
                books = stack.enter_context(opened(setup.device, workload.vram_bytes))
                served = Served(kind(workload, files, books))
                stack.callback(served.method.close)
                served_x = x.to(books.torch_device)
                check(served, served_x, expected)
            except CannotRunError as error:
                figures.append(absent(f"{workload.key} {kind.label}", str(error)))
            except Exception as error:  # noqa: BLE001 (a peer that fails has a row that says how)
                if issubclass(kind, Cache):
                    raise
                figures.append(absent(f"{workload.key} {kind.label}", f"failed: {as_words(error)}"))
            else:
                everybody.append(served)
        limits: list[dict[int, float]] = []
        for number in range(setup.num_rounds):
            limits.append({size: statistics.median(copy(size) for _ in range(3)) for size in sizes})
            turn = number % len(everybody)
            for served in everybody[turn:] + everybody[:turn]:
                serve_round(served, workload.requests(number), x.to(served.method.place), expected)
        return [figure_of(workload, served, limits, everybody[0]) for served in everybody] + figures


def figure_of(workload: Workload, served: Served, limits: list[dict[int, float]], first: Served) -> Figure:
    """The row of one method."""
    shapes, method = workload.models, served.method
    ratios = [
        statistics.median(took / limit[shapes[name].size_bytes] for name, took in switches)
        for switches, limit in zip(served.switches, limits, strict=True)
        if switches
    ]
    every = sorted(took for switches in served.switches for _, took in switches)
    copies = [
        limit[shapes[name].size_bytes] for one, limit in zip(served.switches, limits, strict=True) for name, _ in one
    ]
    label = f"{workload.key} {method.label}"
    if not every:
        return absent(label, f"no switch; {len(served.failures)} failures")
    asked = served.num_requests
    paired = [theirs / ours for theirs, ours in zip(served.total_s, first.total_s, strict=True)]
    peak = method.books.peak_bytes()
    is_ours = isinstance(method, Cache)
    over = None if peak is None else peak / method.books.budget_bytes
    return Figure(
        label,
        f"{statistics.median(every) * 1e3:.2f} ms",
        f"{statistics.median(copies) * 1e3:.2f} ms (flat copy)",
        f"{statistics.median(ratios):.2f}",
        "no failure" if is_ours else "shown",
        not (is_ours and served.failures),
        spread(ratios),
        tuple(ratios),
        {
            "p99 of switches": f"{every[min(len(every) - 1, int(len(every) * 0.99))] * 1e3:.2f} ms",
            "switches": f"{len(every) / asked:.0%} of requests",
            "MB moved a request": f"{served.crossed_bytes / asked / 1e6:.2f}",
            "a request, mean": f"{sum(served.total_s) / asked * 1e3:.2f} ms",
            "all requests / the cache's": f"{statistics.median(paired):.2f} ({spread(paired)})",
            "peak on the device / budget": "-" if over is None else f"{over:.3f}",
            "failures": f"{len(served.failures)}" + (f" ({served.failures[0]})" if served.failures else ""),
        },
        workload.what,
    )


def scale_of(setup: Setup) -> float:
    """As large as the device and RAM have room for all methods side by side."""
    if setup.scale:
        return setup.scale
    if setup.device == "simulated":
        return 1.0
    num = len(setup.methods) or len(METHODS)
    whole = workloads(full=True)
    on_device = torch.cuda.mem_get_info(setup.device)[0] * 0.8 / (num * max(each.vram_bytes for each in whole))
    in_ram = psutil.virtual_memory().available * 0.6 / ((num + 1) * max(each.size_bytes for each in whole))
    return min(1.0, on_device, in_ram)


def measure(setup: Setup | None = None) -> list[Figure]:
    setup = setup or Setup()
    torch.set_grad_enabled(False)
    scale = scale_of(setup)
    found = workloads(full=setup.device != "simulated", scale=scale, is_quick=setup.is_quick)
    figures = []
    for each in found:
        began = time.perf_counter()
        figures += run(each, setup)
        print(f"  {each.key}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return figures


def notes() -> str:
    lines = [f"- {kind.label}: {kind.note}" for kind in METHODS]
    return __doc__.split("\n\n", 2)[2].strip() + "\n\nMethods:\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(present("workloads.py", __doc__, measure, notes=notes(), setup=True, plot=plots.bars_by_workload))
