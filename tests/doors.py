"""The smallest real cache that a handle can come from: one model, one gate, real leases, no moves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

from modelcache.errors import LeaseTimeoutError
from modelcache.handle import ModelHandle
from modelcache.lease import FIRST_USE_S, FirstUseLease, FirstUses, Lease, current_holder
from modelcache.runtime.gate import Gate


class OneModel:
    """Holds `model`; calls run on `device`; a full or closed gate refuses at once, because nobody would open it."""

    def __init__(self, model: Any, device: Any = None, *, limit: int = 0) -> None:
        self.model, self.device = model, device
        self.gate = Gate()
        self.gate.open_()
        self.gate.limit = limit
        self.ticks = itertools.count(1)
        self.now_s = 0.0
        self.alarms: list[Callable[[], None]] = []
        self.first_uses = FirstUses(lambda: self.now_s, lambda _in_s, ring: self.alarms.append(ring), None)
        self.num_acquired = 0
        self.ready = True

    def acquire(self, name: str, *, early: bool = False) -> Lease:
        tick = next(self.ticks)
        lease = Lease(name, self.gate, tick, None, self.model)
        if not self.gate.enter(tick, current_holder()):
            raise LeaseTimeoutError(name, 0.0, "a lease to be returned")
        self.num_acquired += 1
        return lease

    def settle(self, name: str) -> None:
        pass

    def call(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def object_of(self, name: str) -> object:
        return self.model

    def has_weights(self, name: str, model: object) -> bool:
        return True

    def execution_device(self, name: str) -> object:
        return self.device

    def state_of(self, name: str) -> str:
        return "vram 22.1 GiB"

    def is_ready(self, name: str) -> bool:
        return self.ready

    def first_use(self, name: str) -> FirstUseLease:
        tick = next(self.ticks)
        lease = FirstUseLease(name, self.gate, tick, None, self.model)
        assert self.gate.enter(tick, None)
        self.first_uses.limit(lease)
        return lease

    def end_first_uses(self) -> None:
        """The time of every first use is up."""
        self.now_s += FIRST_USE_S
        for ring in tuple(self.alarms):
            ring()

    @property
    def num_leases(self) -> int:
        return self.gate.num_leases


def handle_of(model: Any, device: Any = None, *, name: str = "flux", limit: int = 0) -> tuple[Any, OneModel]:
    """A handle on `model` (typed loosely: it stands for whatever it wraps), and the door behind it."""
    door = OneModel(model, device, limit=limit)
    return ModelHandle(name, door), door
