"""The trace served by a cache, with or without prefetching the model of the next request while this one is answered."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelcache import ModelCache
from modelcache.demo.accelerator import Accelerator
from modelcache.demo.cold_files import forget_pages
from modelcache.demo.records import (
    Budgets,
    CacheRun,
    Compared,
    LeftBehind,
    MoveFact,
    Outcome,
    Sample,
    Served,
    Told,
)
from modelcache.demo.reloading import weights_of
from modelcache.demo.variants import WORKSPACE_BYTES, Request, Workload
from modelcache.demo.watching import MoveLines, Watch

if TYPE_CHECKING:
    from modelcache import CacheStats, Counters, MoveEvent

_DISK_BYTES = 1 << 30
_SEGMENT_BYTES = 16 << 20
_LONGEST_WAIT_S = 30.0

#: Shown each snapshot of the cache.
Show = Callable[["CacheStats"], None]
#: Told how many requests are done.
Tell = Callable[[int], None]


def serve_cached(
    workload: Workload,
    requests: Sequence[Request],
    accelerator: Accelerator,
    budgets: Budgets,
    image_dir: Path,
    show: Show,
    tell: Tell,
    *,
    with_prefetch: bool,
) -> CacheRun:
    """Serve the trace with a cache, look at what the cache did, close it, and look at what it left behind."""
    threads_before = set(threading.enumerate())
    bytes_before = accelerator.allocated_bytes()
    heard: list[MoveEvent] = []
    with MoveLines() as lines:
        with ModelCache(
            vram=budgets.vram_bytes,
            ram=budgets.ram_bytes,
            disk=_DISK_BYTES,
            device=accelerator.device,
            image_dir=image_dir,
            segment=_SEGMENT_BYTES,
            progress=False,
        ) as cache:
            cache.on("move", heard.append)
            for variant in workload.variants:
                cache.register(variant.name, variant.loader, workspace=WORKSPACE_BYTES, **variant.options)
            watch = Watch(cache, workload.names, accelerator.allocated_bytes, show)
            run = _Run(cache, workload, accelerator.torch_device, watch.began_s, tell, image_dir)
            try:
                run.serve(requests, with_prefetch=with_prefetch)
            finally:
                samples = watch.stop()
            outcome = run.outcome(samples, with_prefetch=with_prefetch)
            compared = _compare(cache, workload, accelerator.torch_device)
        told = _told(cache.events(), heard, lines.num_lines)
    del cache, watch, run
    gc.collect()
    left = LeftBehind(
        tuple(thread.name for thread in threading.enumerate() if thread not in threads_before),
        tuple(str(path) for path in image_dir.rglob("*") if path.is_file() and path.parent.name != "kept"),
        accelerator.allocated_bytes() - bytes_before,
    )
    return CacheRun(outcome, told, compared, left)


class _Run:
    """Serves requests one after the other and notes when what happened."""

    def __init__(
        self,
        cache: ModelCache,
        workload: Workload,
        device: torch.device,
        began_s: float,
        tell: Tell,
        image_dir: Path,
    ) -> None:
        self._image_dir = image_dir
        self._cache, self._workload, self._device, self._tell = cache, workload, device, tell
        self._began_s = began_s
        self._served: list[Served] = []
        self._answers: list[torch.Tensor] = []
        self._prefetches: list[Any] = []
        self._seconds = 0.0

    def serve(self, requests: Sequence[Request], *, with_prefetch: bool) -> None:
        """All of them, in order."""
        before: Request | None = None
        for request, following in zip(requests, [*requests[1:], None], strict=True):
            ahead = following if with_prefetch and following is not None else None
            self._one(request, before, ahead)
            before = request
        self._seconds = self._now_s()
        # One that is given up because leases left no room has its reason as its error; it is no failure of the run.
        wait(self._prefetches, _LONGEST_WAIT_S)

    def _one(self, request: Request, before: Request | None, ahead: Request | None) -> None:
        forget_pages((*self._workload.files, *self._image_dir.rglob("*.image")))
        hits = self._cache.status().counters
        asked_s = self._now_s()
        with self._cache.get(request.model, timeout=_LONGEST_WAIT_S) as model:
            ready_s = self._now_s()
            if ahead is not None and ahead.model != request.model:
                self._prefetches.append(self._cache.prefetch(ahead.model))
            self._answers.append(self._workload.answer(model, request, self._device))
        done_s = self._now_s()
        tier = _tier_found(hits, self._cache.status().counters)
        is_switch = before is None or before.model != request.model
        self._served.append(Served(request, tier, is_switch, asked_s, ready_s, done_s))
        self._tell(len(self._served))

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def outcome(self, samples: tuple[Sample, ...], *, with_prefetch: bool) -> Outcome:
        """What the run leaves behind."""
        moves = tuple(_fact(event) for event in self._cache.events())
        links: Counter[str] = Counter()
        for move in moves:
            links[move.link] += move.copied_bytes
        return Outcome(
            "prefetch" if with_prefetch else "cache",
            "modelcache, with prefetch" if with_prefetch else "modelcache",
            tuple(self._served),
            tuple(self._answers),
            self._seconds,
            {link: size for link, size in links.items() if size},
            moves,
            samples,
        )


def _tier_found(before: Counters, after: Counters) -> str:
    """Which of the counts went up."""
    if after.disk_hits > before.disk_hits:
        return "disk"
    return "ram" if after.ram_hits > before.ram_hits else "vram"


def _fact(event: MoveEvent) -> MoveFact:
    return MoveFact(
        event.seq,
        event.model,
        str(event.kind),
        str(event.source),
        str(event.target),
        max(0.0, event.at_s - event.seconds),
        event.at_s,
        event.size_bytes,
        event.copied_bytes,
        str(event.reason),
        event.on_behalf_of or "",
        event.vram_bytes,
        event.ram_bytes,
    )


def _told(events: Sequence[MoveEvent], heard: Sequence[MoveEvent], num_lines: int) -> Told:
    numbers = [event.seq for event in events]
    num_gaps = (max(numbers) - len(set(numbers))) if numbers else 0
    return Told(len(events), len(heard), num_lines, num_gaps, Counter(str(event.reason) for event in events))


def _compare(cache: ModelCache, workload: Workload, device: torch.device) -> Compared:
    """Each model as the cache has it now, with the same model outside; and the digits, all that were kept back."""
    num_equal = num_tensors = num_right = 0
    for variant in workload.variants:
        outside = weights_of(variant.load())
        with cache.get(variant.name, timeout=_LONGEST_WAIT_S) as model:
            inside = weights_of(model)
            num_tensors += len(outside)
            num_equal += sum(
                name in inside and inside[name].dtype == tensor.dtype and torch.equal(inside[name].cpu(), tensor)
                for name, tensor in outside.items()
            )
            if variant.name == workload.cnn:
                with torch.inference_mode():
                    logits = model(workload.digits.images.to(device)).cpu()
                num_right = int((logits.argmax(1) == workload.digits.labels).sum())
    return Compared(num_equal, num_tensors, num_right, len(workload.digits.labels))
