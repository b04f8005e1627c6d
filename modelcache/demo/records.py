"""What the runs of the demo leave behind: plain facts for the checks, the page and the trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from modelcache.demo.variants import Request

TIERS = ("vram", "ram", "disk")


@dataclass(frozen=True, slots=True)
class Served:
    """One request that was answered. Times are seconds since the run began.

    Attributes:
        request: Which.
        tier: Where its model was found: ``vram``, ``ram`` or ``disk``.
        is_switch: The request before it wanted another model.
        asked_s: When it was asked for.
        ready_s: When the model was usable.
        done_s: When the answer was there.
    """

    request: Request
    tier: str
    is_switch: bool
    asked_s: float
    ready_s: float
    done_s: float

    @property
    def wait_s(self) -> float:
        """From asking for the model to having it."""
        return self.ready_s - self.asked_s


@dataclass(frozen=True, slots=True)
class MoveFact:
    """One move, as its event told it.

    Attributes:
        start_s: When the mover began; `end_s`: when it was committed.
        size_bytes: What the destination gained or the source gave up; `copied_bytes` of it crossed a link.
    """

    number: int
    model: str
    kind: str
    source: str
    target: str
    start_s: float
    end_s: float
    size_bytes: int
    copied_bytes: int
    reason: str
    on_behalf_of: str
    vram_bytes: int
    ram_bytes: int

    @property
    def link(self) -> str:
        """Such as ``"ram to vram"``."""
        return f"{self.source} to {self.target}"


@dataclass(frozen=True, slots=True)
class Sample:
    """The tiers at one instant.

    Attributes:
        at_s: Seconds since the run began.
        held: Tier -> bytes per model, in the order of the workload.
        vram_charged_bytes: What the books of VRAM say: held, workspaces, promised and draining; `ram_charged_bytes`
            likewise.
        allocated_bytes: What the device itself says, activations included.
    """

    at_s: float
    held: Mapping[str, tuple[int, ...]]
    vram_charged_bytes: int
    ram_charged_bytes: int
    allocated_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of the whole trace.

    Attributes:
        key: ``reload``, ``cache`` or ``prefetch``.
        title: For people.
        served: The requests, in order.
        answers: Their answers, in the same order.
        seconds: Of the whole run.
        link_bytes: Link -> bytes that crossed it.
        moves: What moved, and `samples`, the tiers over time; nothing for the run without a cache.
    """

    key: str
    title: str
    served: tuple[Served, ...]
    answers: tuple[torch.Tensor, ...]
    seconds: float
    link_bytes: Mapping[str, int]
    moves: tuple[MoveFact, ...] = ()
    samples: tuple[Sample, ...] = ()

    @property
    def moved_bytes(self) -> int:
        """Over all links."""
        return sum(self.link_bytes.values())

    @property
    def hits(self) -> dict[str, int]:
        """How many requests found their model on each tier."""
        return {tier: sum(served.tier == tier for served in self.served) for tier in TIERS}

    @property
    def switch_s(self) -> list[float]:
        """How long each switch to another model took, shortest first."""
        return sorted(served.wait_s for served in self.served if served.is_switch)

    @property
    def waited_s(self) -> float:
        """Over all requests."""
        return sum(served.wait_s for served in self.served)


def quantile(ordered: list[float], share: float) -> float:
    """A quantile of sorted numbers by the nearest rank; 0 of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass(frozen=True, slots=True)
class Check:
    """Something the demo claims, whether it held, and the number that says so."""

    claim: str
    holds: bool
    number: str


@dataclass(frozen=True, slots=True)
class Rescue:
    """What became of a model that accelerate had dispatched over CPU and disk.

    Attributes:
        to_error: What ``.to("cpu")`` said; `cpu_error`, what ``.cpu()`` said.
        num_meta: Tensors that were on the meta device.
        size_bytes: Of the whole model.
        checks: What was found afterwards.
    """

    to_error: str
    cpu_error: str
    num_meta: int
    size_bytes: int
    seconds: float
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """How often each move was told of: they must agree.

    Attributes:
        num_events: In the cache's own list.
        num_heard: Given to a subscriber.
        num_lines: INFO lines in the log.
        num_gaps: Numbers missing between the first event and the last.
        reasons: Reason -> moves.
    """

    num_events: int
    num_heard: int
    num_lines: int
    num_gaps: int
    reasons: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Compared:
    """The models in the cache after the trace, next to the same models outside it.

    Attributes:
        num_equal: Tensors equal bit for bit, of `num_tensors`.
        num_right: Digits recognized, of `num_digits` that the network has not seen.
    """

    num_equal: int
    num_tensors: int
    num_right: int
    num_digits: int


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """What was still there after the cache closed: names of threads and files, bytes on the device."""

    threads: tuple[str, ...]
    files: tuple[str, ...]
    device_bytes: int


@dataclass(frozen=True, slots=True)
class CacheRun:
    """A run with a cache and what was found of the cache."""

    outcome: Outcome
    told: Told
    compared: Compared
    left: LeftBehind


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes of VRAM and RAM the cache may hold."""

    vram_bytes: int
    ram_bytes: int


@dataclass(frozen=True, slots=True)
class Title:
    """What everything the demo shows is about.

    Attributes:
        weights: Which weights these are.
        device: Where they run.
        is_real: The weights are the official ones, verified.
    """

    weights: str
    device: str
    is_real: bool

    @property
    def mark(self) -> str:
        """What every heading ends with, so that nobody takes generated weights for real ones."""
        return "" if self.is_real else " (synthetic weights)"

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"modelcache demo: {self.weights}; {self.device}"
