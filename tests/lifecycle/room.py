"""A real cache with real models on the simulated device, whose every step can be made to stand still; time by hand."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modelcache.cache import ModelCache
from modelcache.testing import FakeClock, FakePool, Faults, SimulatedDevice
from modelcache.wiring import Parts, assemble

#: Of each model: four segments of one layer each.
LAYERS, LAYER_BYTES = 4, 32 * 32 * 4
MODEL_BYTES = LAYERS * LAYER_BYTES
#: How long a thread may take to get somewhere, in real seconds.
PATIENCE_S = 10.0


class Stop:
    """A place where whoever comes stands still until it is let go."""

    def __init__(self) -> None:
        self.reached, self._go = threading.Event(), threading.Event()

    def stand(self) -> None:
        self.reached.set()
        self._go.wait()

    def wait_reached(self) -> None:
        assert self.reached.wait(PATIENCE_S), "nobody came"

    def release(self) -> None:
        self._go.set()

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def net(name: str) -> torch.nn.Module:
    """The model of that name; the same bits every time."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    layers = [torch.nn.Linear(32, 32, bias=False) for _ in range(LAYERS)]
    for layer in layers:
        layer.weight.data.copy_(torch.randn(32, 32, generator=generator))
    return torch.nn.Sequential(*layers).requires_grad_(requires_grad=False)


def bits(model: torch.nn.Module) -> bytes:
    """Its weights, wherever they are."""
    return b"".join(bytes(each.detach().cpu().contiguous().view(torch.uint8).numpy()) for each in model.parameters())


def until(fact: Callable[[], bool], what: str) -> None:
    """Wait, without a clock of the cache, until other threads have made something so."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.002)):
        if fact():
            return
        pause.wait(0.002)
    raise AssertionError(f"never came to be: {what}")


class Room:
    """A real cache; budgets in models.

    Args:
        folder: For image files.
        options: Further keywords of `ModelCache`.
    """

    def __init__(
        self, folder: Path, *, vram: int = 3, ram: int = 8, disk: int = 4, gauge: Any = None, **options: Any
    ) -> None:
        self.faults = Faults()
        self.device = SimulatedDevice(2 * vram * MODEL_BYTES, link_bytes_per_s=None, faults=self.faults)
        self.images = folder / "images"
        given: dict[str, Any] = dict.fromkeys(
            ("page_locked", "ram_spare", "memory", "policy", "when_full", "idle", "pressure", "max_waiters")
        )
        given |= {"vram": vram * MODEL_BYTES, "ram": ram * MODEL_BYTES, "disk": disk * MODEL_BYTES * 2}
        given |= {"device": self.device, "segment": LAYER_BYTES, "image_dir": self.images, "progress": False}
        given |= {"lease_sites": None, **options}
        self.clock, self.pool = FakeClock(), FakePool()
        parts: Parts = replace(assemble(given), clock=self.clock, pool=self.pool, gauge=gauge)
        self.cache = ModelCache._of(parts)
        self.mover: Any = parts.mover

    def add(self, *names: str, at: Stop | None = None, **options: Any) -> None:
        """Register models; their loaders stand still at `at`."""
        for name in names:

            def load(name: str = name) -> torch.nn.Module:
                if at is not None:
                    at.stand()
                return net(name)

            self.cache.register(name, load, **{"size": MODEL_BYTES, "reload": True, **options})

    def use(self, *names: str) -> None:
        for name in names:
            with self.cache.get(name) as model:
                model(torch.ones(1, 32, device=self.device.name))
            del model

    def hold_writes(self, nth: int = 1) -> Stop:
        """The nth write to an image file stands still."""
        stop, files, number = Stop(), self.mover._tiers.files, iter(range(1, 1 << 30))
        write = files._write

        def standing(descriptor: int, data: memoryview) -> int:
            if next(number) == nth:
                stop.stand()
            return write(descriptor, data)

        files._write = standing
        return stop

    def answers_right(self, name: str) -> bool:
        with self.cache.get(name) as model:
            return bits(model) == bits(net(name))


class Footprint:
    """What this process holds of the system: threads of ours, open files, and files below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._now()

    def _now(self) -> tuple[set[str], list[str], list[str]]:
        threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("modelcache")}
        files = sorted(str(path) for path in self._folder.rglob("*"))
        return threads, _descriptors(), files

    def require_unchanged(self) -> None:
        """Nothing more is held than at the start."""
        gc.collect()
        now = self._now()
        assert now == self._before, f"left behind: {now}, before: {self._before}"


def _descriptors() -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # the one that reads this folder
        if not target.endswith("/fd"):
            found.append(f"{entry.name}: {target}")
    return sorted(found)
