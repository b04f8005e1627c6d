"""The demo from beginning to end."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from modelcache.demo import digits
from modelcache.demo.accelerator import label, opened
from modelcache.demo.chrome_trace import write_trace
from modelcache.demo.dispatched import rescue
from modelcache.demo.page import write_page
from modelcache.demo.picture import write_picture
from modelcache.demo.records import Budgets, CacheRun, Outcome, Rescue, Title
from modelcache.demo.reloading import delete_and_reload, size_of
from modelcache.demo.report import print_report
from modelcache.demo.screen import Screen
from modelcache.demo.serving import serve_cached
from modelcache.demo.variants import WORKSPACE_BYTES, Request, Workload
from modelcache.demo.verdicts import verdicts
from modelcache.demo.weights import DamagedWeightsError, SentenceModel, sentence_model

_LOUD = ("transformers", "torchao", "torch.utils._pytree", "accelerate")


def play(*, synthetic: bool, out: Path, num_requests: int, seed: int) -> int:
    """Run every act; 0 if all checks passed."""
    screen = Screen()
    with tempfile.TemporaryDirectory(prefix="modelcache-demo-") as folder, _hushed(), _one_thread():
        try:
            sentences = sentence_model(Path(folder), synthetic=synthetic, seed=seed)
        except DamagedWeightsError as error:
            screen.say(f"error: {error}", "bold red")
            return 1
        return _Play(screen, Path(folder), sentences, out).run(num_requests, seed)


class _Play:
    """The acts, with what they share."""

    def __init__(self, screen: Screen, folder: Path, sentences: SentenceModel, out: Path) -> None:
        self._screen, self._folder, self._sentences, self._out = screen, folder, sentences, out
        self._title = Title(sentences.label, label(), sentences.is_real)

    def run(self, num_requests: int, seed: int) -> int:
        """All acts in order."""
        began_s = time.perf_counter()
        self._screen.act(self._title.line)
        self._act("training a small network on handwritten digits")
        workload = Workload(self._sentences, digits.train(self._folder, seed))
        sizes = {variant.name: size_of(variant.load()) for variant in workload.variants}
        budgets = _budgets(list(sizes.values()))
        requests = workload.requests(num_requests, seed)

        rescued = self._rescue(budgets)
        reload = self._reload(workload, requests, budgets)
        runs = [self._serve(workload, requests, budgets, with_prefetch=ahead) for ahead in (False, True)]
        checks = verdicts(rescued, reload, runs, budgets)
        outcomes = [reload, *(run.outcome for run in runs)]

        self._out.mkdir(parents=True, exist_ok=True)
        page, picture, trace = (self._out / name for name in ("report.html", "switches.svg", "trace.json"))
        write_page(page, self._title, workload, sizes, budgets, rescued, outcomes, checks)
        write_picture(picture, self._title, workload, budgets, outcomes)
        write_trace(trace, outcomes, workload.names, self._sentences.label)
        self._screen.say(f"done in {time.perf_counter() - began_s:.1f} s")
        print_report(self._title, outcomes, checks)
        print(f"page: {page}   picture: {picture}   trace: {trace} (open it in ui.perfetto.dev)")
        return 0 if all(check.holds for check in checks) else 1

    def _act(self, text: str) -> None:
        self._screen.act(text + self._title.mark)

    def _rescue(self, budgets: Budgets) -> Rescue:
        self._act("a model that accelerate split over CPU and disk")
        with opened(budgets.vram_bytes) as accelerator:
            rescued = rescue(self._sentences, accelerator, budgets, self._folder)
        self._screen.say(f'  .to("cpu"): {rescued.to_error}', "red")
        self._screen.say(f"  .cpu():     {rescued.cpu_error}", "red")
        for check in rescued.checks[2:]:
            self._screen.say(f"  {'✓' if check.holds else '✗'} {check.claim}: {check.number}")
        return rescued

    def _reload(self, workload: Workload, requests: tuple[Request, ...], budgets: Budgets) -> Outcome:
        self._act(f"{len(requests)} requests for {len(workload.variants)} models, deleting and reloading")
        with opened(budgets.vram_bytes) as accelerator, self._screen.run("delete and reload", len(requests)) as view:
            return delete_and_reload(workload, requests, accelerator.torch_device, view.tell)

    def _serve(
        self, workload: Workload, requests: tuple[Request, ...], budgets: Budgets, *, with_prefetch: bool
    ) -> CacheRun:
        title = "modelcache, with prefetch" if with_prefetch else "modelcache"
        self._act(f"the same {len(requests)} requests through {title}")
        images = self._folder / ("images-prefetch" if with_prefetch else "images")
        with opened(budgets.vram_bytes) as accelerator, self._screen.run(title, len(requests)) as view:
            return serve_cached(
                workload, requests, accelerator, budgets, images, view.show, view.tell, with_prefetch=with_prefetch
            )


def _budgets(sizes: list[int]) -> Budgets:
    """VRAM for the two largest models and their workspaces, RAM for the four largest."""
    ordered = sorted(sizes, reverse=True)
    return Budgets(_rounded(sum(ordered[:2]) + 2 * WORKSPACE_BYTES), _rounded(sum(ordered[:4])))


def _rounded(size_bytes: int) -> int:
    unit = 1 << 20
    return -(-size_bytes // unit) * unit


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread.

    The models are small, the copies and checks of the cache run beside them, and where other programs want the cores
    too, threads that wait for each other wait for long. Each run of the trace has the same.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep the libraries' bars and remarks off the terminal while the demo runs."""
    logs = [logging.getLogger(name) for name in _LOUD]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)
            transformers.logging.enable_progress_bar()
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)
